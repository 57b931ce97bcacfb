"""The parts of `bench.gpu` that are not pytest's, each in a process of its own: rates, sweeps, profile and snapshot.

Each writes its results to DIR as it goes, so that what was measured before its time was over is there.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

import fastheads
from bench import launches
from bench import sweeps as sweeping
from bench.base.results import Row, environment, write, write_json
from bench.base.timing import compare
from bench.base.towers import BATCHES, SETTINGS
from bench.contests.contenders.towers import AUTO, training
from bench.contests.vision import VisionCase

LEAST = 1.0  # seconds, for a sweep to begin


def rates(out: Path, seconds: float, rehearse: bool) -> None:
    """Bytes per second of a copy (read and written), operations per second of square products."""
    device = "cpu" if rehearse else "cuda"
    rounds, size, n = (3, 2**20, 128) if rehearse else (15, 2**30, 8192)

    def taken(run: Callable[[], Any]) -> float:
        found = compare({"": run}, device, rounds=rounds, sample_seconds=0.01 if rehearse else 0.05)
        return found[""]["median"]

    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {"copied_bytes": size, "n": n, "copy": 2 * size / taken(lambda: target.copy_(source))}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        if rehearse and name in ("bf16", "fp16"):
            continue  # a CPU without these instructions takes seconds
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        found[name] = 2 * n**3 / taken(lambda a=a, b=b: a @ b)
    write_json(out / "rates.result.json", found)


def sweeps(out: Path, seconds: float, rehearse: bool) -> None:
    """`bench.sweeps`, kind by kind; one that is in DIR already is not run again."""
    until = time.monotonic() + seconds
    files = {kind: out / f"sweeps-{kind}.rows.json" for kind in sweeping.KINDS}
    todo = [kind for kind, file in files.items() if not file.exists()]
    for i, kind in enumerate(todo):
        share = (until - time.monotonic()) / (len(todo) - i)
        if share < LEAST:
            raise SystemExit(f"no time left for the sweeps of {', '.join(todo[i:])}")
        print(f"sweep: {kind}, {share:.0f} s", flush=True)
        command = [kind, "--json", str(files[kind]), "--seconds", f"{share:.0f}"]
        sweeping.main([*command, *(["--rehearse", "--device", "cpu"] if rehearse else [])])


def kernels(run: Callable[[], Any], calls: int, trace: Path | None = None) -> list[dict[str, Any]]:
    """`kernel`, `microseconds` and `calls` of one call, in the mean over some after a warm-up, the longest first.

    On a GPU of what runs there, launches counted; on a CPU of PyTorch's operations. trace: the profiler's own file.
    """
    run()
    run()
    cuda = torch.cuda.is_available()
    with profiled(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        for _ in range(calls):
            run()
        if cuda:
            torch.cuda.synchronize()
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    what = "self_device_time_total" if cuda else "self_cpu_time_total"
    ran = [e for e in seen.key_averages() if getattr(e, what) > 0 and (not cuda or "CUDA" in str(e.device_type))]
    found = [{"kernel": e.key, "microseconds": getattr(e, what) / calls, "calls": e.count / calls} for e in ran]
    return sorted(found, key=lambda e: -e["microseconds"])


def mmd_step(rehearse: bool) -> Callable[[], Any]:
    """One forward and backward pass of `fastheads.mmd` on the paper's 12 × 36 × 768; its input is there already."""
    device, width = ("cpu", 16) if rehearse else ("cuda", 768)
    x = torch.randn(12, 36, width, device=device, requires_grad=True)
    ids = torch.arange(3, device=device).repeat_interleave(12)
    seed = torch.ones((), device=device)
    return lambda: torch.autograd.grad(fastheads.mmd(x, ids, num_domains=3), [x], seed)


def host(out: Path, seconds: float, rehearse: bool) -> None:
    """The kernels that a layer launches, by form; host time beside stock's, by form and way of launching
    (`bench.launches`), CUDA's share in it. In a rehearsal no times: the interpreter launches nothing."""
    where = (launches.TINY, 1) if rehearse else (SETTINGS["B/16"], BATCHES["B/16"])
    options: dict[str, Any] = {"autocast": not rehearse, "device": "cpu" if rehearse else "cuda", "captured": False}
    found, rows = {}, list[Row]()
    for form in ("stock", *launches.FORMS):
        layer = launches.Layer(form, *where, **options)
        found[f"{form}: {layer.name}"] = kernels(layer.step(), 1)
        write_json(out / "host.result.json", found)
    for autocast in () if rehearse else (True, False):
        rows += launches.timed(autocast, 21, "cuda")
        write(out / "host.rows.json", environment("cuda"), rows)


def profile(out: Path, seconds: float, rehearse: bool) -> None:
    """Kernels by time and launches, of a step and of the paper's MMD, with traces; what memory a step allocates."""

    def case(kind: str) -> VisionCase:
        if rehearse:
            return VisionCase(kind, "tiny", 1, "cpu", "fp32", (2,))
        ranks = SETTINGS["B/16"].ranks() if kind == "model step" else (2,)
        return VisionCase(kind, "B/16", BATCHES["B/16"], "cuda", "amp", ranks)

    found: dict[str, Any] = {}
    runs = {"step, ours": (AUTO, "model step"), "step, stock": (training("stock"), "model step")}
    for name, (contender, kind) in (runs | {"attention module, ours": (AUTO, "block")}).items():
        trace = out / f"trace-{name.replace(', ', '-').replace(' ', '-')}.json"
        found[name] = kernels(contender.trial(case(kind)).run, 3, trace)[:14]
        write_json(out / "profile.result.json", found)
    found["mmd, 12 × 36 × 768"] = kernels(mmd_step(rehearse), 1)
    write_json(out / "profile.result.json", found)
    if not rehearse:
        step = AUTO.tried(case("model step"))
        torch.cuda.memory._record_memory_history()
        step.run()
        torch.cuda.memory._dump_snapshot(str(out / "memory-snapshot.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


PARTS = {"rates": rates, "sweeps": sweeps, "host": host, "profile": profile}


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
