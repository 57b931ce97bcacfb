"""The MMD on a CPU, forward and backward: times in turn, extra peak memory, growth with N and D, against other ways.

    python -m bench.bench_mmd --json bench/results/mmd-cpu.json --doc docs/results/mmd-cpu.md

Every ratio is of medians of the same run, the candidates taking turns. Memory is what a process of its own adds to its
resident size at the most, gradient included, beyond the features. pytest-benchmark finds a small problem here as well.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.markdown import table
from bench.mmd_peers import PEERS, check_peer, refusal
from bench.timing import compare
from fastheads.losses import mmd
from fastheads.ops import native

# samples of all domains, width, domains, layers
SETTINGS = {
    "3 × 2048 × 768": (6144, 768, 3, 1),
    "3 × 256 × 768": (768, 768, 3, 1),
    "12 layers × 36 × 768": (36, 768, 3, 12),
    "16384 × 768": (16384, 768, 2, 1),
}
LARGE = "16384 × 768"
# setting: (least speed-up over DomainBed, largest share of its extra memory, largest extra MB); KEOPS: over KeOps
KEOPS = ("3 × 256 × 768", 50.0)
TARGETS = {
    "3 × 2048 × 768": (3.0, 0.05, None),
    "12 layers × 36 × 768": (10.0, None, None),
    "16384 × 768": (None, None, 300),
}
GROWTH_N = (512, 1024, 2048, 4096, 8192)
GROWTH_D = (64, 256, 768, 1536)
GROWTH_FIXED = (4096, 768)


def features(setting: str) -> Tensor:
    """`[L, N, D]`, domains one after the other, a little apart, of the size that ViT features have."""
    N, D, S, L = SETTINGS[setting]
    return batch(N, D, S, L)


def batch(N: int, D: int, S: int, L: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(L, N, D, generator=g) / D**0.5
    return x + torch.arange(S).repeat_interleave(N // S).view(1, N, 1) * 0.1 / D**0.5


def step(name: str, x: Tensor, S: int) -> Callable[[], None]:
    """Forward and backward of one candidate: a peer's name, or "ours: " and a preset. x `[L, N, D]`."""
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        if name.startswith("ours: "):
            ids = torch.arange(S).repeat_interleave(x.shape[1] // S)
            loss = mmd(x, ids, num_domains=S, kernel=name.removeprefix("ours: "), impl="cpu")
        elif name == "reference":
            ids = torch.arange(S).repeat_interleave(x.shape[1] // S)
            loss = mmd(x, ids, num_domains=S, kernel="domainbed", impl="reference")
        else:  # a layer at a time: none of them knows layers
            formula = PEERS[name][0]
            loss = torch.stack([formula(layer.chunk(S)) for layer in x.unbind(0)]).mean()
        loss.backward()

    return run


# ---------------------------------------------------------------------------------------------------------- memory


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure_memory(name: str, setting: str) -> tuple[int, float]:
    """Bytes that one step adds at its peak, in this process, and its seconds; Linux."""
    N, D, S, L = SETTINGS[setting]
    step(name, batch(12 * S, 32, S), S)()  # libraries, threads and code that any first call loads
    run = step(name, features(setting), S)
    gc.collect()
    with contextlib.suppress(OSError):  # else the peak so far stands, lower than what follows
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    started = time.perf_counter()
    run()
    return _status("VmHWM") - before, time.perf_counter() - started


def memory_in_process(name: str, setting: str, threads: int) -> tuple[int | str, float]:
    """`measure_memory` in a process of its own, or why it has no result."""
    command = [sys.executable, "-m", "bench.bench_mmd", "--memory", name, setting, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"broke: {(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}", math.nan
    found, seconds = done.stdout.split()[-2:]
    return int(found), float(seconds)


# ----------------------------------------------------------------------------------------------------------- times


def matmul_rate(n: int = 2048, rounds: int = 5) -> float:
    """Floating-point operations per second of float32 `[n, n] @ [n, n]`, the median of `rounds`."""
    a = torch.randn(n, n)
    found = compare({"mm": lambda: a @ a}, "cpu", rounds=rounds, sample_seconds=0.2)
    return 2 * n**3 / found["mm"]["median"]


def flops(N: int, D: int, L: int = 1) -> int:
    """Of the two products, distances on and above the diagonal only: N²D and 2 N²D."""
    return 3 * L * N * N * D


def compare_cold(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """As `bench.timing.compare`, for what takes too long to be called often: every call counts."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - started)
    return {name: summary(found) for name, found in samples.items()}


def summary(s: list[float]) -> dict[str, float]:
    return {"median": statistics.median(s), "low": min(s), "high": max(s), "min": min(s), "samples": len(s)}


def measure_setting(setting: str, rounds: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    N, D, S, L = SETTINGS[setting]
    names = ["ours: domainbed", "ours: adaptive", "ours: dan", *PEERS]
    refused = {n: why for n in PEERS if (why := refusal(n, N, D, S, L))}
    if setting == LARGE:  # what this is about is memory; one of ours stands for all three
        names = ["ours: domainbed", *PEERS]
    rate = matmul_rate()
    runs: dict[str, Callable[[], Any]] = {}
    for name in names:
        if name not in refused:
            runs[name] = step(name, features(setting), S)
    say(f"{setting}: {', '.join(runs)}")
    alone = {n: memory_in_process(n, setting, threads) for n in runs}
    memory = {n: bytes_ for n, (bytes_, _) in alone.items()}
    if setting == LARGE:  # minutes a call: the one that memory was taken of
        times = {n: summary([seconds]) for n, (_, seconds) in alone.items()}
    elif N * N * L > 2**24 or "KeOps" in runs:  # seconds a call: no warm-up but of the library
        for name in runs:
            step(name, batch(12 * S, 32, S), S)()
        times = compare_cold(runs, rounds)
    else:
        times = compare(runs, "cpu", rounds=rounds, sample_seconds=0.05)
    rate = (rate * matmul_rate()) ** 0.5  # before and after, for the machine may be busy with other things
    for n, m in memory.items():
        say(f"  {n}: {times[n]['median'] * 1e3:.1f} ms, {m / 1e6 if isinstance(m, int) else m} MB")
    share = flops(N, D, L) / times["ours: domainbed"]["median"] / rate
    found = {"times": times, "memory": memory, "refused": refused, "matmul_rate": rate, "share_of_matmul": share}
    return found | {"load": os.getloadavg()}


def measure_growth(rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Ours against N and D, and the share of the matmul rate each reaches."""
    found = []
    shapes = [(n, GROWTH_FIXED[1]) for n in GROWTH_N] + [(GROWTH_FIXED[0], d) for d in GROWTH_D]
    for N, D in dict.fromkeys(shapes):
        a, b = torch.randn(1024, D), torch.randn(4096, D)
        runs: dict[str, Callable[[], Any]] = {"ours": step("ours: domainbed", batch(N, D, 2), 2)}
        runs["pull"] = lambda a=a, b=b: (a @ b.mT) @ b
        times = compare(runs, "cpu", rounds=rounds, sample_seconds=0.1)
        rate = 4 * 1024 * 4096 * D / times["pull"]["median"]  # of products of this depth, in turn with ours
        seconds = times["ours"]["median"]
        row = {"N": N, "D": D, "seconds": seconds, "share_of_matmul": flops(N, D) / seconds / rate}
        row |= {"matmul_rate": rate, "low": times["ours"]["low"], "high": times["ours"]["high"]}
        say(f"  N {N}, D {D}: {seconds * 1e3:.1f} ms, {row['share_of_matmul']:.0%} of the products' rate")
        found.append(row)
    return found


# ------------------------------------------------------------------------------------------------------- the result


def machine(threads: int) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "native": native.describe(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg(),
    }


def _ratio(setting: str, found: dict[str, Any]) -> tuple[float | None, float | None]:
    """Speed-up over DomainBed and share of its extra memory."""
    t, m = found["times"], found["memory"]
    if "DomainBed" not in t:
        return None, None
    mine, theirs = m["ours: domainbed"], m["DomainBed"]
    share = mine / theirs if isinstance(mine, int) and isinstance(theirs, int) and theirs else None
    return t["DomainBed"]["median"] / t["ours: domainbed"]["median"], share


def verdicts(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Setting, target, what came out, and whether it is met."""
    rows = []
    for setting, (speed, share, megabytes) in TARGETS.items():
        if setting not in results["settings"]:
            continue
        found = results["settings"][setting]
        ratio, part = _ratio(setting, found)
        own = found["memory"]["ours: domainbed"]
        if speed is not None:
            rows.append(
                (
                    setting,
                    f"≥ {speed:.0f} × faster than DomainBed",
                    f"{ratio:.1f} ×" if ratio else "–",
                    ratio and ratio >= speed,
                )
            )
        if share is not None:
            rows.append(
                (setting, f"≤ {share:.0%} of its extra memory", f"{part:.1%}" if part else "–", part and part <= share)
            )
        if megabytes is not None:
            shown = f"{own / 1e6:.0f} MB" if isinstance(own, int) else own
            rows.append((setting, f"≤ {megabytes} MB extra", shown, isinstance(own, int) and own <= megabytes * 1e6))
    keops = results["settings"].get(KEOPS[0], {}).get("times", {})
    if "KeOps" in keops:
        ratio = keops["KeOps"]["median"] / keops["ours: domainbed"]["median"]
        rows.append((KEOPS[0], f"≥ {KEOPS[1]:.0f} × faster than KeOps", f"{ratio:.0f} ×", ratio >= KEOPS[1]))
    if not results.get("growth"):
        return [(a, b, c, "yes" if met else "no") for a, b, c, met in rows]
    largest = max(results["growth"], key=lambda r: r["N"] * r["N"] * r["D"])
    got = largest["share_of_matmul"]
    rows.append((f"{largest['N']} × {largest['D']}", "≥ 70 % of the matmul rate", f"{got:.0%}", got >= 0.7))
    return [(a, b, c, "yes" if met else "no") for a, b, c, met in rows]


def document(results: dict[str, Any]) -> str:
    m = results["machine"]
    load = ", ".join(f"{v:.1f}" for v in m["load"])
    lines = [
        "# The MMD on a CPU",
        "",
        "Written by `python -m bench.bench_mmd --json bench/results/mmd-cpu.json --doc docs/results/mmd-cpu.md`.",
        "",
        "Forward and backward, float32; medians of one run in which the candidates take turns, in brackets quartiles",
        f"(3 × 2048: the extremes). {LARGE} is one call each, in processes of their own.",
        "Memory is what a process of its own adds at its peak, the gradient included, beyond the features.",
        "",
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, native kernels: {m['native']},",
        f"torch {m['torch']}, {m['date']}.",
        f"Load averages when it began: {load} (other jobs ran beside it where this is over 0).",
        "",
        table(("problem", "target", "measured", "met"), verdicts(results)),
    ]
    for setting in (name for name in SETTINGS if name in results["settings"]):
        found = results["settings"][setting]
        lines += ["", f"## {setting}", ""]
        rows = []
        for name, t in found["times"].items():
            same = (
                "ours: domainbed"
                if name.startswith("ours") or f"ours: {PEERS[name][1]}" not in found["times"]
                else f"ours: {PEERS[name][1]}"
            )
            base = found["times"][name if name.startswith("ours") else same]["median"]
            memory = found["memory"][name]
            rows.append(
                (
                    name,
                    f"{t['median'] * 1e3:,.1f} [{t['low'] * 1e3:,.1f}, {t['high'] * 1e3:,.1f}]",
                    f"{t['median'] / base:.1f} ×",
                    f"{memory / 1e6:,.0f}" if isinstance(memory, int) else memory,
                )
            )
        lines.append(table(("", "ms", "of ours", "extra MB"), rows))
        lines += ["", *(f"{name}: not run: {why}  " for name, why in found["refused"].items())]
        lines.append(
            f"`[2048, 2048]` products reach {found['matmul_rate'] / 1e9:.0f} GFLOP/s here; "
            f"ours (domainbed) does its 3 N²D at {found['share_of_matmul']:.0%} of that."
        )
    if not results.get("growth"):
        return "\n".join(lines).rstrip() + "\n"
    lines += ["", "## Growth with N and D", ""]
    growth = [(r["N"], r["D"], f"{r['seconds'] * 1e3:,.1f}", f"{r['share_of_matmul']:.0%}") for r in results["growth"]]
    lines.append(table(("N", "D", "ms", "of the matmul rate"), growth))
    lines += ["", *slopes(results["growth"])]
    return "\n".join(lines).rstrip() + "\n"


def slopes(growth: Sequence[dict[str, Any]]) -> list[str]:
    """The exponents of N and D, from the last doubling of each, in words."""

    def slope(rows: Sequence[dict[str, Any]], key: str) -> float:
        a, b = rows[-2:]
        return math.log(b["seconds"] / a["seconds"]) / math.log(b[key] / a[key])

    by_n = sorted((r for r in growth if r["D"] == GROWTH_FIXED[1]), key=lambda r: r["N"])
    by_d = sorted((r for r in growth if r["N"] == GROWTH_FIXED[0]), key=lambda r: r["D"])
    first, last = by_d[0], by_d[-1]
    each = (last["seconds"] - first["seconds"]) / (last["D"] - first["D"])
    rest = first["seconds"] - each * first["D"]
    return [
        f"From its last step on, time goes with N^{slope(by_n, 'N'):.2f} and, at N = {GROWTH_FIXED[0]}, with",
        f"D^{slope(by_d, 'D'):.2f}: the two products are in proportion to N²D; distances, exponentials and sums to N².",
        f"A line through the widths puts the latter at {max(rest, 0) * 1e3:.0f} ms, the products of {GROWTH_FIXED[1]}",
        f"features at {each * GROWTH_FIXED[1] * 1e3:.0f} ms.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_mmd", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--doc", type=Path, help="where the tables go")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", action="append", choices=(*SETTINGS, "growth"), help="measure these again; the file's others stay"
    )
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "SETTING"), help="print one candidate's extra peak bytes")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.memory:
        print(*measure_memory(*options.memory))
        return
    for name in PEERS:
        if not refusal(name, 24, 6, 2):
            difference = check_peer(name)
            if difference > 1e-10:
                raise SystemExit(f"{name} is not the same formula as ours: off by {difference:.1e}")
    results: dict[str, Any] = {"settings": {}}
    if options.only and options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    results.setdefault("machine", machine(options.threads))
    asked = options.only or (*SETTINGS, "growth")
    for setting in (name for name in SETTINGS if name in asked):
        results["settings"][setting] = measure_setting(setting, options.rounds, options.threads, print)
    if "growth" in asked:
        print("growth with N and D")
        results["growth"] = measure_growth(options.rounds, print)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = document(results)
    if options.doc:
        options.doc.write_text(text, encoding="utf-8")
    print(text)


@pytest.mark.parametrize("name", ["ours: domainbed", "DomainBed", "reference"])
def test_mmd(benchmark: Any, name: str) -> None:
    """Forward and backward of 3 × 256 × 768."""
    benchmark.group = "MMD, 3 × 256 × 768"
    benchmark.pedantic(step(name, batch(768, 768, 3), 3), rounds=10, warmup_rounds=3)


@pytest.mark.parametrize("name", [n for n in PEERS if n != "KeOps"])
def test_peers_are_the_same_formula(name: str) -> None:
    assert check_peer(name) < 1e-10


if __name__ == "__main__":
    main()
