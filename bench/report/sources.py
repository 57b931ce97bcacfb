"""Result files as the report has them: rows of one machine each, and who is who among their contenders."""

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.base.results import Row, by_case, read_json
from bench.base.towers import SETTINGS
from bench.contests.contest import Contender
from bench.roofline.chips import chip_of
from bench.roofline.costs import shares_of
from bench.roofline.passes import PATHS

GROUPS = ("attention", "block", "model step", "mmd", "inference", "hosts")


class Source(NamedTuple):
    name: str
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def machine(self) -> str:
        threads = "" if self.gpu else f", {self.environment['threads']} threads"
        return f"{self.environment['device']}{threads}"

    @property
    def gpu(self) -> bool:
        return bool(self.environment["capability"])

    def caption(self) -> str:
        e = self.environment
        changed = " with uncommitted changes" if e["changed"] else ""
        load = "" if self.gpu or not e.get("load") else f", load average {e['load'][0]:.1f}"
        return f"{self.machine}{load}; commit {e['commit'][:10]}{changed}, {e['date'][:10]}; `{self.name}`"

    def sweeps(self) -> list[str]:
        return [group for group in dict.fromkeys(r.group for r in self.rows) if group.endswith(" sweep")]


def sources(files: Sequence[Path]) -> list[Source]:
    """The files that hold contests or sweeps; ValueError for a rehearsal's, and where two have the same case."""
    found, seen = [], dict[tuple[str, str, str], str]()
    for file in files:
        content = read_json(file)
        groups = ((row.get("group", ""), row) for row in content.get("rows", ()))
        rows = tuple(Row(**row) for group, row in groups if group in GROUPS or group.endswith(" sweep"))
        if not rows:
            continue  # of the compiler, of the roofline, or with a page of its own
        if content.get("rehearsal"):
            raise ValueError(f"{file.name}: a rehearsal's numbers mean nothing")
        found.append(source := Source(file.name, content["environment"], rows))
        for group, case in by_case(rows):
            other = seen.setdefault((source.machine, group, case), source.name)
            if other != source.name:
                raise ValueError(f"{other} and {source.name} both have {group}: {case} of {source.machine}; keep one")
    return found


def one_machine(found: Sequence[Source], what: str) -> None:
    """Raises ValueError where the sources are of more than one machine."""
    first, other = found[0], next((s for s in found if s.machine != found[0].machine), None)
    if other is not None:
        one, another = f"{first.name} was measured on {first.machine}", f"{other.name} on {other.machine}"
        raise ValueError(f"{what}: {one}, {another}; times of different machines do not go into one table")


def by_machine(found: Sequence[Source]) -> dict[str, list[Source]]:
    """GPUs first."""
    machines: dict[str, list[Source]] = {}
    for source in sorted(found, key=lambda s: (not s.gpu, s.machine, s.name)):
        machines.setdefault(source.machine, []).append(source)
    return machines


def cases(found: Sequence[Source]) -> Iterator[tuple[Source, list[Row]]]:
    """The contests, group by group; a case's rows are of one file."""
    for group in GROUPS:
        for source in found:
            for rows in by_case(r for r in source.rows if r.group == group).values():
                yield source, rows


@functools.cache
def contenders() -> dict[tuple[str, str], Contender]:
    modules = [importlib.import_module(f"bench.contests.bench_{group.replace(' ', '_')}") for group in GROUPS]
    return {(m.GROUP.name, c.name): c for m in modules for c in m.GROUP.contenders}


def words(row: Row) -> str:
    known = contenders().get((row.group, row.contender))
    return known.words if known else row.contender


def is_ours(row: Row) -> bool:
    known = contenders().get((row.group, row.contender))
    return bool(known and known.ours)


def roofline_shares(found: Sequence[Source]) -> list[tuple[Row, float, float]]:
    """Rows of the attention module that the roofline has a path for; share of peak's time, and of reachable rates'."""
    one_machine(found, "fraction of the roofline")
    chip = chip_of(found[0].environment["device"])
    rows = (r for source in found for r in source.rows if r.group == "block" and r.seconds and r.contender in PATHS)
    shares = []
    for r in rows if chip else ():
        shape, rank = SETTINGS[r.extra["setting"]].shape(r.extra["batch"]), r.extra["ranks"][0]
        shares.append((r, *shares_of(r.contender, shape, rank, chip, r.median)))
    return shares
