"""Which models `patch` takes, and who computes their layers: every configuration of OpenCLIP, timm's transformers,
Hugging Face's CLIP, SigLIP and text encoders in the sizes that are published.

    python -m bench.models --doc docs/models.md            a minute or two, no weights, no network

Hugging Face's are built where `transformers` is installed; elsewhere their table stays as it is.

Towers are built on the meta device, so the largest takes no memory. What stands in a row is what `explain` says of that
tower with the published adapter (`HeadConfig.hap`), for a GPU.
"""

import argparse
import contextlib
import importlib.util
import io
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import _build_text_tower, _build_vision_tower

import fastheads
from bench.base.tables import table, write_block
from fastheads import HeadConfig, ops

TIMM = ("vision_transformer", "deit", "eva", "vitamin", "vision_transformer_relpos", "beit")  # timm's modules
# Hugging Face's: the kind of model, and (width, layers, heads) of its image and its text tower, as its config.json has
# them; None for a tower that it lacks.
_B, _L, _H, _SO = (768, 12, 12), (1024, 24, 16), (1280, 32, 16), (1152, 27, 16)
_SIGLIP = {"base-patch16-224": _B, "large-patch16-256": _L, "so400m-patch14-384": _SO}
HUGGINGFACE: dict[str, tuple[str, tuple[int, ...] | None, tuple[int, ...]]] = {
    "openai/clip-vit-base-patch32": ("clip", _B, (512, 12, 8)),
    "openai/clip-vit-base-patch16": ("clip", _B, (512, 12, 8)),
    "openai/clip-vit-large-patch14": ("clip", _L, _B),
    "openai/clip-vit-large-patch14-336": ("clip", _L, _B),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("clip", _H, _L),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ("clip", (1664, 48, 16), (1280, 32, 20)),
    **{f"google/{kind}-{name}": ("siglip", of, of) for kind in ("siglip", "siglip2") for name, of in _SIGLIP.items()},
    "google/siglip2-giant-opt-patch16-256": ("siglip", (1536, 40, 16), _SO),
    "google/siglip2-base-patch16-naflex": ("siglip2", _B, _B),
    "google/siglip2-so400m-patch16-naflex": ("siglip2", _SO, _SO),
    "google-bert/bert-base-uncased": ("bert", None, _B),
    "FacebookAI/roberta-base": ("roberta", None, _B),
    "FacebookAI/xlm-roberta-base": ("xlm-roberta", None, _B),
    "FacebookAI/xlm-roberta-large": ("xlm-roberta", None, _L),
    "facebook/nllb-200-distilled-600M": ("m2m_100", None, (1024, 12, 16)),
    "google/mt5-base": ("mt5", None, _B),
    "google/mt5-xl": ("mt5", None, (2048, 24, 32)),
}
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


def huggingface_row(name: str) -> list[str]:
    kind, image, text = HUGGINGFACE[name]
    found = answer(lambda: _huggingface(kind, image, text), "visual") if image else Answer("")
    words = answer(lambda: _huggingface(kind, image, text), "text")
    return [name, found.heads, str(found), _count(found), words.heads, str(words)]


def _huggingface(kind: str, image: Sequence[int] | None, text: Sequence[int]) -> torch.nn.Module:
    """A whole model, or a text encoder in OpenCLIP's `HFTextEncoder`."""
    import transformers

    make = transformers.AutoConfig.for_model
    if image:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        towers = {
            f"{tower}_config": dict(zip(names, sizes, strict=True))
            for tower, sizes in (("vision", image), ("text", text))
        }
        model: torch.nn.Module = transformers.AutoModel.from_config(make(kind, **towers))
        return model
    names = {
        "m2m_100": ("d_model", "encoder_layers", "encoder_attention_heads"),
        "mt5": ("d_model", "num_layers", "num_heads"),
    }.get(kind, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    encoder = HFTextEncoder("", text[0], make(kind, **dict(zip(names, text, strict=True))), "mean_pooler", "linear")
    if encoder.config.is_encoder_decoder:
        encoder.transformer = encoder.transformer.encoder
    return encoder


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
HEADERS["huggingface"] = HEADERS["open_clip"]


def names() -> dict[str, list[str]]:
    """The models of each table."""
    of_timm = [name for module in TIMM for name in timm.list_models(module=module)]
    return {"open_clip": open_clip.list_models(), "timm": of_timm, "huggingface": list(HUGGINGFACE)}


ROW = {"open_clip": open_clip_row, "timm": timm_row, "huggingface": huggingface_row}
# What stands above each table: the library, and the package of its version.
LIBRARIES = {"open_clip": "open_clip_torch", "timm": "timm", "huggingface": "transformers"}


def summary(rows: Sequence[Sequence[str]]) -> str:
    kinds = Counter((row[2] or row[-1]).split(":")[0] for row in rows)
    return f"{len(rows)}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--doc", type=Path, metavar="FILE", help="fills the tables in this document")
    given = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    for name, models in names().items():
        if importlib.util.find_spec(LIBRARIES[name].removesuffix("_torch")) is None:
            print(f"{name}: {LIBRARIES[name]} is not installed, its table stays as it is")
            continue
        found = [ROW[name](model) for model in models]
        print(f"{name}, {summary(found)}", flush=True)
        if given.doc:
            library = LIBRARIES[name]
            title = f"{library.removesuffix('_torch')} {version(library)}, {summary(found)}"
            text = f"{title}\n\n{table(HEADERS[name], found)}"
            write_block(given.doc, name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
