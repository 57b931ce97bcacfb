"""Every kernel as it is compiled for an A100 (sm_80) and an H100 or H200 (sm_90): registers, spills, shared memory.

    python -m bench.compile_report [--quick] [--check] [--jobs 2] [--json FILE] [--doc FILE]

Needs no GPU, but Triton without its interpreter. The launchers choose their tiles as they would on the GPU, and the
shapes are such that they reach every row. `--check` exits with 1 where a default row spills, needs more shared memory
than a block has, or multiplies without tensor cores; `--quick` is a representative part for CI. `--doc` puts the tables
into a document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.base.tables import table, write_block
from bench.compile_report.cases import Case, all_cases, quick_cases, run_case

ARCHITECTURES = (80, 90)
SHARED_NAME = {80: "A100", 90: "H100, H200"}
# Constexprs that say which problem it is, not which tile.
PROBLEM = {"H", "DH", "D", "HEADS", "HEAD", "HEAD_DIM", "DIM", "PREC", "PRECISION", "CAUSAL"}
PROBLEM |= {"MASK", "GATE", "POOL", "RANK", "LOW", "SLOTS", "SHARED", "PARTS"}
PROBLEM |= {"num_warps", "num_stages"}  # have columns of their own


@dataclass
class Row:
    """A kernel of a case: what `offline.Compiled` says of it, or the error that stands in its place."""

    case: Case
    arch: int
    compiled: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    error: str = ""
    also: list[Case] = field(default_factory=list)  # cases that compile to the very same kernel

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        return cls(**{**values, "case": Case(**values["case"]), "also": [Case(**c) for c in values["also"]]})


def compile_case(job: tuple[Case, int]) -> list[Row]:
    """One case for one architecture, in a process that may be another."""
    case, arch = job
    from bench.compile_report.offline import compiling

    rows = []
    try:
        with compiling(arch) as compiled:
            run_case(case)
        for c in compiled:
            rows.append(Row(case, arch, c.to_dict(), c.problems()))
    except Exception as error:  # one kernel that doesn't compile must not hide the others
        rows.append(Row(case, arch, error=_innermost(error)))
    return rows


def _innermost(error: BaseException) -> str:
    """An error in one line; Triton wraps one into another for every function that is inlined."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def compile_all(cases: Iterable[Case], arches: Sequence[int], jobs: int) -> list[Row]:
    """Rows of all cases, each specialisation once: several cases may share it."""
    work = [(case, arch) for case in cases for arch in arches]
    if jobs == 1:
        results = [compile_case(job) for job in work]
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(compile_case, work))
    return merge_shapes([row for result in results for row in result])


def merge_shapes(rows: Iterable[Row]) -> list[Row]:
    """Each specialisation once, with the shapes of all cases that share it."""
    by_hash: dict[str, Row] = {}
    merged = []
    for row in rows:
        key = "" if row.compiled is None else row.compiled["hash"]
        first = by_hash.get(key)
        if key and first is not None:
            first.also.append(row.case)
            continue
        by_hash[key] = row
        merged.append(row)
    return merged


# Of an SM: 32-bit registers in each of its four parts, bytes of shared memory, of which a block takes 1 KB more than it
# asks for, warps, blocks (CUDA C++ Programming Guide, technical specifications per compute capability).
SM_REGISTERS, SM_SHARED, SM_WARPS, SM_BLOCKS = 16 * 1024, {80: 164 * 1024, 90: 228 * 1024}, 64, 32


def blocks_per_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """How many blocks run on one SM at a time. A warp takes registers by the 256, and stays in one of four parts."""
    by_registers = 4 * (SM_REGISTERS // (-(-registers * 32 // 256) * 256)) // warps
    return min(by_registers, SM_SHARED[arch] // (shared + 1024), SM_WARPS // warps, SM_BLOCKS)


def shape_text(row: Row) -> str:
    """The first case's shape, with the lengths of those that differ in nothing else, and how many others there are."""
    alike = [row.case, *(c for c in row.also if replace(c, length=row.case.length) == row.case)]
    lengths = sorted({c.length for c in alike})
    text = row.case.shape().replace(f"N {row.case.length}", f"N {', '.join(map(str, lengths))}")
    others = len({c.shape() for c in row.also} - {c.shape() for c in alike})
    return f"{text} (+ {others})" if others else text


def failures(rows: Iterable[Row]) -> list[str]:
    """Why the check fails, in words: rows that don't compile, and default rows that are not fit."""
    found = []
    for row in rows:
        where = f"{row.case.title()}, sm_{row.arch}"
        if row.error:
            found.append(f"{where}: {row.error}")
        elif row.compiled is not None:
            problems = row.problems if row.case.default else [p for p in row.problems if "shared memory" in p]
            found += [f"{where}: {row.compiled['kernel']} {problem}" for problem in problems]
    return found


def tile_text(constexprs: dict[str, Any]) -> str:
    """The constexprs that make the tile, in few characters; those of a tuple of settings by their own names."""
    words = []
    for name, value in constexprs.items():
        if name in PROBLEM or value in (None, False, 0, "()"):
            continue
        words += [tile_text(value)] if isinstance(value, dict) else [f"{name}={_short(value)}"]
    return " ".join(words)


def _short(value: Any) -> str:
    """A tuple of (first, size) as its sizes: ((0, 128), (128, 64)) as 128+64."""
    pairs = re.findall(r"\(\d+, (\d+)\)", str(value))
    return "+".join(pairs) if pairs else str(value).replace(" ", "")


def report(rows: Sequence[Row], arch: int) -> str:
    """The markdown table of one architecture."""
    lines = []
    for row in rows:
        c = row.compiled
        if row.arch != arch:
            continue
        if c is None:
            lines.append([row.case.launcher, shape_text(row), row.error[:120], *[""] * 7])
            continue
        cores = f"{c['wgmma']} wgmma" if c["wgmma"] else f"{c['mma']} mma" if c["mma"] else "none"
        tile, shared = tile_text(c["constexprs"]), f"{c['shared'] / 1024:.1f}"
        resident = blocks_per_sm(row.arch, c["registers"], c["shared"], c["num_warps"])
        used = [c["num_warps"], c["num_stages"], c["registers"], c["stack"] + c["local"], shared, resident, cores]
        lines.append([c["kernel"].removesuffix("_kernel"), shape_text(row), tile, *used])
    header = ["kernel", "shape", "tile", "warps", "stages", "registers", "spilled B", "shared KB", "blocks per SM"]
    return table([*header, "tensor cores"], lines)


def summary(rows: Sequence[Row]) -> str:
    """One line per architecture: how many, and what is wrong."""
    lines = []
    for arch in sorted({row.arch for row in rows}):
        own = [r for r in rows if r.arch == arch and r.compiled is not None]
        spilled = [r for r in own if r.compiled is not None and r.compiled["stack"] + r.compiled["local"]]
        default = [r for r in spilled if r.case.default]
        most = max((r.compiled["shared"] for r in own if r.compiled is not None), default=0)
        lines.append(
            f"sm_{arch} ({SHARED_NAME[arch]}): {len(own)} kernels compiled, {len(default)} default rows spill"
            f"{f' and {len(spilled) - len(default)} others' if len(spilled) > len(default) else ''}; "
            f"most shared memory {most / 1024:.1f} KB"
        )
    return "\n".join(lines)


def to_json(rows: Sequence[Row]) -> str:
    """The rows, one a line, and the versions that compiled them."""
    import torch
    import triton

    versions = json.dumps({"torch": torch.__version__, "triton": triton.__version__})
    lines = ",\n".join(json.dumps(row.to_dict()) for row in rows)
    return f'{{"versions": {versions}, "rows": [\n{lines}\n]}}\n'


def from_json(text: str) -> list[Row]:
    """What `to_json` wrote."""
    return [Row.from_dict(row) for row in json.loads(text)["rows"]]


def spilling(rows: Sequence[Row]) -> list[Row]:
    """Rows that spill, or didn't compile."""
    return [r for r in rows if r.compiled is None or r.compiled["stack"] + r.compiled["local"]]


def doc_blocks(rows: Sequence[Row]) -> dict[str, str]:
    """What a document shows: the rows of the quick cases, all that spill, and the count."""
    quick = set(quick_cases())
    blocks = {"compile_report summary": summary(rows).replace("\n", "  \n")}
    for arch in ARCHITECTURES:
        shown = [row for row in rows if quick & {row.case, *row.also}]
        blocks[f"compile_report sm_{arch}"] = report(shown, arch)
        spilled = [row for row in spilling(rows) if row.arch == arch]
        blocks[f"compile_report sm_{arch} spills"] = report(spilled, arch) if spilled else "None."
    return blocks


def write_doc(rows: Sequence[Row], file: Path) -> None:
    for name, text in doc_blocks(rows).items():
        write_block(file, name, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a representative part, in CI's time")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a default row is not fit")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose title contains this")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--doc", type=Path, help="put the tables into this document")
    given = parser.parse_args(argv)
    cases = [c for c in (quick_cases() if given.quick else all_cases()) if given.only in c.title()]
    started = time.perf_counter()
    rows = compile_all(cases, ARCHITECTURES, given.jobs)
    for arch in ARCHITECTURES:
        print(f"\nsm_{arch} ({SHARED_NAME[arch]})\n\n{report(rows, arch)}")
    print(f"\n{summary(rows)}\n{len(cases)} cases in {time.perf_counter() - started:.0f} s")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(to_json(rows), encoding="utf-8")
    if given.doc:
        write_doc(rows, given.doc)
    found = failures(rows)
    for line in found:
        print("NOT FIT", line, file=sys.stderr)
    return 1 if found and given.check else 0
