"""Every kernel as it is compiled for an A100 (sm_80) and an H100 or H200 (sm_90), and a few for the other families that
`kernels/tiles.py` has rows for: registers, spills, shared memory.

Needs no GPU, but Triton without its interpreter. The launchers choose their tiles as they would on the GPU, and the
shapes are such that they reach every row. `--check` exits with 1 where a default row spills, needs more shared memory
than a block has, or multiplies without tensor cores; `--quick` is a representative part for CI. `--doc` puts the tables
into a document.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from bench.base.results import write_lines
from bench.base.tables import write_block
from bench.compile_report.cases import all_cases, family_cases, quick_cases
from bench.compile_report.kernels import (
    NAME,
    OTHER_NAME,
    SHARED_NAME,
    compile_all,
    doc_blocks,
    failures,
    report,
    summary,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a representative part, in CI's time")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a default row is not fit")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="cases whose title, with sm_80 or the like, contains this"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--doc", type=Path, help="put the tables into this document")
    given = parser.parse_args(argv)
    work = [(case, arch) for case in (quick_cases() if given.quick else all_cases()) for arch in SHARED_NAME]
    work += [(case, arch) for case in family_cases() for arch in OTHER_NAME] if not given.quick else []
    work = [(case, arch) for case, arch in work if given.only in f"{case.title()}, sm_{arch}"]
    started = time.perf_counter()
    kernels = compile_all(work, given.jobs)
    for arch in dict.fromkeys(arch for _, arch in work):
        print(f"\nsm_{arch} ({NAME[arch]})\n\n{report(kernels, arch)}")
    print(f"\n{summary(kernels)}\n{len(work)} launches in {time.perf_counter() - started:.0f} s")
    if given.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        write_lines(given.json, [kernel.to_dict() for kernel in kernels], versions=versions)
    for name, text in doc_blocks(kernels).items() if given.doc else ():
        write_block(given.doc, name, text)
    found = failures(kernels)
    for line in found:
        print("NOT FIT", line, file=sys.stderr)
    return 1 if found and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
