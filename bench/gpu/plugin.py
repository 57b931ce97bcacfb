"""How `bench.gpu` runs pytest, as a plugin: what matters first, and an end in time.

First ours, as "auto" chooses it, of every case; then what else a target names, case by case; then others.
What would start after `--until` is skipped. In a rehearsal only the contenders of TINY take part.
"""

import time
from dataclasses import replace

import pytest

from bench.report.gpu_page import CHOSEN

NO_TIME = "no time left"
# Contenders that a target names, in either of bench/'s precisions; what is measured first is measured for sure.
FIRST = ("stock", "auto", "triton", "stacked", "delta", "plain", "peft", "merged", "sdpa", "sdpa, gate", "DomainBed")
THEN = ("stacked, recompute", "delta, recompute", "one_pass", "factored", "patched", "TLlib", "DAN snippet")
# Of a rehearsal: a call of an interpreted kernel takes half a second.
TINY = {
    "block": ("stock", "stacked", "delta", "plain", "peft"),
    "model step": ("stock", "cpu", "plain"),
    "attention": ("sdpa", "triton"),
    "mmd": ("auto", "triton", "DomainBed"),
    "inference": ("stock", "patched", "merged"),
    "hosts": ("stock", "auto"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench.gpu")
    group.addoption("--until", type=float, default=float("inf"), metavar="EPOCH", help="start nothing after this time")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    group = getattr(metafunc.module, "GROUP", None)
    if group is not None and metafunc.config.getoption("--rehearse", default=False):
        own = tuple(c for c in group.contenders if c.name in TINY[group.name])
        metafunc.module.GROUP = replace(group, contenders=own)


def _rank(item: pytest.Item) -> int:
    values = getattr(getattr(item, "callspec", None), "params", {})
    contender = values.get("contender")
    if contender is None or contender.name == CHOSEN.get(getattr(values["case"], "precision", "")):
        return 0
    return 1 if contender.name in FIRST else 2 if contender.name in THEN else 4 if contender.slow_start else 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--until"):
        pytest.skip(NO_TIME)
