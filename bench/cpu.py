"""A patched ViT-B/32's image tower beside the frozen stock one on a CPU: training step and inference.

Stock runs as OpenCLIP runs it, `nn.MultiheadAttention`'s own inference path included; a training step goes back to the
images. They take turns. Some five minutes on one core without bfloat16 instructions, where bfloat16 is slow.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.base.results import Row, by_case, environment, read, write
from bench.base.tables import table, write_block
from bench.base.timing import compare
from bench.base.towers import SETTINGS
from bench.contests.contenders.towers import AUTO, INFERENCE, training
from bench.contests.vision import VisionCase

GROUP, SETTING, RANKS = "tower on a CPU", "B/32", SETTINGS["B/32"].ranks()
STOCK, PATCHED, *_ = INFERENCE
# what: kind of the case, stock, ours, and how many times stock's time ours may take
KINDS = {"training": ("model step", training("stock"), AUTO, 1.10), "inference": ("inference", STOCK, PATCHED, 1.02)}
SECONDS, MOST = 40.0, 41  # of a case's turns, and how many of them at most


def measure(batches: Sequence[int], bf16_batches: Sequence[int], seconds: float) -> list[Row]:
    rows = []
    for precision, dtype, sizes in (("fp32", "float32", batches), ("amp", "bfloat16 autocast", bf16_batches)):
        for what, batch in itertools.product(KINDS, sizes):
            kind, stock, ours, _ = KINDS[what]
            case = VisionCase(kind, SETTING, batch, "cpu", precision, RANKS, to_images=kind == "model step")
            runs = {"stock": stock.tried(case).run, "fastheads": ours.tried(case).run}
            times = compare(runs, "cpu", rounds=MOST, sample_seconds=0, seconds=seconds)
            name, extra = f"{what}, {dtype}, batch {batch}", {"what": what, "dtype": dtype, **case.extra()}
            for contender, took in times.items():
                ratio = took["median"] / times["stock"]["median"]
                rows.append(Row(GROUP, name, contender, seconds=took, baseline="stock", ratio=ratio, extra=extra))
            print(f"{name}: {rows[-1].ratio:.3f} × stock", flush=True)
    return rows


def report(rows: Sequence[Row]) -> str:
    cells = []
    for stock, ours in by_case(rows).values():
        ms = [f"{r.median * 1e3:,.0f}" for r in (stock, ours)]
        what, *problem = (ours.extra[name] for name in ("what", "dtype", "batch"))
        cells.append([what, *problem, *ms, f"{ours.ratio:.2f}", f"≤ {KINDS[what][3]:.2f}"])
    return table(("what", "dtype", "batch", "stock ms", "fastheads ms", "fastheads / stock", "target"), cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="fills the table in this document")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing, read a result")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--bf16-batch", type=int, nargs="*", default=[1], metavar="N", help="under bfloat16 autocast")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each case's turns")
    given = parser.parse_args(argv)
    asked = given.batch, given.bf16_batch, given.seconds
    where, rows = read(given.source) if given.source else (environment("cpu"), measure(*asked))
    print(report(rows))
    if given.json:
        write(given.json, where, rows)
    if given.doc:
        write_block(given.doc, "cpu", report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
