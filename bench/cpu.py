"""Our CPU path beside every right way to compute the same in PyTorch, in turn: training and inference, small to large.

    python -m bench.cpu                     some ten minutes on two cores
    python -m bench.cpu --json bench/results/cpu.json --doc docs/performance.md

Training: an attention module of ViT-B/32 at both published ranks, its image tower and a tiny one, forward
and backward, against plain-PyTorch HA-LoRA, low-rank products in one autograd.Function, and merged weights. Inference:
the adapted tower against the stock one, which has OpenCLIP's own fast path, and the merged one.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.base.results import Row, by_case, environment, read, write
from bench.base.tables import table, write_block
from bench.base.timing import compare
from bench.base.towers import SETTINGS
from bench.contests.contenders.towers import AUTO, INFERENCE, training
from bench.contests.vision import VisionCase

GROUP = "on a CPU"
KINDS, BATCHES, TINY_BATCH = ("block", "model step", "inference"), (1, 8, 32), 8
STEP = {c.name: c for c in (AUTO, *map(training, ("stock", "plain", "factored", "merged")))}
INFER = {c.name: c for c in INFERENCE if c.name in ("patched", "merged", "stock", "plain")}
# Ours, and those it is held to: a stock tower trains nothing, and infers without an adapter.
OURS = {"block": (AUTO.name,), "model step": (AUTO.name,), "inference": ("patched", "merged")}
AGAINST = {
    "block": ("plain", "factored", "merged"),
    "model step": ("plain", "factored", "merged"),
    "inference": ("stock",),
}
MOST = 1.02  # times the fastest one's time
SECONDS, ROUNDS = 15.0, 41  # of a case's turns, and how many of them at most


def cases(batches: Sequence[int], precision: str) -> list[VisionCase]:
    shapes = (*((("tiny", TINY_BATCH),) if precision == "fp32" else ()), *(("B/32", batch) for batch in batches))
    found = []
    for kind, (key, batch) in itertools.product(KINDS, shapes):
        case = VisionCase(kind, key, batch, "cpu", precision, SETTINGS[key].ranks())
        if kind != "block":
            found.append(case)
        elif key != "tiny":
            found += [replace(case, ranks=(rank,)) for rank in (2, 8)]
    return found


def measured(case: VisionCase, seconds: float, repeat: int) -> list[Row]:
    """A row for each contender; ratio: of medians, to the fastest one that ours is held to."""
    runs = {name: c.tried(case).run for name, c in (INFER if case.kind == "inference" else STEP).items()}
    times = compare(runs, "cpu", rounds=ROUNDS, sample_seconds=0, seconds=seconds)
    fastest = min(AGAINST[case.kind], key=lambda name: times[name]["median"])
    of: dict[str, Any] = {"baseline": fastest, "extra": case.extra() | {"kind": case.kind, "repeat": repeat}}
    ratios = {name: took["median"] / times[fastest]["median"] for name, took in times.items()}
    print(f"{case.kind}, {case.name}: {', '.join(f'{n} {r:.3f}' for n, r in ratios.items())}", flush=True)
    what = f"{case.kind}: {case.name}"
    return [Row(GROUP, what, name, seconds=took, ratio=ratios[name], **of) for name, took in times.items()]


def report(rows: Sequence[Row]) -> str:
    """Times are medians of the first round of turns, ratios those of each."""
    cells = []
    for (_, case), own in by_case(rows).items():
        first = {r.contender: r for r in own if r.extra and not r.extra["repeat"]}
        kind, fastest = case.split(":")[0], next(iter(first.values())).baseline
        for name in OURS[kind]:
            ratios = " ".join(f"{r.ratio:.2f}" for r in own if r.contender == name)
            times = (first["stock"], first[fastest], first[name])
            adapter = f"{case}, merged" if kind == "inference" and name == "merged" else case
            cells.append([adapter, *(f"{r.median * 1e3:,.1f}" for r in times), fastest, ratios])
    return table(("", "stock ms", "fastest ms", "ours ms", "fastest", f"ours / fastest (≤ {MOST})"), cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="fills the table in this document")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing, read a result")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), metavar="N")
    parser.add_argument("--bf16-batch", type=int, nargs="*", default=[1], metavar="N", help="under bfloat16 autocast")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each case's turns")
    parser.add_argument("--repeat", type=int, default=3, help="how often all of it is measured")
    given = parser.parse_args(argv)
    if given.source:
        where, rows = read(given.source)
    else:
        where, rows = environment("cpu"), []
        chosen = [*cases(given.batch, "fp32"), *cases(given.bf16_batch, "amp")]
        for repeat, case in itertools.product(range(given.repeat), [c for c in chosen if c.kind in given.kind]):
            rows += measured(case, given.seconds, repeat)
    print(report(rows))
    if given.json:
        write(given.json, where, rows)
    if given.doc:
        write_block(given.doc, "cpu", report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
