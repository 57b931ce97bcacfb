"""Compilation for a GPU that is not there, in processes of their own: in the tests' the interpreter may be on."""

import pytest
from standalone import compiled, without_interpreter

from bench.compile_report.offline import compiling


def test_what_makes_a_kernel_unfit_is_said_in_words():
    assert compiled().problems() == []
    assert compiled(stack=16).problems() == ["spills 16 bytes"]
    assert "shared memory" in compiled(shared=164 * 1024).problems()[0]
    assert compiled(shared=164 * 1024, arch=90).problems() == []
    assert compiled(mma=0).problems() == ["has products, and no tensor-core instruction"]
    assert compiled(mma=0, dots=False).problems() == []


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compiling(80):
        pass


def test_an_unknown_architecture_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="arch: got 70; takes 80, 87, 86"), compiling(70):
        pass


@pytest.mark.slow
def test_a_kernel_that_spills_is_caught_and_the_driver_is_put_back():
    done = without_interpreter("tests/bench/compile_report/spilling.py", timeout=240)
    assert done.returncode == 0, done.stderr
    lines = {tuple(line.split(" ", 2)[:2]): line for line in done.stdout.splitlines()}
    for arch in ("sm_80", "sm_90"):
        assert "spills" not in lines[arch, "16"]
        assert "spills" in lines[arch, "64"]
        assert "'BLOCK': 64" in lines[arch, "64"]
