"""Where the time of one call goes: its kernels, the longest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from bench.contests.contenders.ways import Way
from bench.contests.vision import VisionCase, trial

CALLS = 3


def profile(case: VisionCase, way: Way, rows: int = 14, trace: Path | None = None) -> list[dict[str, Any]]:
    """`kernel`, `microseconds` and `calls` of one forward and backward, as the mean of three after a warm-up.

    On a GPU of what runs there, launches counted; on a CPU of PyTorch's operations. trace: where to write the
    profiler's own, for a viewer. Raises NotRunError as `trial` does.
    """
    run = trial(case, way).run
    run()
    run()
    cuda = case.device == "cuda"
    with profiled(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        for _ in range(CALLS):
            run()
        if cuda:
            torch.cuda.synchronize()
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    what = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [
        {"kernel": e.key, "microseconds": getattr(e, what) / CALLS, "calls": e.count / CALLS}
        for e in seen.key_averages()
        if getattr(e, what) > 0 and (not cuda or "CUDA" in str(e.device_type))
    ]
    return sorted(found, key=lambda e: -e["microseconds"])[:rows]
