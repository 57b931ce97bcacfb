"""A `benchmark` fixture where pytest-benchmark is not installed: what `bench/conftest.py` asks of that one, no more.

python -m pytest bench/ -p bench.stopwatch
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


class Stopwatch:
    """`pedantic` times a call `rounds` times; `stats.stats` has median, q1, q3 and min, in seconds."""

    def __init__(self) -> None:
        self.group = ""
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None

    def pedantic(self, call: Callable[[], Any], *, setup: Callable[[], Any], rounds: int, warmup_rounds: int) -> None:
        samples = []
        for i in range(warmup_rounds + rounds):
            setup()
            started = time.perf_counter()
            call()
            if i >= warmup_rounds:
                samples.append(time.perf_counter() - started)
        low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=median, q1=low, q3=high, min=min(samples)))


@pytest.fixture
def benchmark() -> Stopwatch:
    return Stopwatch()
