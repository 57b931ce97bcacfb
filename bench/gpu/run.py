"""Everything that only a GPU can show, in one command: tests, benches, sweeps, profile, and what of the targets is met.

    python -m bench.gpu --out DIR                under nine minutes, no network, no installation
    python -m bench.gpu --out DIR --tune         the search for tile rows as well (--minutes 15)
    python -m bench.gpu --out DIR --rehearse     the same on a CPU, tiny, Triton's kernels in the interpreter: a minute

Parts, each a process under a time limit of its own, what matters first. The state is the files in DIR/parts: started
again with the same DIR, the command runs what is not yet complete (`--again PART` runs a part once more). What no time
is left for is named. Writes gpu.json (environment, parts, rows), traces.tar.gz and summary.md to DIR; exits with 1
where a part failed. Needs torch, triton, pytest; what else is missing (pytest-benchmark, open_clip, peft) is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.base import results
from bench.gpu.parts import write_json

ROOT = Path(__file__).resolve().parents[2]
GRACE = 12.0  # seconds between "start nothing more" and the end of a part


@dataclass(frozen=True)
class Part:
    """seconds: at most; `least` must be left for it to start. kind: "python", "tests" or "bench" (both pytest)."""

    name: str
    kind: str
    seconds: float
    least: float
    arguments: tuple[str, ...] = ()


# The paths that take longest first: where the time ends early, what is missing matters least.
PARTS = (
    Part("rates", "python", 40, 15),
    Part("tests", "tests", 110, 30, ("tests/kernels", "tests/ops", "-m", "not gpu")),
    Part("gpu tests", "tests", 70, 30, ("tests/ops/test_gpu.py", "tests", "-m", "gpu")),
    Part("block", "bench", 110, 30),
    Part("model step", "bench", 110, 30),
    Part("attention", "bench", 60, 25),
    Part("mmd", "bench", 60, 25),
    Part("inference", "bench", 50, 25),
    Part("sweeps", "python", 110, 40),
    Part("profile", "python", 60, 20),
)
TUNE = Part("tune", "python", 300, 40)
REHEARSAL = (
    Part("rates", "python", 30, 1),
    Part("tests", "tests", 60, 1, ("tests/bench/roofline/test_roofline.py",)),
    Part("benches", "bench", 240, 1),
    Part("sweeps", "python", 90, 1),
    Part("profile", "python", 60, 1),
)


@dataclass(frozen=True)
class Outcome:
    """status: "done", "failed", "stopped" (its time was over) or "left out". why: in words. left: tests not started."""

    status: str
    seconds: float = 0.0
    why: str = ""
    command: str = ""
    counts: dict[str, int] | None = None
    failures: tuple[dict[str, str], ...] = ()
    left: tuple[str, ...] = ()
    output: str = ""


class Run:
    """A folder of parts."""

    def __init__(self, out: Path, rehearse: bool, say: Callable[[str], None]) -> None:
        self.out, self.rehearse, self.say = out, rehearse, say
        self.folder = out / "parts"
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.json"

    def outcome(self, name: str) -> Outcome | None:
        file = self.file(name)
        if not file.exists():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return Outcome(**{**found, "failures": tuple(found["failures"]), "left": tuple(found["left"])})

    def environment(self) -> dict[str, Any]:
        """Of this machine and commit; ValueError where DIR has parts of another."""
        now = results.environment("cpu" if self.rehearse else "cuda")
        file = self.folder / "environment.json"
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            for key in ("device", "commit"):
                if before[key] != now[key]:
                    raise ValueError(f"--out: {self.out} has parts of {key} {before[key]}, and this is {now[key]}")
            return dict(before)
        now["missing"] = [p for p in ("pytest_benchmark", "open_clip", "peft", "timm", "xformers") if not has(p)]
        write_json(file, now)
        return now

    def command(self, part: Part, limit: float) -> list[str]:
        if part.kind == "python":
            module = "bench.tune" if part.name == "tune" else "bench.gpu.parts"
            own = [] if part.name == "tune" else [part.name]
            command = [
                sys.executable,
                "-m",
                module,
                *own,
                "--out",
                str(self.folder),
                "--seconds",
                f"{limit - GRACE / 2:.0f}",
            ]
            return command + (["--rehearse"] if self.rehearse else [])
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        command += ["-p", "bench.gpu.plugin", "--until", f"{time.time() + limit - GRACE:.0f}"]
        command += ["--left", str(self.file(part.name).with_suffix("")), f"--junitxml={self._junit(part)}"]
        if not has("pytest_timeout"):
            # --strict-config refuses the `timeout` of pyproject.toml where nothing reads it
            command += ["-o", "addopts=--import-mode=importlib"]
        if part.kind == "tests":
            command += ["--benchmark-disable"] if has("pytest_benchmark") else []
            cores = os.cpu_count() or 1
            if cores >= 8 and has("xdist") and not self.rehearse:
                command += ["-n", str(min(12, cores - 2))]  # compiling takes longer than running
            return [*command, *part.arguments]
        command += [] if has("pytest_benchmark") else ["-p", "bench.stopwatch"]
        command += ["bench/", "--rows", str(self.rows(part))]
        return command + (["--tiny"] if self.rehearse else ["-k", bench_file(part.name)])

    def _junit(self, part: Part) -> Path:
        return self.file(part.name).with_suffix(".xml")

    def rows(self, part: Part) -> Path:
        return self.file(part.name).with_suffix(".rows.json")

    def run(self, part: Part, limit: float) -> Outcome:
        """Runs a part for at most `limit` seconds, and notes what came of it."""
        command = self.command(part, limit)
        log = self.file(part.name).with_suffix(".log")
        for old in (*self.folder.glob(f"{log.stem}.*.json"), self._junit(part)):
            if not old.name.startswith("sweep-"):
                old.unlink(missing_ok=True)
        env = dict(os.environ)
        if self.rehearse:
            env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            env |= {"FASTHEADS_IMPL": "stacked"} if part.name == "profile" else {}
        else:
            env.pop("TRITON_INTERPRET", None)
        started = time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
            stopped = wait(process, limit)
        seconds = time.perf_counter() - started
        output = log.read_text(encoding="utf-8", errors="replace")
        left = [name for file in self.folder.glob(f"{log.stem}.*.json") if file.name.count(".") == 2
                for name in _left(file)]  # fmt: skip
        found: dict[str, Any] = {}
        if self._junit(part).exists():
            found = read_junit(self._junit(part).read_text(encoding="utf-8"))
        last = (output.strip().splitlines() or [""])[-1][:300]
        if stopped or left:
            status = "stopped"
            why = f"its {limit:.0f} s were over" + (f", {len(left)} tests not started" if left else "")
            if process.returncode and not stopped:
                status, why = "failed", f"{last}; {why}"
        else:
            status, why = ("failed", last) if process.returncode else ("done", "")
        outcome = Outcome(
            status, seconds, why, " ".join(["python", *command[1:]]), found.get("counts"),
            tuple(found.get("failures", ())), tuple(left), output[-4000:] if status != "done" else "",
        )  # fmt: skip
        write_json(self.file(part.name), asdict(outcome))
        return outcome

    def collect(self, where: dict[str, Any], parts: Sequence[Part], outcomes: dict[str, Outcome]) -> dict[str, Any]:
        """gpu.json's content: everything in the parts' files."""
        rows = [row for file in sorted(self.folder.glob("*.rows.json")) for row in results.read(file)[1]]
        extra = {file.name.split(".")[0]: json.loads(file.read_text(encoding="utf-8"))
                 for file in self.folder.glob("*.result.json")}  # fmt: skip
        kept = {name: {k: v for k, v in asdict(o).items() if k != "output"} for name, o in outcomes.items()}
        where = {**where, "rates": extra.pop("rates", None)}
        return {"environment": where, "rows": rows, "parts": kept, "rehearsal": self.rehearse, **extra}

    def write(self, content: dict[str, Any]) -> None:
        results.write(self.out / "gpu.json", content["environment"], content["rows"])
        whole = json.loads((self.out / "gpu.json").read_text(encoding="utf-8"))
        whole |= {k: v for k, v in content.items() if k not in ("environment", "rows")}
        write_json(self.out / "gpu.json", whole)
        with tarfile.open(self.out / "traces.tar.gz", "w:gz") as archive:
            for file in sorted(self.folder.iterdir()):
                if file.suffix in (".log", ".pickle", ".xml") or file.name.startswith("trace-"):
                    archive.add(file, file.name)


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def bench_file(group: str) -> str:
    """pytest's -k for a group: the name of its test."""
    return f"test_{group.replace(' ', '_')}"


def _left(file: Path) -> list[str]:
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, list) else []


def wait(process: subprocess.Popen[Any], limit: float) -> bool:
    """True where it had to be stopped: by an interrupt first, upon which pytest still writes its report."""
    try:
        process.wait(limit)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return True


def read_junit(text: str) -> dict[str, Any]:
    """Counts and failures of a JUnit report."""
    root = ElementTree.fromstring(text)
    suite = root if root.tag == "testsuite" else root.find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = []
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                name = f"{case.get('classname')}::{case.get('name')}"
                failed.append({"test": name, "message": found.get("message", "")[:500]})
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"counts": {**counts, "passed": passed}, "failures": failed}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, traces.tar.gz and summary.md")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny problems")
    parser.add_argument("--minutes", type=float, default=9.0, help="all of it may take")
    parser.add_argument("--tune", action="store_true", help="search the tile tables as well")
    parser.add_argument("--again", nargs="+", default=[], metavar="PART", help="run these although they are complete")
    given = parser.parse_args(argv)
    started = time.monotonic()
    parts = [*(REHEARSAL if given.rehearse else PARTS), *([TUNE] if given.tune else [])]
    names = [part.name for part in parts]
    unknown = sorted(set(given.again) - set(names))
    if unknown:
        parser.error(f"--again: got {', '.join(unknown)}; takes {', '.join(names)}")

    import torch

    import bench.base.checkout  # noqa: F401
    import fastheads

    if not given.rehearse and not torch.cuda.is_available():
        print("There is no CUDA device here; `--rehearse` runs the same on the CPU.", file=sys.stderr)
        return 2
    for module in (fastheads, fastheads.kernels):
        if ROOT not in Path(str(module.__file__)).resolve().parents:
            print(f"{module.__name__} is {module.__file__}, not that of {ROOT}: run this in {ROOT}", file=sys.stderr)
            return 2

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)

    run = Run(given.out.resolve(), given.rehearse, say)
    try:
        where = run.environment()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    say(f"{where['device']}, torch {torch.__version__}, commit {where['commit'][:10]}, fastheads of {ROOT}")
    outcomes: dict[str, Outcome] = {}
    for part in parts:
        before = run.outcome(part.name)
        if before is not None and before.status == "done" and part.name not in given.again:
            outcomes[part.name] = before
            say(f"{part.name}: there already")
            continue
        if part.name == "sweeps" and part.name in given.again:
            for file in run.folder.glob("sweep-*.rows.json"):
                file.unlink()
        left = 60 * given.minutes - (time.monotonic() - started) - 5
        if left < part.least:
            outcomes[part.name] = before or Outcome("left out", why=f"no time left of {given.minutes:g} minutes")
        else:
            say(f"{part.name}, at most {min(part.seconds, left):.0f} s")
            outcomes[part.name] = run.run(part, min(part.seconds, left))
        found = outcomes[part.name]
        if found.status != "done":
            say(f"  {found.status}: {found.why}")
    content = run.collect(where, parts, outcomes)
    run.write(content)
    from bench.report.gpu_page import summary

    text = summary(content)
    (run.out / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    say(f"written to {run.out}")
    return 1 if any(o.status == "failed" for o in outcomes.values()) else 0
