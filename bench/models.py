"""Which models `patch` takes, and who computes their layers: every configuration of OpenCLIP, timm's transformers.

    python -m bench.models --doc docs/models.md            a minute or two, no weights, no network

Towers are built on the meta device, so the largest takes no memory. What stands in a row is what `explain` says of that
tower with the published adapter (`HeadConfig.hap`), for a GPU.
"""

import argparse
import contextlib
import io
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_text_tower, _build_vision_tower

import fastheads
from bench.base.tables import table, write_block
from fastheads import HeadConfig, ops

TIMM = ("vision_transformer", "deit", "eva", "vitamin", "vision_transformer_relpos", "beit")  # timm's modules
FUSED, REFERENCE, REFUSED, DOWNLOAD = "fused", "reference", "refused", "needs a download to be built"


@dataclass(frozen=True)
class Answer:
    """What patch says of a tower. why: of "reference" and "refused"; parameters: of the published adapter."""

    kind: str
    why: str = ""
    heads: str = ""
    parameters: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}" if self.why else self.kind


def answer(build: Callable[[], torch.nn.Module], tower: str) -> Answer:
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
        for gate in ("softmax", None):
            try:
                return _explained(model, tower, gate)
            except TypeError as error:
                why = str(error).removeprefix("model: ")
                if "gate=None" not in why:
                    break
    return Answer(REFUSED, re.split(r"; takes|, which", why)[0])


def _explained(model: torch.nn.Module, tower: str, gate: str | None) -> Answer:
    report = fastheads.explain(model, HeadConfig(rank=2, towers=(tower,), gate=gate))
    report = fastheads.explain(model, replace(HeadConfig.hap(len(report.layers)), towers=(tower,), gate=gate))
    shapes = Counter((layer.num_heads, layer.head_dim) for layer in report.layers)
    heads = ", ".join(f"{n} × {h} × {d}" for (h, d), n in shapes.items())
    whys = list(dict.fromkeys(why for layer in report.layers for why in _not_fused(layer)))
    whys += ["gates would not fold, so gate=None"] * (gate is None)
    kind = REFERENCE if any(_not_fused(layer) for layer in report.layers) else FUSED
    return Answer(kind, "; ".join(whys), heads, report.lora_parameters + report.gate_parameters)


def _not_fused(layer: Any) -> list[str]:
    """Why no kernel computes a layer in bfloat16 on a GPU."""
    extras = tuple(
        why.removeprefix("does not cover ") for why in layer.choice.refused["cpu"] if why.startswith("does not cover ")
    )
    options: dict[str, Any] = {"dtype": torch.bfloat16, "stored": torch.float32, "rank": layer.rank, "extras": extras}
    problem = ops.Problem(device="cuda", num_heads=layer.num_heads, head_dim=layer.head_dim, **options)
    choice = ops.choose("auto", problem)
    return list(extras) or choice.refused["delta"] if choice.falls_back else []


def open_clip_row(name: str) -> list[str]:
    config = open_clip.get_model_config(name)
    size, quick = config["embed_dim"], config.get("quick_gelu", False)
    image = answer(lambda: _build_vision_tower(size, dict(config["vision_cfg"]), quick), "visual")
    text = Answer(DOWNLOAD)
    if "hf_model_name" not in config["text_cfg"]:
        text = answer(lambda: _build_text_tower(size, dict(config["text_cfg"]), quick), "text")
    return [name, image.heads, str(image), _count(image), text.heads, str(text)]


def timm_row(name: str) -> list[str]:
    found = answer(lambda: timm.create_model(name), "visual")
    return [name, found.heads, str(found), _count(found)]


def _count(found: Answer) -> str:
    return "" if found.parameters is None else f"{found.parameters:,}"


HEADERS = {
    "open_clip": [
        "model",
        "layers × heads × size",
        "image tower",
        "parameters of the adapter",
        "text tower's",
        "text tower",
    ],
    "timm": ["model", "layers × heads × size", "", "parameters of the adapter"],
}


def names() -> dict[str, list[str]]:
    """The models of each table."""
    return {"open_clip": open_clip.list_models(), "timm": [n for m in TIMM for n in timm.list_models(module=m)]}


ROW = {"open_clip": open_clip_row, "timm": timm_row}


def summary(rows: Sequence[Sequence[str]]) -> str:
    kinds = Counter(row[2].split(":")[0] for row in rows)
    return f"{len(rows)}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--doc", type=Path, metavar="FILE", help="fills the tables in this document")
    given = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    for name, models in names().items():
        found = [ROW[name](model) for model in models]
        print(f"{name}, {summary(found)}", flush=True)
        if given.doc:
            version = open_clip.__version__ if name == "open_clip" else timm.__version__
            text = f"{name} {version}, {summary(found)}\n\n{table(HEADERS[name], found)}"
            write_block(given.doc, name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
