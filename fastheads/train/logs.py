"""The log of a run: a line of JSON for each step, TensorBoard's events, or both."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastheads.files import write_whole

LOGS = ("jsonl", "tensorboard")


def reset_peak_memory() -> None:
    """Starts a new measurement of `peak_memory_mb`, where the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # then the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak memory since the reset, MB: allocated on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024 / 1e6
    import psutil

    now = psutil.Process().memory_info()
    return getattr(now, "peak_wset", now.rss) / 1e6  # Windows has a peak; elsewhere what is resident now


def free_memory() -> int:
    """Bytes that this machine has free, or that the control group which this process is in may still take."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no limit
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, limit - used))
    return free


class Log:
    """`log.jsonl` and `tensorboard/` in `folder`, as far as `kinds` names them; after `step` they go on.

    Each step is there once: what a killed run wrote after the state it goes on from is taken out. Raises ImportError
    where TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], step: int) -> None:
        self._lines: Any = None
        self._events: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        if "jsonl" in kinds:
            path = folder / "log.jsonl"
            write_whole(path, b"".join(_until(path, step)))
            self._lines = open(path, "a", buffering=1)  # noqa: SIM115
        if "tensorboard" in kinds:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of one step; those in dictionaries and lists have the names and places of all they are in."""
        if self._lines is not None:
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in _flat("", values):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        for file in (self._lines, self._events):
            if file is not None:
                file.close()


def _until(path: Path, step: int) -> list[bytes]:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):  # cut off by a kill
            break
        kept.append(line)
    return kept


def _flat(name: str, value: Any) -> list[tuple[str, float]]:
    if not isinstance(value, (Mapping, list)):
        return [(name, value)]
    parts: Any = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [found for key, part in parts for found in _flat(f"{name}/{key}".lstrip("/"), part)]
