"""Times of several functions side by side: they take turns, so that a chip that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def _sample(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of one call, in the mean over `repeats`."""
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def compare(
    runs: Mapping[str, Callable[[], Any]], device: str, *, rounds: int = 15, sample_seconds: float = 0.03
) -> dict[str, dict[str, float]]:
    """Median, quartiles and minimum, in seconds, of each run: `rounds` samples each, taken in turn after a warm-up."""
    repeats = {}
    for name, run in runs.items():
        run()
        _sample(run, 1, device)
        repeats[name] = max(1, round(sample_seconds / max(_sample(run, 1, device), 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_sample(run, repeats[name], device))
    return {name: _summary(found) for name, found in samples.items()}


def _summary(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {
        "median": median,
        "low": low,
        "high": high,
        "min": min(samples),
        "samples": len(samples),
    }
