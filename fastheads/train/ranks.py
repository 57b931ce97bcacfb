"""The processes of a run: that they are of one mind, and that they end together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
ErrorT = TypeVar("ErrorT", bound=Exception)

PATIENCE = 600.0  # seconds that a process waits for the others; FASTHEADS_PATIENCE says otherwise


class Stopped(SystemExit):
    """The run was asked to end (SIGTERM) and saved its state: exit code 0. where: after which step."""

    def __init__(self, where: str) -> None:
        super().__init__(0)
        self.where = where


def _told(name: str, otherwise: int) -> int:
    """What the launcher says in the environment."""
    return int(os.environ.get(name, otherwise))


def rank() -> int:
    """Which of the processes this is."""
    return _told("RANK", 0)


def local_rank() -> int:
    """Which of this machine's processes this is."""
    return _told("LOCAL_RANK", 0)


def processes() -> int:
    """How many there are."""
    return _told("WORLD_SIZE", 1)


def local_processes() -> int:
    """How many there are on this machine."""
    return _told("LOCAL_WORLD_SIZE", 1)


def is_main_process() -> bool:
    """Whether this process writes and prints: the first, or the only one."""
    return rank() == 0


def join() -> PartialState:
    """This process among those that `torchrun` or `accelerate launch` started; alone where there are no others."""
    from accelerate import PartialState

    patience = timedelta(seconds=float(os.environ.get("FASTHEADS_PATIENCE", PATIENCE)))
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
    if state.num_processes != processes():
        raise ValueError(
            f"WORLD_SIZE: says {processes()} processes, but {state.num_processes} found each other; start them by "
            "torchrun or accelerate launch, which set LOCAL_RANK too, or unset it for one"
        )
    return state


def group() -> Any:
    """The process group over which a batch is one; None where this process is alone."""
    return dist.group.WORLD if join().num_processes > 1 else None


def of_all(own: list[T]) -> list[T]:
    """The processes' lists, one after the other. Every process must call it."""
    if processes() == 1:
        return own
    from accelerate.utils import gather_object

    join()
    found: list[T] = gather_object(own)
    return found


def in_turn(own: Sequence[T], count: int) -> list[T]:
    """What was dealt out to the processes in turn, as many to each, in order again: the first `count` of all."""
    each = of_all([own])
    return [one for turn in zip(*each, strict=True) for one in turn][:count]


def everywhere(error: ErrorT) -> ErrorT:
    """Marks an error that every process raises, so that one of them may tell it for all."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


def failures(error: Exception | None) -> str:
    """What went wrong on any process, in words; "" where nothing did. Every process must call it."""
    own = "" if error is None else " ".join(str(error).split()) or type(error).__name__
    return next(filter(None, of_all([own])), "")


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
