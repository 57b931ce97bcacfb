"""The pictures of `bench.report`: bars of contenders, lines of sweeps, shares of the roofline, drawn from panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.base.results import Row

AXES = {
    "batch sweep": "batch",
    "length sweep": "number of tokens, N",
    "rank sweep": "rank of the deltas",
    "closed sweep": "share of closed heads",
}
OURS, OTHER, WRONG, INK, GRID = "#0072b2", "#9aa0a6", "#d55e00", "#1d1d1f", "#ecedee"
LINES = (OURS, "#d55e00", "#646a73", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Panel:
    """One pair of axes. kind: "bars" or "lines".

    bars: (label, value, colour), from the top. lines: (label, xs, ys). log: of which axes, "", "x", "xy".
    """

    kind: str
    title: str
    label: str
    bars: tuple[tuple[str, float, str], ...] = ()
    lines: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = ()
    x_label: str = ""
    log: str = ""


def bars(rows: Sequence[Row], words: Mapping[str, str], ours: Set[str]) -> tuple[Panel, ...]:
    """Per case: time over the baseline's, and where it is known peak memory in MB."""
    panels = []
    for case in dict.fromkeys(r.case for r in rows):
        ran = sorted((r for r in rows if r.case == case and r.ratio), key=lambda r: r.ratio or 0)
        if not ran:
            continue

        def bar(r: Row, value: float) -> tuple[str, float, str]:
            wrong = r.status == "wrong"
            label = words[r.contender] + (" (wrong)" if wrong else "")
            return label, value, WRONG if wrong else OURS if r.contender in ours else OTHER

        panels.append(Panel("bars", case, f"time / {ran[0].baseline}", tuple(bar(r, r.ratio or 0) for r in ran)))
        known = [r for r in ran if r.peak_bytes is not None]
        if known:
            memory = tuple(bar(r, (r.peak_bytes or 0) / 1e6) for r in known)
            panels.append(Panel("bars", case, "peak memory, MB", memory))
    return tuple(panels)


def lines(sweep: str, rows: Sequence[Row]) -> tuple[Panel, ...]:
    """Per case: images per second against the batch, milliseconds against everything else."""
    panels = []
    speed = sweep == "batch sweep"
    for case in dict.fromkeys(r.case for r in rows):
        ran = [r for r in rows if r.case == case and r.seconds and r.x is not None]
        each = []
        for name in dict.fromkeys(r.contender for r in ran):
            points = sorted((r.x, _y(r, speed)) for r in ran if r.contender == name)
            each.append((name, tuple(p[0] for p in points), tuple(p[1] for p in points)))
        if each:
            log = {"batch sweep": "x", "length sweep": "xy", "rank sweep": "x"}.get(sweep, "")
            label = "images per second" if speed else "ms, forward and backward"
            panels.append(Panel("lines", case, label, lines=tuple(each), x_label=AXES[sweep], log=log))  # type: ignore[arg-type]
    return tuple(panels)


def _y(row: Row, speed: bool) -> float:
    return float(row.per_second or 0) if speed else (row.seconds or {})["median"] * 1e3


def shares(found: Sequence[tuple[str, float]]) -> tuple[Panel, ...]:
    """Shares of the least time that reachable rates allow."""
    if not found:
        return ()
    each = tuple((label, share, OURS) for label, share in found)
    return (Panel("bars", "least time / measured time", "share of the roofline, reachable rates", each),)


def draw(panels: Sequence[Panel], caption: str, digest: str, file: Path) -> None:
    """Panels two in a row, the caption below; `digest` goes into the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    tallest = max(len(p.bars) for p in panels)
    height = rows * max(2.8, 0.24 * tallest + 1.1) + 0.25 * (1 + caption.count("\n"))
    figure = Figure(figsize=(11 if len(panels) > 1 else 6.5, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for at, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, min(2, len(panels)), at)
        (_draw_bars if panel.kind == "bars" else _draw_lines)(axes, panel)
        axes.set_title(panel.title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption.replace("`", ""), fontsize=6.5, color=INK)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Comment": digest, "Software": None})


def _draw_bars(axes: Any, panel: Panel) -> None:
    labels = [b[0] for b in panel.bars]
    places = range(len(labels))
    axes.barh(places, [b[1] for b in panel.bars], color=[b[2] for b in panel.bars])
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel(panel.label, fontsize=8)
    axes.grid(True, axis="x", color=GRID)
    axes.set_axisbelow(True)
    for place, (_, value, _) in zip(places, panel.bars, strict=True):
        axes.text(value, place, f" {value:,.2f}" if value < 100 else f" {value:,.0f}", va="center", fontsize=6)


def _draw_lines(axes: Any, panel: Panel) -> None:
    for (label, x, y), colour in zip(panel.lines, LINES, strict=False):
        axes.plot(x, y, "o-", label=label, color=colour, markersize=3, linewidth=1.3)
    if "x" in panel.log:
        axes.set_xscale("log", base=2)
    if "y" in panel.log:
        axes.set_yscale("log")
    axes.set_xlabel(panel.x_label, fontsize=8)
    axes.set_ylabel(panel.label, fontsize=8)
    axes.grid(True, color=GRID)
    axes.legend(frameon=False, fontsize=7)
    if not panel.log:
        axes.set_ylim(bottom=0)


def digest_of(file: Path) -> str:
    """What `draw` wrote into the file; "" where there is none."""
    from PIL import Image

    with Image.open(file) as image:
        return str(image.info.get("Comment", ""))
