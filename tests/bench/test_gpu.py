"""The one-command GPU run: its verdicts, its reading of pytest's report, and a rehearsal on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import main, read_junit, run_tests
from bench.summary import Target, chosen, module_targets, tower_targets
from bench.timing import compare

ROOT = Path(__file__).resolve().parents[2]


def variant(ms: float, saved: float = 1.0) -> dict:
    return {"both_ms": ms, "inference_ms": ms, "saved_mb": saved, "peak_mb": None, "share_of_peak": 0.5}


def test_targets_are_met_or_missed_by_their_numbers():
    assert Target("", 1.05, True, 1.05).verdict() == "met"
    assert Target("", 1.05, True, 1.06).verdict() == "missed"
    assert Target("", 1.6, False, 1.7).verdict() == "met"
    assert Target("", 1.6, False, None, "no peft").verdict() == "not measured: no peft"


def test_targets_of_the_module_come_from_one_runs_medians():
    variants = {"stock": variant(2.0), "stacked": variant(2.2, 6.0), "plain": variant(3.3, 10.0), "delta": variant(9)}
    found = {"precision": "amp", "variants": variants, "refused": {"peft": "peft is not installed"}}
    assert chosen(found) == "stacked" and chosen({**found, "precision": "bf16"}) == "delta"
    stock, plain, peft, _, saved, *_ = module_targets(found)
    assert (stock.value, stock.verdict()) == (pytest.approx(1.1), "missed")
    assert (plain.value, plain.verdict()) == (pytest.approx(1.5), "missed")
    assert peft.verdict() == "not measured: peft is not installed"
    assert (saved.value, saved.verdict()) == (pytest.approx(0.6), "met")
    (step,) = tower_targets(found)
    assert step.value == pytest.approx(1.1)


def test_a_junit_report_is_read():
    text = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
    <testcase classname="tests.a" name="good"/>
    <testcase classname="tests.a" name="bad"><failure message="no"/></testcase>
    </testsuite></testsuites>"""
    found = read_junit(text)
    assert found["counts"]["passed"] == 1
    assert found["failures"] == [{"test": "tests.a::bad", "message": "no"}]


def test_variants_take_turns():
    order = []
    found = compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", rounds=3, sample_seconds=0)
    assert "".join(order[-6:]) == "ababab"
    assert found["a"]["samples"] == 3


@pytest.mark.slow
def test_tests_that_take_too_long_are_stopped():
    found = run_tests(["tests/bench/test_roofline.py"], limit=0.1)
    assert found["exit"] == 124 and "stopped after" in found["output"]


def test_without_a_gpu_it_says_how_to_rehearse(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_rehearsal_writes_tests_bench_and_summary(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tests = json.loads((tmp_path / "tests.json").read_text())
    assert tests["lanes"]["rehearsal"]["counts"]["failures"] == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["environment"]["versions"]["torch"]
    assert {"stock", "plain", "merged", "factored", "reference"} <= set(found["modules"][0]["variants"])
    assert "stacked" in found["modules"][0]["refused"]
    assert not found["left_out"]
    summary = (tmp_path / "summary.md").read_text()
    assert "rehearsal" in summary and "time / stock frozen" in summary and "training step" in summary
