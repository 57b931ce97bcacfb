"""A folder of parts: each a process under a time limit of its own, whose state is the files it leaves there."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.base import results
from bench.base.checkout import ROOT
from bench.gpu.plugin import NO_TIME

GRACE = 12.0  # seconds between "start nothing more" and the end of a part


class Part(NamedTuple):
    """seconds: at most; `least` must be left for it to start. kind: "python" (a module), "tests", "bench" (pytest)."""

    name: str
    kind: str
    seconds: float
    least: float
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """status: "done", "failed", "stopped" (its time was over) or "left out". why: in words. left: tests not started."""

    status: str
    seconds: float = 0.0
    why: str = ""
    command: str = ""
    counts: dict[str, int] | None = None
    failures: list[dict[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    output: str = ""


class Run:
    """The parts that stand in `out`/parts."""

    def __init__(self, out: Path, rehearse: bool) -> None:
        self.out, self.rehearse, self.folder = out, rehearse, out / "parts"
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, part: str, suffix: str = ".json") -> Path:
        return self.folder / f"{part.replace(' ', '-')}{suffix}"

    def outcome(self, part: str) -> Outcome | None:
        found = results.read_json(self.file(part))
        return None if found is None else Outcome(**found)

    def forget(self, part: str) -> None:
        for file in self.folder.glob(f"{self.file(part).stem}[.-]*"):
            file.unlink()

    def environment(self) -> dict[str, Any]:
        """Of this machine and commit; ValueError where DIR has parts of another."""
        now, file = results.environment("cpu" if self.rehearse else "cuda"), self.folder / "environment.json"
        now["missing"] = [p for p in ("open_clip", "peft", "timm", "xformers") if not has(p)]
        before = results.read_json(file) or now
        for key in ("device", "commit"):
            if before[key] != now[key]:
                raise ValueError(f"--out: {self.out} has parts of {key} {before[key]}, and this is {now[key]}")
        results.write_json(file, before)
        return before

    def command(self, part: Part, limit: float) -> list[str]:
        command = [sys.executable, "-m"]
        if part.kind == "python":
            command += [*part.arguments, "--out", str(self.folder), "--seconds", f"{limit - GRACE / 2:.0f}"]
            return command + (["--rehearse"] if self.rehearse else [])
        command += ["pytest", "-q", "--no-header", "-p", "no:cacheprovider", *part.arguments]
        command += ["-p", "bench.gpu.plugin", "--until", f"{time.time() + limit - GRACE:.0f}"]
        command += [f"--junitxml={self.file(part.name, '.xml')}"]
        if not has("pytest_timeout"):
            # --strict-config refuses the `timeout` of pyproject.toml where nothing reads it
            command += ["-o", "addopts=--import-mode=importlib"]
        if part.kind == "bench":
            return [*command, "--rows", str(self.file(part.name, ".rows.json"))]
        cores = os.cpu_count() or 1
        if cores >= 8 and has("xdist") and not self.rehearse:
            command += ["-n", str(min(12, cores - 2))]  # compiling takes longer than running
        return command

    def run(self, part: Part, limit: float) -> Outcome:
        command, log, junit = self.command(part, limit), self.file(part.name, ".log"), self.file(part.name, ".xml")
        for old in (junit, self.file(part.name, ".rows.json")):
            old.unlink(missing_ok=True)
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if self.rehearse:
            env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            env |= {"FASTHEADS_IMPL": "stacked"} if part.name == "profile" else {}
        started = time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
            stopped = wait(process, limit)
        seconds = time.perf_counter() - started
        output = log.read_text(encoding="utf-8", errors="replace")
        found = read_junit(junit.read_text(encoding="utf-8")) if junit.exists() else {}
        status, why = "done", ""
        if stopped or found.get("left"):
            status, why = "stopped", f"its {limit:.0f} s were over"
            why += f", {len(found['left'])} tests not started" if found.get("left") else ""
        if process.returncode and not stopped:
            last = (output.strip().splitlines() or [""])[-1][:300]
            status, why = "failed", f"{last}; {why}" if why else last
        shown = "" if status == "done" else output[-4000:]
        outcome = Outcome(status, seconds, why, " ".join(["python", *command[1:]]), output=shown, **found)
        results.write_json(self.file(part.name), asdict(outcome))
        return outcome

    def collect(self, where: dict[str, Any], outcomes: dict[str, Outcome]) -> dict[str, Any]:
        """gpu.json's content, which is written: everything in the parts' files."""
        rows = [row for file in sorted(self.folder.glob("*.rows.json")) for row in results.read(file)[1]]
        files = self.folder.glob("*.result.json")
        beside = {file.name.split(".")[0]: results.read_json(file) for file in files}
        where = {**where, "rates": beside.pop("rates", None)}
        parts = {name: {k: v for k, v in asdict(o).items() if k != "output"} for name, o in outcomes.items()}
        beside |= {"parts": parts, "rehearsal": self.rehearse}
        results.write(self.out / "gpu.json", where, rows, **beside)
        return {"environment": where, "rows": rows, **beside}

    def archive(self) -> None:
        """traces.tar.gz: logs, traces, the memory snapshot."""
        with tarfile.open(self.out / "traces.tar.gz", "w:gz") as archive:
            for file in sorted(self.folder.iterdir()):
                if file.suffix in (".log", ".pickle", ".xml") or file.name.startswith("trace-"):
                    archive.add(file, file.name)


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def wait(process: subprocess.Popen[Any], limit: float) -> bool:
    """True where it had to be stopped: by an interrupt first, upon which pytest still writes its report."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit)
        return False
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()
    return True


def read_junit(text: str) -> dict[str, Any]:
    """Counts, failures and what was left of a JUnit report."""
    root = ElementTree.fromstring(text)
    suite = root if root.tag == "testsuite" else root.find("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    failures, left = [], []
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        broken = (found for found in case if found.tag in ("failure", "error"))
        failures += [{"test": name, "message": found.get("message", "")[:500]} for found in broken]
        left += [name for found in case if found.get("message") == NO_TIME]
    return {"counts": counts, "failures": failures, "left": left}
