"""The MMD on a CPU, forward and backward: times in turn, extra peak memory, growth with N and D, against other ways.

    python -m bench.mmd --json bench/results/mmd-cpu.json --doc docs/results/mmd-cpu.md
        --plot docs/results/mmd-growth.png

Every ratio is of medians of the same run, the candidates taking turns. Memory is what a process of its own adds to its
resident size at the most, gradient included, beyond the features. `--parts` measures some parts and leaves the file's
others as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.base.results import environment
from bench.base.timing import compare
from bench.contests.contenders.mmd_peers import PEERS, check_peer, refusal
from bench.report import mmd_page as report
from fastheads.losses import mmd
from fastheads.ops import mmd as operator
from fastheads.ops import native

OURS = ("ours: domainbed", "ours: adaptive", "ours: dan")
# A part: samples of all domains, width, domains, layers; the candidates; rounds, and seconds of one sample of a round.
PARTS: dict[str, tuple[tuple[int, int, int, int], tuple[str, ...], int, float]] = {
    "12 × 36 × 768": ((36, 768, 3, 12), (*OURS, *PEERS), 15, 0.1),
    "3 × 2048 × 768": ((6144, 768, 3, 1), (*OURS, *PEERS), 5, 0.0),
    "3 × 256 × 768": ((768, 768, 3, 1), (OURS[0], "DomainBed", "KeOps"), 5, 0.0),
    "16384 × 768": ((16384, 768, 2, 1), (OURS[0], *PEERS), 1, 0.0),
}
LARGE = "16384 × 768"  # a minute a call for some: one call each, in the process that its memory is taken of
GROWTH_N, GROWTH_D = (256, 512, 1024, 2048, 4096, 8192), (64, 128, 256, 512, 768, 1536)
GROWTH_FIXED = (4096, 768)
DOMAINBED_UP_TO = 4096  # samples, in the growth part


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def batch(N: int, D: int, S: int, L: int = 1) -> Tensor:
    """`[L, N, D]`, domains one after the other, a little apart, of the size that ViT features have."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(L, N, D, generator=g) / D**0.5
    return x + torch.arange(S).repeat_interleave(N // S).view(1, N, 1) * 0.1 / D**0.5


def step(name: str, x: Tensor, S: int) -> Callable[[], None]:
    """Forward and backward of one candidate: a peer's name, or "ours: " and a preset. x `[L, N, D]`."""
    x = x.clone().requires_grad_()
    ids = torch.arange(S).repeat_interleave(x.shape[1] // S)

    def run() -> None:
        x.grad = None
        if name.startswith("ours: "):
            loss = mmd(x, ids, num_domains=S, kernel=name.removeprefix("ours: "), impl="cpu")
        elif name == "reference":
            loss = mmd(x, ids, num_domains=S, kernel="domainbed", impl="reference")
        else:  # a layer at a time: none of them knows layers
            formula = PEERS[name][0]
            loss = torch.stack([formula(layer.chunk(S)) for layer in x.unbind(0)]).mean()
        loss.backward()

    return run


def product(n: int = 2048) -> Callable[[], Tensor]:
    """The product that the machine's rate is taken of: float32 `[n, n] @ [n, n]`."""
    a = torch.randn(n, n)
    return lambda: a @ a


def product_flops(n: int = 2048) -> int:
    return 2 * n**3


def pairs(samples: int, device: str = "cpu") -> int:
    """Pairs of samples whose distance a sweep over one set of them forms, on a "cpu" or on a GPU ("cuda").

    A panel's own square is made whole: of up to 2,048 samples, which are one panel, all N² pairs; of many more, half.
    """
    height = operator.panel_rows(samples, 64 if device == "cpu" else 128)
    return sum(min(height, samples - i) * (samples - i) for i in range(0, samples, height))


def flops(N: int, D: int, L: int = 1) -> int:
    """Of the two products: inner products of the pairs, and their weights times the features, 2 N²D."""
    return L * (2 * pairs(N) * D + 2 * N * N * D)


# ---------------------------------------------------------------------------------------------------------- memory


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure_alone(name: str, part: str) -> dict[str, float]:
    """Bytes that one step adds at its peak in this process, its seconds, and the products' rate after it; Linux."""
    N, D, S, L = PARTS[part][0]
    step(name, batch(12 * S, D, S), S)()  # libraries, threads and code that any first call loads
    run = step(name, batch(N, D, S, L), S)
    gc.collect()
    with contextlib.suppress(OSError):  # else the peak so far stands, lower than what follows
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    started = time.perf_counter()
    run()
    seconds, peak = time.perf_counter() - started, _status("VmHWM")
    found = compare({"product": product()}, "cpu", rounds=3, sample_seconds=0.2)
    return {"bytes": peak - before, "seconds": seconds, "rate": product_flops() / found["product"]["median"]}


def in_process(name: str, part: str, threads: int) -> dict[str, float] | str:
    """`measure_alone` in a process of its own, or why it has no result."""
    command = [sys.executable, "-m", "bench.mmd", "--alone", name, part, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"broke: {(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}"
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# ----------------------------------------------------------------------------------------------------------- parts


def stages(run: Callable[[], None], rounds: int = 3) -> dict[str, float]:
    """Seconds of each stage of our own step, the least of some rounds: where what the products don't take goes."""
    found: dict[str, list[float]] = {}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            out = function(*args, **options)
            found[name][-1] += time.perf_counter() - started
            return out

        return call

    names = {"_samples": "sort and centre", "_run_tile": "exponentials", "_pull": "gradient's products"}
    for _ in range(rounds):
        for name in (*names.values(), "inner products", "step"):
            found.setdefault(name, []).append(0.0)
        with contextlib.ExitStack() as stack:
            for function, name in names.items():
                stack.enter_context(mock.patch.object(operator, function, timed(getattr(operator, function), name)))
            stack.enter_context(mock.patch.object(torch, "bmm", timed(torch.bmm, "inner products")))
            timed(run, "step")()
    whole = min(found["step"])
    best = {name: min(seconds) for name, seconds in found.items() if name != "step"}
    return best | {"the rest": whole - sum(best.values())}


def measure_part(part: str, rounds: int | None, threads: int) -> dict[str, Any]:
    (N, D, S, L), names, own_rounds, sample_seconds = PARTS[part]
    refused = {n: why for n in PEERS if n in names and (why := refusal(n, N, D, S, L))}
    names = tuple(n for n in names if n not in refused)
    for name in names:
        if name in PEERS and (difference := check_peer(name)) > 1e-10:
            raise SystemExit(f"{name} is not the same formula as ours: off by {difference:.1e}")
    say(f"{part}: {', '.join(names)}; refused: {', '.join(refused) or 'none'}")
    alone = {}
    for name in names:
        alone[name] = found = in_process(name, part, threads)
        shown = found if isinstance(found, str) else f"{found['bytes'] / 1e6:,.0f} MB, {found['seconds']:.2f} s"
        say(f"  {name}, in a process of its own: {shown}")
    ran = {n: found for n, found in alone.items() if not isinstance(found, str)}
    result: dict[str, Any] = {"refused": refused | {n: f for n, f in alone.items() if isinstance(f, str)}}
    result["memory"] = {n: int(found["bytes"]) for n, found in ran.items()}
    result["machine"] = machine()
    if part == LARGE:
        result["times"] = {n: report.summary([found["seconds"]]) for n, found in ran.items()}
        result["matmul_rate"] = ran[OURS[0]]["rate"]
    else:
        runs: dict[str, Callable[[], Any]] = {n: step(n, batch(N, D, S, L), S) for n in ran}
        runs["product"] = product()
        times = compare_in_turn(runs, rounds or own_rounds, sample_seconds)
        result["matmul_rate"] = product_flops() / times.pop("product")["median"]
        result |= {"times": times, "stages": stages(runs[OURS[0]])}
        for name, t in times.items():
            say(f"  {name}: {t['median'] * 1e3:,.1f} ms")
    result["share_of_matmul"] = flops(N, D, L) / result["times"][OURS[0]]["median"] / result["matmul_rate"]
    say(f"  {result['share_of_matmul']:.0%} of the products' rate, {result['matmul_rate'] / 1e9:.0f} GFLOP/s")
    return result


def compare_in_turn(runs: dict[str, Callable[[], Any]], rounds: int, sample_seconds: float) -> dict[str, Any]:
    """`timing.compare`; with sample_seconds 0 for what takes seconds a call: no warm-up, every call counts."""
    if sample_seconds:
        return compare(runs, "cpu", rounds=rounds, sample_seconds=sample_seconds)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(rounds):
        for name, run in runs.items():
            if name == "reference" and at >= 3:
                continue  # the slowest, and nobody's target
            started = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - started)
        say(f"  round {at + 1} of {rounds}")
    return {name: report.summary(found) for name, found in samples.items()}


def measure_growth(rounds: int | None) -> dict[str, Any]:
    """Ours against N and D, in turn with DomainBed's and with the product that the rate is taken of."""
    say("growth with N and D")
    rows = []
    shapes = [(n, GROWTH_FIXED[1]) for n in GROWTH_N] + [(GROWTH_FIXED[0], d) for d in GROWTH_D]
    for N, D in dict.fromkeys(shapes):
        runs: dict[str, Callable[[], Any]] = {"ours": step(OURS[0], batch(N, D, 2), 2), "product": product()}
        if N <= DOMAINBED_UP_TO:
            runs["DomainBed"] = step("DomainBed", batch(N, D, 2), 2)
        times = compare(runs, "cpu", rounds=rounds or (3 if N * D > 2**21 else 5), sample_seconds=0.1)
        rate = product_flops() / times["product"]["median"]
        row: dict[str, Any] = {"N": N, "D": D, "matmul_rate": rate, "seconds": times["ours"]["median"]}
        row["share_of_matmul"] = flops(N, D) / row["seconds"] / rate
        row["DomainBed"] = times["DomainBed"]["median"] if "DomainBed" in times else None
        row["stages"] = stages(runs["ours"])
        say(f"  N {N}, D {D}: {row['seconds'] * 1e3:,.1f} ms, {row['share_of_matmul']:.0%} of the products' rate")
        rows.append(row)
    return {"rows": rows, "machine": machine()}


def machine() -> dict[str, Any]:
    return environment("cpu") | {"native": native.describe(), "load": os.getloadavg()[0]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mmd", description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the numbers go; parts that are not measured now stay")
    parser.add_argument("--doc", type=Path, help="where the tables go")
    parser.add_argument("--plot", type=Path, help="where the picture of the growth goes (PNG)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="of every part, in place of its own number")
    every = (*PARTS, "growth")
    parser.add_argument("--parts", nargs="*", choices=every, default=every, metavar="PART", help=", ".join(every))
    parser.add_argument("--alone", nargs=2, metavar=("NAME", "PART"), help="one candidate's extra peak bytes and time")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.alone:
        print(json.dumps(measure_alone(*options.alone)))
        return
    results: dict[str, Any] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    started = time.monotonic()
    for part in (p for p in every if p in options.parts):
        if part == "growth":
            results[part] = measure_growth(options.rounds)
        else:
            results[part] = measure_part(part, options.rounds, options.threads)
        if options.json:  # after every part: what is measured is kept
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"{time.monotonic() - started:.0f} s in all")
    if options.plot and "growth" in results:
        report.plot(results["growth"]["rows"], options.plot)
    text = report.document(results, list(PARTS), options.plot)
    if options.doc:
        options.doc.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
