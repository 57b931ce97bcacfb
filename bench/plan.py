"""What fits: the largest batch of a training step on each GPU, and what a layer keeps beside plain PyTorch's.

    python -m bench.plan --json bench/results/plan.json --doc docs/performance.md     some minutes, no GPU

Counted by `fastheads.plan` and its ledger, on tensors without values; nothing here was measured.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fastheads
from bench.base.results import write_json
from bench.base.tables import put, table
from bench.base.towers import SETTINGS
from bench.contests import attentions
from bench.contests.models import blocks_of, clip
from fastheads.ledger import count
from fastheads.train.models import build
from fastheads.train.planning import CONTEXT, GPUS, NOT_MEASURED, Step

MODELS = ("ViT-B-16", "ViT-L-14", "ViT-H-14")
PRECISIONS = ("amp-bf16", "bf16")
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "norms": {"recompute": "norms"},
    "recompute": {"recompute": True},
    "checkpointing": {"checkpointing": True},
}
LAYERS = ("plain", "factored", "merged", "stacked", "delta", "one_pass", "reference", "cpu")
LAYERS += ("stacked, norms", "delta, norms", "stacked, recompute")
# Of the blocks around the layers too; see docs/memory.md.
BLOCKS = ("stacked, recompute 2", "stacked, operator saved", "stacked, checkpointing", "stacked, offloaded")
AT = 256  # images in a batch, where layers are counted
RANK = 2


def largest(name: str, precision: str, way: str) -> dict[str, Any]:
    """One row: bytes of the model, of each image, and the largest batch by GPU."""
    step = Step(build(name), precision=precision, **WAYS[way])
    found = {"model": name, "precision": precision, "impl": step.impl, "way": way}
    found["model_bytes"] = sum(step.model_bytes.values())
    found["image_bytes"] = (step.total(2 * AT) - step.total(AT)) // AT
    return {**found, "largest": {gpu: step.largest(room - CONTEXT) for gpu, room in GPUS.items()}}


def saving_the_operator(model: Any) -> None:
    """Blocks are computed again, all but their head attention, whose outputs are saved."""
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.fastheads.head_attention.default])
    blocks = blocks_of(model)
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block, context_fn=contexts)


def kept(path: str, precision: str) -> dict[str, Any]:
    """Of ViT-B/16 at rank 2: bytes that a layer keeps from its LayerNorm's input to the residual, with that input and
    without, and a whole block; the difference between towers of four layers and of two."""
    four, two = (_saved(path, precision, layers) for layers in (4, 2))
    each = {part: (four[part] - two.get(part, 0)) // 2 for part in four}
    setting = SETTINGS["B/16"].shape(AT)
    # LayerNorm's input: by a GPU's autocast kept as float32, else the residual stream, of which the MLP keeps as much.
    given = 2 * setting.row if precision == "amp-bf16" and path != "cpu" else setting.row
    layer = each.get("attention", 0) + each.get("residual stream", 0) // 2
    own = {} if path in BLOCKS else {"layer": layer, "own": layer - given}
    return {"path": path, "precision": precision, **own, "block": sum(each.values())}


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
        impl, _, way = path.partition(", ")
        if path in peers:
            attentions.modules(peers[path])(model, ranks)
        else:
            fastheads.patch(
                model,
                fastheads.HeadConfig(rank=ranks),
                impl=impl,
                recompute={"norms": "norms", "recompute": 1, "recompute 2": 2}.get(way, 0),
            )
    if way == "checkpointing":
        model.visual.set_grad_checkpointing()
    elif way == "operator saved":
        saving_the_operator(model)

    def loss(images: torch.Tensor) -> torch.Tensor:
        with save_on_cpu() if way == "offloaded" else nullcontext():
            return model.visual(images).float().sum()

    return count(
        model,
        images,
        loss,
        mode=mode,
        device=device,
        autocast=torch.bfloat16 if amp else None,
    ).saved


def fits_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["model", "precision", "form", "computed again", "model MB", "MB per image", *GPUS]
    cells = []
    for row in rows:
        sizes = [f"{row['model_bytes'] / 1e6:,.0f}", f"{row['image_bytes'] / 1e6:.1f}"]
        about = [row["model"], row["precision"], row["impl"], row["way"]]
        cells.append([*about, *sizes, *(f"{row['largest'][gpu]:,}" for gpu in GPUS)])
    return f"{table(header, cells)}\n\n{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."


def kept_table(rows: Sequence[Mapping[str, Any]]) -> str:
    plain = {row["precision"]: row for row in rows if row["path"] == "plain"}
    unit = SETTINGS["B/16"].shape(AT).row
    cells = []
    for row in rows:
        own, beside = [f"{row['layer'] / unit:.2f}" if "layer" in row else ""], plain[row["precision"]]
        own += [f"{row[what] / beside[what]:.3f}" if what in row else "" for what in ("layer", "own", "block")]
        cells.append([row["precision"], row["path"], *own])
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
        "kept": [kept(path, precision) for precision in PRECISIONS for path in LAYERS + BLOCKS],
        "fits": [largest(name, precision, way) for name in MODELS for precision in PRECISIONS for way in WAYS],
    }
    put(blocks(content), given.doc)
    if given.json:
        write_json(given.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
