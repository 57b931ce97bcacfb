"""The pictures: bars of contenders, lines of sweeps, shares of the roofline. What is drawn is told from how."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.base.results import Row, by_case
from bench.report.sources import GROUPS, Source, by_machine, is_ours, one_machine, roofline_shares, words

AXES = {
    "batch sweep": "batch",
    "length sweep": "number of tokens, N",
    "rank sweep": "rank of the deltas",
    "closed sweep": "share of closed heads",
}
OURS, OTHER, WRONG, INK, GRID = "#0072b2", "#9aa0a6", "#d55e00", "#1d1d1f", "#ecedee"
LINES = (OURS, "#d55e00", "#646a73", "#009e73", "#cc79a7")


class Panel(NamedTuple):
    """One pair of axes. kind: "bars", "lines" or "points".

    bars: (label, value, colour), from the top. lines: (label, xs, ys); of points (label, values, standard errors),
    which stand at the bars' labels. log: of which axes, "", "x", "xy".
    """

    kind: str
    title: str
    label: str
    bars: tuple[tuple[str, float, str], ...] = ()
    lines: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = ()
    x_label: str = ""
    log: str = ""


class Figure(NamedTuple):
    """A picture and what it is drawn from; `digest` is written into the file, so that a stale one is known."""

    file: str
    alt: str
    caption: str
    panels: tuple[Panel, ...]

    def digest(self) -> str:
        return hashlib.sha256(repr((self.caption, self.panels)).encode()).hexdigest()[:16]


def figure_of(found: Sequence[Source], what: str) -> Figure | None:
    """The figure of a group, a sweep or "roofline" on one machine; None where there is nothing to draw."""
    one_machine(found, f"a figure of {what}")
    if what == "roofline":
        shares = roofline_shares(found)
        rows = [r for r, _, _ in shares]
        bars = tuple((f"{r.case}\n{words(r)}", reached, OURS) for r, _, reached in shares)
        label = "share of the roofline, reachable rates"
        panels = (Panel("bars", "least time / measured time", label, bars),) if bars else ()
    else:
        rows = [r for s in found for r in s.rows if r.group == what]
        panels = _lines(what, rows) if what.endswith(" sweep") else _bars(rows)
    if not panels:
        return None
    machine = found[0].machine
    slug = re.sub(r"[\W_]+", "-", machine.lower()).strip("-")
    caption = "\n".join(s.caption() for s in found if any(r in s.rows for r in rows))
    return Figure(f"{slug}-{what.replace(' ', '-')}.png", f"{what} on {machine}", caption, panels)


def all_figures(found: Sequence[Source]) -> list[Figure]:
    made = []
    for own in by_machine(found).values():
        names = [g for g in GROUPS if any(r.group == g for s in own for r in s.rows)]
        made += [figure_of(own, name) for name in (*names, "roofline")]
        made += [figure_of([source], group) for source in own for group in source.sweeps()]
    return [figure for figure in made if figure is not None]


def _bars(rows: Sequence[Row]) -> tuple[Panel, ...]:
    """Per case: time over the baseline's, and where it is known peak memory in MB."""

    def bar(r: Row, value: float) -> tuple[str, float, str]:
        if r.status == "wrong":
            return f"{words(r)} (wrong)", value, WRONG
        return words(r), value, OURS if is_ours(r) else OTHER

    panels = []
    for (_, case), own in by_case(rows).items():
        ran = sorted((r for r in own if r.ratio), key=lambda r: r.ratio)
        memory = tuple(bar(r, r.peak_bytes / 1e6) for r in ran if r.peak_bytes is not None)
        if ran:
            panels.append(Panel("bars", case, f"time / {ran[0].baseline}", tuple(bar(r, r.ratio) for r in ran)))
        if memory:
            panels.append(Panel("bars", case, "peak memory, MB", memory))
    return tuple(panels)


def _lines(sweep: str, rows: Sequence[Row]) -> tuple[Panel, ...]:
    """Per case: images per second against the batch, milliseconds against everything else."""
    panels, speed = [], sweep == "batch sweep"
    for (_, case), own in by_case(r for r in rows if r.seconds and r.x is not None).items():
        points: dict[str, list[tuple[float, float]]] = {}
        for r in own:
            points.setdefault(r.contender, []).append((r.x, r.per_second if speed else r.median * 1e3))
        each = [(name, *zip(*sorted(line), strict=True)) for name, line in points.items()]
        log = {"batch sweep": "x", "length sweep": "xy", "rank sweep": "x"}.get(sweep, "")
        label = "images per second" if speed else "ms, forward and backward"
        panels.append(Panel("lines", case, label, lines=tuple(each), x_label=AXES[sweep], log=log))
    return tuple(panels)


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
        {"bars": _draw_bars, "lines": _draw_lines, "points": _draw_points}[panel.kind](axes, panel)
        axes.set_title(panel.title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption.replace("`", ""), fontsize=6.5, color=INK)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Comment": digest, "Software": None})


def _draw_bars(axes: Any, panel: Panel) -> None:
    labels, values, colours = zip(*panel.bars, strict=True)
    places = range(len(labels))
    axes.barh(places, values, color=colours)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel(panel.label, fontsize=8)
    axes.grid(True, axis="x", color=GRID)
    axes.set_axisbelow(True)
    for place, value in enumerate(values):
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


def _draw_points(axes: Any, panel: Panel) -> None:
    labels = [label for label, _, _ in panel.bars]
    for at, ((label, values, errors), colour) in enumerate(zip(panel.lines, LINES, strict=False)):
        places = [place + 0.25 * at for place in range(len(labels))]
        axes.errorbar(values, places, xerr=errors, fmt="o", label=label, color=colour, markersize=3.5, linewidth=1.2)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.7)
    axes.set_xlabel(panel.label, fontsize=8)
    axes.grid(True, axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=7)


def digest_of(file: Path) -> str:
    """What `draw` wrote into the file; "" where there is none."""
    from PIL import Image

    with Image.open(file) as image:
        return str(image.info.get("Comment", ""))
