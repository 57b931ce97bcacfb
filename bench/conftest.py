"""`pytest bench/`: options, contenders taken in turn with their baseline, and a table per case at the end.

pytest bench/                     quick on a CPU (minutes, no compiled contenders), everything on a GPU
pytest bench/ --full              everything
pytest bench/ --rehearse          tiny shapes, in seconds: that it runs, and that ours is right
pytest bench/ -k mmd --rows FILE  one group; its rows, as `bench.base.results` has them, to FILE
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.base.checkout  # noqa: F401
from bench.base import results
from bench.base.results import Row
from bench.base.tables import table
from bench.contests import contest
from bench.contests.contest import Contender, Group, Judge, NotRunError, Trial

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = {"cpu": 1.0, "cuda": 1.0}  # of timed calls of a contender
ROUNDS = (5, 40)  # at least, at most; FEW where one takes seconds
FEW = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="the full set on a CPU too: larger, with compiled contenders")
    group.addoption("--rehearse", action="store_true", help="tiny shapes, whose times mean nothing")
    group.addoption("--rows", type=Path, metavar="FILE", help="write the rows to this file")


def _size(config: pytest.Config) -> str:
    if config.getoption("--rehearse"):
        return "rehearsal"
    return "full" if config.getoption("--full") or DEVICE == "cuda" else "quick"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    group: Group = metafunc.module.GROUP
    pairs = [(case, c) for case in group.cases(DEVICE, _size(metafunc.config)) for c in group.of(case)]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case.name}: {c.name}" for case, c in pairs])


class Contest:
    """The rows so far, and of the case at hand its judge and its baseline's trial."""

    def __init__(self, size: str) -> None:
        self.size, self.rows = size, list[Row]()
        self.words: dict[tuple[str, str], str] = {}
        self._judges: dict[str, Judge] = {}
        self._baseline: tuple[Any, Trial] | None = None

    def judge(self, group: Group) -> Judge:
        return self._judges.setdefault(group.name, Judge(group))

    def baseline(self, group: Group, case: Any) -> Trial:
        """Kept while the case lasts."""
        key = (group.name, case)
        if self._baseline is None or self._baseline[0] != key:
            self._baseline = None
            contest.free()
            self._baseline = key, contest.build(group.named(group.baseline), case)
        return self._baseline[1]


@pytest.fixture(scope="session")
def _contest(request: pytest.FixtureRequest) -> Contest:
    found = Contest(_size(request.config))
    request.config.stash[KEY] = found
    return found


KEY = pytest.StashKey[Contest]()


def _synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _rounds(seconds: float) -> int:
    least = FEW if seconds > SECONDS[DEVICE] else ROUNDS[0]
    return min(max(round(SECONDS[DEVICE] / seconds), least), ROUNDS[1])


@pytest.fixture
def compete(benchmark: Any, _contest: Contest) -> Iterator[Callable[[Group, Any, Contender], None]]:
    """Checks a contender, times it in turn with the group's baseline, and notes its row."""

    def run(group: Group, case: Any, contender: Contender) -> None:
        benchmark.group = f"{group.name}: {case.name}"
        _contest.words[group.name, contender.name] = contender.words
        try:
            row = _row(benchmark, _contest, group, case, contender)
        except NotRunError as error:
            _contest.rows.append(contest.not_run(group.name, case, contender, str(error)))
            pytest.skip(str(error))
        _contest.rows.append(row)
        shown = ("status", "why", "error", "allowed", "ratio", "peak_bytes", "saved_bytes")
        benchmark.extra_info.update({name: getattr(row, name) for name in shown})
        assert row.status == "ok" or not contender.ours, f"{contender.name}: {row.why}"

    yield run
    contest.free()


def _row(benchmark: Any, found: Contest, group: Group, case: Any, contender: Contender) -> Row:
    if contender.slow_start and found.size != "full":
        raise NotRunError(contest.SLOW_START)
    verdict = found.judge(group).check(contender, case)
    baseline = _synchronised(found.baseline(group, case).run)
    trial = contest.build(contender, case)
    call = _synchronised(trial.run)
    calls: list[float] = []

    def in_turn() -> None:
        calls.append(_seconds(baseline))

    once = _seconds(call) + _seconds(baseline)
    rounds = FEW if found.size == "rehearsal" else _rounds(once)
    benchmark.pedantic(call, setup=in_turn, rounds=rounds, warmup_rounds=1)
    row: dict[str, Any] = {"extra": case.extra(), "baseline": group.baseline, **contest.memory_of(trial, case.device)}
    if benchmark.stats is not None:  # not with --benchmark-disable
        took = benchmark.stats.stats
        row["seconds"] = {"median": took.median, "low": took.q1, "high": took.q3, "min": took.min, "samples": rounds}
        row["ratio"] = took.median / statistics.median(calls[1:])  # without the warm-up's
        row["per_second"] = trial.samples / took.median if trial.samples else None
    return Row(
        group.name, case.name, contender.name, verdict.status, verdict.why, verdict.error, verdict.allowed, **row
    )


# ---------------------------------------------------------------------------------------------------------- the end


def _verdict(row: Row) -> str:
    if row.status == "not run":
        return f"not run: {row.why}"
    return f"right, off by {row.error:.0e}" if row.status == "ok" else f"WRONG: {row.why}"


def _cells(row: Row, words: str) -> list[str]:
    return [
        words,
        f"{row.seconds['median'] * 1e3:,.2f}" if row.seconds else "",
        f"{row.ratio:.2f}" if row.ratio else "",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
        "" if row.saved_bytes is None else f"{row.saved_bytes / 1e6:,.1f}",
        _verdict(row),
    ]


def tables(rows: list[Row], words: dict[tuple[str, str], str]) -> str:
    """A table per group and case."""
    parts = []
    for group, case in dict.fromkeys((row.group, row.case) for row in rows):
        own = [row for row in rows if (row.group, row.case) == (group, case)]
        baseline = next((row.baseline for row in own if row.baseline), "")
        header = ("", "median ms", f"/ {baseline}" if baseline else "", "peak MB", "saved MB", "")
        cells = [_cells(row, words.get((group, row.contender), row.contender)) for row in own]
        parts.append(f"{group}: {case}\n\n{table(header, cells)}")
    return "\n\n".join(parts)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(KEY, None)
    if found is None or not found.rows:
        return
    terminalreporter.section("contests")
    terminalreporter.write_line(tables(found.rows, found.words))
    file = config.getoption("--rows")
    if file is not None:
        results.write(file, results.environment(DEVICE), found.rows)
        terminalreporter.write_line(f"\nrows in {file}")
