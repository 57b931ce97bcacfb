"""A progress bar per run: loss, MMD, images per second, time left."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bars:
    """`with Bars() as bars: fit(…, report=bars.watch("name"))`. Off a terminal it prints a line per run instead."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # what the rest of the line leaves: the rest fits 80 columns
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._last = ""

    def __enter__(self) -> Bars:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        if self.console.is_terminal:
            self._progress.stop()

    def _finish(self) -> None:
        if self._task is not None and not self.console.is_terminal and self._last:
            self.console.print(self._last, highlight=False, soft_wrap=True)
        self._task, self._last = None, ""

    def watch(self, name: str) -> Any:
        """The callback for the run called `name`."""
        self._finish()
        if not self.console.is_terminal:
            self.console.print(name, highlight=False, soft_wrap=True)
        task = self._progress.add_task(name, total=None, text="")
        self._task = task

        def report(values: dict[str, Any]) -> None:
            text = f"loss {values['loss']:.2f}"
            for part, label in (("mmd", "MMD"), ("context_kl", "KL")):
                if part in values:
                    text += f" {label} {values[part]:.3f}"
            if "images_per_second" in values:
                text += f" {values['images_per_second']:.0f} images/s"
            self._progress.update(task, total=values["steps"], completed=values["step"], text=text)
            self._last = f"  {values['step']}/{values['steps']}  {text}"

        return report
