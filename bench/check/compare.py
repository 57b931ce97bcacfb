"""Has the CPU path become slower? Two commits side by side, and each beside itself, which is the noise.

    python -m bench.check [--base REV] [--minutes M]

Base: REV; else where this branch left origin/main; where that is this commit, or there is no origin/main: the commit
itself if the working tree differs from it, else its parent. Head is the working tree as it stands. Both are copied to a
folder of their own and csrc/ is built there in the same way; the cases (`bench.check.cases`) are head's.

Two processes per side take turns, case by case. A case is slower where the ratio of medians, head's over base's, is
beyond what a side shows against itself: the larger of its two ratios, plus MARGIN times their spread (bootstrap over
the rounds). What is beyond is measured again in new processes, and fails where it is beyond every time. No times are
stored and none are compared with another machine's. Exit status: 0 no case slower, 1 a case slower or broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.base.tables import table
from bench.check.worker import load

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "bench" / "check" / "cases.py"
SIDES = ("base", "head", "base again", "head again")
MARGIN = 3.0
PASSES = 3


class MissingError(Exception):
    """A tree cannot run a case; the text says why."""


class Worker:
    """A process of `bench.check.worker` on one tree."""

    def __init__(self, tree: Path, cases: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(tree), str(cases)]
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        # Neither a PYTHONPATH nor the current folder may offer another fastheads.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            command, cwd=tree, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def seconds(self, case: str, calls: int) -> float:
        """Of a call, in the mean over `calls`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"case": case, "calls": calls}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise MissingError(f"the process ended: {(self.log.read().strip().splitlines() or ['without a word'])[-1]}")
        answer = json.loads(line)
        if "missing" in answer:
            raise MissingError(answer["missing"])
        return float(answer["seconds"])

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()
        self.log.close()


@contextlib.contextmanager
def workers(trees: Mapping[str, Path], cases: Path) -> Iterator[dict[str, Worker]]:
    """Two for each of "base" and "head"."""
    started = {side: Worker(trees[side.split()[0]], cases) for side in SIDES}
    try:
        yield started
    finally:
        for worker in started.values():
            worker.close()


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
        """A ratio that a side may show against itself."""
        return math.exp(max(self._against_itself(side)[0] for side in ("base", "head")) + MARGIN * self.spread())

    def spread(self) -> float:
        """Standard deviation of the logarithm of a ratio of medians of one side against itself, in the mean of both."""
        return math.sqrt(statistics.fmean(self._against_itself(side)[1] ** 2 for side in ("base", "head")))

    def _against_itself(self, side: str, draws: int = 400) -> tuple[float, float]:
        """|log ratio| of a side's two processes, and its standard deviation when rounds are drawn again."""
        one, other = self.samples[side], self.samples[f"{side} again"]
        rng, n = random.Random(0), len(one)
        drawn = []
        for _ in range(draws):
            rounds = rng.choices(range(n), k=n)
            drawn.append(
                math.log(statistics.median(other[i] for i in rounds) / statistics.median(one[i] for i in rounds))
            )
        return abs(math.log(statistics.median(other) / statistics.median(one))), statistics.pstdev(drawn)

    def slower(self) -> bool:
        return not self.missing and self.ratio() > self.noise()

    def broken(self) -> bool:
        """Head cannot run what base can."""
        return "head" in self.missing and "base" not in self.missing


def measure(
    trees: Mapping[str, Path], cases: Path, names: Sequence[str], *, rounds: int = 15, sample_seconds: float = 0.05
) -> list[Result]:
    """Each case in turn by two processes per tree, in an order that moves on from round to round."""
    found = []
    with workers(trees, cases) as running:
        for name in names:
            result = Result(name)
            for side in ("base", "head"):
                try:
                    running[side].seconds(name, 1)
                except MissingError as error:
                    result.missing[side] = str(error)
            if not result.missing:
                once = running["head"].seconds(name, 1)
                calls = max(1, round(sample_seconds / max(once, 1e-6)))
                for side in SIDES:
                    running[side].seconds(name, calls)
                result.samples = {side: [] for side in SIDES}
                for i in range(rounds):
                    for side in SIDES[i % len(SIDES) :] + SIDES[: i % len(SIDES)]:
                        result.samples[side].append(running[side].seconds(name, calls))
            found.append(result)
    return found


def check(trees: Mapping[str, Path], cases: Path, deadline: float = math.inf, **options: float) -> tuple[str, bool]:
    """The verdict in words, and whether all is well. options: those of `measure`."""
    names = list(load(cases).CASES)
    passes = [measure(trees, cases, names, **options)]  # type: ignore[arg-type]
    while len(passes) < PASSES and time.monotonic() < deadline:
        again = [r.case for r in passes[-1] if r.slower()]
        if not again:
            break
        passes.append(measure(trees, cases, again, **options))  # type: ignore[arg-type]
    latest = {r.case: r for results in passes for r in results}
    rows = []
    for r in latest.values():
        if r.missing:
            rows.append([r.case, "", "", "", "", "broken" if r.broken() else "not compared"])
            continue
        base, head = r.medians()
        verdict = "slower" if r.slower() else "faster" if r.ratio() < 1 / r.noise() else "no difference"
        rows.append([r.case, f"{base * 1e3:.3g}", f"{head * 1e3:.3g}", f"{r.ratio():.3f}", f"{r.noise():.3f}", verdict])
    lines = [table(["case", "base ms", "head ms", "head / base", "noise", ""], rows)]
    for r in latest.values():
        lines += [f"{r.case}: {side} cannot run it: {why}" for side, why in r.missing.items()]
    slower = [r for r in latest.values() if r.slower()]
    lines += [
        f"{r.case}: head takes {r.ratio():.3f} × base's time, beyond the {r.noise():.3f} × that the same commit shows "
        f"against itself, in {sum(r.case in [x.case for x in p] for p in passes)} of {len(passes)} passes"
        for r in slower
    ]
    return "\n".join(lines), not slower and not any(r.broken() for r in latest.values())


# ---------------------------------------------------------------------------------------------------------- trees


def git(*arguments: str, root: Path = ROOT, check: bool = True) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if check and done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def default_base(root: Path = ROOT) -> str:
    """The commit to compare with, as the module's docstring says."""
    head, changed = git("rev-parse", "HEAD", root=root), bool(git("status", "--porcelain", root=root))
    left = git("merge-base", "HEAD", "origin/main", root=root, check=False)
    if left and left != head:
        return left
    return head if changed else git("rev-parse", "--verify", "HEAD~1", root=root)


def copy_working_tree(root: Path, to: Path) -> None:
    """What git tracks or would track, as it stands."""
    for name in git("ls-files", "-z", "-co", "--exclude-standard", root=root).split("\0"):
        source = root / name
        if name and source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)


def build_native(tree: Path) -> str:
    """Builds csrc/ inside the tree, as an install does; what is there to say about it."""
    if not (tree / "csrc").exists():
        return "has no csrc/"
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, capture_output=True, text=True
    )
    if done.returncode or not list(tree.glob("fastheads/libfastheads*")):
        return f"csrc/ does not build: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"
    return ""


@contextlib.contextmanager
def trees_of(base: str, root: Path = ROOT) -> Iterator[dict[str, Path]]:
    """Base in a git worktree, head as a copy of the working tree; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        trees = {side: Path(folder).resolve() / side for side in ("base", "head")}
        git("worktree", "add", "--detach", str(trees["base"]), base, root=root)
        try:
            copy_working_tree(root, trees["head"])
            yield trees
        finally:
            git("worktree", "remove", "--force", str(trees["base"]), root=root)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", metavar="REV", help="compare with this commit")
    parser.add_argument("--rounds", type=int, default=15, help="samples per process and case")
    parser.add_argument("--minutes", type=float, default=3.5, help="after which nothing is measured again")
    given = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * given.minutes
    try:
        base = git("rev-parse", "--verify", f"{given.base}^{{commit}}") if given.base else default_base()
    except ValueError as error:
        print(f"No commit to compare with: {error}", file=sys.stderr)
        return 2
    head = git("rev-parse", "--short=10", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    print(f"base {base[:10]}, head {head}: {git('log', '-1', '--format=%s', base)!r} and what came since", flush=True)
    with trees_of(base) as trees:
        for side, tree in trees.items():
            problem = build_native(tree)
            if problem:
                print(f"{side} {problem}")
        text, well = check(trees, CASES, deadline, rounds=given.rounds)
    print(text)
    print("No case is slower beyond the noise." if well else "Slower, or broken: see above.")
    return 0 if well else 1
