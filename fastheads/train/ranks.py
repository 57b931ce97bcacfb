"""The processes of a run: that they are of one mind, and that they end together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from fastheads.train.earlier import differences
from fastheads.train.recipe import Recipe

ErrorT = TypeVar("ErrorT", bound=Exception)

PATIENCE = 600.0  # seconds that a process waits for the others; FASTHEADS_PATIENCE says otherwise


class Stopped(SystemExit):
    """The run was asked to end (SIGTERM) and saved its state: exit code 0. where: after which step."""

    def __init__(self, where: str) -> None:
        super().__init__(0)
        self.where = where


def join() -> PartialState:
    """This process among those that `torchrun` or `accelerate launch` started; alone where there are no others."""
    patience = timedelta(seconds=float(os.environ.get("FASTHEADS_PATIENCE", PATIENCE)))
    return PartialState(cpu=not torch.cuda.is_available(), timeout=patience)


def group() -> Any:
    """The process group over which a batch is one; None where this process is alone."""
    return dist.group.WORLD if join().num_processes > 1 else None


def agree(key: Mapping[str, Any], recipe: Recipe, **found: Any) -> None:
    """That every process has the same images, weights and settings (`run_key`), and `found` the same in `out`.

    Raises ValueError, on every process the same.
    """
    if join().num_processes == 1:
        return
    (first, what), *others = gather_object([(dict(key), found)])
    for rank, (other, its) in enumerate(others, 1):
        told = [text.replace(": was ", ": process 0 has ").replace(", now ", f", process {rank} ")
                for text in differences(first, other, recipe)]  # fmt: skip
        told += [f"{name} in --out: process 0 has {what[name]}, process {rank} {its[name]}"
                 for name in what if what[name] != its[name]]  # fmt: skip
        if told:
            raise everywhere(
                ValueError(f"processes disagree: {'; '.join(told)}; start all with the same files and options")
            )


def everywhere(error: ErrorT) -> ErrorT:
    """Marks an error that every process raises, so that one of them may tell it for all."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


def failures(error: Exception | None) -> str:
    """What went wrong on any process, in words; "" where nothing did. Every process must call it."""
    own = "" if error is None else " ".join(str(error).split()) or type(error).__name__
    told = [own] if join().num_processes == 1 else gather_object([own])
    return next(filter(None, told), "")


def lost(error: BaseException) -> bool:
    """Whether an error only says that another process has ended, or is silent."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextmanager
def ending_at_once(where: str) -> Iterator[None]:
    """Asked to end inside (SIGTERM), this process raises `Stopped` there and then; `Notice` takes over inside of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(where)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Notice:
    """Remembers inside `with` that this process was asked to end, by SIGTERM or because its launcher is gone."""

    def __init__(self) -> None:
        self._asked = False
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def given(self) -> bool:
        return self._asked or self._parent not in (None, os.getppid())

    def __enter__(self) -> Notice:
        self._before = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody listen
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
