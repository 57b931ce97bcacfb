"""A patched ViT-B/32's image tower beside the frozen stock one on a CPU: training step and inference.

    python -m bench.cpu --json bench/results/cpu.json [--doc docs/performance.md]

Stock runs as OpenCLIP runs it, `nn.MultiheadAttention`'s own inference path included. They take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.markdown import table, write_block
from bench.records import environment
from bench.timing import compare

MODEL = "ViT-B-32"
TARGETS = {"training": 1.10, "inference": 1.02}


def models() -> dict[str, Any]:
    """The stock tower, frozen, and the patched one with deltas that are not zero."""
    import open_clip

    import fastheads

    torch.manual_seed(0)
    stock = open_clip.create_model(MODEL).requires_grad_(False)
    patched = copy.deepcopy(stock)
    fastheads.patch(patched)
    for parameter in fastheads.lora_parameters(patched):
        torch.nn.init.normal_(parameter, std=0.02)
    return {"stock": stock, "fastheads": patched}


def runs(found: dict[str, Any], batch: int, kind: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Per model: a forward pass, and where it trains a backward pass to the images."""
    training = kind == "training"
    images = torch.randn(batch, 3, 224, 224, requires_grad=training)

    def run(model: Any) -> Callable[[], Any]:
        def step() -> None:
            with torch.set_grad_enabled(training), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                features = model.encode_image(images)
            if training:
                features.float().square().mean().backward()

        return step

    for model in found.values():
        model.train(training)
    return {name: run(model) for name, model in found.items()}


def measure(batches: Sequence[int], rounds: int, with_bf16: bool) -> list[dict[str, Any]]:
    found, rows = models(), []
    for dtype in (torch.float32, torch.bfloat16) if with_bf16 else (torch.float32,):
        for kind in TARGETS:
            for batch in batches:
                times = compare(runs(found, batch, kind, dtype), "cpu", rounds=rounds)
                ratio = times["fastheads"]["median"] / times["stock"]["median"]
                name = str(dtype).removeprefix("torch.")
                rows.append({"kind": kind, "dtype": name, "batch": batch, "ratio": ratio, "seconds": times})
                print(f"{kind}, {name}, batch {batch}: {ratio:.3f} × stock", flush=True)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    header = ("what", "dtype", "batch", "stock ms", "fastheads ms", "fastheads / stock", "target")
    cells = [
        (
            row["kind"],
            row["dtype"] + ("" if row["dtype"] == "float32" else " autocast"),
            row["batch"],
            *(f"{row['seconds'][name]['median'] * 1e3:,.0f}" for name in ("stock", "fastheads")),
            f"{row['ratio']:.2f}",
            f"≤ {TARGETS[row['kind']]:.2f}",
        )
        for row in rows
    ]
    return table(header, cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="fills the table in this document")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing, read a result")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-bf16", action="store_true", help="on CPUs without bfloat16 it is slow")
    args = parser.parse_args(argv)
    if args.source:
        result = json.loads(args.source.read_text())
    else:
        where = environment("cpu")
        result = {"environment": where, "model": MODEL, "rows": measure(args.batch, args.rounds, not args.no_bf16)}
    print(report(result["rows"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.doc:
        write_block(args.doc, "cpu", report(result["rows"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
