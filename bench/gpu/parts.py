"""The parts of `bench.gpu` that are not pytest's, each in a process of its own: rates, sweeps, profile and snapshot.

    python -m bench.gpu.parts NAME --out DIR --seconds S [--rehearse]

Each writes its results to DIR as it goes, so that what was measured before its time was over is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import bench.base.checkout  # noqa: F401

SWEEPS = ("batch", "length", "rank", "closed")
LEAST = 1.0  # seconds, for a sweep to begin


def write_json(file: Path, content: Any) -> None:
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


# ------------------------------------------------------------------------------------------------------------ rates


def median_seconds(run: Callable[[], Any], device: str, rounds: int) -> float:
    from bench.base.timing import compare

    return compare({"": run}, device, rounds=rounds, sample_seconds=0.05 if device == "cuda" else 0.01)[""]["median"]


def rates(out: Path, seconds: float, rehearse: bool) -> None:
    """Bytes per second of a copy (read and written), operations per second of square products."""
    device = "cpu" if rehearse else "cuda"
    rounds, size, n = (3, 2**20, 128) if rehearse else (15, 2**30, 8192)
    found: dict[str, Any] = {"copied_bytes": size, "n": n}
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * size / median_seconds(lambda: target.copy_(source), device, rounds)
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        if rehearse and name in ("bf16", "fp16"):
            continue  # a CPU without these instructions takes seconds
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            found[name] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b, device, rounds)  # type: ignore[misc]
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    write_json(out / "rates.result.json", found)


# ----------------------------------------------------------------------------------------------------------- sweeps


def sweeps(out: Path, seconds: float, rehearse: bool) -> None:
    """`bench.sweeps`, kind by kind; one that is in DIR already is not run again."""
    from bench.sweeps import main as sweep

    until = time.monotonic() + seconds
    todo = [kind for kind in SWEEPS if not (out / f"sweep-{kind}.rows.json").exists()]
    for i, kind in enumerate(todo):
        share = (until - time.monotonic()) / (len(todo) - i)
        if share < LEAST:
            raise SystemExit(f"no time left for the sweeps of {', '.join(todo[i:])}")
        command = [kind, "--json", str(out / f"sweep-{kind}.rows.json"), "--seconds", f"{share:.0f}"]
        print(f"sweep: {kind}, {share:.0f} s", flush=True)
        sweep([*command, *(["--rehearse", "--device", "cpu"] if rehearse else [])])


# ---------------------------------------------------------------------------------------------------------- profile


def step_case(rehearse: bool, kind: str = "model step") -> Any:
    from bench.contests.models import SETTINGS
    from bench.contests.vision import VisionCase

    if rehearse:
        return VisionCase(kind, "tiny", 1, "cpu", "fp32", (2,))
    ranks = SETTINGS["B/16"].ranks() if kind == "model step" else (2,)
    return VisionCase(kind, "B/16", 256, "cuda", "amp", ranks)


def profile(out: Path, seconds: float, rehearse: bool) -> None:
    """Kernels by time and launches, of a step and of the paper's MMD, with traces; what memory a step allocates."""
    from bench.contests.contenders.ways import AUTO, way
    from bench.contests.vision import trial
    from bench.gpu.profiling import profile as profiled

    found: dict[str, Any] = {}
    for name, chosen, kind in (
        ("step, ours", AUTO, "model step"),
        ("step, stock", way("stock"), "model step"),
        ("attention module, ours", AUTO, "block"),
    ):
        trace = out / f"trace-{name.replace(', ', '-').replace(' ', '-')}.json"
        found[name] = profiled(step_case(rehearse, kind), chosen, trace=trace)
        write_json(out / "profile.result.json", found)
    found["mmd, 12 × 36 × 768"] = mmd_kernels(rehearse)
    write_json(out / "profile.result.json", found)
    if not rehearse:
        step = trial(step_case(rehearse), AUTO)
        step.run()
        torch.cuda.memory._record_memory_history()
        step.run()
        torch.cuda.memory._dump_snapshot(str(out / "memory-snapshot.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


def mmd_kernels(rehearse: bool) -> list[dict[str, Any]]:
    """What one forward and backward pass of `fastheads.mmd` on 12 × 36 × 768 launches; preparing its input is not."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    import fastheads

    device, width = ("cpu", 16) if rehearse else ("cuda", 768)
    x = torch.randn(12, 36, width, device=device, requires_grad=True)
    ids = torch.arange(3, device=device).repeat_interleave(12)
    seed = torch.ones((), device=device)

    def run() -> None:
        torch.autograd.grad(fastheads.mmd(x, ids, num_domains=3), [x], seed)

    run()
    cuda = device == "cuda"
    with profiled(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        run()
        if cuda:
            torch.cuda.synchronize()
    what = "self_device_time_total" if cuda else "self_cpu_time_total"
    return [
        {"kernel": e.key, "microseconds": getattr(e, what), "calls": e.count}
        for e in seen.key_averages()
        if getattr(e, what) > 0 and (not cuda or "CUDA" in str(e.device_type))
    ]


PARTS = {"rates": rates, "sweeps": sweeps, "profile": profile}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.parts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=tuple(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    PARTS[given.name](given.out, given.seconds, given.rehearse)
    return 0


if __name__ == "__main__":
    sys.exit(main())
