"""What fits: the largest batch of a training step on each GPU, and what a layer keeps beside plain PyTorch's.

    python -m bench.plan --json bench/results/plan.json --doc docs/performance.md     some minutes, no GPU

Counted by `fastheads.plan` and its ledger, on tensors without values; nothing here was measured.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastheads
from bench.base.results import write_json
from bench.base.tables import table, write_block
from bench.base.towers import SETTINGS
from bench.contests import attentions
from bench.contests.models import clip
from fastheads.ledger import count
from fastheads.train.planning import CONTEXT, GPUS, NOT_MEASURED, Step, build

MODELS = ("ViT-B-16", "ViT-L-14", "ViT-H-14")
PRECISIONS = ("amp-bf16", "bf16")
LAYERS = ("plain", "factored", "merged", "stacked", "delta", "one_pass", "stacked, recompute", "reference", "cpu")
AT = 256  # images in a batch, where layers are counted
RANK = 2


def largest(name: str, precision: str, recompute: bool) -> dict[str, Any]:
    """One row: bytes of the model, of each image, and the largest batch by GPU."""
    step = Step(build(name), precision=precision, recompute=recompute)
    found = {"model": name, "precision": precision, "impl": step.impl, "recompute": recompute}
    found["model_bytes"] = sum(step.model_bytes.values())
    found["image_bytes"] = (step.total(2 * AT) - step.total(AT)) // AT
    return {**found, "largest": {gpu: step.largest(room - CONTEXT) for gpu, room in GPUS.items()}}


def kept(path: str, precision: str) -> dict[str, Any]:
    """Of ViT-B/16 at rank 2: bytes that a layer keeps from its LayerNorm's input to the residual, with that input and
    without, and a whole block; the difference between towers of four layers and of two."""
    four, two = (_saved(path, precision, layers) for layers in (4, 2))
    each = {part: (four[part] - two.get(part, 0)) // 2 for part in four}
    setting = SETTINGS["B/16"].shape(AT)
    # LayerNorm's input: by a GPU's autocast kept as float32, else the residual stream, of which the MLP keeps as much.
    given = 2 * setting.row if precision == "amp-bf16" and path != "cpu" else setting.row
    layer = each["attention"] + each.get("residual stream", 0) // 2
    return {"path": path, "precision": precision, "layer": layer, "own": layer - given, "block": sum(each.values())}


def _saved(path: str, precision: str, layers: int) -> Mapping[str, int]:
    setting, amp, mode = SETTINGS["B/16"], precision == "amp-bf16", FakeTensorMode(allow_non_fake_inputs=True)
    dtype, ranks = torch.float32 if amp else torch.bfloat16, (RANK,) * layers
    device = "cpu" if path == "cpu" else "cuda"

    def images() -> tuple[torch.Tensor]:
        with mode:
            return (torch.empty(AT, 3, setting.image, setting.image, device=device, dtype=dtype),)

    with mode:
        model = clip(setting, layers, device, dtype)
        peers = {"plain": attentions.Plain, "factored": attentions.Factored, "merged": attentions.Merged}
        impl, _, again = path.partition(", ")
        if path in peers:
            attentions.modules(peers[path])(model, ranks)
        else:
            fastheads.patch(model, fastheads.HeadConfig(rank=ranks), impl=impl, recompute=bool(again))
    return count(
        model,
        images,
        lambda images: model.visual(images).float().sum(),
        mode=mode,
        device=device,
        autocast=torch.bfloat16 if amp else None,
    ).saved


def fits_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["model", "precision", "form", "recompute", "model MB", "MB per image", *GPUS]
    cells = []
    for row in rows:
        sizes = [f"{row['model_bytes'] / 1e6:,.0f}", f"{row['image_bytes'] / 1e6:.1f}"]
        about = [row["model"], row["precision"], row["impl"], "yes" if row["recompute"] else ""]
        cells.append([*about, *sizes, *(f"{row['largest'][gpu]:,}" for gpu in GPUS)])
    return f"{table(header, cells)}\n\n{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."


def kept_table(rows: Sequence[Mapping[str, Any]]) -> str:
    plain = {row["precision"]: row for row in rows if row["path"] == "plain"}
    unit = SETTINGS["B/16"].shape(AT).row
    cells = []
    for row in rows:
        shares = [f"{row[what] / plain[row['precision']][what]:.3f}" for what in ("layer", "own", "block")]
        cells.append([row["precision"], row["path"], f"{row['layer'] / unit:.2f}", *shares])
    return table(["precision", "path", "rows kept", "/ plain's", "without the input", "whole block"], cells)


def blocks(content: Mapping[str, Any]) -> dict[str, str]:
    """What the page has, by block."""
    return {"plan fits": fits_table(content["fits"]), "plan kept": kept_table(content["kept"])}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--doc", type=Path, help="put the tables into the blocks of this document")
    given = parser.parse_args(argv)
    content = {
        "kept": [kept(path, precision) for precision in PRECISIONS for path in LAYERS],
        "fits": [largest(name, p, again) for name in MODELS for p in PRECISIONS for again in (False, True)],
    }
    for block, text in blocks(content).items():
        print(f"\n{text}")
        if given.doc:
            write_block(given.doc, block, text)
    if given.json:
        write_json(given.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
