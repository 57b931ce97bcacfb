"""How `bench.gpu` runs pytest, as a plugin: what matters first, an end in time, and in a rehearsal tiny problems.

    python -m pytest -p bench.gpu.plugin --until EPOCH --left FILE [--tiny] ...

What starts after EPOCH is skipped, and FILE has a JSON list of it.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bench.base.checkout  # noqa: F401

# Contenders that a target names, in either of bench/'s precisions; what is measured first is measured for sure.
FIRST = ("stock", "auto", "triton", "stacked", "delta", "plain", "peft", "merged", "sdpa", "sdpa, gate", "DomainBed")
THEN = ("stacked, recompute", "delta, recompute", "one_pass", "factored", "patched", "TLlib", "DAN snippet")
# Of a rehearsal: a call of an interpreted kernel takes half a second.
TINY = {
    "block": ("stock", "stacked", "delta", "one_pass", "plain", "peft", "merged"),
    "model step": ("stock", "cpu", "plain"),
    "attention": ("sdpa", "triton"),
    "mmd": ("auto", "triton", "DomainBed", "compiled"),
    "inference": ("stock", "patched", "merged"),
}
LEFT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench.gpu")
    group.addoption("--until", type=float, default=float("inf"), metavar="EPOCH", help="start nothing after this time")
    group.addoption("--left", type=Path, metavar="FILE", help="where the list of what was not started goes")
    group.addoption("--tiny", action="store_true", help="tiny problems on the CPU, Triton's kernels interpreted")


def tiny(case: Any) -> Any:
    """A likeness of a case, of which Triton's interpreter makes a second's work."""
    if hasattr(case, "setting"):
        small = replace(case, setting="tiny", batch=1)
        return replace(small, ranks=(2,)) if hasattr(case, "ranks") else small
    return replace(case, layers=min(case.layers, 2), each=4, width=16)


def large(case: Any) -> Any:
    """The issue's large MMD, 16,384 × 768, which a CPU's set cannot have."""
    return replace(case, layers=1, domains=2, each=8192, width=768, kernel="domainbed")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    group = getattr(metafunc.module, "GROUP", None)
    if group is None or "contender" not in metafunc.fixturenames:
        return
    cases = group.cases
    if metafunc.config.getoption("--tiny"):
        own = tuple(c for c in group.contenders if c.name in TINY[group.name])
        few = [tiny(case) for case in cases("cpu", False)[:2]]
        group = replace(group, contenders=own, cases=lambda device, full: list(dict.fromkeys(few)))
    elif group.name == "mmd":
        group = replace(group, cases=lambda device, full: [*cases(device, full), large(cases(device, full)[0])])
    metafunc.module.GROUP = group


def _rank(item: pytest.Item) -> int:
    contender = getattr(getattr(item, "callspec", None), "params", {}).get("contender")
    if contender is None:
        return 0
    return 0 if contender.name in FIRST else 1 if contender.name in THEN else 3 if contender.slow_start else 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_rank)
    if config.getoption("--tiny"):
        for plugin in config.pluginmanager.get_plugins():
            if Path(getattr(plugin, "__file__", None) or "").parent == Path(__file__).parents[1] and hasattr(
                plugin, "ROUNDS"
            ):
                plugin.ROUNDS = (1, 1)  # bench/conftest.py's


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--until"):
        item.config.stash.setdefault(LEFT, []).append(item.nodeid)
        pytest.skip("no time left")


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--left")
    left = session.config.stash.get(LEFT, [])
    # With xdist each worker has its own list, and the session that starts them none.
    worker = getattr(session.config, "workerinput", {}).get("workerid", "")
    if file is not None and (left or not worker):
        file.with_suffix(f".{worker or 'main'}.json").write_text(json.dumps(left), encoding="utf-8")
