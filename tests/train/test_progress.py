"""fastheads.train.progress: bars on a terminal; in a log file a line whenever it has been silent for too long."""

import io
import threading
import time
from contextlib import contextmanager

import pytest
from rich.console import Console

from fastheads.train import progress
from fastheads.train.evaluation import fit_probe, score
from fastheads.train.progress import Bars, clock, phase
from fastheads.train.recipe import Recipe


@pytest.fixture
def log():
    return io.StringIO()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.02)


def wait_for(log, text, seconds=5.0):
    """Until the log has it: what prints it is another thread."""
    end = time.monotonic() + seconds
    while text not in log.getvalue():
        assert time.monotonic() < end, log.getvalue()
        time.sleep(0.005)


def running():
    return [thread for thread in threading.enumerate() if thread.name == "fastheads-progress"]


def test_silence_is_broken_by_the_innermost_phase_and_how_far_it_is(log, impatient):
    with Bars(Console(file=log)):
        wait_for(log, "  0:00 so far\n")
        with phase("looking at [the] images", 70, "images") as advance:
            wait_for(log, "  looking at [the] images: 0/70 images, 0:00 so far\n")
            advance(30)
            advance(5)
            wait_for(log, "  looking at [the] images: 35/70 images, 0:00 so far, about 0:00 left\n")
            with phase("loading"):
                wait_for(log, "  loading: 0:00 so far\n")
            wait_for(log, "  loading: 0:00 so far\n  looking at")


def test_a_run_says_its_loss_and_ends_with_its_last_step(log, impatient):
    with Bars(Console(file=log)) as bars:
        report = bars.watch("HAP · [sketch] · 0")
        wait_for(log, "  HAP · [sketch] · 0: 0:00 so far\n")
        report({"step": 3, "steps": 9, "loss": 0.5, "mmd": 0.25, "images_per_second": 12.0})
        wait_for(log, "  HAP · [sketch] · 0: 3/9, loss 0.50 MMD 0.250 12 images/s, 0:00 so far\n")
        rates = {"images_per_second": 12.0, "loader": 80.0, "model": 13.6}
        report({"step": 3, "steps": 9, "loss": 0.5, **rates})
        wait_for(log, "loss 0.50 12 images/s (loader 80, model 14), 0:00 so far\n")
        report({"step": 4, "steps": 9, "loss": 0.25})
        wait_for(log, "  HAP · [sketch] · 0: 4/9, loss 0.25, 0:00 so far, about 0:00 left\n")
    assert log.getvalue().startswith("HAP · [sketch] · 0\n") and log.getvalue().endswith("\n  4/9  loss 0.25\n")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_comes_after_the_end(log, impatient, error):
    try:
        with Bars(Console(file=log)), phase("loading"):
            wait_for(log, "loading")
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    ended = log.getvalue()
    assert not running()
    time.sleep(0.06)
    assert log.getvalue() == ended
    with phase("after the end") as advance:
        advance(1)
    assert log.getvalue() == ended


def test_as_long_as_there_are_lines_nothing_is_added(log, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENCE", 0.3)
    with Bars(Console(file=log)) as bars:
        for i in range(5):
            time.sleep(0.1)
            bars.say(f"result {i}")
    assert log.getvalue() == ""
    assert capsys.readouterr().out == "".join(f"result {i}\n" for i in range(5))


def test_half_a_minute_is_kept():
    assert progress.SILENCE < 30


def test_a_terminal_gets_bars_and_nothing_else(log, impatient, capsys):
    with Bars(Console(file=log, force_terminal=True, width=80, legacy_windows=False)) as bars:
        assert not running()
        with phase("evaluating", 10, "images") as advance:
            advance(5)
            time.sleep(0.15)
        bars.say("a result")
        bars.watch("HAP")({"step": 4, "steps": 9, "loss": 0.25})
    shown = log.getvalue()
    assert "evaluating" in shown and "50%" in shown and "loss 0.25" in shown and "so far" not in shown
    assert capsys.readouterr().out == "a result\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_alone_prints(impatient, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    with Bars() as bars:
        assert len(running()) == (rank == "0")
        bars.watch("HAP")({"step": 4, "steps": 9, "loss": 0.25})
    assert ("4/9  loss 0.25" in capsys.readouterr().err) == (rank == "0")


def test_time_left_is_measured_from_where_a_resumed_run_started(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    task = progress._Task(0, "HAP", 20_000, began=990.0)
    task.update(10_000)
    assert task.line() == "  HAP: 10000/20000, 0:10 so far"
    now[0] += 100
    task.update(10_100)
    assert task.line() == "  HAP: 10100/20000, 1:50 so far, about 2:45:00 left"


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (60, "1:00"), (754.4, "12:34"), (3723, "1:02:03")])
def test_times_are_written_as_on_a_clock(seconds, text):
    assert clock(seconds) == text


def test_evaluation_and_the_probe_tell_how_far_they_are(base, problem, monkeypatch):
    told = []

    class Recorder:
        @contextmanager
        def phase(self, text, total, unit):
            at = len(told)
            told.append([text, total, unit, 0])
            yield lambda count: told[at].__setitem__(3, told[at][3] + count)

    token = progress._shown.set(Recorder())
    try:
        score(base, problem, "red", "all", Recipe(batch_size=8))
        fit_probe(base, problem, Recipe(batch_size=8))
    finally:
        progress._shown.reset(token)
    assert told == [
        ["evaluating red", 20, "images", 20],
        ["features of blue", 16, "images", 16],
        ["features of green", 16, "images", 16],
        ["features of blue", 4, "images", 4],
        ["features of green", 4, "images", 4],
        ["fitting the probe", 5, "regularisations", 5],
    ]
