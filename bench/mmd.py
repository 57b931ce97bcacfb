"""The MMD on a CPU, forward and backward: times in turn, extra peak memory, growth with N and D, against other ways.

Every ratio is of medians of the same run, the candidates taking turns. Memory is what a process of its own adds to its
resident size at the most, gradient included, beyond the features. `--parts` measures some parts and leaves the file's
others as they are.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.base import results
from bench.base.memory import resident_bytes
from bench.base.results import Row
from bench.base.timing import compare, seconds_of, summary
from bench.contests import bench_mmd
from bench.contests.bench_mmd import MMDCase
from bench.contests.contenders.mmd import PEERS
from bench.contests.contest import Contender
from bench.report import mmd_page as page
from bench.report.mmd_page import OURS
from bench.roofline.loops import mmd_pairs
from fastheads.ops import mmd_cpu, native

GROUP = "mmd on a CPU"
CANDIDATES = (OURS, "ours: adaptive", "ours: dan", *PEERS, "reference")
Shape = tuple[int, int, int, int]  # samples of all domains, width, domains, layers
# A part: its shape; the candidates; rounds, and seconds of one sample of a round.
PARTS: dict[str, tuple[Shape, tuple[str, ...], int, float]] = {
    "12 × 36 × 768": ((36, 768, 3, 12), CANDIDATES, 15, 0.1),
    "3 × 2048 × 768": ((6144, 768, 3, 1), CANDIDATES, 5, 0.0),
    "3 × 256 × 768": ((768, 768, 3, 1), (OURS, "DomainBed", "KeOps"), 5, 0.0),
    "16384 × 768": ((16384, 768, 2, 1), (OURS, *PEERS, "reference"), 1, 0.0),
}
LARGE = "16384 × 768"  # a minute a call for some: one call each, in the process that its memory is taken of
GROWTH_N, GROWTH_D = (256, 512, 1024, 2048, 4096, 8192), (64, 128, 256, 512, 768, 1536)
DOMAINBED_UP_TO = 4096  # samples, in the growth part
PRODUCT = 2048


def candidate(name: str, shape: Shape) -> tuple[Contender, MMDCase]:
    """A peer, the reference, or "ours: " and a preset, on `[L, N, D]` of S domains."""
    (N, D, S, L), ours = shape, name.startswith("ours: ")
    preset = name.removeprefix("ours: ") if ours else PEERS[name].kernel if name in PEERS else "domainbed"
    return bench_mmd.GROUP.named("cpu" if ours else name), MMDCase(L, S, N // S, D, preset, "cpu")


def step(name: str, shape: Shape) -> Callable[[], Any]:
    contender, case = candidate(name, shape)
    return contender.trial(case).run


def product() -> Callable[[], Tensor]:
    """The product that the machine's rate is taken of: float32 `[2048, 2048]` with another."""
    a = torch.randn(PRODUCT, PRODUCT)
    return lambda: a @ a


def reached(product: float, seconds: float, shape: Shape) -> dict[str, Any]:
    """The rate of `product`, and what ours has of it: inner products of the pairs, their weights times the features."""
    (N, D, _, L), rate = shape, 2 * PRODUCT**3 / product
    return {"matmul_rate": rate, "share_of_matmul": L * (2 * mmd_pairs(N, D) * D + 2 * N * N * D) / seconds / rate}


def measure_alone(name: str, part: str) -> dict[str, float]:
    """Bytes that one step adds at its peak in this process, its seconds, and those of `product` after it."""
    shape = N, D, S, L = PARTS[part][0]
    step(name, (12 * S, D, S, 1))()  # libraries, threads and code that any first call loads
    run, seconds = step(name, shape), list[float]()
    added = resident_bytes(lambda: seconds.append(seconds_of(run, 1, "cpu")))
    after = compare({"": product()}, "cpu", rounds=3, sample_seconds=0.2)[""]["median"]
    return {"bytes": added, "seconds": seconds[0], "product": after}


def in_process(name: str, part: str, threads: int) -> dict[str, float] | str:
    """`measure_alone` in a process of its own, or why it has no result."""
    command = [sys.executable, "-m", "bench.mmd", "--alone", name, part, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"broke: {(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}"
    return json.loads(done.stdout.splitlines()[-1])


def stages(run: Callable[[], Any], rounds: int = 3) -> dict[str, float]:
    """Seconds of each stage of our own step, the least of some rounds: where what the products don't take goes."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * rounds)

    def timed(name: str, at: int, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        out = function(*args, **options)
        found[name][at] += time.perf_counter() - started
        return out

    names = {"sort and centre": (mmd_cpu, "load"), "exponentials": (mmd_cpu, "tile")}
    names |= {"gradient's products": (mmd_cpu, "pull_"), "inner products": (torch, "bmm")}
    for at in range(rounds):
        with contextlib.ExitStack() as stack:
            for name, (owner, function) in names.items():
                call = functools.partial(timed, name, at, getattr(owner, function))
                stack.enter_context(mock.patch.object(owner, function, call))
            timed("step", at, run)
    best = {name: min(found[name]) for name in names}
    return best | {"the rest": min(found["step"]) - sum(best.values())}


def measure_in_turn(names: Iterable[str], shape: Shape, rounds: int, sample_seconds: float) -> tuple[Any, Any]:
    """Times of candidates and, since the product takes turns with them, what ours reaches; its stages."""
    runs = {name: step(name, shape) for name in names}
    times = compare({**runs, "": product()}, "cpu", rounds=rounds, sample_seconds=sample_seconds)
    found = reached(times.pop("")["median"], times[OURS]["median"], shape) | {"stages": stages(runs[OURS])}
    said = f"{times[OURS]['median'] * 1e3:,.1f} ms, {found['share_of_matmul']:.0%} of the products' rate"
    print(f"  {shape[0]} × {shape[1]}, ours: {said}", flush=True)
    return times, found


def measure_part(part: str, threads: int, rounds: int | None) -> dict[str, Any]:
    """Environment, rows, and what of the machine's rate ours reaches."""
    shape, names, own_rounds, sample_seconds = PARTS[part]
    rows, alone = [], dict[str, dict[str, float]]()
    for name in names:
        contender, case = candidate(name, shape)
        why = contender.why_not(case)
        if not why and bench_mmd.GROUP.check(contender, case).status != "ok":
            raise SystemExit(f"{name} is not the same formula as ours")
        found = why or in_process(name, part, threads)
        if isinstance(found, str):
            rows.append(Row(GROUP, part, name, "not run", found))
            print(f"{part}: {name}: {found}", flush=True)
            continue
        alone[name] = found
        said = f"{found['bytes'] / 1e6:,.0f} MB, {found['seconds']:.2f} s"
        print(f"{part}: {name}, in a process of its own: {said}", flush=True)
    if part == LARGE:
        times, ours = {name: summary([found["seconds"]]) for name, found in alone.items()}, alone[OURS]
        beside = reached(ours["product"], ours["seconds"], shape)
    else:
        times, beside = measure_in_turn(alone, shape, rounds or own_rounds, sample_seconds)
    rows += [Row(GROUP, part, n, seconds=t, peak_bytes=int(alone[n]["bytes"])) for n, t in times.items()]
    return {"environment": machine(), "rows": list(map(results.fields, rows)), **beside}


def measure_growth(rounds: int | None) -> dict[str, Any]:
    """Ours against N and D, in turn with DomainBed's."""
    rows = []
    shapes = [(n, page.GROWTH_WIDTH) for n in GROWTH_N] + [(page.GROWTH_SAMPLES, d) for d in GROWTH_D]
    for N, D in dict.fromkeys(shapes):
        names = (OURS, "DomainBed") if N <= DOMAINBED_UP_TO else (OURS,)
        times, found = measure_in_turn(names, (N, D, 2, 1), rounds or (3 if N * D > 2**21 else 5), 0.1)
        for name, took in times.items():
            extra = {"N": N, "D": D, **found} if name == OURS else None
            rows.append(Row(GROUP, f"N {N}, D {D}", name, seconds=took, extra=extra))
    return {"environment": machine(), "rows": list(map(results.fields, rows))}


def machine() -> dict[str, Any]:
    return results.environment("cpu") | {"native": native.describe(), "load": os.getloadavg()[0]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mmd", description=(__doc__ or "").splitlines()[0])
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
        return 0
    content: dict[str, Any] = (options.json and results.read_json(options.json)) or {}
    for part in (p for p in every if p in options.parts):
        measure = measure_growth if part == "growth" else functools.partial(measure_part, part, options.threads)
        content[part] = measure(options.rounds)
        if options.json:  # after every part: what is measured is kept
            results.write_json(options.json, content)
    if options.plot and "growth" in content:
        page.plot(content["growth"], options.plot)
    text = page.document(content, list(PARTS), options.plot)
    if options.doc:
        options.doc.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
