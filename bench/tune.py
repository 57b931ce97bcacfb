"""The search for tile rows on a GPU: each candidate is checked against the default's output, then timed.

`--open`: of the rows alone that were left open (`OPEN_BACKWARD` in kernels/tiles.py), five seconds each. Writes
tune.result.json, or tiles.result.json, problem by problem; started again, it goes on with those that are not there.
Prints, where a candidate is faster, the row to paste into FORWARD or BACKWARD (kernels/tiles.py). A new row is compiled
for its chips first (`python -m bench.compile_report`): no spills.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.base.results import read_json, write_json
from bench.base.timing import compare
from bench.base.towers import BATCHES, SETTINGS
from bench.contests.contest import first_line

TOWERS = ("B/16", "L/14", "H/14")
LENGTHS = (197, 257, 577, 50)
TOKENS = 256 * 197
# Both outputs are rounded to bfloat16 and so is P inside: a few units in the last place, 2⁻⁸, of the largest value.
ALLOWED = 2.0**-6
GAIN = 1.03  # by so much a candidate must be faster, or the row is not worth changing
OPEN_SECONDS = 5.0


class Problem(NamedTuple):
    """direction: "forward" or "backward". deltas: with low-rank deltas of q and v (`delta`), else without."""

    direction: str
    tower: str
    heads: int
    head_dim: int
    length: int
    batch: int
    deltas: bool
    device: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        form = "delta" if self.deltas else "stacked"
        return f"{self.direction}, {self.tower}, head {self.head_dim}, N {self.length}, {form}"


def problems(rehearse: bool) -> list[Problem]:
    if rehearse:
        each = (("forward", False), ("backward", True))
        return [Problem(d, "tiny", 1, 16, 20, 1, deltas, "cpu", torch.float32) for d, deltas in each]
    found = []
    for n, tower, d, deltas in itertools.product(LENGTHS, TOWERS, ("backward", "forward"), (False, True)):
        heads = SETTINGS[tower].heads, SETTINGS[tower].head_dim
        found.append(Problem(d, tower, *heads, n, max(1, TOKENS // n), deltas, "cuda", torch.bfloat16))
    return found


def candidates(p: Problem) -> list[Any]:
    from fastheads.kernels.tiles import LONGEST_ON_CHIP, Row

    if p.direction == "backward":
        if p.device == "cpu":
            return [Row(16, 16, (16, 16), one_launch=True), Row(16, 16, (16, 32))]
        blocks = ((64, 32, 32, 64), (64, 64, 64, 64), (64, 16, 16, 64), (128, 32, 32, 128), (128, 64, 32, 128))
        forms = ({"one_launch": True}, {})
        each = itertools.product(forms, blocks, (4, 8), (1, 2))
        found = [Row(m, n, tuple(key), **form, warps=warps, stages=s) for form, (m, n, *key), warps, s in each]
        at_once = itertools.product((16, 32, 64), (4, 8), (1, 2)) if p.length <= LONGEST_ON_CHIP else ()
        return found + [Row(m, chunk=256, tail=m > 16, warps=warps, stages=s) for m, warps, s in at_once]
    if p.device == "cpu":
        return [Row(32, 16), Row(64, chunk=64)]
    chunks = itertools.product((64, 128), (False, True), (4, 8)) if p.length <= LONGEST_ON_CHIP else ()
    streamed = itertools.product((64, 128), (32, 64), (4, 8), (2, 3))
    found = [Row(64, chunk=largest, tail=tail, warps=warps) for largest, tail, warps in chunks]
    return found + [Row(m, n, warps=warps, stages=stages) for m, n, warps, stages in streamed]


def searched(rehearse: bool) -> dict[Problem, list[Any]]:
    return {p: candidates(p) for p in problems(rehearse)}


def left_open(arch: int) -> dict[Problem, list[Any]]:
    """The problems whose row is open on a chip, and the rows that stand against it; arch 0: of a rehearsal."""
    from fastheads.kernels.tiles import BACKWARD, FAMILY, OPEN_BACKWARD, row_for

    own = [p for p in problems(rehearse=not arch) if p.direction == "backward"]
    if not arch:
        return {p: candidates(p)[:1] for p in own}
    rows = OPEN_BACKWARD.get(FAMILY.get(arch, 0), ())

    def others(p: Problem) -> list[Any]:
        own = row_for(BACKWARD, arch, p.head_dim, p.length, p.dtype).tiles(p.length)
        return [row for row in rows if p.length <= row.length and row.tiles(p.length) != own]

    own = [p for p in own if p.tower in BATCHES and p.length == SETTINGS[p.tower].tokens and not p.deltas]
    return {p: others(p) for p in own if rows}


def run_of(p: Problem) -> Callable[[Any], list[Tensor]]:
    """What a candidate is timed and checked by: its kernel's outputs; None is the default's row."""
    from fastheads.kernels.attention_bwd import attention_bwd
    from fastheads.kernels.attention_fwd import attention_fwd
    from fastheads.kernels.low_rank import LowRank
    from fastheads.kernels.sums import sums

    torch.manual_seed(0)
    B, N, H, dh, r = p.batch, p.length, p.heads, p.head_dim, 8
    qkv, do = (torch.randn(B, N, d, device=p.device, dtype=p.dtype) for d in (3 * H * dh, H * dh))
    options: dict[str, Any] = {"num_heads": H, "gate": 1 + 0.1 * torch.randn(H, device=p.device), "delta": None}
    if p.deltas:
        low = torch.randn(B, N, 2 * H * r, device=p.device, dtype=p.dtype)
        options["delta"] = LowRank(low, 0.05 * torch.randn(2, H, dh, r, device=p.device), (0, 2), 1.0, False)
    if p.direction == "forward":
        return lambda candidate: list(attention_fwd(qkv, **options, _row=candidate)[:2])
    _, lse, _ = attention_fwd(qkv, **options)

    def backward(candidate: Any) -> list[Any]:
        dqkv, dgates = attention_bwd(do, qkv, lse, **options, _row=candidate)
        return [dqkv, sums(dgates, None)[0]]

    return backward


def off_by(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest difference over the largest value, of the output that is worst; NaN counts as infinite."""
    each = [(one.float(), other.float()) for one, other in zip(found, right, strict=True)]
    off = torch.stack([(one - other).abs().max() / other.abs().max().clamp_min(1e-30) for one, other in each])
    return float(off.nan_to_num(nan=float("inf")).max())


def search(p: Problem, candidates: Sequence[Any], until: float, **timing: Any) -> dict[str, Any]:
    """The default and every candidate in turn; which is fastest, and why others did not take part."""
    run = run_of(p)
    right = run(None)
    runs: dict[str, Callable[[], Any]] = {"default": lambda: run(None)}
    refused: dict[str, str] = {}
    for candidate in candidates:
        name = repr(candidate)
        if time.monotonic() > until:
            refused[name] = "no time left"
            continue
        try:
            error = off_by(run(candidate), right)
        except Exception as problem:  # too much shared memory, a tile that does not compile: not a candidate here
            refused[name] = f"{type(problem).__name__}: {first_line(problem)}"
            continue
        if error > ALLOWED:
            refused[name] = f"wrong: off by {error:.2g} of the largest value"
        else:
            runs[name] = lambda c=candidate: run(c)
    times = {name: took["median"] for name, took in compare(runs, p.device, **timing).items()}
    best, default = min(times, key=times.get), times["default"]
    gain = default / times[best]
    found = {"best": best, "gain": gain, "winner": best if gain > GAIN else "default", "default_seconds": default}
    ratios = {name: seconds / default for name, seconds in times.items()}
    return found | {"times": times, "ratios": ratios, "refused": refused}


def _arch() -> int:
    from fastheads.kernels.launch import architecture

    return architecture(torch.empty(0, device="cuda"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--open", action="store_true", help="only the rows that were left open")
    parser.add_argument("--rehearse", action="store_true", help="tiny problems on the CPU, in the interpreter")
    given = parser.parse_args(argv)
    until, file = time.monotonic() + given.seconds, given.out / f"{'tiles' if given.open else 'tune'}.result.json"
    found: dict[str, Any] = read_json(file) or {}
    each = left_open(0 if given.rehearse else _arch()) if given.open else searched(given.rehearse)
    timing: dict[str, Any] = {"rounds": 1, "sample_seconds": 0.001} if given.rehearse else {"rounds": 9}
    todo = [p for p in each if p.name not in found]
    for i, p in enumerate(todo):
        if time.monotonic() > until:
            raise SystemExit(f"no time left for {len(todo) - i} of {len(todo)} problems, from {p.name} on")
        own = each[p]
        if given.open and not given.rehearse:
            timing = {"rounds": 1000, "seconds": OPEN_SECONDS * (1 + len(own))}
        found[p.name] = result = search(p, own, until, **timing)
        print(f"{p.name}: {len(result['times']) - 1} of {len(own)} candidates ran", flush=True)
        if result["gain"] > GAIN:
            print(f"  {result['gain']:.2f} × the default's speed: {result['best']}", flush=True)
        write_json(file, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
