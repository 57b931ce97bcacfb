"""All variants of `bench.variants` side by side: times, peak and saved memory, and what the roofline says of each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.chips import Chip
from bench.memory import held_bytes, peak_bytes
from bench.passes import PATHS
from bench.roofline import cost
from bench.timing import compare
from bench.variants import SETTINGS, VARIANTS, Setting, Step, UnavailableError, build, module_step, tower_step

Say = Callable[[str], None]


def _ready(names: Sequence[str], make: Callable[[str], Step], refused: dict[str, str], say: Say) -> dict[str, Step]:
    """The steps that run here, each run once; why the others don't goes to `refused`."""
    steps = {}
    for name in names:
        if name in refused:
            continue
        try:
            step = make(name)
            step.both()
        except UnavailableError as error:
            refused[name] = str(error)
        except Exception as error:  # a peer, or an implementation, that breaks must not end the whole run
            refused[name] = f"broke: {type(error).__name__}: {str(error).strip()[:500]}"
        else:
            steps[name] = step
        if name in refused:
            say(f"  {name}: {refused[name]}")
    return steps


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_module(
    key: str,
    precision: str,
    device: str,
    *,
    names: Sequence[str] = VARIANTS,
    chip: Chip | None = None,
    say: Say = print,
    **timing: Any,
) -> dict[str, Any]:
    """Forward, and forward with backward, of one layer at each published rank, and their mean over the tower.

    timing: options of `bench.timing.compare`.
    """
    setting = SETTINGS[key]
    ranks = setting.shape.ranks()
    found: dict[str, Any] = {"setting": key, "precision": precision, "refused": {}, "ranks": {}, "variants": {}}
    for rank in sorted(set(ranks)):
        say(f"{setting.name}, {precision}: attention module, rank {rank}")

        def make(name: str, rank: int = rank) -> Step:
            from bench.peers import blocks_of

            model = build(name, setting, [rank], device, precision)
            return module_step(blocks_of(model)[0], setting, device, precision)

        steps = _ready(names, make, found["refused"], say)
        with torch.no_grad():
            inference = compare({n: s.forward for n, s in steps.items()}, device, **timing)
        both = compare({n: s.both for n, s in steps.items()}, device, **timing)
        x_bytes = setting.shape.row * (2 if precision == "fp32" else 1)  # the module's input is kept as well
        found["ranks"][str(rank)] = {
            name: {
                "inference": inference[name],
                "both": both[name],
                "saved": held_bytes(step.forward, step.known) + x_bytes,
                "peak": peak_bytes(step.both, device),
            }
            for name, step in steps.items()
        }
        del steps
        _free()
    for name in found["ranks"][str(ranks[0])]:
        if all(name in found["ranks"][str(r)] for r in ranks):
            found["variants"][name] = _mean(found, name, ranks, setting, chip)
    return found


def _mean(found: dict[str, Any], name: str, ranks: list[int], setting: Setting, chip: Chip | None) -> dict[str, Any]:
    each = [found["ranks"][str(r)][name] for r in ranks]
    mean = {
        "inference_ms": sum(e["inference"]["median"] for e in each) / len(each) * 1e3,
        "both_ms": sum(e["both"]["median"] for e in each) / len(each) * 1e3,
        "saved_mb": sum(e["saved"] for e in each) / len(each) / 1e6,
        "peak_mb": None if each[0]["peak"] is None else sum(e["peak"] for e in each) / len(each) / 1e6,
    }
    if chip is not None and name in PATHS:
        best = cost(name, setting.shape, [chip])
        for which in (False, True):
            share = best.seconds(chip.name, which) * 1e3 / mean["both_ms"]
            mean["share_of_reached" if which else "share_of_peak"] = share
    return mean


def measure_tower(
    key: str, precision: str, device: str, *, names: Sequence[str] = VARIANTS, say: Say = print, **timing: Any
) -> dict[str, Any]:
    """The training step of the whole tower, at the published ranks."""
    setting = SETTINGS[key]
    say(f"{setting.name}, {precision}: training step of the tower")
    refused: dict[str, str] = {}

    def make(name: str) -> Step:
        model = build(name, setting, setting.shape.ranks(), device, precision)
        return tower_step(model, setting, device, precision)

    steps = _ready(names, make, refused, say)
    times = compare({n: s.both for n, s in steps.items()}, device, **{"rounds": 9, "sample_seconds": 0.1, **timing})
    peaks = {n: peak_bytes(s.both, device) for n, s in steps.items()}
    variants = {
        n: {"both_ms": times[n]["median"] * 1e3, "peak_mb": None if p is None else p / 1e6, "times": times[n]}
        for n, p in peaks.items()
    }
    del steps
    _free()
    return {"setting": key, "precision": precision, "refused": refused, "variants": variants}


def profile(key: str, precision: str, device: str, name: str, rank: int = 2, rows: int = 14) -> list[dict[str, Any]]:
    """Where the module's time goes: its kernels, the longest first, in microseconds per forward and backward."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from bench.peers import blocks_of

    setting = SETTINGS[key]
    step = module_step(blocks_of(build(name, setting, [rank], device, precision))[0], setting, device, precision)
    step.both()
    step.both()
    calls = 3
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profiled(activities=kinds) as seen:
        for _ in range(calls):
            step.both()
        if device == "cuda":
            torch.cuda.synchronize()
    what = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = [
        {"kernel": e.key, "microseconds": getattr(e, what) / calls, "calls": e.count / calls}
        for e in seen.key_averages()
        if getattr(e, what) > 0 and (device != "cuda" or "CUDA" in str(e.device_type))
    ]
    return sorted(found, key=lambda e: -e["microseconds"])[:rows]
