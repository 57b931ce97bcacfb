"""What happens along a line: ours, stock OpenCLIP and plain-PyTorch HA-LoRA, against one quantity.

    batch     a training step of whole models, up to the largest batch that fits by the ledger (`fastheads.ledger`)
    length    one attention module, sequences of N tokens, tokens in all fixed
    rank      one attention module, the deltas' rank
    closed    one attention module, the share of heads whose gate is 0

Contenders of one x take turns; in `batch` each has the memory, and so the machine, to itself. What `--seconds` leaves
no time for is in the file as not run.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.base.memory import available_bytes, peak_bytes
from bench.base.results import Row, environment, write
from bench.base.tables import sweep_tables
from bench.base.timing import compare
from bench.base.towers import SETTINGS
from bench.contests.contenders.towers import AUTO, AUTO_RECOMPUTE, training
from bench.contests.contest import Contender, NotRunError, Trial, first_line, free
from bench.contests.vision import VisionCase
from fastheads.ledger import count, nbytes
from fastheads.train.planning import largest_batch

KINDS = ("batch", "length", "rank", "closed")
CONTENDERS = (AUTO, training("stock"), training("plain"))
REAL = ("B/16", "L/14", "H/14")
LENGTHS = {"cuda": (50, 65, 128, 197, 257, 401, 577, 730, 1024, 2048), "cpu": (25, 50, 100, 197, 400, 800)}
TOKENS = {"cuda": 256 * 197, "cpu": 1600}
RANKS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0, 0.25, 0.5, 0.75, 0.9)
Points = list[tuple[float, VisionCase]]
FINEST = 8  # the largest batch is found to within an eighth


@dataclass
class Sweep:
    """How a sweep runs. precisions: each as a `VisionCase` has it; one module's is the first. budget: bytes that a step
    may take, model included.

    seconds: for everything. rounds, sample_seconds: of `timing.compare`.
    """

    device: str
    precisions: Sequence[str]
    seconds: float
    budget: int
    rounds: int = 7
    sample_seconds: float = 0.1
    say: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self.no_time = f"no time left of {self.seconds:g} s"

    def compare(self, trials: dict[str, Trial], rounds: int) -> dict[str, dict[str, float]]:
        runs = {name: made.run for name, made in trials.items()}
        return compare(runs, self.device, rounds=min(rounds, self.rounds), sample_seconds=self.sample_seconds)

    def left_out(self, group: str, case: str, names: Iterable[str], x: float, why: str) -> None:
        for name in names:
            self.rows.append(Row(group, case, name, "not run", why, x=x))
            self.say(f"  {name}, x = {x:g}: not run, {why}")


def memory_error(error: BaseException) -> str | None:
    """What an error says of memory that ended; None where it is about something else."""
    text = first_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return text or "out of memory"
    return text if "out of memory" in str(error) or "ALLOC_FAILED" in str(error) else None


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest batch up to `most` for which `fits` holds, 0 where there is none: doubled until it is `most`, or
    fails, and then found to within an eighth."""
    if start > most or not fits(start):
        return 0
    good = start
    while good < most:
        bad = min(2 * good, most)
        if not fits(bad):
            break
        good = bad
    while good < most and bad - good > max(1, good // FINEST):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def counted(contender: Contender, case: VisionCase) -> Callable[[int], int]:
    """Bytes of a step at a batch, by the ledger.

    Counted are the last three layers and the last four: all others are like the fourth last.
    """

    def of(batch: int, layers: int) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            made = contender.trial(replace(case, batch=batch, ranks=case.ranks[-layers:]))
            there, forward = list(made.known()), made.forward
            assert forward is not None
            options: Any = {"mode": mode, "device": case.device, "there": there}
            found = count(nn.Module(), tuple, lambda: forward().float().sum(), **options)
        return nbytes(there) + sum(found.peak.values())

    @functools.cache
    def total(batch: int) -> int:
        three, four = of(batch, 3), of(batch, 4)
        return three + (len(case.ranks) - 3) * (four - three)

    return total


def sweep_batch(sweep: Sweep, settings: Sequence[str], contenders: Sequence[Contender], start: int = 1) -> None:
    """Rows per model, contender and batch; the last one's `extra` says that it was the largest, and what ended it."""
    each = [(setting, p, c) for setting in settings for p in sweep.precisions for c in contenders]
    for i, (setting, precision, contender) in enumerate(each):
        share = (sweep.deadline - time.monotonic()) / (len(each) - i)
        case = VisionCase("model step", setting, start, sweep.device, precision, SETTINGS[setting].ranks())
        _grow(sweep, case, contender, time.monotonic() + share)


def _grow(sweep: Sweep, case: VisionCase, contender: Contender, deadline: float) -> None:
    start, where = case.batch, case.name.replace(f", batch {case.batch}", "")
    total = counted(contender, case)
    seen: dict[int, tuple[float, Row]] = {}  # batch: seconds of its calls, its row
    ended = ""

    def fits(batch: int) -> bool:
        nonlocal ended
        before = max(seen, default=0)
        if seen and time.monotonic() + seen[before][0] * batch / before > deadline:
            raise NotRunError(sweep.no_time)
        try:
            took, row = _point(sweep, replace(case, batch=batch), contender, where)
            seen[batch] = took, replace(row, extra={**row.extra, "counted": total(batch)})
            sweep.say(f"  {where}, {contender.name}: batch {batch}, {row.per_second:,.1f} images/s")
        except Exception as error:
            why = memory_error(error)
            if why is None:
                raise
            ended = why
        free()
        return batch in seen

    try:
        most = largest_batch(total, sweep.budget, start)
        ended = f"by the ledger a step of {max(most + 1, start)} would take more than {sweep.budget / 1e9:.3g} GB"
        largest(fits, start, most)
    except NotRunError as error:
        ended = str(error)
    free()
    for batch, (_, row) in sorted(seen.items()):
        note = {"largest": ended != sweep.no_time, "ended": ended} if batch == max(seen) else {}
        sweep.rows.append(replace(row, extra={**row.extra, **note}))
    if not seen:
        sweep.left_out("batch sweep", where, [contender.name], start, ended)


def _point(sweep: Sweep, case: VisionCase, contender: Contender, where: str) -> tuple[float, Row]:
    """Seconds of its calls, without what only a first one takes, and its row."""
    made = contender.trial(case)
    made.run()
    started = time.monotonic()
    peak = peak_bytes(made.run, sweep.device)
    needed = peak + nbytes(made.known())
    took = sweep.compare({"": made}, rounds=5)[""]
    own = {"per_second": case.batch / took["median"], "extra": {**case.extra(), "bytes": needed}}
    row = Row("batch sweep", where, contender.name, seconds=took, peak_bytes=peak, x=case.batch, **own)
    return time.monotonic() - started, row


def sweep_module(sweep: Sweep, kind: str, where: str, points: Points, contenders: Sequence[Contender]) -> None:
    """Forward and backward of one module, contenders in turn at each x."""
    group = f"{kind} sweep"
    last = 0.0  # seconds of a point's timed calls
    for x, case in points:
        if time.monotonic() + last > sweep.deadline:
            sweep.left_out(group, where, [c.name for c in contenders], x, sweep.no_time)
            continue
        trials: dict[str, Trial] = {}
        for contender in contenders:
            try:
                made = contender.trial(case)
                made.run()
                trials[contender.name] = made
            except Exception as error:
                why = str(error) if isinstance(error, NotRunError) else memory_error(error)
                if why is None:
                    raise
                sweep.left_out(group, where, [contender.name], x, why)
        started = time.monotonic()
        times = sweep.compare(trials, sweep.rounds)
        last = time.monotonic() - started
        for name, took in times.items():
            ratio = took["median"] / times["stock"]["median"] if "stock" in times else None
            peak, per_second = peak_bytes(trials[name].run, sweep.device), case.batch / took["median"]
            own = {"seconds": took, "baseline": "stock", "ratio": ratio, "peak_bytes": peak, "per_second": per_second}
            sweep.rows.append(Row(group, where, name, x=x, extra=case.extra(), **own))
        sweep.say(f"  {where}, x = {x:g}: " + ", ".join(f"{n} {t['median'] * 1e3:.2f} ms" for n, t in times.items()))
        del trials
        free()


def points_of(kind: str, case: VisionCase, rehearse: bool) -> Points:
    """What a sweep of one module goes through."""
    if kind == "length":
        lengths = (8, 17) if rehearse else LENGTHS[case.device]
        total = 64 if rehearse else TOKENS[case.device]
        return [(n, replace(case, tokens=n, batch=max(1, total // n))) for n in lengths]
    if kind == "rank":
        return [(r, replace(case, ranks=(r,))) for r in ((1, 4) if rehearse else RANKS)]
    heads = case.of.heads
    shares = sorted({round(share * heads) for share in ((0, 0.5) if rehearse else SHARES)})
    return [(closed / heads, replace(case, closed=closed)) for closed in shares]


def run(kind: str, sweep: Sweep, settings: Sequence[str], rehearse: bool = False) -> None:
    if kind == "batch":
        sweep_batch(sweep, settings, (*CONTENDERS, AUTO_RECOMPUTE), start=8 if sweep.device == "cuda" else 2)
        return
    until = sweep.deadline
    for i, setting in enumerate(settings):
        sweep.deadline = time.monotonic() + (until - time.monotonic()) / (len(settings) - i)
        batch = 256 if sweep.device == "cuda" else 8
        case = VisionCase("block", setting, 2 if rehearse else batch, sweep.device, sweep.precisions[0], (8,))
        varied = {"length": f", batch {case.batch}", "rank": ", rank 8"}.get(kind, "")
        sweep_module(sweep, kind, case.name.replace(varied, ""), points_of(kind, case, rehearse), CONTENDERS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sweeps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    parser.add_argument("--setting", nargs="+", choices=tuple(SETTINGS), help="models; default: B/32 on a CPU")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16", "amp"), help="default: on a GPU amp and bf16"
    )
    parser.add_argument("--seconds", type=float, default=120, help="for everything")
    parser.add_argument(
        "--memory-gb", type=float, metavar="GB", help="what a step may take; default: what is free, half of it on a CPU"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, two points")
    given = parser.parse_args(argv)
    cpu = given.device == "cpu"
    default = ("tiny",) if given.rehearse else ("B/32",) if cpu else REAL if given.kind == "batch" else ("B/16", "L/14")
    budget = available_bytes() // 2 if cpu else torch.cuda.mem_get_info()[0]
    if given.memory_gb is not None:
        budget = int(given.memory_gb * 1e9)
    elif given.rehearse:
        budget = 2_000_000 if cpu else 20_000_000
    quick: dict[str, Any] = {"rounds": 2, "sample_seconds": 0.002} if given.rehearse else {}
    precisions = given.precision or (("fp32",) if cpu else ("amp", "bf16"))
    sweep = Sweep(given.device, precisions, given.seconds, budget, **quick)
    run(given.kind, sweep, given.setting or default, given.rehearse)
    print("\n".join(sweep_tables(sweep.rows, f"{given.kind} sweep")))
    if given.json is not None:
        write(given.json, environment(given.device), sweep.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
