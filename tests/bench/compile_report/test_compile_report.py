"""The compile report: what it compiles, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path

from standalone import compiled

from bench.compile_report.__main__ import main
from bench.compile_report.cases import Case, all_cases, family_cases, quick_cases
from bench.compile_report.kernels import NAME, PROBLEM, SM, Kernel, blocks_per_sm, failures, merged, read, report
from fastheads.kernels.tiles import FAMILY

ROOT = Path(__file__).resolve().parents[3]


def row(case: Case = Case("attention_fwd"), **values) -> Kernel:  # noqa: B008
    found = compiled(**values)
    return Kernel(case, found.arch, found)


def test_a_default_row_that_spills_fails_the_check():
    (line,) = failures([row(), row(stack=24)])
    assert "attention_fwd: head 64, N 197, sm_80: k spills 24 bytes" in line


def test_other_rows_may_spill_but_not_exceed_shared_memory():
    other = Case("attention_fwd", dtype="float32")
    assert failures([row(other, stack=24, mma=0)]) == []
    assert len(failures([row(other, shared=200 * 1024)])) == 1


def test_a_kernel_that_does_not_compile_fails_the_check():
    (line,) = failures([Kernel(Case("one_pass"), 90, error="CompilationError: no")])
    assert line == "one_pass: head 64, N 197, sm_90: CompilationError: no"


def test_the_interpreter_fails_the_check_in_words(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--quick", "--check", "--jobs", "1", "--only", "dropout"]) == 1
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_cases_reach_every_launcher_length_and_switch():
    cases = all_cases()
    assert set(quick_cases()) <= set(cases) and len(set(cases)) == len(cases)
    assert {c.launcher for c in quick_cases()} == {c.launcher for c in cases}
    for launcher in ("attention_fwd", "attention_bwd"):
        own = [c for c in cases if c.launcher == launcher]
        assert {c.length for c in own} >= {50, 65, 77, 197, 257, 577, 730, 4096}
        assert {c.head_dim for c in own} >= {16, 64, 72, 80, 88, 104, 112, 128}
        assert {c.mask for c in own} == {"", "bool", "additive"}
        assert any(c.causal for c in own) and any(not c.gate for c in own) and any(c.rank == 8 for c in own)
    assert {c.pool for c in cases if c.launcher == "attention_fwd"} >= {None, 0, "mean"}


def test_every_family_of_chips_has_cases():
    assert {FAMILY[arch] for arch in NAME} == set(FAMILY.values()) and set(NAME) <= set(SM)
    assert {c.launcher for c in family_cases()} >= {"attention_fwd", "attention_bwd"}
    assert all(c.default for c in family_cases())


def test_what_is_left_out_of_a_tile_is_a_constant_of_some_kernel():
    text = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    assert PROBLEM - {"warps", "stages"} <= set(re.findall(r"(\w+): tl\.constexpr", text))


def test_cases_that_compile_to_the_same_kernel_are_one_row():
    rows = [row(Case("attention_fwd", length=n), hash="same") for n in (197, 257)]
    (one,) = merged(rows)
    assert "N 197, 257" in report([one], 80)


def test_blocks_per_sm_are_bounded_by_registers_shared_memory_and_warps():
    """Worked out by hand from the tables of the programming guide."""
    # 255 registers are 8,192 a warp: two warps in each of an SM's four parts, so two blocks of four warps
    assert blocks_per_sm(80, 255, 24 * 1024, 4) == 2
    # 84.1 KB twice, and 1 KB each beside it, are more than 164 KB and less than 228
    assert [blocks_per_sm(arch, 128, 86 * 1024, 4) for arch in (80, 90)] == [1, 2]
    assert blocks_per_sm(90, 32, 0, 8) == 8  # 64 warps
    assert blocks_per_sm(80, 32, 1024, 1) == 32
    assert [blocks_per_sm(arch, 32, 1024, 1) for arch in (86, 89)] == [16, 24]
    assert blocks_per_sm(120, 32, 0, 8) == 6  # 48 warps


def test_a_pooled_token_at_257_tokens_leaves_an_a100_two_blocks():
    """As many as without it; it once took one of them."""
    found = {}
    for kernel in read(ROOT / "bench" / "results" / "compile.json"):
        for case in (kernel.case, *kernel.also) if kernel.arch == 80 else ():
            if (case.launcher, case.head_dim, case.length, case.rank) == ("attention_fwd", 64, 257, 0):
                c = kernel.compiled
                found.setdefault(case.pool, blocks_per_sm(80, c.registers, c.shared, c.num_warps))
    assert (found[0], found[None]) == (2, 2)


def test_rows_survive_json():
    one = row(stack=8)
    assert Kernel.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert dataclasses.replace(one.case) == one.case
