"""`pytest bench/`: options, contenders taken in turn with their baseline, and a table per case at the end.

On a CPU the quick set, without compiled contenders, on a GPU everything. `-k mmd` is one group; a rehearsal shows in
seconds that it runs, and that ours is right; `--untimed` only the latter.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.base.results import Row, by_case, environment, write
from bench.base.tables import contest_table
from bench.base.timing import compare
from bench.contests.contest import SLOW_START, Contender, Group, NotRunError, Trial, free

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS, ROUNDS = 1.0, 40  # of a contender's calls and its baseline's, and how many of them at most


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="the full set on a CPU too: larger, with compiled contenders")
    group.addoption("--rehearse", action="store_true", help="tiny shapes, whose times mean nothing")
    group.addoption("--untimed", action="store_true", help="ours alone, checked and run once")
    group.addoption("--rows", type=Path, metavar="FILE", help="write the rows to this file")


def _size(config: pytest.Config) -> str:
    if config.getoption("--rehearse"):
        return "rehearsal"
    return "full" if config.getoption("--full") or DEVICE == "cuda" else "quick"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    group: Group = metafunc.module.GROUP
    untimed = metafunc.config.getoption("--untimed")
    cases = group.cases(DEVICE, _size(metafunc.config))
    pairs = [(case, c) for case in cases for c in group.of(case) if c.ours or not untimed]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case.name}: {c.name}" for case, c in pairs])


class Contests:
    """The rows so far; of the case at hand its baseline's trial."""

    def __init__(self, size: str, untimed: bool) -> None:
        self.size, self.untimed, self.rows = size, untimed, list[Row]()
        self.words: dict[tuple[str, str], str] = {}
        self._baseline: dict[Any, Trial] = {}  # of one case: models don't lie beside each other

    def row(self, group: Group, case: Any, contender: Contender) -> Row:
        """Checks a contender and times it in turn with the group's baseline; raises NotRunError."""
        if contender.slow_start and self.size != "full":
            raise NotRunError(SLOW_START)
        verdict = group.check(contender, case)
        if self.untimed:
            contender.tried(case)
            return Row(group.name, case.name, contender.name, extra=case.extra(), **verdict._asdict())
        if (group.name, case) not in self._baseline:
            self._baseline.clear()
            free()
            self._baseline[group.name, case] = group.named(group.baseline).tried(case)
        trial, rounds = contender.tried(case), 1 if self.size == "rehearsal" else ROUNDS
        runs = {"": trial.run, "baseline": self._baseline[group.name, case].run}
        took, beside = compare(runs, case.device, rounds=rounds, sample_seconds=0, seconds=SECONDS).values()
        found = {"seconds": took, "baseline": group.baseline, "ratio": took["median"] / beside["median"]}
        found |= trial.memory(case.device) | {"extra": case.extra()} | verdict._asdict()
        per_second = trial.samples / took["median"] if trial.samples else None
        return Row(group.name, case.name, contender.name, per_second=per_second, **found)


KEY = pytest.StashKey[Contests]()


@pytest.fixture
def compete(request: pytest.FixtureRequest) -> Iterator[Callable[[Group, Any, Contender], None]]:
    """Notes the row of a contender, which fails the test where ours is wrong."""
    config = request.config
    contests = config.stash.setdefault(KEY, Contests(_size(config), config.getoption("--untimed")))

    def run(group: Group, case: Any, contender: Contender) -> None:
        contests.words[group.name, contender.name] = contender.words
        try:
            row = contests.row(group, case, contender)
        except NotRunError as error:
            row = Row(group.name, case.name, contender.name, "not run", str(error), extra=case.extra())
        contests.rows.append(row)
        if row.status == "not run":
            pytest.skip(row.why)
        assert row.status == "ok" or not contender.ours, f"{contender.name}: {row.why}"

    yield run
    free()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(KEY, None)
    if found is None or not found.rows:
        return
    terminalreporter.section("contests")
    for (group, case), rows in by_case(found.rows).items():
        words = {r.contender: found.words[group, r.contender] for r in rows}
        terminalreporter.write_line(f"{group}: {case}\n\n{contest_table(rows, words, errors=True)}\n")
    file = config.getoption("--rows")
    if file is not None:
        write(file, environment(DEVICE), found.rows)
        terminalreporter.write_line(f"rows in {file}")
