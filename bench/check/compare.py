"""Two trees side by side, case by case, and each beside itself, which is the noise."""

import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.base.tables import table
from bench.base.timing import in_turn
from bench.check.worker import load

SIDES = ("base", "head", "base again", "head again")
MARGIN = 3.0
PASSES = 3


class Worker:
    """A process of `bench.check.worker` on one tree."""

    def __init__(self, tree: Path, cases: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(tree), str(cases)]
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        # Neither a PYTHONPATH nor the current folder may offer another fastheads.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, cwd=tree, env=env, text=True, **pipes)

    def seconds(self, case: str, calls: int) -> float:
        """Of a call, in the mean over `calls`. Raises RuntimeError where the tree can't run the case: it says why."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"case": case, "calls": calls}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the process ended: {(self.log.read().strip().splitlines() or ['without a word'])[-1]}")
        answer = json.loads(line)
        if "missing" in answer:
            raise RuntimeError(answer["missing"])
        return float(answer["seconds"])

    def close(self) -> None:
        self.process.communicate()  # ends what it reads, and waits for it
        self.log.close()


@dataclass
class Result:
    """A case: seconds per call of each side and round, or the sides that cannot run it and why."""

    case: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def medians(self) -> tuple[float, float]:
        """Base's and head's seconds, both processes of a side together."""
        s = self.samples
        return statistics.median(s["base"] + s["base again"]), statistics.median(s["head"] + s["head again"])

    def ratio(self) -> float:
        base, head = self.medians()
        return head / base

    def noise(self) -> float:
        """A ratio that a side may show against itself: the larger of the two, and MARGIN times their spread."""
        shown, spread = zip(*map(self._against_itself, ("base", "head")), strict=True)
        return math.exp(max(shown) + MARGIN * math.sqrt(statistics.fmean(s**2 for s in spread)))

    def _against_itself(self, side: str, draws: int = 400) -> tuple[float, float]:
        """|log ratio| of a side's two processes, and its standard deviation when rounds are drawn again."""
        rng, n = random.Random(0), len(self.samples[side])

        def log_ratio(rounds: Sequence[int]) -> float:
            one, other = (statistics.median(self.samples[s][i] for i in rounds) for s in (side, f"{side} again"))
            return math.log(other / one)

        drawn = [log_ratio(rng.choices(range(n), k=n)) for _ in range(draws)]
        return abs(log_ratio(range(n))), statistics.pstdev(drawn)

    def slower(self) -> bool:
        return not self.missing and self.ratio() > self.noise()

    def verdict(self) -> str:
        if self.missing:  # broken: head cannot run what base can
            return "not compared" if "base" in self.missing else "broken"
        return "slower" if self.slower() else "faster" if self.ratio() < 1 / self.noise() else "no difference"

    def row(self) -> list[str]:
        if self.missing:
            return [self.case, "", "", "", "", self.verdict()]
        ms = [f"{seconds * 1e3:.3g}" for seconds in self.medians()]
        return [self.case, *ms, f"{self.ratio():.3f}", f"{self.noise():.3f}", self.verdict()]


def measure(
    trees: Mapping[str, Path], cases: Path, names: Sequence[str], rounds: int = 15, sample_seconds: float = 0.05
) -> list[Result]:
    """Each case in turn by two processes per tree."""
    found = []
    with contextlib.ExitStack() as stack:
        started = {side: Worker(trees[side.split()[0]], cases) for side in SIDES}
        running = {side: stack.enter_context(contextlib.closing(worker)) for side, worker in started.items()}
        for name in names:
            result = Result(name)
            for side in ("base", "head"):
                try:
                    running[side].seconds(name, 1)
                except RuntimeError as error:
                    result.missing[side] = str(error)
            if not result.missing:
                once = running["head"].seconds(name, 1)
                calls = max(1, round(sample_seconds / max(once, 1e-6)))
                samplers = {side: partial(running[side].seconds, name, calls) for side in SIDES}
                in_turn(samplers, 1)  # a warm-up
                result.samples = in_turn(samplers, rounds)
            found.append(result)
    return found


def check(trees: Mapping[str, Path], cases: Path, deadline: float = math.inf, **options: float) -> tuple[str, bool]:
    """The verdict in words, and whether all is well. options: those of `measure`."""
    passes = [measure(trees, cases, list(load(cases).CASES), **options)]
    while len(passes) < PASSES and time.monotonic() < deadline:
        again = [r.case for r in passes[-1] if r.slower()]
        if not again:
            break
        passes.append(measure(trees, cases, again, **options))
    latest = {r.case: r for results in passes for r in results}.values()
    lines = [table(["case", "base ms", "head ms", "head / base", "noise", ""], [r.row() for r in latest])]
    for r in latest:
        lines += [f"{r.case}: {side} cannot run it: {why}" for side, why in r.missing.items()]
    for r in (r for r in latest if r.slower()):
        beyond = (
            f"{r.ratio():.3f} × base's time, beyond the {r.noise():.3f} × that the same commit shows against itself"
        )
        in_passes = sum(r.case in [x.case for x in p] for p in passes)
        lines.append(f"{r.case}: head takes {beyond}, in {in_passes} of {len(passes)} passes")
    return "\n".join(lines), not any(r.verdict() in ("slower", "broken") for r in latest)
