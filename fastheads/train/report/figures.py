"""The report's pictures, and how it prints numbers: plain numbers in, PNG bytes out.

Every figure is 3.8 inches wide with 9-point text, so that it stays legible when a phone shows it at
its full width. Only matplotlib's object interface is used; no pyplot, no state left behind.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

WIDTH = 3.8  # inches
DPI = 200
INK, MUTED, RULE = "#24272b", "#646a73", "#d9dadc"

# Okabe and Ito's colour-blind safe palette (yellow, too pale on white, darkened to ochre).
METHOD_COLOURS = {
    "zero-shot": "#8a8f98",
    "linear-probe": "#b8860b",
    "fine-tune": "#d55e00",
    "car-ft": "#cc79a7",
    "lora": "#56b4e9",
    "ha-lora": "#0072b2",
    "dig": "#009e73",
    "hap": "#882255",
}
SPARE_COLOURS = ["#7a4f9e", "#999933", "#6b4a2f", "#44aa99"]

_STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a dollar sign in a domain's name is a dollar sign
    "text.usetex": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": "#ecedee",
    "grid.linewidth": 0.8,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length, half its error bar, its colour, and the number printed."""

    label: str
    value: float
    colour: str
    text: str
    error: float | None = None


@dataclass(frozen=True)
class Curve:
    """One line: `x` and `y` of one length; `mark` is the x of a point to emphasise."""

    label: str
    colour: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    strong: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Pair:
    """One method's mean accuracy on source validation and on the target, in per cent."""

    label: str
    colour: str
    source: float
    target: float


def colour(method: str, known: Sequence[str]) -> str:
    """The method's colour on every picture; ids outside the palette take spare ones in order."""
    others = [name for name in known if name not in METHOD_COLOURS]
    if method in METHOD_COLOURS:
        return METHOD_COLOURS[method]
    return SPARE_COLOURS[others.index(method) % len(SPARE_COLOURS)]


def short(label: str, width: int = 14) -> str:
    """`label` in at most two lines of `width` characters."""
    return "\n".join(textwrap.wrap(label, width, max_lines=2, placeholder=" …", break_long_words=True))


def ticks(count: int, *, integer: bool = False) -> MaxNLocator:
    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=integer, min_n_ticks=1 if integer else 2)


def render(height: float, paint: Callable[[Figure], None]) -> bytes:
    """A figure of `height` inches as PNG; `paint` draws on it."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
        canvas = FigureCanvasAgg(figure)
        paint(figure)
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def compact(value: float) -> str:
    """`value` for an axis: 1,200 stays, 12,000 becomes 12k, 1,500,000 becomes 1.5M."""
    for start, size, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= start:
            return f"{value / size:g}{suffix}"
    return f"{value:,g}"


def size(count: float) -> str:
    """Bytes in decimal units: `950 B`, `12.3 kB`, `1.2 MB`."""
    for start, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= start:
            return f"{count / start:.3g} {unit}"
    return f"{count:.0f} B"


def percent(part: float, whole: float) -> str:
    """`part` of `whole`: `98 %`, `1.2 %`, `0.64 %`, `< 0.01 %`."""
    share = 100 * part / whole
    if share < 0.01:
        return "< 0.01 %"
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3 min 20 s`, `1 h 12 min`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def bars(
    rows: Sequence[Bar],
    *,
    title: str,
    unit: str,
    full: float | None = None,
    guide: tuple[float, str] | None = None,
) -> bytes:
    """Horizontal bars from zero, one per row, each with its number printed at its end.

    `full` is the axis's natural end (100 for per cent); `guide` a dotted line, `(value, name)`.
    """

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        ends = [row.value + (row.error or 0.0) for row in rows]
        end = max([*ends, full or 0.0]) or 1.0
        for at, row in enumerate(rows):
            axes.barh(at, row.value, height=0.66, color=row.colour)
            if row.error is not None:
                axes.errorbar(row.value, at, xerr=row.error, color=INK, elinewidth=1.1, capsize=2.5)
            axes.text(ends[at] + 0.02 * end, at, row.text, va="center", fontsize=8.5)
        axes.set_yticks(range(len(rows)), [short(row.label) for row in rows], color=INK)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        # The widest number needs room after the longest bar: 0.018 of the axis per character.
        room = max(ends[at] + (0.04 + 0.023 * len(row.text)) * end for at, row in enumerate(rows))
        axes.set_xlim(0, max(end, room))
        if full is not None:
            axes.set_xticks(np.linspace(0, full, 6))
        else:
            axes.xaxis.set_major_locator(ticks(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
        axes.set_title(short(title, 32), pad=18 if guide else 10)
        if guide is not None:
            axes.axvline(guide[0], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            axes.text(
                guide[0],
                1.01,
                guide[1],
                transform=axes.get_xaxis_transform(),
                ha="left" if guide[0] < 0.5 * end else "right",
                va="bottom",
                fontsize=8,
                color=MUTED,
            )

    lines = sum(1.0 + 0.45 * short(row.label).count("\n") for row in rows)
    return render(0.95 + 0.27 * lines, paint)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves label heights (0 to 1) apart to about `gap`, keeping their order."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    moved = list(places)
    for _ in range(200):
        for low, high in zip(order, order[1:], strict=False):
            push = max(0.0, gap - (moved[high] - moved[low])) / 2
            moved[low], moved[high] = moved[low] - push, moved[high] + push
        moved = [min(max(place, 0.0), 1.0) for place in moved]
    return moved


def curves(lines: Sequence[Curve], *, title: str, ylabel: str, percent: bool = False) -> bytes:
    """Lines over training steps, each named at its right end in place of a legend."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=line.colour,
                linewidth=2.1 if line.strong else 1.5,
                marker="o" if len(line.x) == 1 else None,
                markersize=4,
                zorder=3 if line.strong else 2,
            )
            if line.mark is not None and line.x[0] <= line.mark <= line.x[-1]:
                height = float(np.interp(line.mark, line.x, line.y))
                axes.plot(line.mark, height, "o", color=line.colour, markersize=5.5, mec="white", zorder=4)
        low = min(float(line.y.min()) for line in lines)
        high = max(float(line.y.max()) for line in lines)
        margin = 0.06 * (high - low) or 0.05
        bottom = 0.0 if low >= 0 and not percent else low - margin
        axes.set_ylim(bottom, min(high + margin, 100.0 + margin) if percent else high + margin)
        _name_ends(axes, lines)
        axes.set(xlabel="training step", title=short(title, 32))
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(ticks(4, integer=True))
        axes.yaxis.set_major_locator(ticks(5))
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)

    return render(2.9, paint)


def over(lines: Sequence[tuple[str, str, Sequence[tuple[float, Any]]]], setting: str) -> bytes:
    """Accuracy over a setting: lines of (label, colour, points), a point a value and a score with its error."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = [value for _, _, points in lines for value, _ in points]
        for label, colour, points in lines:
            x, y = [value for value, _ in points], [score.mean for _, score in points]
            axes.errorbar(x, y, [s.error or 0 for _, s in points], color=colour, marker="o", markersize=4, label=label)
        if values and min(values) > 0 and max(values) > 9 * min(values):
            axes.set_xscale("log")
        axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
        axes.minorticks_off()
        axes.set(xlabel=setting, ylabel="accuracy, %", title=short(f"Accuracy over {setting}", 32))
        axes.grid(axis="y")
        axes.legend()

    return render(2.9, paint)


def _name_ends(axes: Axes, lines: Sequence[Curve]) -> None:
    bottom, top = axes.get_ylim()
    start = min(float(line.x[0]) for line in lines)
    last = max(float(line.x[-1]) for line in lines)
    span = last - start or 1.0
    axes.set_xlim(start - 0.02 * span, last + 0.02 * span)
    ends = [(float(line.y[-1]) - bottom) / (top - bottom) for line in lines]
    across = axes.get_yaxis_transform()
    for line, end, place in zip(lines, ends, _spread(ends, 0.078), strict=True):
        reach = (float(line.x[-1]) - start + 0.02 * span) / (1.04 * span)
        axes.plot(
            [reach, 1.0, 1.05],
            [bottom + y * (top - bottom) for y in (end, end, place)],
            transform=across,
            color=line.colour,
            linewidth=0.8,
            linestyle=(0, (2, 2)) if reach < 0.97 else "-",
            clip_on=False,
        )
        axes.text(
            1.07,
            bottom + place * (top - bottom),
            short(line.label, 22).split("\n")[0],
            transform=across,
            va="center",
            fontsize=8.5,
            fontweight="bold" if line.strong else "normal",
        )


def dumbbell(axes: Axes, row: float, start: float, end: float, colour: str, size: float = 7) -> None:
    """A hollow point at `start` joined to a filled one at `end`; points are `size` points wide."""
    axes.plot([start, end], [row, row], color=colour, linewidth=1.6)
    axes.plot(start, row, "o", mfc="white", mec=colour, mew=1.6, markersize=size)
    axes.plot(end, row, "o", color=colour, markersize=size)


def source_and_target(pairs: Sequence[Pair]) -> bytes:
    """Per method: a hollow point for source validation joined to a filled one for the target."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for at, pair in enumerate(pairs):
            dumbbell(axes, at, pair.source, pair.target, pair.colour)
        axes.set_yticks(range(len(pairs)), [short(pair.label) for pair in pairs], color=INK)
        axes.set_ylim(len(pairs) - 0.45, -0.55)
        axes.margins(x=0.08)
        axes.set_xlabel("accuracy, %")
        axes.xaxis.set_major_locator(ticks(5))
        axes.grid(axis="both")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title("○ source validation   ● target", fontsize=9)

    return render(0.95 + 0.27 * len(pairs), paint)


def gate_norm(gates: Sequence[NDArray[np.float64]]) -> Normalize:
    """One colour scale for all gate pictures, centred on 1, where a head is unchanged.

    Gates end at 0 but may rise to the number of heads, so the two sides may be stretched
    differently, by no more than 3; the colour bar shows it.
    """
    low, high = min(0.95, *(grid.min() for grid in gates)), max(1.05, *(grid.max() for grid in gates))
    stretched = 1.0 - min(1.0, (high - 1.0) / 3), 1.0 + (1.0 - low) / 3
    return TwoSlopeNorm(1.0, min(float(low), stretched[0]), max(float(high), stretched[1]))


def gate_map(gates: NDArray[np.float64], *, title: str, norm: Normalize) -> bytes:
    """`gates [L, H]` as a heat map; the numbers are printed where there are at most eight heads."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = _heat(axes, gates, norm)
        layers, heads = gates.shape
        step = 1 if max(layers, heads) <= 12 else 2
        axes.set_xticks(range(0, heads, step), [str(h + 1) for h in range(0, heads, step)])
        axes.set_yticks(range(0, layers, step), [str(at + 1) for at in range(0, layers, step)])
        axes.set(xlabel="head", ylabel="layer (1 is next to the image)", title=short(title, 32))
        if heads <= 8:
            for (layer, head), value in np.ndenumerate(gates):
                red, green, blue, _ = image.to_rgba(value)
                ink = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color=ink)
        bar = figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03)
        bar.ax.axhline(1.0, color=INK, linewidth=0.8)
        bar.outline.set_visible(False)
        low, high = float(norm.vmin or 0.0), float(norm.vmax or 2.0)
        marks = [*ticks(2).tick_values(low, 1.0), *ticks(3).tick_values(1.0, high)]
        bar.set_ticks(sorted({mark for mark in marks if low <= mark <= high}))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.set_label("gate (1 = unchanged)")

    layers, heads = gates.shape
    return render(float(np.clip(0.9 + 3.0 * layers / max(heads, 4), 1.9, 4.4)), paint)


def gate_history(grids: Mapping[int, NDArray[np.float64]], *, title: str, norm: Normalize) -> bytes:
    """Small heat maps, three to a row, one per step; `grids` maps a step to gates `[L, H]`."""
    rows = (len(grids) + 2) // 3

    def paint(figure: Figure) -> None:
        for at, (step, grid) in enumerate(grids.items()):
            axes = figure.add_subplot(rows, 3, at + 1)
            _heat(axes, grid, norm)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"step {step:,}", fontsize=9, fontweight="normal", pad=4)
            if at % 3 == 0:
                axes.set_ylabel("layer", fontsize=8.5)
            if at + 3 >= len(grids):
                axes.set_xlabel("head", fontsize=8.5)
        figure.suptitle(short(title, 40), x=0.02, ha="left", fontsize=10, fontweight="bold")

    layers, heads = next(iter(grids.values())).shape
    panel = float(np.clip(1.15 * layers / heads, 0.6, 1.6))
    return render(0.6 + rows * (panel + 0.3), paint)


def _heat(axes: Axes, grid: NDArray[np.float64], norm: Normalize) -> Any:
    # Purple-orange: diverging, white at 1, told apart under every common colour blindness.
    image = axes.imshow(grid, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
    layers, heads = grid.shape
    axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    return image
