"""A patched ViT-B/32's image tower beside the frozen stock one on a CPU: training step and inference.

    python -m bench.cpu --json bench/results/cpu.json [--doc docs/performance.md]

Stock runs as OpenCLIP runs it, `nn.MultiheadAttention`'s own inference path included. They take turns, and the ratio is
the median of the turns' own. Some five minutes on one core without bfloat16 instructions, where bfloat16 is slow.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.base.results import environment
from bench.base.tables import table, write_block

MODEL = "ViT-B-32"
TARGETS = {"training": 1.10, "inference": 1.02}
SECONDS, LEAST, MOST = 40.0, 5, 41  # of a row's turns, and how many of them


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


def turns(run: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call: as many turns as fit into `seconds`, the order changing from turn to turn."""

    def timed(step: Callable[[], Any]) -> float:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    for step in run.values():
        step()
    rounds = int(seconds / sum(timed(step) for step in run.values()))
    found: dict[str, list[float]] = {name: [] for name in run}
    for i in range(max(LEAST, min(MOST, rounds))):
        for name in list(run)[:: 1 if i % 2 else -1]:
            found[name].append(timed(run[name]))
    return found


def summary(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median": median, "low": low, "high": high, "min": min(samples), "samples": len(samples)}


def measure(batches: Sequence[int], bf16_batches: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    found, rows = models(), []
    for dtype, sizes in ((torch.float32, batches), (torch.bfloat16, bf16_batches)):
        for kind in TARGETS:
            for batch in sizes:
                times = turns(runs(found, batch, kind, dtype), seconds)
                ratios = [own / stock for own, stock in zip(times["fastheads"], times["stock"], strict=True)]
                row = {"kind": kind, "dtype": str(dtype).removeprefix("torch."), "batch": batch}
                each = {name: summary(samples) for name, samples in times.items()}
                rows.append({**row, "ratio": statistics.median(ratios), "ratios": summary(ratios), "seconds": each})
                print(f"{kind}, {row['dtype']}, batch {batch}: {rows[-1]['ratio']:.3f} × stock", flush=True)
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
    parser.add_argument("--bf16-batch", type=int, nargs="*", default=[1], metavar="N", help="under bfloat16 autocast")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each row's turns")
    args = parser.parse_args(argv)
    if args.source:
        result = json.loads(args.source.read_text())
    else:
        where, rows = environment("cpu"), measure(args.batch, args.bf16_batch, args.seconds)
        result = {"environment": where, "model": MODEL, "rows": rows}
    print(report(result["rows"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.doc:
        write_block(args.doc, "cpu", report(result["rows"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
