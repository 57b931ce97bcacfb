"""Sweeps end where memory or time does, and say so. That a rehearsal writes rows: `gpu/test_gpu.py`."""

import pytest
import torch

from bench import sweeps
from bench.base import memory
from bench.contests.contenders.towers import AUTO, tower, training
from bench.contests.contest import Contender, NotRunError, Trial
from bench.contests.vision import VisionCase
from bench.sweeps import Sweep, counted, largest, memory_error, points_of, sweep_batch, sweep_module
from fastheads.ledger import nbytes

STOCK = training("stock")
QUICK = {"rounds": 1, "sample_seconds": 0.0, "say": lambda line: None}


def simulated(monkeypatch, limit=1000, error=None):
    """Batches that were asked for, and a way to contenders whose trials take no memory up to `limit` images; by the
    ledger an image takes ten bytes."""
    asked = []

    def build(case):
        def run():
            if case.batch > limit:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        asked.append(case.batch)
        return Trial(run, dict)

    monkeypatch.setattr(sweeps, "peak_bytes", lambda run, device: 1000)
    monkeypatch.setattr(sweeps, "counted", lambda contender, case: lambda batch: 10 * batch)
    return asked, lambda name: Contender(name, "", build)


@pytest.mark.parametrize("limit", [1, 7, 8, 100, 1000, 1023])
def test_the_largest_batch_is_found_to_within_an_eighth(limit):
    found = largest(lambda batch: batch <= limit, 1, 5000)
    assert found <= limit < found + max(1, found // 8) + 1


@pytest.mark.parametrize("most", [1, 2, 7, 64, 100])
def test_no_batch_beyond_the_largest_is_tried(most):
    asked = []
    assert largest(lambda batch: not asked.append(batch), 1, most) == most
    assert max(asked) == most and len(asked) <= 8


def test_nothing_fits():
    assert largest(lambda batch: False, 4, 100) == 0
    assert largest(lambda batch: True, 4, 3) == 0


def test_the_batch_grows_to_what_the_ledger_says_and_no_further(monkeypatch):
    asked, contender = simulated(monkeypatch)
    sweep = Sweep("cpu", ("fp32", "bf16"), 60, 1009, **QUICK)
    sweep_batch(sweep, ["tiny"], [contender("auto"), contender("stock")], start=8)
    assert asked == [8, 16, 32, 64, 100] * 4
    last = [r for r in sweep.rows if (r.extra or {}).get("largest")]
    assert [(r.contender, r.extra["precision"], r.x) for r in last] == [
        (name, precision, 100) for precision in ("fp32", "bf16") for name in ("auto", "stock")
    ]
    assert last[0].extra["ended"].startswith("by the ledger a step of 101 ") and last[0].extra["counted"] == 1000
    assert last[0].per_second == pytest.approx(100 / last[0].seconds["median"])


def test_the_batch_grows_until_memory_ends(monkeypatch):
    _, contender = simulated(monkeypatch, limit=100)
    sweep = Sweep("cpu", ("fp32",), 60, 10**4, **QUICK)
    sweep_batch(sweep, ["tiny"], [contender("auto")], start=8)
    last = sweep.rows[-1]
    assert 89 <= last.x <= 100 and last.extra["largest"] is True
    assert last.extra["ended"].startswith("CUDA out of memory")
    assert all(row.status == "ok" for row in sweep.rows)
    assert [row.x for row in sweep.rows] == sorted(row.x for row in sweep.rows)


@pytest.mark.parametrize(
    ("limit", "budget", "why"), [(1, 1000, "out of memory"), (1000, 70, "by the ledger a step of 8")]
)
def test_a_first_batch_that_does_not_fit_is_not_run(limit, budget, why, monkeypatch):
    asked, contender = simulated(monkeypatch, limit=limit)
    sweep = Sweep("cpu", ("fp32",), 60, budget, **QUICK)
    sweep_batch(sweep, ["tiny"], [contender("auto")], start=8)
    (row,) = sweep.rows
    assert row.status == "not run" and why in row.why and row.x == 8
    assert asked == ([8] if limit == 1 else [])


def test_an_error_that_is_not_about_memory_is_an_error(monkeypatch):
    _, contender = simulated(monkeypatch, limit=100, error=RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        sweep_batch(Sweep("cpu", ("fp32",), 60, 10**4, **QUICK), ["tiny"], [contender("auto")], start=256)


@pytest.mark.parametrize(
    ("error", "about_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("expected a tensor"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, about_memory):
    assert bool(memory_error(error)) is about_memory


@pytest.mark.parametrize("contender", [STOCK, AUTO], ids=lambda c: c.name)
def test_what_is_counted_of_a_step_is_what_it_takes(contender):
    case = VisionCase("model step", "tiny", 8, "cpu", "fp32", (2, 2, 2, 8, 8))
    made = contender.trial(case)
    made.run()
    taken = memory.peak_bytes(made.run, "cpu") + nbytes(made.known())
    assert counted(contender, case)(8) == pytest.approx(taken, rel=0.02)


def test_without_time_nothing_is_called_the_largest(monkeypatch):
    _, contender = simulated(monkeypatch)
    sweep = Sweep("cpu", ("fp32",), -1, 10**4, **QUICK)
    sweep_batch(sweep, ["tiny"], [contender("auto")], start=8)
    (row,) = sweep.rows
    assert row.extra["largest"] is False and "no time left" in row.extra["ended"]


def test_points_that_no_time_is_left_for_are_said(monkeypatch):
    case = VisionCase("block", "tiny", 2, "cpu", "fp32", (8,))
    sweep = Sweep("cpu", ("fp32",), -1, 10**4, **QUICK)
    sweep_module(sweep, "rank", "here", points_of("rank", case, True), [AUTO, STOCK])
    assert [(r.x, r.contender, r.status) for r in sweep.rows] == [
        (x, name, "not run") for x in (1, 4) for name in ("auto", "stock")
    ]
    assert all("no time left" in r.why for r in sweep.rows)


def test_a_contender_that_cannot_run_leaves_the_others():
    def refuse(model, ranks):
        raise NotRunError("not on this machine")

    case = VisionCase("block", "tiny", 2, "cpu", "fp32", (8,))
    sweep = Sweep("cpu", ("fp32",), 60, 10**4, **QUICK)
    contenders = [tower("absent", "", "ha-lora", refuse), STOCK, AUTO]
    sweep_module(sweep, "rank", "here", points_of("rank", case, True)[:1], contenders)
    assert [(r.contender, r.status) for r in sweep.rows] == [("absent", "not run"), ("stock", "ok"), ("auto", "ok")]
    assert sweep.rows[1].ratio == 1.0 and sweep.rows[2].baseline == "stock"


def test_length_keeps_the_tokens_and_closed_counts_heads():
    case = VisionCase("block", "B/16", 2, "cpu", "fp32", (8,))
    lengths = points_of("length", case, False)
    assert all(0.9 * 1600 < k.batch * k.length <= 1600 for _, k in lengths) and lengths[0][1].length == 25
    shares = points_of("closed", case, False)
    assert [k.closed for _, k in shares] == [0, 3, 6, 9, 11] and shares[1][0] == 0.25


def test_closed_heads_have_a_gate_of_zero():
    open_, closed = (
        AUTO.trial(VisionCase("block", "tiny", 2, "cpu", "fp32", (4,), closed=n)).outputs() for n in (0, 1)
    )
    assert bool((closed["dlora_A"][:, 0] == 0).all()) and bool((closed["dlora_A"][:, 1] != 0).any())
    assert bool((open_["dlora_A"][:, 0] != 0).any())
    assert "dtheta" in open_ and "dtheta" not in closed
    assert all(bool(torch.isfinite(v).all()) for v in closed.values())
