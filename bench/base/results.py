"""What every bench writes and `bench.report` reads: a row per contender and case; where, when, with what it was taken.

{"environment": {...}, "rows": [{"group": ..., "case": ..., "contender": ..., ...}, ...]}
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.base.checkout import ROOT
from fastheads.files import write_whole

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "open_clip_torch",
    "timm",
    "transformers",
    "peft",
    "xformers",
    "pykeops",
    "pytest",
)


@dataclass(frozen=True)
class Row:
    """One contender on one case.

    group: "attention", "block", "model step", "mmd", "inference", "hosts", or "… sweep". case: the problem in words.
    status: "ok", "wrong" (it ran, and its numbers are not those of the mathematics it stands for) or "not run".
    why: for "wrong" what is wrong, for "not run" the reason.
    error, allowed: largest error against float64, relative to the largest value, and what the numerics rule allows.
    seconds: of a call: median, low, high, min, samples, as `timing.summary` has them.
    baseline, ratio: another contender of the case, and this one's time over that one's, medians of calls in turn.
    peak_bytes, saved_bytes: most memory beyond what stood before; what a forward pass keeps for its backward pass.
    x: what a sweep varies (batch, tokens, rank, share of closed heads); per_second: images, or samples, per second.
    extra: what one group alone has.
    """

    group: str
    case: str
    contender: str
    status: str = "ok"
    why: str = ""
    error: float | None = None
    allowed: float | None = None
    seconds: dict[str, float] | None = None
    baseline: str = ""
    ratio: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    x: float | None = None
    per_second: float | None = None
    extra: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.status != "ok" and not self.why:
            raise ValueError(f"why: a contender that is {self.status!r} needs a reason")

    @property
    def median(self) -> float:
        return self.seconds["median"]


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.group, row.case), []).append(row)
    return found


def write_json(file: Path, content: Any) -> None:
    write_whole(file, f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode())


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]], **beside: Any) -> None:
    """JSON of `beside` and "rows", each row on a line of its own."""
    fields = "".join(f"{json.dumps(name)}: {json.dumps(value, indent=1)},\n" for name, value in beside.items())
    text = "{" + fields + '"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
    write_whole(file, text.encode())


def fields(row: Row) -> dict[str, Any]:
    """As a file has it: what a row does not have is left out."""
    return {k: v for k, v in asdict(row).items() if v not in (None, "")}


def write(file: Path, environment: Mapping[str, Any], rows: Iterable[Row], **beside: Any) -> None:
    write_lines(file, map(fields, rows), environment=environment, **beside)


def read_json(file: Path) -> Any:
    """None where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def rows_of(content: Mapping[str, Any]) -> list[Row]:
    return [Row(**row) for row in content["rows"]]


def read(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """Environment and rows of a file that `write` wrote."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["environment"], rows_of(content)


def environment(device: str) -> dict[str, Any]:
    """Machine, versions, commit, date. device: "cpu" or "cuda"."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "driver": _smi("driver_version", "clocks.sm", "clocks.max.sm", "power.limit") if cuda else None,
        "versions": versions,
        "commit": _output("git", "rev-parse", "HEAD") or "unknown: not a git checkout",
        "changed": bool(_output("git", "status", "--porcelain")),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({platform.machine()} CPU)"
    return f"{platform.processor() or platform.machine()} CPU"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no such program on this machine
        return ""


def _smi(*fields: str) -> dict[str, str]:
    values = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()
    return dict(zip(fields, (v.strip() for v in values[0].split(",")), strict=False)) if values else {}
