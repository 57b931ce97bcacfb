"""The one-command GPU run: parts and limits, verdicts, and a rehearsal on the CPU in an uninstalled checkout."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from standalone import clean_environment

from bench.base import results, timing
from bench.base.results import Row
from bench.base.timing import compare
from bench.base.towers import SHAPES
from bench.check.__main__ import copy_working_tree
from bench.gpu import __main__ as command
from bench.gpu.__main__ import PARTS, main
from bench.gpu.plugin import NO_TIME
from bench.gpu.run import Outcome, Part, Run, read_junit
from bench.report.gpu_page import (
    LARGE,
    PAPER,
    Target,
    host_targets,
    mmd_targets,
    module_targets,
    step_target,
    tile_table,
)
from bench.roofline.chips import CHIPS
from bench.roofline.costs import cost

ROOT = Path(__file__).resolve().parents[3]


def block(name: str, rank: int, ratio: float, saved: int = 100, **fields) -> Row:
    extra = {"setting": "B/16", "precision": "amp", "ranks": [rank], "batch": 256}
    values = {"seconds": {"median": 1e-3}, "baseline": "stock", "ratio": ratio, "saved_bytes": saved, "extra": extra}
    return Row("block", f"rank {rank}", name, **{**values, **fields})


def by_what(targets: list[Target]) -> dict[str, Target]:
    return {t.what: t for t in targets}


def test_targets_are_met_or_missed_by_their_numbers():
    assert Target("", "", 1.05, True, 1.05).verdict() == "met"
    assert Target("", "", 1.05, True, 1.06).verdict() == "missed"
    assert Target("", "", 1.6, False, 1.7).verdict() == "met"
    assert Target("", "", 1.6, False, None, "no peft").verdict() == "not measured: no peft"


def test_the_modules_targets_weigh_ranks_by_their_layers():
    rows = [block("stacked", 2, 1.0), block("stacked", 8, 1.6), block("plain", 2, 2.2), block("plain", 8, 2.2)]
    rows += [block("peft", r, 0, status="not run", why="peft is not installed", seconds=None) for r in (2, 8)]
    found = by_what(module_targets(rows, "NVIDIA H100", "B/16", "amp"))
    assert found["stacked / stock frozen"].value == pytest.approx((10 * 1.0 + 2 * 1.6) / 12)
    assert found["stacked / stock frozen"].verdict() == "missed"
    assert found["plain PyTorch / stacked"].value == pytest.approx(2.2 / 1.1)
    assert found["PEFT / stacked"].verdict() == "not measured: peft: peft is not installed"
    assert (
        found["saved: stacked, recompute / plain"].verdict().startswith("not measured: stacked, recompute has no row")
    )
    least = cost("stacked", SHAPES["B/16"], [CHIPS["H100"]]).seconds("H100")
    assert found["share of the roofline, reachable rates"].value == pytest.approx(least / 1e-3)


def test_saved_memory_counts_the_modules_input():
    row = 256 * 197 * 768 * 2
    rows = [block(n, r, 1, saved=s) for n, s in (("stacked", 0), ("plain", row)) for r in (2, 8)]
    assert by_what(module_targets(rows, "", "B/16", "amp"))["saved: stacked / plain"].value == pytest.approx(0.5)


def test_a_step_is_held_against_the_frozen_models():
    extra = {"setting": "L/14", "precision": "bf16", "ranks": [2, 8], "batch": 128}
    rows = [Row("model step", "", "delta", seconds={"median": 1.0}, ratio=1.02, extra=extra)]
    assert step_target(rows, "L/14", "bf16").verdict() == "met"
    assert step_target(rows, "L/14", "amp").verdict() == "not measured: stacked has no row"


def test_the_mmds_targets_come_from_rows_rates_and_launches():
    def row(name: str, case: tuple, ratio: float, seconds: float = 1e-3) -> Row:
        extra = dict(zip(("layers", "domains", "each", "width", "kernel"), case, strict=True))
        peak = 4 * 16384 * 768
        return Row("mmd", "", name, seconds={"median": seconds}, ratio=ratio, peak_bytes=peak, extra=extra)

    seconds = 3 * 16384**2 * 768 / 100e12  # 100 TFLOP/s
    rows = [row("auto", LARGE, 1.0, seconds), row("DomainBed", LARGE, 6), row("DomainBed", PAPER, 40)]
    kernels = {"mmd, 12 × 36 × 768": [{"kernel": "a", "calls": 1}, {"kernel": "b", "calls": 3}]}
    found = by_what(mmd_targets(rows, {"tf32": 200e12}, kernels))
    assert found["launches, forward and gradient"].verdict() == "missed"
    assert found["DomainBed's loop / ours"].verdict() == "missed"
    assert found["materialised PyTorch (DomainBed's) / ours"].verdict() == "met"
    assert found["KeOps / ours"].verdict() == "not measured: KeOps has no row"
    assert found["share of the tf32 matmul rate, 3 N²D"].value == pytest.approx(0.5)
    assert found["memory / inputs and gradients"].value == pytest.approx(1.0)


def test_a_layers_launches_and_host_time_have_targets():
    rows = [Row("launches", "host time", "stacked, ours", seconds={"median": 1e-4}, baseline="stock", ratio=0.9)]
    found = by_what(host_targets(rows, {"stacked: ViT-B/16": [{"calls": 1}, {"calls": 12}], "stock: ViT-B/16": []}))
    assert (found["launches, stacked"].value, found["launches, stacked"].verdict()) == (13, "missed")
    assert found["host time, stacked / stock"].verdict() == "met"
    assert found["launches, delta"].verdict() == "not measured: no launches were counted"
    assert found["host time, delta / stock"].verdict() == "not measured: delta, ours has no row"


def test_the_summary_says_which_tile_row_won():
    times = {"default": 2e-3, "Row(m=64)": 1e-3}
    result = {"winner": "Row(m=64)", "times": times, "ratios": {"default": 1.0, "Row(m=64)": 0.5}}
    lines = tile_table(result | {"refused": {"Row(m=32)": "wrong: off by 1"}}).splitlines()
    assert [("won" in line, "0.500" in line) for line in lines[2:]] == [(True, True), (False, False), (False, False)]
    assert "wrong: off by 1" in lines[-1]


def test_nine_minutes_are_enough_and_two_show_what_matters_most():
    assert sum(part.seconds for part in PARTS) <= 9 * 60 - 5
    assert sum(part.seconds for part in PARTS[:2]) <= 2 * 60 - 5
    names = [part.name for part in PARTS]
    assert names[:7] == ["correctness", "block", "host", "tiles", "mmd", "model step", "profile"]
    assert all(part.least <= part.seconds for part in PARTS)


def test_a_junit_report_is_read():
    text = f"""<testsuites><testsuite tests="4" failures="1" errors="0" skipped="2">
    <testcase classname="tests.a" name="good"/>
    <testcase classname="tests.a" name="bad"><failure message="no"/></testcase>
    <testcase classname="tests.a" name="elsewhere"><skipped message="needs a GPU"/></testcase>
    <testcase classname="tests.a" name="late"><skipped type="pytest.skip" message="{NO_TIME}"/></testcase>
    </testsuite></testsuites>"""
    found = read_junit(text)
    assert found["counts"]["passed"] == 1
    assert found["failures"] == [{"test": "tests.a::bad", "message": "no"}]
    assert found["left"] == ["tests.a::late"]


def test_variants_take_turns():
    order = []
    found = compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", rounds=3, sample_seconds=0)
    assert "".join(order[-6:]) == "abbaab"
    assert found["a"]["samples"] == 3


@pytest.mark.parametrize(("taken", "rounds"), [(2.0, 3), (0.5, 5), (0.1, 10), (0.001, 40)])
def test_few_rounds_are_taken_where_seconds_are_short(taken, rounds, monkeypatch):
    monkeypatch.setattr(timing, "seconds_of", lambda *_: taken)
    assert compare({"": int}, "cpu", rounds=40, sample_seconds=0, seconds=1.0)[""]["samples"] == rounds


class Sleeping(Run):
    """A run whose parts sleep, or fail."""

    def command(self, part: Part, limit: float) -> list[str]:
        return [sys.executable, "-c", f"import sys, time; time.sleep({part.arguments[0]}); {part.arguments[1]}"]


@pytest.fixture
def run(tmp_path):
    return Sleeping(tmp_path, rehearse=True)


def test_a_part_that_takes_too_long_is_stopped_and_says_so(run):
    outcome = run.run(Part("slow", "python", 1, 1, ("60", "")), limit=0.5)
    assert outcome.status == "stopped" and "its 0 s were over" in outcome.why and outcome.seconds < 20
    assert run.outcome("slow") == outcome


def test_a_part_that_fails_says_its_last_line(run):
    outcome = run.run(Part("bad", "python", 9, 1, ("0", "sys.exit('no such chip')")), limit=30)
    assert (outcome.status, outcome.why) == ("failed", "no such chip")


def test_a_part_that_is_complete_is_known_from_its_file(run, tmp_path):
    run.run(Part("good", "python", 9, 1, ("0", "")), limit=30)
    assert Run(tmp_path, True).outcome("good").status == "done"
    assert Run(tmp_path, True).outcome("other") is None


def test_what_is_there_is_written_after_every_part(tmp_path, monkeypatch):
    """A run that is killed in its second part leaves the results of its first. The last has what time is over."""
    good, killed = Part("good", "python", 9, 1, ("0", "")), Part("killed", "python", 9, 1, ("0", ""))
    limits = []

    class Killed(Sleeping):
        def run(self, part: Part, limit: float) -> Outcome:
            limits.append(limit)
            if part is killed:
                raise KeyboardInterrupt
            return super().run(part, limit)

    monkeypatch.setattr(command, "REHEARSAL", (good, killed))
    monkeypatch.setattr(command, "Run", Killed)
    with pytest.raises(KeyboardInterrupt):
        main(["--out", str(tmp_path), "--rehearse"])
    assert limits[0] == 9 and 400 < limits[1] < 535
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {"good": "done", "killed": "left out"}
    assert "| killed | left out |" in (tmp_path / "summary.md").read_text()


def test_a_folder_of_another_commit_is_refused(run, monkeypatch):
    run.environment()
    there = results.environment("cpu")
    monkeypatch.setattr(results, "environment", lambda device: {**there, "commit": "f" * 40})
    with pytest.raises(ValueError, match="has parts of commit .* and this is fff"):
        run.environment()


def test_without_a_gpu_it_says_how_to_rehearse(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "out")])
    assert "no CUDA device here; --rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--rehearse", "--again", "nothing"])
    assert "--again: invalid choice: 'nothing' (choose from" in capsys.readouterr().err


def uninstalled(folder: Path) -> dict[str, str]:
    """A copy of the files, and an interpreter that has every package but no fastheads; the environment to run it in.

    A path in PYTHONPATH is searched, but the .pth files in it, of which an editable install is one, are not read.
    """
    (folder / "checkout").mkdir()
    copy_working_tree(ROOT, folder / "checkout")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    env = clean_environment()
    env.pop("VIRTUAL_ENV", None)
    return env | {"PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_rehearsal_runs_in_a_checkout_that_was_never_installed(tmp_path):
    env = uninstalled(tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    options = {"env": env, "capture_output": True, "text": True}
    elsewhere = subprocess.run([python, "-c", "import fastheads"], cwd=tmp_path, **options)
    assert "No module named 'fastheads'" in elsewhere.stderr

    command = [python, "-m", "bench.gpu", "--out", str(tmp_path / "out"), "--rehearse"]
    done = subprocess.run(command, cwd=tmp_path / "checkout", timeout=1000, **options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert f"fastheads of {tmp_path / 'checkout'}" in done.stdout
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(found["parts"], "done")
    _, rows = results.read(tmp_path / "out" / "gpu.json")
    ran = {(r.group, r.contender) for r in rows if r.seconds and r.status == "ok"}
    kernels = {("block", n) for n in ("stacked", "delta")} | {("mmd", "triton"), ("inference", "patched")}
    assert kernels <= ran
    assert {r.group for r in rows if r.group.endswith("sweep")} == {
        f"{k} sweep" for k in ("batch", "length", "rank", "closed")
    }
    swept = [r for r in rows if r.group.endswith("sweep")]
    assert all(r.status == "ok" and r.per_second > 0 and r.x is not None for r in swept)
    assert sum("largest" in r.extra for r in swept) == 4  # of each contender: found, or its time was over
    assert any(r.status == "wrong" for r in rows if r.contender == "peft") or "peft" in found["environment"]["missing"]
    assert found["environment"]["rates"]["copy"] > 0 and found["profile"]["step, ours"]
    assert {name.split(":")[0] for name in found["host"]} == {"stock", "stacked", "delta", "one_pass"}
    assert all(result["winner"] in result["times"] and not result["refused"] for result in found["tiles"].values())
    assert (tmp_path / "out" / "traces.tar.gz").stat().st_size > 1000
    assert "not measured" in (tmp_path / "out" / "summary.md").read_text()

    again = subprocess.run(command, cwd=tmp_path / "checkout", timeout=180, **options)
    assert again.returncode == 0 and again.stdout.count("there already") == len(found["parts"])
    assert isinstance(Outcome(**found["parts"]["rates"]).seconds, float)
