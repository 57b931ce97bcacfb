"""What was measured, as text: wins and losses, a line per case, a section per machine, README's lines.

A table is of one machine: rows of several are refused. Each names chip, commit and date. Wins stand beside losses, and
what is wrong or did not run stands there with its reason.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from bench.base.results import Row
from bench.base.tables import contest_table, sweep_tables, table
from bench.report.figures import AXES, figure_of
from bench.report.gpu_page import CHOSEN
from bench.report.sources import Source, by_machine, cases, is_ours, one_machine, roofline_shares, words

TITLES = {
    "attention": "Attention alone: from q, k, v to gated heads, and back",
    "block": "The attention module: from its LayerNorm to the residual, forward and backward",
    "model step": "A training step of the image tower, without the optimiser",
    "mmd": "The MMD between domains, loss and gradient",
    "inference": "Image features, without gradients",
    "hosts": "Other libraries' attention, patched, beside its own stock self",
}
MOST = 8  # wins in the table; losses are all there
NO_GPU = (
    "**No GPU's speed was measured.** What the kernels should reach on an A100, H100 or H200 is the compiler's and a "
    "model's word, further down; `python -m bench.gpu` replaces it by measurements."
)
NOTHING = "No measurement is in the form that this page is made from yet (`python -m pytest bench/ --rows FILE`)."


def standing(rows: Sequence[Row], gpu: bool) -> list[Row]:
    """Which of ours stand for us in a case: the default, and in inference the merged model too."""
    ran = {r.contender: r for r in rows if r.seconds and r.status == "ok" and is_ours(r)}
    if rows[0].group == "inference":
        return [ran[name] for name in ("patched", "merged") if name in ran]
    chosen = CHOSEN.get((rows[0].extra or {}).get("precision", ""), "") if gpu else ""
    order = ["auto", chosen, "triton" if gpu else "cpu", *ran]
    return [next(ran[name] for name in order if name in ran)] if ran else []


class Comparison(NamedTuple):
    """factor: how many times as long as ours the peer takes; memory: ours' peak over the peer's."""

    ours: Row
    peer: Row
    factor: float
    memory: float | None

    def line(self, factor: float) -> list[str]:
        wrong = "" if self.peer.status == "ok" else " (its numbers are wrong)"
        against, memory = f"{words(self.peer)}{wrong}", "" if self.memory is None else f"{self.memory:.2f}"
        return [f"{self.ours.group}: {self.ours.case}", words(self.ours), against, f"{factor:.2f} ×", memory]


def comparisons(found: Sequence[Source]) -> list[Comparison]:
    """Ours against every peer of its case, each by its ratio to what both took turns with."""
    one_machine(found, "wins and losses")
    pairs = []
    for source, rows in cases(found):
        peers = [r for r in rows if not is_ours(r) and r.ratio is not None]
        for ours, peer in itertools.product(standing(rows, source.gpu), peers):
            known = ours.peak_bytes is not None and peer.peak_bytes
            memory = ours.peak_bytes / peer.peak_bytes if known else None
            pairs.append(Comparison(ours, peer, peer.ratio / ours.ratio, memory))
    return pairs


def wins_and_losses(found: Sequence[Source]) -> str:
    """The largest wins, and every peer that is faster."""
    pairs = comparisons(found)
    wins = sorted((c for c in pairs if c.factor > 1), key=lambda c: -c.factor)
    losses = sorted((c for c in pairs if c.factor < 1), key=lambda c: c.factor)

    def of(shown: list[list[str]], by: str) -> str:
        return table(["case", "ours", "against", by, "our peak memory / its"], shown)

    lines = [f"{len(pairs)} comparisons: ours is faster in {len(wins)}, the other in {len(losses)}.", ""]
    if wins:
        largest = of([c.line(c.factor) for c in wins[:MOST]], "ours is faster by")
        lines += [f"The largest wins ({min(MOST, len(wins))} of {len(wins)}):", "", largest, ""]
    if not losses:
        return "\n".join([*lines, "No other is faster in any case that was measured."])
    every = of([c.line(1 / c.factor) for c in losses], "it is faster by")
    return "\n".join([*lines, "Where the other is faster, all of them:", "", every])


def machine_section(found: Sequence[Source], folder: str) -> str:
    """Everything of one machine: contests, sweeps, roofline, with their figures in `folder`."""
    one_machine(found, "a section")

    def picture(own: Sequence[Source], what: str) -> list[str]:
        figure = figure_of(own, what)
        return [] if figure is None else [f"![{figure.alt}]({folder}/{figure.file})", ""]

    lines, group = [f"### {found[0].machine}", ""], ""
    for source, rows in cases(found):
        if rows[0].group != group:
            group = rows[0].group
            lines += [f"#### {TITLES[group]}", "", *picture(found, group)]
        lines += [
            f"**{rows[0].case}** ({source.caption()})",
            "",
            contest_table(rows, {r.contender: words(r) for r in rows}),
            "",
        ]
    for source in found:
        for name in source.sweeps():
            lines += [f"#### Against the {AXES[name]}", "", *picture([source], name)]
            lines += [f"({source.caption()})", "", *sweep_tables(source.rows, name)]
    shares = roofline_shares(found)
    if shares:
        cells = [[r.case, words(r), f"{peak:.0%}", f"{reached:.0%}"] for r, peak, reached in shares]
        lines += ["#### Fraction of the roofline", "", *picture(found, "roofline")]
        lines += [table(["case", "", "of the datasheet's peaks", "of reachable rates"], cells), ""]
        lines += [f"({s.caption()})" for s in found if any(r in s.rows for r, _, _ in shares)] + [""]
    return "\n".join(lines).rstrip()


def answer(found: Sequence[Source]) -> str:
    """What a reader meets first: wins and losses per machine."""
    lines = [] if any(s.gpu for s in found) else [NO_GPU, ""]
    lines += [] if found else [NOTHING]
    for machine, own in by_machine(found).items():
        lines += [f"### On {machine}", "", wins_and_losses(own), "", *(f"({s.caption()})  " for s in own), ""]
    return "\n".join(lines).rstrip()


def measured(found: Sequence[Source], folder: str = "results") -> str:
    return "\n\n".join(machine_section(own, folder) for own in by_machine(found).values()) or NOTHING


def cases_table(found: Sequence[Source]) -> str:
    """Ours beside stock and the nearest peer, a line per case."""
    lines = []
    for machine, own in by_machine(found).items():
        cells, pairs = [], comparisons(own)
        for source, rows in cases(own):
            for ours in standing(rows, source.gpu):
                here = [c for c in pairs if c.ours is ours]
                right = [c for c in here if c.peer.status == "ok" and c.peer.contender != ours.baseline]
                best = min(right, key=lambda c: c.factor, default=None)
                base = f"{ours.ratio:.2f}" if ours.contender != ours.baseline else "–"
                nearest = f"{words(best.peer)}: {best.factor:.2f} ×" if best else "–"
                cells.append([f"{ours.group}: {ours.case}", words(ours), base, nearest])
        header = ["case", "ours", "time / stock's or SDPA's", "fastest other that is right: its time / ours"]
        lines += [f"On {machine}:", "", table(header, cells), ""]
    return "\n".join(lines).rstrip() or NOTHING


def readme(found: Sequence[Source]) -> str:
    """README's lines on speed: on each machine, how often a peer is faster."""
    lines = [] if any(s.gpu for s in found) else ["No GPU's speed was measured yet."]
    for machine, own in by_machine(found).items():
        pairs = comparisons(own)
        lost = f"in {sum(c.factor < 1 for c in pairs)} of {len(pairs)} comparisons the other is faster"
        lines.append(f"On {machine}: {lost}.")
    return "\n".join([*lines, "[Performance](docs/performance.md) lists each, with its file."])
