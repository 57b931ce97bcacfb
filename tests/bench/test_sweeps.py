"""Sweeps end where memory or time does, and say so. That a rehearsal writes rows: `gpu/test_gpu.py`."""

import pytest
import torch

from bench import sweeps
from bench.contests.contenders.towers import AUTO, tower, training
from bench.contests.contest import Contender, NotRunError, Trial
from bench.contests.vision import VisionCase
from bench.sweeps import Sweep, largest, memory_error, points_of, sweep_batch, sweep_module

STOCK = training("stock")
QUICK = {"rounds": 1, "sample_seconds": 0.0, "say": lambda line: None}


def simulated(monkeypatch, limit=100, error=None):
    """Batches that were asked for, and a way to contenders whose trials take no memory up to `limit` images."""
    asked = []

    def build(case):
        def run():
            if case.batch > limit:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        asked.append(case.batch)
        return Trial(run, dict)

    monkeypatch.setattr(sweeps, "peak_bytes", lambda run, device: 1000)
    return asked, lambda name: Contender(name, "", build)


@pytest.mark.parametrize("limit", [1, 7, 8, 100, 1000, 1023])
def test_the_largest_batch_is_found_to_within_an_eighth(limit):
    found = largest(lambda batch: batch <= limit)
    assert found <= limit < found + max(1, found // 8) + 1


def test_nothing_fits():
    assert largest(lambda batch: False, start=4) == 0


def test_the_batch_grows_until_memory_ends(monkeypatch):
    asked, contender = simulated(monkeypatch)
    sweep = Sweep("cpu", "fp32", 60, **QUICK)
    sweep_batch(sweep, ["tiny"], [contender("auto"), contender("stock")], start=8)
    assert asked[:5] == [8, 16, 32, 64, 128]
    assert [r.contender for r in sweep.rows if (r.extra or {}).get("largest")] == ["auto", "stock"]
    rows = [row for row in sweep.rows if row.contender == "auto"]
    last = rows[-1]
    assert 89 <= last.x <= 100 and last.extra["largest"] is True
    assert last.extra["ended"].startswith("CUDA out of memory")
    assert last.per_second == pytest.approx(last.x / last.seconds["median"])
    assert all(row.status == "ok" for row in sweep.rows)
    assert [row.x for row in rows] == sorted(row.x for row in rows)


def test_a_first_batch_that_does_not_fit_is_not_run(monkeypatch):
    _, contender = simulated(monkeypatch, limit=1)
    sweep = Sweep("cpu", "fp32", 60, **QUICK)
    sweep_batch(sweep, ["tiny"], [contender("auto")], start=8)
    (row,) = sweep.rows
    assert row.status == "not run" and "out of memory" in row.why and row.x == 8


def test_an_error_that_is_not_about_memory_is_an_error(monkeypatch):
    _, contender = simulated(monkeypatch, error=RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        sweep_batch(Sweep("cpu", "fp32", 60, **QUICK), ["tiny"], [contender("auto")], start=256)


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


def test_a_budget_ends_it_on_a_cpu():
    """Of a tiny tower, measured: the last batch is within, an eighth more would not be."""
    budget = 4_000_000
    sweep = Sweep("cpu", "fp32", 60, budget, **QUICK)
    sweep_batch(sweep, ["tiny"], [STOCK], start=2)
    last = sweep.rows[-1]
    assert last.extra["largest"] and " GB" in last.extra["ended"]
    assert last.extra["bytes"] <= budget < last.extra["bytes"] * (last.x + max(1, last.x // 8) + 1) / last.x


def test_without_time_nothing_is_called_the_largest(monkeypatch):
    _, contender = simulated(monkeypatch)
    sweep = Sweep("cpu", "fp32", -1, **QUICK)
    sweep_batch(sweep, ["tiny"], [contender("auto")], start=8)
    (row,) = sweep.rows
    assert row.extra["largest"] is False and "no time left" in row.extra["ended"]


def test_points_that_no_time_is_left_for_are_said(monkeypatch):
    case = VisionCase("block", "tiny", 2, "cpu", "fp32", (8,))
    sweep = Sweep("cpu", "fp32", -1, **QUICK)
    sweep_module(sweep, "rank", "here", points_of("rank", case, True), [AUTO, STOCK])
    assert [(r.x, r.contender, r.status) for r in sweep.rows] == [
        (x, name, "not run") for x in (1, 4) for name in ("auto", "stock")
    ]
    assert all("no time left" in r.why for r in sweep.rows)


def test_a_contender_that_cannot_run_leaves_the_others():
    def refuse(model, ranks):
        raise NotRunError("not on this machine")

    case = VisionCase("block", "tiny", 2, "cpu", "fp32", (8,))
    sweep = Sweep("cpu", "fp32", 60, **QUICK)
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
    assert all(bool(torch.isfinite(v).all()) for v in closed.values())
