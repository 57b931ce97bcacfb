"""In and out of distribution: accuracy on the sources' held-out images against that on the target, over training and
over WiSE-FT's mixture, and how far the target's lies above what is to be expected."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from fastheads.train.methods import METHODS
from fastheads.train.report import answer_figures, markup
from fastheads.train.report.markup import NONE
from fastheads.train.report.record import Run, logit, number, present, validation_and_target
from fastheads.train.report.shown import Shown

BASELINES = ("zero-shot", "linear-probe", "fine-tune")


@dataclass(frozen=True)
class Point:
    """Accuracies, 0 to 1, of a run as it is kept (`over` ""), at a "step" or with "alpha" of the tuned weights."""

    over: str
    at: float
    source: float
    target: float


@dataclass(frozen=True)
class Line:
    """`logit(target) = slope · logit(source) + intercept`, through `points` of the baselines."""

    slope: float
    intercept: float
    points: int

    def expected(self, source: float) -> float:
        """The target's accuracy that a baseline of this accuracy on the sources would have."""
        return 1 / (1 + math.exp(-(self.slope * logit(source) + self.intercept)))


def baseline(points: Sequence[Point]) -> Line | None:
    """The line of least squares through points in logits (Taori et al., arXiv 2007.00644).

    None for fewer than two of different accuracy on the sources.
    """
    x, y = np.array([(logit(p.source), logit(p.target)) for p in points]).reshape(-1, 2).T
    if len(x) < 2 or np.ptp(x) < 1e-9:
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return Line(slope, float(y.mean() - slope * x.mean()), len(x))


def points(run: Run) -> list[Point]:
    """What a run's record has of both accuracies: as it is kept, over training, over the mixture."""
    kept, history, found = validation_and_target(run), run.get("history") or {}, list[Point]()
    if kept:
        found.append(Point("", 0, *kept))
    target = {step: value for step, value in history.get("target") or () if number(value) is not None}
    for step, source in history.get("validation") or ():
        if step in target and number(source) is not None:
            found.append(Point("step", step, source, target[step]))
    for each in run.get("wise_ft") or ():
        mixed = validation_and_target({**run, "accuracy": each["accuracy"]})
        found += [Point("alpha", each["alpha"], *mixed)] if mixed else []
    return found


def effective(point: Point, line: Line | None) -> float | None:
    """Effective robustness, in points: the target's accuracy less what a baseline as good on the sources would have."""
    return None if line is None else 100 * (point.target - line.expected(point.source))


class Robustness(Shown):
    """The section on both accuracies."""

    def baselines(self) -> list[str]:
        """The rows of a published baseline, by whatever name."""
        known = {METHODS[name].description for name in BASELINES}
        kinds = {m: str(self.entries.get(m, {}).get("description") or "").split(" Here: ")[0] for m in self.ids}
        return [m for m in self.ids if m in BASELINES or kinds[m] in known]

    def lines(self) -> dict[str, Line | None]:
        """The baselines' line on each target, where there is one."""
        runs = {t: [run for m in self.baselines() for run in self.of(m, target=t)] for t in self.targets}
        return {t: baseline([p for run in each for p in points(run) if not p.over]) for t, each in runs.items()}

    def means(self, method: str, target: str) -> list[Point]:
        """A row's points on a target, each the mean over its seeds."""
        together: dict[tuple[str, float], list[Point]] = {}
        for run in self.of(method, target=target):
            for point in points(run):
                together.setdefault((point.over, point.at), []).append(point)
        return [
            Point(over, at, float(np.mean([p.source for p in each])), float(np.mean([p.target for p in each])))
            for (over, at), each in together.items()
        ]

    def robustness(self) -> str:
        """Both accuracies of every row on each target; nothing without a curve or two baselines."""
        lines, charts, rows, gained = self.lines(), "", [], dict[tuple[str, str], float | None]()
        for at, target in enumerate(self.targets):
            each = {m: self.means(m, target) for m in self.ids}
            gained |= {
                (m, target): effective(p, lines[target]) for m, found in each.items() for p in found if not p.over
            }
            if lines[target] is None and not any(p.over for found in each.values() for p in found):
                continue
            shown = [(self.brief(m), self.colour(m), found) for m, found in each.items() if found]
            alt = "; ".join(
                f"{name} {100 * p.source:.1f} and {100 * p.target:.1f} %" for name, _, found in shown for p in found[:1]
            )
            charts += self.picture(
                f"in-and-out-{at}",
                answer_figures.in_and_out(shown, f"Held out: {target}", lines[target]),
                f"Scatter chart. Accuracy on the sources and on {target}: {alt}.",
                "",
            )
        if not charts:
            return ""
        for method in self.ids:
            found = [gained.get((method, target)) for target in self.targets]
            known = present(found)
            average = [float(np.mean(known)) if len(known) == len(found) else None] * (len(found) > 1)
            rows.append([self.key(method), *(NONE if x is None else markup.signed(x) for x in (*found, *average))])
        return f'<div class="figures">{charts}</div>' + self._table(rows, lines)

    def _table(self, rows: Sequence[Sequence[str]], lines: Mapping[str, Any]) -> str:
        words = (
            f"Points: each method as it is kept{', mean over seeds' * self.over_seeds}; solid: over training; dashed: "
            "over parts of the tuned weights in WiSE-FT's mixture. Both axes are scaled by logits. "
        )
        used = self.names(self.baselines())
        if not any(lines.values()):
            return markup.note(
                f"{words}No effective robustness: it takes two or more runs, of different accuracy on the sources, of "
                f"{', '.join(METHODS[m].label for m in BASELINES)}."
            )
        counts = "; ".join(f"{line.points} on {t}, slope {line.slope:.2f}" for t, line in lines.items() if line)
        caption = (
            f"Effective robustness (Taori et al. 2020), in points: how far the target's accuracy lies above the line "
            f"through the baselines' logits, here through the runs of {used} ({counts}). A line through few runs is "
            "rough, through two it has no error of its own, and one that falls is nothing to be expected."
        )
        columns = [*self.targets, *["average"] * (len(self.targets) > 1)]
        return markup.note(words) + markup.table(["Method", *map(escape, columns)], rows, caption)
