"""Times of several functions side by side: they take turns, so that a machine that slows down slows all of them.

Every time in bench/ is taken here, but for the processes of `bench.check`, which take their turns here.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

Runs = Mapping[str, Callable[[], Any]]
FEW = 5  # rounds at least, where `seconds` allow it; of so few samples low and high are the extremes


def seconds_of(run: Callable[[], Any], calls: int, device: str) -> float:
    """Seconds of one call, in the mean over `calls`. device: "cpu", "cuda", or "thread": this thread's work alone."""
    if device != "cuda":
        clock = time.thread_time if device == "thread" else time.perf_counter
        started = clock()
        for _ in range(calls):
            run()
        return (clock() - started) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def in_turn(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each sampler returns in each round, in an order that moves on from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = deque(samplers)
    for _ in range(rounds):
        for name in order:
            samples[name].append(samplers[name]())
        order.rotate(-1)
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median, low and high quartile, minimum, and how many samples there are."""
    low, median, high = min(samples), statistics.median(samples), max(samples)
    if len(samples) > FEW:
        low, _, high = statistics.quantiles(samples, n=4)
    return {"median": median, "low": low, "high": high, "min": min(samples), "samples": len(samples)}


def compare(
    runs: Runs, device: str, *, rounds: int = 15, sample_seconds: float = 0.03, seconds: float | None = None
) -> dict[str, dict[str, float]]:
    """The `summary` of each run's seconds, taken in turn after a warm-up.

    A sample is of as many calls as fit into sample_seconds. rounds: samples of each; fewer, where all of them together
    are to take no longer than `seconds`: then at least 5, or 3 where one round takes longer.
    """
    samplers, once = {}, 0.0
    for name, run in runs.items():
        run()
        taken = seconds_of(run, 1, device)
        calls = max(1, round(sample_seconds / max(taken, 1e-6)))
        samplers[name] = lambda run=run, calls=calls: seconds_of(run, calls, device)  # type: ignore[misc]
        once += taken * calls
    if seconds is not None:
        rounds = min(rounds, max(round(seconds / once), FEW if once < seconds else 3))
    return {name: summary(samples) for name, samples in in_turn(samplers, rounds).items()}
