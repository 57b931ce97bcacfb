"""Everything that only a GPU can show, in one command: its tests, then the benches, then a summary.

    python -m bench.gpu --out DIR            under ten minutes, no network
    python -m bench.gpu --out DIR --rehearse the same on a CPU, with tiny shapes, in under a minute

Runs in a checkout that isn't installed. Needs torch, triton, open_clip and pytest; what it has no package for it leaves
out, and says so. Writes tests.json, bench.json and summary.md to DIR; exits with 1 where a test failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "open_clip_torch", "peft", "xformers", "pytest")
# Where there is a GPU these run in bfloat16 and float16; the second is every test marked `gpu`.
NUMERICS = ("tests/kernels", "tests/ops")


# ------------------------------------------------------------------------------------------------------ where


def environment(device: str) -> dict[str, Any]:
    """Chip, versions, commit, date."""
    import torch

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "versions": versions,
        "commit": _git("rev-parse", "HEAD") or "unknown: not a git checkout",
        "changed": bool(_git("status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        return ""


# ------------------------------------------------------------------------------------------------------ tests


def run_tests(arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """pytest in a process of its own, for at most `limit` seconds: counts, and the failures in words."""
    command = [sys.executable, "-m", "pytest", "-p", "bench.checkout", "-q", "--no-header", *arguments]
    if importlib.util.find_spec("pytest_benchmark") is not None:
        command += ["--benchmark-disable"]
    if importlib.util.find_spec("pytest_timeout") is None:
        # --strict-config refuses the `timeout` of pyproject.toml where nothing reads it
        command += ["-o", "addopts=--import-mode=importlib"]
    cores = os.cpu_count() or 1
    if cores >= 8 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, cores - 2))]  # compiling takes longer than running
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "junit.xml", Path(folder) / "log"
        with log.open("w", encoding="utf-8") as out:
            running = subprocess.Popen(
                [*command, f"--junitxml={report}"], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, text=True
            )
            stopped = _wait(running, limit)
        output = log.read_text(encoding="utf-8", errors="replace")
        found = read_junit(report.read_text(encoding="utf-8")) if report.exists() else {"failures": []}
    code = running.returncode
    if stopped:
        code, output = 124, f"{output}\nstopped after {limit:.0f} s"
    found |= {"command": " ".join(["python", *command[1:]]), "exit": code, "seconds": time.perf_counter() - started}
    return {**found, "stopped": stopped, "output": output[-6000:] if code else output[-600:]}


def _wait(running: subprocess.Popen[str], limit: float) -> bool:
    """True where it had to be stopped: by an interrupt first, upon which pytest still writes its report."""
    try:
        running.wait(limit)
        return False
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)
    try:
        running.wait(20)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
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
                failed.append(
                    {"test": f"{case.get('classname')}::{case.get('name')}", "message": found.get("message", "")[:500]}
                )
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"counts": {**counts, "passed": passed}, "failures": failed}


# ------------------------------------------------------------------------------------------------------ bench


def run_benches(device: str, rehearse: bool, deadline: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Modules and towers of both settings; what no time is left for is named in `left_out`."""
    import torch

    from bench.chips import chip_of
    from bench.measure import measure_module, measure_tower, profile

    chip = chip_of(torch.cuda.get_device_name()) if device == "cuda" else None
    settings, precisions = (["tiny"], ["fp32"]) if rehearse else (["B/16", "L/14"], ["amp", "bf16"])
    quick: dict[str, Any] = {"rounds": 2, "sample_seconds": 0.002} if rehearse else {}
    found: dict[str, Any] = {"modules": [], "towers": [], "profiles": {}, "left_out": []}
    jobs: list[tuple[str, float, Callable[[], None]]] = []
    for precision in precisions:
        for key in settings:
            # seconds each may take on a GPU, compilation included
            jobs.append((f"module {key} {precision}", 60, lambda k=key, p=precision: found["modules"].append(
                measure_module(k, p, device, chip=chip, say=say, **quick))))  # type: ignore[misc]  # fmt: skip
            jobs.append((f"tower {key} {precision}", 60, lambda k=key, p=precision: found["towers"].append(
                measure_tower(k, p, device, say=say, **quick))))  # type: ignore[misc]  # fmt: skip
        if precision == precisions[0]:
            for name in ("stock", "reference" if rehearse else "stacked"):
                jobs.append((f"profile {name}", 10, lambda n=name, p=precision: found["profiles"].update(
                    {n: profile(settings[0], p, device, n)})))  # type: ignore[misc]  # fmt: skip
    for name, needs, job in jobs:
        if time.monotonic() + needs > deadline:
            found["left_out"].append(f"{name}: no time left")
            continue
        try:
            job()
        except Exception as error:
            found["left_out"].append(f"{name} broke: {type(error).__name__}: {str(error)[:300]}")
        for line in found["left_out"][-1:]:
            say(line)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for tests.json, bench.json and summary.md")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--minutes", type=float, default=9.5, help="all of it may take")
    parser.add_argument("--tests", nargs="*", default=None, help="pytest's arguments in place of the GPU tests")
    given = parser.parse_args(argv)
    started = time.monotonic()
    deadline = started + 60 * given.minutes

    if given.rehearse:
        os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from bench.summary import summary

    device = "cuda" if torch.cuda.is_available() and not given.rehearse else "cpu"
    if device == "cpu" and not given.rehearse:
        print("There is no CUDA device here; `--rehearse` runs the same on the CPU.", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)

    def write(name: str, content: dict[str, Any]) -> None:
        (given.out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    where = environment(device)
    say(f"{where['device']}, torch {torch.__version__}, commit {where['commit'][:10]}")
    lanes = {"numerics": [*NUMERICS, "-m", "not gpu"], "gpu": ["tests", "-m", "gpu"]}
    if given.rehearse:
        lanes = {"rehearsal": ["tests/bench/test_roofline.py"]}
    if given.tests is not None:
        lanes = {"tests": given.tests}
    results: dict[str, Any] = {}
    for name, arguments in lanes.items():
        say(f"tests: {name}")
        # at most two fifths of the time for all tests together
        limit = max(20.0, (deadline - started) * 0.4 / len(lanes))
        results[name] = run_tests(arguments, limit)
        say(f"  {results[name].get('counts', 'no report')}, exit status {results[name]['exit']}")
    write("tests.json", {"environment": where, "lanes": results})
    found = run_benches(device, given.rehearse, deadline, say)
    write("bench.json", {"environment": where, **found})
    text = summary(where, results, found, rehearsal=given.rehearse)
    (given.out / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    say(f"written to {given.out}")
    return 1 if any(r["exit"] for r in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
