"""The MMD's sweep by Triton at size: what its panels move and compute, as square or triangle, and the memory it takes.

A product in float32 is three in TF32, whose rate is half that of 16 bits; `Pass.attention` counts operations of those.
Exponentials are those of DomainBed's seven bandwidths.
"""

from dataclasses import dataclass

from bench.base.tables import table
from bench.roofline.chips import Chip
from bench.roofline.costs import seconds
from bench.roofline.passes import Pass
from fastheads.kernels.mmd import pull_span
from fastheads.kernels.tiles import cdiv, mmd_pull_tiles, mmd_tiles
from fastheads.ops.mmd_panels import panels
from fastheads.ops.mmd_triton import BLOCK, room_for
from fastheads.reference import PRESETS

POWERS = PRESETS["domainbed"].powers
TF32X3 = 2 * 3  # 16-bit operations in whose time one of float32 is done


@dataclass(frozen=True)
class Problem:
    """rows: of this rank, against the samples of all; 0: of all. triangle: pairs on and above the diagonal alone, whose
    weights serve both sides."""

    samples: int
    width: int
    itemsize: int = 4
    rows: int = 0
    triangle: bool = True

    @property
    def cuts(self) -> list[tuple[int, int]]:
        room, rows = room_for(self.samples * self.width * self.itemsize), self.rows or self.samples
        return panels(1, rows, self.samples, room, BLOCK, self.triangle)[0]

    def columns(self, i: int) -> int:
        """Of the panel that begins with row i."""
        return self.samples - i * self.triangle


def passes(p: Problem, arch: int) -> list[Pass]:
    D, size, tile = p.width, p.itemsize, mmd_tiles(arch, "tf32x3", len(POWERS), 1)
    pull = mmd_pull_tiles()
    pairs = sum((e - i) * p.columns(i) for i, e in p.cuts)
    beyond = sum((e - i) * (p.samples - e) for i, e in p.cuts) * p.triangle  # right of the panels' own squares
    read = sum(p.columns(i) for i, _ in p.cuts) * D * size
    sums = sum(p.samples - e for _, e in p.cuts) * D * 8 * p.triangle

    def pulls(name: str, pairs: int, moved: float) -> Pass:
        l2 = pairs * D * (4 / pull["BD"] + size / pull["BM"])
        return Pass(name, 4 * pairs + moved, attention=2 * TF32X3 * pairs * D, l2=l2)

    made = [
        Pass("centre and norms", p.samples * D * (2 * size + 24)),
        Pass(
            "inner products, kernels, sums",
            4 * pairs + read,
            attention=2 * TF32X3 * pairs * D,
            exp=POWERS.count(0) * pairs,
            l2=pairs * D * size * (1 / tile["BM"] + 1 / tile["BN"]),
        ),
        pulls("what weights pull: rows", pairs, read),
    ]
    if beyond:
        made.append(pulls("what weights pull: columns", beyond, sums))
    if p.triangle and size == 2:
        made.append(Pass("float32 sums to 16 bits", 6 * p.samples * D))
    return made


def spans_of(p: Problem, i: int, e: int) -> int:
    """Elements of a panel's spans and their sum; of one there is no copy."""
    tile = mmd_pull_tiles()
    programs, columns = cdiv(e - i, tile["BM"]) * cdiv(p.width, tile["BD"]), p.columns(i)
    spans = cdiv(columns, pull_span(columns, programs, tile["BN"]))
    return (spans + 1) * (e - i) * p.width if spans > 1 else 0


def bytes_beyond(p: Problem) -> float:
    """The most that a step takes beyond features (all ranks' where they are gathered) and gradient."""
    panel = 4 * max((e - i) * p.columns(i) + spans_of(p, i, e) for i, e in p.cuts)
    gradient = (p.rows or p.samples) * p.width * p.itemsize
    sums = 4 * p.samples * p.width if p.triangle and p.itemsize == 2 and len(p.cuts) > 1 else gradient
    # a sweep, its sums beside the gradient, the gradient beside what a loss's scale makes of it
    return max(sums + panel, sums + gradient * (sums != gradient), 2 * gradient) - gradient


PROBLEMS = {
    f"{n:,} × 768, {'float32' if size == 4 else '16 bits'}, {'triangle' if triangle else 'square'}": Problem(
        n, 768, size, triangle=triangle
    )
    for n in (2048, 4096, 16384)
    for size in (4, 2)
    for triangle in (True, False)
}
PROBLEMS |= {
    f"65,536 × 768 over 8 ranks, {'float32' if size == 4 else '16 bits'}": Problem(65536, 768, size, 8192, False)
    for size in (4, 2)
}


def mmd_table(chips: list[Chip]) -> str:
    """Each problem's operations, memory and least time at the rates that good kernels reach (at the peaks)."""
    rows = []
    for name, p in PROBLEMS.items():
        counted = passes(p, chips[0].arch)
        features = p.samples * p.width * p.itemsize
        row = [name, len(p.cuts), f"{sum(c.attention for c in counted) / TF32X3 / 1e12:.3f}"]
        row += [f"{sum(c.exp for c in counted) / 1e9:.2f}", f"{sum(c.bytes for c in counted) / 1e9:.2f}"]
        row += [f"{features / 1e6:.0f}", f"{bytes_beyond(p) / 1e6:.0f} ({bytes_beyond(p) / features:.2f} ×)"]
        for chip in chips:
            own = passes(p, chip.arch)
            row.append(f"{1e3 * seconds(own, chip.reached):.2f} ({1e3 * seconds(own, chip.peak):.2f})")
        rows.append(row)
    header = ["problem, DomainBed's kernels", "panels", "TFLOP", "G exp", "GB moved", "MB of features"]
    return table([*header, "MB beyond them and their gradient", *(f"{c.name} ms (peak)" for c in chips)], rows)
