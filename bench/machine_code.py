"""How fast the attention kernels can multiply, by their machine code: what in their inner loops holds up an SM.

    python -m bench.machine_code                  a minute, no GPU
    python -m bench.machine_code --json bench/results/machine_code.json --doc docs/performance.md

An SM has four parts. An instruction of a warp keeps a unit of its part busy for some cycles: tensor cores, exponentials
(MUFU), float32, integers; or what all four share, shared memory. A turn of an inner loop takes no less than

    max(the busiest unit, its instructions one after the other, the sum over units / warps of a part)

for a warp by itself has nothing to overlap. Kernels reach REACHED of that: it is the one number here that was fitted,
to two published rates (PUBLISHED), and what it misses of each is said. Not seen: waves, loading what comes before a
loop, device memory (`bench.roofline` has its bytes).

Rates per SM and clock: CUDA C++ Programming Guide, arithmetic throughput, 8.0 and 9.0; 128 bytes of shared memory;
dense 16-bit products by the datasheets' peaks. mma.sync reaches 62.9 % of Hopper's peak (arXiv 2402.13499).
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.base.results import read_json, write_json
from bench.base.tables import table, write_block
from bench.compile_report.cases import LAUNCHERS, Case
from bench.compile_report.kernels import blocks_per_sm
from bench.compile_report.offline import CUOBJDUMP, compiling, described
from bench.roofline import loops
from bench.roofline.chips import CHIPS, Chip
from fastheads.kernels.tiles import Row

PARTS, SHARED_BYTES = 4, 128  # of an SM, and what its shared memory moves in a cycle
PRODUCTS = {80: 256, 90: 512}  # multiply-adds of 16 bits that a part's tensor cores do in a cycle
MMA_SYNC = {80: 1.0, 90: 0.629}  # of which without wgmma
FLOAT = {80: 2, 90: 1}  # cycles of a warp's float32 instruction
HALF_RATE, EXP = 2, 8  # cycles of an integer one, of MUFU
UNITS = ("tensor cores", "exponentials", "float32", "integers", "shared memory")
FLOATS = {"FADD", "FMUL", "FFMA"}
PRODUCT_PIPE = {"IMAD", "HFMA2", "HADD2", "HMUL2"}
# Neither of a unit above nor worth its cycles: they are issued.
OTHER = {
    "BRA",
    "BAR",
    "BSSY",
    "BSYNC",
    "NOP",
    "DEPBAR",
    "LDGDEPBAR",
    "WARPGROUP",
    "WARPSYNC",
    "MEMBAR",
    "FENCE",
    "CALL",
}
OTHER |= {
    "LDG",
    "STG",
    "LDC",
    "EXIT",
    "RET",
    "YIELD",
    "SYNCS",
    "R2UR",
    "VOTEU",
    "CS2R",
    "S2R",
    "ERRBAR",
    "CCTL",
    "ATOMG",
}

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
SHAPE = re.compile(r"HMMA\.16(8)(8|16)\b|HGMMA\.64x(\d+)x(\d+)")


class Loop(NamedTuple):
    """A turn of an inner loop, of one warp. cycles: of each of UNITS, of one part of the SM while all four do the same;
    alone: those of the warp if nobody else were there; multiplied: operations of products of the four parts."""

    instructions: int
    cycles: dict[str, float]
    alone: float
    multiplied: float


@dataclass(frozen=True)
class Pace:
    """A kernel's inner loops together. cycles: least ones of a turn, `busy` each unit's share of them (and "issue");
    warps: that a part chooses from; products: its tensor cores' share, which the kernel's rate is of the peak."""

    registers: int
    warps: float
    cycles: float
    busy: dict[str, float]
    products: float

    @property
    def limit(self) -> str:
        """What is busiest; where that is not all of the time, too few warps to overlap it."""
        unit = max(self.busy, key=lambda name: self.busy[name])
        return unit if self.busy[unit] > 0.99 else f"too few warps ({unit} {self.busy[unit]:.0%})"


def _shared_bytes(op: str) -> int:
    """Bytes that a warp's instruction moves to or from shared memory, registers of other threads included."""
    name = op.split(".")[0]
    if name in ("LDSM", "STSM"):
        return 128 * int(op[-1]) if op[-1] in "24" else 128
    if name in ("LDS", "STS", "LDGSTS", "ATOMS"):
        return 512 if ".128" in op else 256 if ".64" in op else 128
    return 128 if name == "SHFL" else 0


def loop_of(body: Sequence[tuple[str, str]], arch: int) -> Loop:
    """body: the instructions of a turn, (name, operands)."""
    cycles, alone, multiplied = dict.fromkeys(UNITS, 0.0), 0.0, 0.0

    def busy(unit: str, taken: float, by_itself: float | None = None) -> None:
        nonlocal alone
        cycles[unit] += taken
        alone += taken if by_itself is None else by_itself

    for op, operands in body:
        name = op.split(".")[0]
        if name == "HMMA" and (shape := SHAPE.match(op)):
            products = 16 * 8 * int(shape[2])
            rate = PRODUCTS[arch] * MMA_SYNC[arch] / (2 if "TF32" in op else 1)
            busy("tensor cores", products / rate)
            multiplied += 2 * products * PARTS
        elif name == "HGMMA" and (shape := SHAPE.match(op)):
            n, k = int(shape[3]), int(shape[4])
            busy("tensor cores", 64 * n * k / (PARTS * PRODUCTS[arch] / (2 if "TF32" in op else 1)))
            in_registers = re.match(r"\s*R\d+, R\d+", operands)  # the left operand; else it is shared too
            # read by the product as it goes, for all four warps at once
            cycles["shared memory"] += (n + (0 if in_registers else 64)) * k * 2 / SHARED_BYTES
            multiplied += 2 * 64 * n * k
        elif name == "MUFU":
            busy("exponentials", EXP)
        elif name in FLOATS:
            busy("float32", FLOAT[arch])
        elif name in PRODUCT_PIPE:
            busy("float32", HALF_RATE)
        elif moved := _shared_bytes(op):
            busy("shared memory", PARTS * moved / SHARED_BYTES, moved / SHARED_BYTES)
        elif name not in OTHER and not name.startswith("U"):
            busy("integers", HALF_RATE)
    return Loop(len(body), cycles, alone, multiplied)


def inner_loops(text: str, arch: int) -> list[Loop]:
    """Of a kernel as cuobjdump prints it: the loops without a loop inside that multiply on tensor cores."""
    code = [(int(at, 16), op, operands) for at, op, operands in INSTRUCTION.findall(text)]
    jumps = ((re.search(r"0x([0-9a-f]+)", operands), at) for at, op, operands in code if op.split(".")[0] == "BRA")
    spans = [(int(to[1], 16), at) for to, at in jumps if to and int(to[1], 16) < at]
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    found = [loop_of([(op, operands) for at, op, operands in code if a <= at <= b], arch) for a, b in inner]
    return [loop for loop in found if loop.multiplied]


def pace_of(found: Sequence[Loop], warps: float, registers: int) -> Pace:
    """Of the loops that multiply at least half as much as the largest, which are the sweeps' own and turn alike often;
    the others are their tails."""
    most = max(loop.multiplied for loop in found)
    own = [loop for loop in found if 2 * loop.multiplied >= most]
    turns = [max(*loop.cycles.values(), loop.instructions, loop.alone / warps) for loop in own]
    total = sum(turns)
    busy = {unit: sum(loop.cycles[unit] for loop in own) / total for unit in UNITS}
    busy["issue"] = sum(loop.instructions for loop in own) / total
    return Pace(registers, warps, total, busy, busy["tensor cores"])


def _paced(kernel: Any, arch: int, compiled: Any) -> Pace:
    made = described(kernel, arch, compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    blocks = blocks_per_sm(arch, made.registers, made.shared, made.num_warps)
    return pace_of(inner_loops(text, arch), blocks * made.num_warps / PARTS, made.registers)


def paces(case: Case, arch: int) -> list[Pace]:
    """Of each kernel that the case launches."""
    with compiling(arch, _paced) as found:
        LAUNCHERS[case.launcher](case, *([LONG_ROW] if case == LONG else []))
    return found


# Operations per second of a flash attention's forward pass in Triton, head size 64, 4,096 tokens, not causal: Triton's
# own tutorial as its documentation ran it, by its numbers on an A100; the same on an H100 in FlashAttention-3's paper
# (arXiv 2407.08608, figure 5). Our kernel that streams its keys is that algorithm, with a row that the tutorial tries.
PUBLISHED = {"A100": 160.6e12, "H100": 400e12}
LONG = Case("attention_fwd", 64, 4096, gate=False, pool=None)
LONG_ROW = Row(128, 64, stages=3)
REACHED = 0.69


def rate(pace: Sequence[Pace], chip: Chip) -> float:
    """Operations per second of kernels that take turns, by this model."""
    return REACHED * chip.peak.attention * len(pace) / sum(1 / p.products for p in pace)


CASES = [
    *(Case(launcher, 64, n) for launcher in ("attention_fwd", "attention_bwd") for n in (50, 197, 257, 577)),
    *(Case(launcher, 64, n, rank=8) for launcher in ("attention_fwd", "attention_bwd") for n in (197,)),
    *(Case(launcher, 64, 77, causal=True) for launcher in ("attention_fwd", "attention_bwd")),
    *(Case(launcher, 80, 257) for launcher in ("attention_fwd", "attention_bwd")),
]


def _work(case: Case, arch: int) -> float:
    """Operations of the case's products, padding included."""
    parts, heads = (case.parts, case.rank) if case.rank else ((), 0), case.batch * case.heads
    if case.launcher == "attention_fwd":
        return heads * loops.attention_fwd(arch, case.head_dim, case.length, *parts).products
    return heads * loops.attention_bwd(arch, case.head_dim, case.length, heads, *parts).products


def measure(cases: Sequence[Case], chips: Sequence[Chip], tell: Callable[[str], Any] = print) -> list[dict[str, Any]]:
    """A row for each case and chip; milliseconds by this model and at the rate that `chips` takes as reached."""
    rows = []
    for case in cases:
        for chip in chips:
            found = paces(case, chip.arch)
            reached, work = rate(found, chip), _work(case, chip.arch)
            row = {"case": case.title(), "chip": chip.name, "paces": [asdict(p) for p in found], "rate": reached}
            rows.append(row | {"ms": 1e3 * work / reached, "assumed ms": 1e3 * work / chip.reached.attention})
            tell(f"{case.title()}, {chip.name}: {reached / 1e12:.0f} TFLOP/s, {found[0].limit}")
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        for pace in (Pace(**p) for p in row["paces"]):
            shares = [f"{pace.busy[unit]:.0%}" for unit in (*UNITS, "issue")]
            own = [f"{row['rate'] / 1e12:.0f}", f"{row['ms']:.3f}", f"{row['assumed ms']:.3f}"]
            cells.append([row["case"], row["chip"], f"{pace.warps:g}", *shares, pace.limit, *own])
    units = ["tensor", "exp", "float32", "integers", "shared", "issue"]
    return table(["kernel", "chip", "warps", *units, "limit", "TFLOP/s", "ms", "ms at the roofline's rate"], cells)


def held(rows: Sequence[dict[str, Any]]) -> str:
    """What the model says of kernels whose rate is known."""
    lines = []
    for row in (r for r in rows if r["case"] == LONG.title()):
        known = PUBLISHED[row["chip"]]
        off = f"{row['rate'] / known - 1:+.0%}"
        lines.append(f"- {row['chip']}: {row['rate'] / 1e12:.0f} TFLOP/s, published {known / 1e12:.0f} ({off})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="fills the tables in this document")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="compile nothing, read a result")
    given = parser.parse_args(argv)
    chips = [CHIPS["A100"], CHIPS["H100"]]
    rows = read_json(given.source)["rows"] if given.source else measure([LONG, *CASES], chips)
    own = [row for row in rows if row["case"] != LONG.title()]
    print(f"\n{report(own)}\n\nheld against published rates:\n\n{held(rows)}")
    if given.json:
        write_json(given.json, {"rows": rows})
    if given.doc:
        write_block(given.doc, "machine code", f"{report(own)}\n\nHeld against published rates:\n\n{held(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
