"""What is going on: bars on a terminal; elsewhere, in a log file, a line at least every half minute.

    with Bars() as bars:
        with phase("looking at the images", total=700, unit="images") as advance:
            advance(64)
        fit(…, report=bars.watch("name"))

`phase` finds the bars by itself, from any function they run; without any it shows nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastheads.train.ranks import is_main_process

SILENCE = 25.0  # seconds between two lines off a terminal: half a minute at most is promised

_shown: ContextVar[Bars | None] = ContextVar("shown", default=None)


@contextmanager
def phase(text: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Something that takes time; yields what to call with the number of `unit` (of `total`) just done."""
    bars = _shown.get()
    if bars is None:
        yield lambda count: None
        return
    with bars.phase(text, total, unit) as advance:
        yield advance


def clock(seconds: float) -> str:
    """For example 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass
class _Task:
    """A run or a phase. Its speed is measured from its first report on: a resumed run doesn't start at 0."""

    id: TaskID
    name: str
    total: int | None
    unit: str = ""
    note: str = ""
    done: int = 0
    first: tuple[int, float] | None = None
    began: float = field(default_factory=time.monotonic)

    def update(self, done: int) -> None:
        self.first = self.first or (done, time.monotonic())
        self.done = done

    def line(self) -> str:
        """How far it is, since when, and how long it will take."""
        now = time.monotonic()
        parts = [f"{self.done}/{self.total} {self.unit}".strip()] if self.total else []
        parts += [self.note] * bool(self.note) + [f"{clock(now - self.began)} so far"]
        if self.total and self.first and self.first[0] < self.done < self.total:
            pace = (now - self.first[1]) / (self.done - self.first[0])
            parts.append(f"about {clock(pace * (self.total - self.done))} left")
        return f"  {self.name}: {', '.join(parts)}"


class Bars:
    """A bar for each run and each phase. Off a terminal a line per run, and one whenever `SILENCE` seconds had none.

    Of several processes the first alone prints.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=not is_main_process())
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),  # what the rest of the line leaves: the rest fits 80 columns
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            expand=True,
            redirect_stdout=False,  # results may go to a file while the bars go to a terminal
        )
        self._run: _Task | None = None
        self._phases: list[_Task] = []  # one inside the other
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._printed = self._began
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._token: Token[Bars | None] | None = None

    def __enter__(self) -> Bars:
        self._token = _shown.set(self)
        if self.console.is_terminal:
            self._progress.start()
        elif not self.console.quiet:
            self._thread = threading.Thread(target=self._break_silence, name="fastheads-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _shown.reset(self._token)
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._finish()
        self._stop_bars()

    def say(self, text: str) -> None:
        """A line on standard output, above the bars."""
        self._stop_bars()
        with self._lock:
            print(text, flush=True)
            self._printed = time.monotonic()
        if self.console.is_terminal:
            self._progress.start()

    def watch(self, name: str) -> Callable[[dict[str, Any]], None]:
        """The callback for the run called `name`."""
        self._finish()
        self._print(name)
        task = self._run = self._task(name, None)

        def report(values: dict[str, Any]) -> None:
            text = f"loss {values['loss']:.2f}"
            for part, label in (("mmd", "MMD"), ("context_kl", "KL")):
                if part in values:
                    text += f" {label} {values[part]:.3f}"
            if "images_per_second" in values:
                text += f" {values['images_per_second']:.0f} images/s"
            if "loader" in values and "model" in values:
                text += f" (loader {values['loader']:.0f}, model {values['model']:.0f})"
            with self._lock:
                task.note, task.total = text, values["steps"]
                task.update(values["step"])
            self._progress.update(task.id, total=values["steps"], completed=values["step"], text=text)

        return report

    @contextmanager
    def phase(self, text: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """As the function of that name."""
        task = self._task(text, total, unit)
        with self._lock:
            self._phases.append(task)

        def advance(count: int) -> None:
            with self._lock:
                task.update(task.done + count)
            self._progress.update(task.id, completed=task.done)

        try:
            yield advance
        finally:
            with self._lock:
                self._phases.pop()
            self._progress.remove_task(task.id)

    def _stop_bars(self) -> None:
        """The bars of runs stay to be read; where there are none no empty line does."""
        if self.console.is_terminal:
            self._progress.live.transient = not self._progress.tasks
            self._progress.stop()

    def _task(self, name: str, total: int | None, unit: str = "") -> _Task:
        return _Task(self._progress.add_task(name, total=total, text=""), name, total, unit)

    def _finish(self) -> None:
        """The last line of the run, if one was on."""
        with self._lock:
            run, self._run = self._run, None
        if run is not None and run.note:
            self._print(f"  {run.done}/{run.total}  {run.note}")

    def _print(self, line: str) -> None:
        """A line off a terminal, where nothing wraps it or reads it as markup."""
        if not self.console.is_terminal:
            with self._lock:
                self.console.out(line, highlight=False)
                self._printed = time.monotonic()

    def _break_silence(self) -> None:
        while not self._ended.wait(max(0.0, self._printed + SILENCE - time.monotonic())):
            with self._lock:
                if time.monotonic() >= self._printed + SILENCE:
                    task = self._phases[-1] if self._phases else self._run
                    self._print(task.line() if task else f"  {clock(time.monotonic() - self._began)} so far")
