"""What the compiler made of the cases' kernels: compiled in several processes, judged, and shown in tables."""

import multiprocessing
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from bench.base.results import read_json
from bench.base.tables import table
from bench.compile_report.cases import LAUNCHERS, Case, quick_cases
from bench.compile_report.offline import Compiled, compiling

SHARED_NAME = {80: "A100", 90: "H100, H200"}
OTHER_NAME = {86: "A10, RTX 30", 89: "L4, L40S, RTX 40", 100: "B200", 120: "RTX 50"}  # a few cases each: `family_cases`
NAME = SHARED_NAME | OTHER_NAME
# Constexprs that say which problem it is, not which tile.
PROBLEM = {"HEAD", "LOW", "CAUSAL", "POOL", "T", "HEADS", "DIM", "TARGETS", "SHARED", "MERGE"}
PROBLEM |= {"S", "POWERS", "PRESET", "UNBIASED", "PREC", "BLOCKS"}
PROBLEM |= {"warps", "stages"}  # have columns of their own
# Of an SM: 32-bit registers in each of its four parts; bytes of shared memory, of which a block takes 1 KB more than it
# asks for, warps and blocks (CUDA C++ Programming Guide, technical specifications per compute capability).
SM_REGISTERS = 16 * 1024
SM = {
    80: (164, 64, 32),
    86: (100, 48, 16),
    89: (100, 48, 24),
    90: (228, 64, 32),
    100: (228, 64, 32),
    120: (100, 48, 24),
}


@dataclass
class Kernel:
    """A kernel of a case: what was compiled, or the error that stands in its place."""

    case: Case
    arch: int
    compiled: Compiled | None = None
    error: str = ""
    also: list[Case] = field(default_factory=list)  # cases that compile to the very same kernel

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"problems": self.compiled.problems() if self.compiled else []}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Kernel":
        compiled = Compiled(**values["compiled"]) if values["compiled"] else None
        also = [Case(**case) for case in values["also"]]
        return Kernel(Case(**values["case"]), values["arch"], compiled, values["error"], also)

    def shape(self) -> str:
        """The case's shape, with the lengths of those that differ in nothing else, and how many others there are."""
        alike = [self.case, *(c for c in self.also if replace(c, length=self.case.length) == self.case)]
        lengths = sorted({c.length for c in alike})
        text = self.case.shape().replace(f"N {self.case.length}", f"N {', '.join(map(str, lengths))}")
        others = len({c.shape() for c in self.also} - {c.shape() for c in alike})
        return f"{text} (+ {others})" if others else text


def read(file: Path) -> list[Kernel]:
    return [Kernel.from_dict(row) for row in read_json(file)["rows"]]


def compile_case(job: tuple[Case, int]) -> list[Kernel]:
    """One case for one architecture, in a process that may be another."""
    case, arch = job
    try:
        with compiling(arch) as compiled:
            LAUNCHERS[case.launcher](case)
        return [Kernel(case, arch, c) for c in compiled]
    except Exception as error:  # one kernel that doesn't compile must not hide the others
        inner: BaseException = error
        while inner.__cause__ is not None:  # Triton wraps one into another for every function that is inlined
            inner = inner.__cause__
        lines = [line.strip() for line in str(inner).splitlines() if line.strip(" ^")]
        return [Kernel(case, arch, error=f"{type(inner).__name__}: {lines[-1] if lines else ''}")]


def compile_all(work: Iterable[tuple[Case, int]], jobs: int) -> list[Kernel]:
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = (map if jobs == 1 else pool.map)(compile_case, work)
        return merged(chain.from_iterable(found))


def merged(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Each specialisation once, with all cases that share it."""
    found: dict[Any, Kernel] = {}
    for kernel in kernels:
        first = found.setdefault(kernel.compiled.hash if kernel.compiled else id(kernel), kernel)
        if first is not kernel:
            first.also.append(kernel.case)
    return list(found.values())


def failures(kernels: Iterable[Kernel]) -> list[str]:
    """Why the check fails, in words: cases that don't compile, and default rows that are not fit."""
    found = []
    for kernel in kernels:
        where = f"{kernel.case.title()}, sm_{kernel.arch}"
        if kernel.compiled is None:
            found.append(f"{where}: {kernel.error}")
            continue
        problems = [p for p in kernel.compiled.problems() if kernel.case.default or "shared memory" in p]
        found += [f"{where}: {kernel.compiled.kernel} {problem}" for problem in problems]
    return found


def blocks_per_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """How many blocks run on one SM at a time. A warp takes registers by the 256, and stays in one of four parts."""
    by_registers = 4 * (SM_REGISTERS // (-(-registers * 32 // 256) * 256)) // warps
    memory, most_warps, most = SM[arch]
    return min(by_registers, memory * 1024 // (shared + 1024), most_warps // warps, most)


def tile_text(constexprs: dict[str, Any]) -> str:
    """The constexprs that make the tile, in few characters; those of a tuple of settings by their own names."""
    words = []
    for name, value in constexprs.items():
        if name in PROBLEM or value in (None, False, 0, "()"):
            continue
        if isinstance(value, dict):
            words.append(tile_text(value))
        else:
            # a tuple of (first, size) as its sizes: ((0, 128), (128, 64)) as 128+64
            pairs = re.findall(r"\(\d+, (\d+)\)", str(value))
            words.append(f"{name}={'+'.join(pairs) if pairs else str(value).replace(' ', '')}")
    return " ".join(words)


def report(kernels: Iterable[Kernel], arch: int) -> str:
    header = ["kernel", "shape", "tile", "warps", "stages", "registers", "spilled B", "shared KB", "blocks per SM"]
    rows = []
    for kernel in (k for k in kernels if k.arch == arch):
        c = kernel.compiled
        if c is None:
            rows.append([kernel.case.launcher, kernel.shape(), kernel.error[:120], *[""] * 7])
        else:
            cores = f"{c.wgmma} wgmma" if c.wgmma else f"{c.mma} mma" if c.mma else "none"
            resident = blocks_per_sm(arch, c.registers, c.shared, c.num_warps)
            used = [c.num_warps, c.num_stages, c.registers, c.spills, f"{c.shared / 1024:.1f}", resident, cores]
            rows.append([c.kernel.removesuffix("_kernel"), kernel.shape(), tile_text(c.constexprs), *used])
    return table([*header, "tensor cores"], rows)


def summary(kernels: Sequence[Kernel]) -> str:
    """One line per architecture: how many, and what is wrong."""
    lines = []
    for arch in sorted({kernel.arch for kernel in kernels}):
        own = [k for k in kernels if k.arch == arch and k.compiled]
        spilled = [k.case.default for k in own if k.compiled.spills]
        others = f" and {len(spilled) - sum(spilled)} others" if not all(spilled) else ""
        most = f"most shared memory {max((k.compiled.shared for k in own), default=0) / 1024:.1f} KB"
        counted = f"{len(own)} kernels compiled, {sum(spilled)} default rows spill{others}"
        lines.append(f"sm_{arch} ({NAME[arch]}): {counted}; {most}")
    return "\n".join(lines)


def doc_blocks(kernels: Sequence[Kernel]) -> dict[str, str]:
    """What a document shows: the quick cases, all that spill or don't compile, and the count."""
    quick = set(quick_cases())
    blocks = {"compile_report summary": summary(kernels).replace("\n", "  \n")}
    for arch in SHARED_NAME:
        blocks[f"compile_report sm_{arch}"] = report((k for k in kernels if quick & {k.case, *k.also}), arch)
        spilled = [k for k in kernels if k.arch == arch and (k.compiled is None or k.compiled.spills)]
        blocks[f"compile_report sm_{arch} spills"] = report(spilled, arch) if spilled else "None."
    return blocks
