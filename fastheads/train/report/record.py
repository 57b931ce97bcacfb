"""The numbers a leave-one-domain-out experiment's record holds, and the statistics over its runs."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastheads.train.report.clusters import ByClass, by_class, clustered_error, gained

Run = Mapping[str, Any]
Grid = NDArray[np.float64]
BOTH = "A difference combines the errors of both methods as if they were independent."
AT_EVALUATIONS = ("validation", "context_accuracy", "context_change", "target")  # histories of (step, value)
LEAST = 1e-3  # accuracies are no less than this, and no more than 1 less it, in logits, which have no end otherwise
FEW = 20  # classes, below which an error clustered by them is itself uncertain by a sixth or more
ADAPTERS = ("hap", "ha-lora", "lora", "dig")  # the methods that train one, the first that ran stands for all


@dataclass(frozen=True)
class Score:
    """An accuracy, or a difference of two, in per cent; its standard error (None: not known)."""

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")

    @property
    def clear(self) -> bool:
        """Of a difference: whether it is more than two standard errors from 0."""
        return self.error is not None and abs(self.mean) > 2 * self.error


@dataclass(frozen=True)
class Changed:
    """An image whose answer a method changed: its class, zero-shot's answer `before` and the method's `after`."""

    path: Path
    label: str
    before: str
    after: str

    @property
    def right(self) -> bool:
        return self.after == self.label


def number(value: Any) -> float | None:
    """`value` if it is a finite number."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def logit(accuracy: float) -> float:
    """`log(p / (1 − p))`, of an accuracy within LEAST of 0 or 1 as if it were LEAST off."""
    p = min(max(accuracy, LEAST), 1 - LEAST)
    return math.log(p / (1 - p))


def present(values: Iterable[Any]) -> list[float]:
    """The finite numbers among `values`."""
    return [found for found in map(number, values) if found is not None]


def _mean(values: Iterable[Any]) -> float | None:
    found = present(values)
    return float(np.mean(found)) if found else None


def _standard_error(values: Sequence[float]) -> float | None:
    """Over the values; None for fewer than two, or where nothing varies (zero-shot has no seed)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return spread / math.sqrt(len(values)) if spread > 1e-12 else None


def target_accuracy(run: Run) -> float | None:
    """The run's accuracy on the domain held out, 0 to 1."""
    return number((run.get("accuracy") or {}).get(run["target"]))


def gates_by_step(run: Run) -> dict[int, Grid]:
    """The run's gates `[L, H]` by step."""
    kept = run.get("gates") or {}
    grids = [np.asarray(grid, dtype=np.float64) for grid in kept.get("values") or []]
    return {int(step): grid for step, grid in zip(kept.get("step") or [], grids, strict=False) if grid.ndim == 2}


def validation_and_target(run: Run) -> tuple[float, float] | None:
    """Mean accuracy on the sources' validation images, and accuracy on the target; 0 to 1."""
    accuracy, target = run.get("accuracy") or {}, target_accuracy(run)
    source = _mean(accuracy.get(domain) for domain in run.get("sources") or [])
    return None if source is None or target is None else (source, target)


def curve(runs: Sequence[Run], key: str) -> tuple[Grid, Grid] | None:
    """The mean of the runs' histories of `key` on the longest run's steps, lightly smoothed."""
    lines = []
    for run in runs:
        history = run.get("history") or {}
        pairs = history.get(key) or []
        if key not in AT_EVALUATIONS:
            pairs = zip(history.get("step") or [], pairs, strict=False)
        known = [(float(x), float(y)) for x, y in pairs if number(y) is not None]
        lines += [np.array(known).T] if known else []
    if not lines:
        return None
    x = max(lines, key=lambda line: line.shape[1])[0]
    # A run that stopped early takes no part in the mean after its last step.
    every = np.array([np.interp(x, line[0], line[1], left=np.nan, right=np.nan) for line in lines])
    seen = ~np.isnan(every)
    x, y = x[seen.any(0)], (np.nansum(every, 0)[seen.any(0)] / seen.sum(0)[seen.any(0)])
    half = len(y) // 50 if key not in AT_EVALUATIONS else 0
    smooth = [y[max(0, at - half) : at + half + 1].mean() for at in range(len(y))]
    return x, np.array(smooth)


def _name(label: str) -> str:
    """`label` without a remark in brackets at its end."""
    return re.sub(r"\s*\([^()]*\)$", "", label) or label


class Record:
    """The experiment's record, and the statistics taken over its runs."""

    def __init__(self, experiment: Mapping[str, Any]) -> None:
        self.experiment = experiment
        self.runs: list[Run] = experiment["runs"]
        self.dataset = experiment.get("dataset") or {}
        self.model = experiment.get("model") or {}
        self.images = self.dataset.get("images") or {}
        self.entries = {m["id"]: m for m in experiment.get("methods") or []}
        used = list(dict.fromkeys(run["method"] for run in self.runs))
        self.ids = sorted(used, key=lambda m: list(self.entries).index(m) if m in self.entries else len(self.entries))
        held = list(dict.fromkeys(run["target"] for run in self.runs))
        domains = self.dataset.get("domains") or []
        self.targets = sorted(held, key=lambda d: domains.index(d) if d in domains else len(held))
        self.seeds = list(dict.fromkeys(run.get("seed") for run in self.runs))
        self.over_seeds = len(self.seeds) > 1
        scores = {method: self.average(method) for method in self.ids}
        known = {m: score for m, score in scores.items() if score is not None}
        self.ranked = dict(sorted(known.items(), key=lambda pair: -pair[1].mean))

    def label(self, method: str) -> str:
        return str(self.entries.get(method, {}).get("label") or method)

    def brief(self, method: str) -> str:
        """The label for pictures and small tables: without a remark in brackets, unless only that tells it apart."""
        names = [_name(self.label(other)) for other in self.ids]
        mine = _name(self.label(method))
        return mine if names.count(mine) == 1 else self.label(method)

    def of(self, method: str, **match: Any) -> list[Run]:
        chosen = [run for run in self.runs if run["method"] == method]
        return [run for run in chosen if all(run.get(k) == v for k, v in match.items())]

    def score(self, method: str, target: str) -> Score | None:
        """Accuracy on `target`; its error is clustered by class, over seeds, or binomial (`error_kind`)."""
        hits = present(map(target_accuracy, self.of(method, target=target)))
        if not hits:
            return None
        mean, error = float(np.mean(hits)), _standard_error(hits)
        images = number(self.images.get(target))
        if counts := self.counts(method, [target]):
            error = clustered_error(counts)
        elif not self.over_seeds and images and self.dataset.get("evaluation", "all") == "all":
            error = math.sqrt(mean * (1 - mean) / images)
        return Score(100 * mean, None if error is None else 100 * error)

    def average(self, method: str) -> Score | None:
        """The mean over all targets; None while one of them is missing.

        By class, its error is of the targets' classes together. Over seeds, it is that of the per-seed means; for one
        seed, the targets' binomial errors are combined.
        """
        scores = [score for target in self.targets if (score := self.score(method, target))]
        if len(scores) < len(self.targets):
            return None
        mean = float(np.mean([score.mean for score in scores]))
        if counts := self.counts(method, self.targets):
            error = clustered_error(counts)
            return Score(mean, None if error is None else 100 * error)
        errors = [score.error for score in scores if score.error is not None]
        if len(scores) == 1 or not self.over_seeds:
            return Score(mean, math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None)
        per_seed = []
        for seed in self.seeds:
            runs = {run["target"]: target_accuracy(run) for run in self.of(method, seed=seed)}
            hits = present(runs.get(target) for target in self.targets)
            per_seed += [100 * float(np.mean(hits))] if len(hits) == len(scores) else []
        return Score(mean, _standard_error(per_seed))

    def counts(self, method: str, targets: Sequence[str]) -> list[ByClass] | None:
        """Right answers by class on each target, where errors are clustered by class and every run has them."""
        if self.dataset.get("errors") != "class":
            return None
        found = [by_class(self.of(method, target=target)) for target in targets]
        known = [each for each in found if each is not None]
        return known if len(known) == len(targets) else None

    def difference(self, method: str, other: str) -> Score | None:
        """How far `method` lies above `other`, averaged over targets; None where one of them has no average.

        By class, the error is of the paired differences; else the two methods' errors are combined as if independent.
        """
        mine, its = self.average(method), self.average(other)
        if mine is None or its is None:
            return None
        errors = [score.error for score in (mine, its) if score.error is not None]
        error = math.hypot(*errors) if errors else None
        ours, theirs = self.counts(method, self.targets), self.counts(other, self.targets)
        if ours and theirs:
            pairs = [pair for pair in map(gained, ours, theirs) if pair is not None]
            paired = clustered_error(pairs) if len(pairs) == len(ours) else None
            error = error if paired is None else 100 * paired
        return Score(mine.mean - its.mean, error)

    def gain(self, method: str) -> Score | None:
        """The difference to zero-shot."""
        return self.difference(method, "zero-shot")

    def error_kind(self) -> str:
        """What ± and the error bars are, in words."""
        by_class = {method: counts for method in self.ids if (counts := self.counts(method, self.targets))}
        if not by_class:
            return self._error_without_classes()
        classes = max(np.count_nonzero(each.images) for counts in by_class.values() for each in counts)
        kind = (
            "± and error bars: standard error clustered by class. Pictures of one class are not independent, so it "
            f"counts the {classes} classes, not the pictures; a difference of two methods is taken class by class. "
        )
        kind += "With so few classes the error itself is rough. " if classes < FEW else ""
        kind += (
            f"Answers are averaged over {len(self.seeds)} seeds first; the spread between seeds is not in it."
            if self.over_seeds
            else "One seed: the spread between training runs is not known."
        )
        others = [method for method in self.ids if method not in by_class]
        if others:
            kind += f" No counts by class, so not clustered: {self.names(others)}."
        return kind

    def _error_without_classes(self) -> str:
        if self.over_seeds:
            kind = f"± and error bars: standard error over {len(self.seeds)} seeds; none where seeds change nothing."
            return f"{kind} {BOTH}"
        if any(score.error is not None for score in self.ranked.values()):
            return (
                "± and error bars: binomial standard error of the target accuracy, from the number "
                f"of images. One seed: the spread between training runs is not known. {BOTH}"
            )
        return "No error bars: one seed, and the number of scored images is not known."

    def place(self, method: str) -> int:
        """From 1; methods with the same accuracy share a place."""
        return 1 + sum(score.mean > self.ranked[method].mean for score in self.ranked.values())

    def adapter(self) -> str | None:
        """The method whose adapter stands for all: HAP where it ran."""
        return next((m for m in ADAPTERS if m in self.ids), None)

    def leading(self) -> list[str]:
        """The best adapter, and HAP; where no adapter is ranked, the best trained method."""
        adapters = [m for m in self.ranked if m in ADAPTERS]
        best = adapters or [m for m in self.ranked if m != "zero-shot"]
        return list(dict.fromkeys([*best[:1], *(m for m in adapters if m == "hap")]))

    def mean_of(self, method: str, key: str) -> float | None:
        return _mean(run.get(key) for run in self.of(method))

    def names(self, methods: Iterable[str]) -> str:
        return ", ".join(map(self.label, methods))
