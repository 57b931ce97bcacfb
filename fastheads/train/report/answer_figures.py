"""Pictures of the answers: accuracy class by class, and how well confidence matches it; in and out of distribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastheads.train.report.figures import INK, MUTED, dumbbell, render, short
from fastheads.train.report.record import logit

ROWS = 50  # classes in one picture, at most


@dataclass(frozen=True)
class Moved:
    """A class, and its accuracy by zero-shot and by a method, in per cent."""

    label: str
    before: float
    after: float


@dataclass(frozen=True)
class Reliability:
    """One method's bins of confidence: mean confidence, accuracy and number of images; empty bins left out."""

    label: str
    colour: str
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    images: NDArray[np.float64]
    error: float  # expected calibration error, points


def classes(rows: Sequence[Moved], *, title: str, method: str, colour: str) -> bytes:
    """Per class a hollow point for zero-shot, joined to a filled one for the method."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for at, row in enumerate(rows):
            dumbbell(axes, at, row.before, row.after, colour, 4.5)
        names = [short(row.label, 22).split("\n")[0] for row in rows]
        axes.set_yticks(range(len(rows)), names, color=INK, fontsize=7.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-3, 103)
        axes.set_xticks(range(0, 101, 20))
        axes.grid(axis="both")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel("accuracy, %")
        axes.set_title(f"{short(title, 32)}\n○ zero-shot   ● {short(method, 20)}", fontsize=9)

    return render(1.05 + 0.155 * len(rows), paint)


def reliability(panels: Sequence[Reliability]) -> bytes:
    """Accuracy against confidence, a small panel per method, three to a row; points grow with their images."""
    rows = (len(panels) + 2) // 3

    def paint(figure: Figure) -> None:
        for at, panel in enumerate(panels):
            axes = figure.add_subplot(rows, 3, at + 1)
            axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            axes.plot(panel.confidence, panel.accuracy, color=panel.colour, linewidth=1.3)
            sizes = 4 + 40 * panel.images / panel.images.sum()
            axes.scatter(panel.confidence, panel.accuracy, sizes, color=panel.colour, zorder=3)
            axes.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal")
            axes.set_xticks([0, 50, 100] if at + 3 >= len(panels) else [])
            axes.set_yticks([0, 50, 100] if at % 3 == 0 else [])
            axes.tick_params(labelsize=7.5)
            axes.set_title(f"{short(panel.label)}\nECE {panel.error:.1f}", fontsize=8, fontweight="normal", pad=4)
        figure.supxlabel("confidence, %", fontsize=8.5, color=MUTED)
        figure.supylabel("accuracy, %", fontsize=8.5, color=MUTED)

    return render(0.4 + 1.4 * rows, paint)


def in_and_out(rows: Sequence[tuple[str, str, Sequence[Any]]], title: str, line: Any) -> bytes:
    """Accuracy on the target over that on the sources, both scaled by logits: rows of (label, colour, points), and the
    baselines' line, if there is one (`robustness.Point` and `Line`)."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for label, colour, points in rows:
            axes.plot([], [], "o", color=colour, markersize=5.5, label=label)
            for over, style in (("step", "-"), ("alpha", "--")):
                path = sorted((p for p in points if p.over == over), key=lambda p: p.at)
                marker = "." if over == "alpha" or len(path) == 1 else None
                x, y = [p.source for p in path], [p.target for p in path]
                axes.plot(x, y, style, color=colour, linewidth=1.2, marker=marker, alpha=0.7)
            for point in points:
                if not point.over:
                    axes.plot(point.source, point.target, "o", color=colour, markersize=5.5, mec="white")
        ends = np.array([(logit(p.source), logit(p.target)) for _, _, points in rows for p in points])
        axes.set_xscale("logit", nonpositive="clip")
        axes.set_yscale("logit", nonpositive="clip")
        for axis, low, high in zip((axes.xaxis, axes.yaxis), ends.min(0) - 0.15, ends.max(0) + 0.15, strict=True):
            marks = 1 / (1 + np.exp(-np.linspace(low, high, 5)))
            axis.set_ticks(marks[1:-1], [f"{100 * mark:.1f}" for mark in marks[1:-1]])
            (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(marks[0], marks[-1])
        axes.minorticks_off()
        if line is not None:
            across = np.linspace(*axes.get_xlim(), 50)
            axes.plot(
                across, [line.expected(source) for source in across], color=MUTED, linewidth=1, linestyle=(0, (1, 2))
            )
        axes.set(xlabel="sources, held-out images, %", ylabel="target, %", title=short(title, 32))
        axes.grid()
        figure.legend(loc="outside lower center", ncols=2)

    return render(2.9 + 0.12 * len(rows), paint)
