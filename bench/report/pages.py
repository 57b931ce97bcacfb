"""What was measured, as the page a user decides by: docs/performance.md's tables, its charts, README's figures.

    python -m bench.report           writes them, from every file of rows in bench/results/
    python -m bench.report --check   says what of them is not what the files generate; exit status 1

A table or chart is of one machine: rows of several are refused. Each names chip, commit and date. Wins stand beside
losses, and what is wrong or did not run stands there with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.base.checkout import ROOT
from bench.base.results import Row
from bench.base.tables import contest_table, read_block, sweep_tables, table, write_block
from bench.base.towers import SETTINGS
from bench.report import charts
from bench.report.sources import GROUPS, Source, by_machine, cases, is_ours, one_machine, sources, words, words_of
from bench.report.targets import CHOSEN
from bench.roofline.chips import chip_of
from bench.roofline.costs import shares_of
from bench.roofline.passes import PATHS

TITLES = {
    "attention": "Attention alone: from q, k, v to gated heads, and back",
    "block": "The attention module: from its LayerNorm to the residual, forward and backward",
    "model step": "A training step of the image tower, without the optimiser",
    "mmd": "The MMD between domains, loss and gradient",
    "inference": "Image features, without gradients",
}
MOST = 8  # wins in the table; losses are all there


# -------------------------------------------------------------------------------------------------- wins and losses


def standing(rows: Sequence[Row], gpu: bool) -> list[Row]:
    """Which of ours stand for us in a case: the default, and in inference the merged model too."""
    ran = {r.contender: r for r in rows if r.seconds and r.status == "ok" and is_ours(r)}
    if rows[0].group == "inference":
        return [ran[name] for name in ("patched", "merged") if name in ran]
    chosen = CHOSEN.get((rows[0].extra or {}).get("precision", ""), "") if gpu else ""
    order = ["auto", chosen, "triton" if gpu else "cpu", *ran]
    return [next(ran[name] for name in order if name in ran)] if ran else []


@dataclass(frozen=True)
class Comparison:
    """factor: how many times as long as ours the peer takes; memory: ours' peak over the peer's."""

    ours: Row
    peer: Row
    factor: float
    memory: float | None


def comparisons(found: Sequence[Source]) -> list[Comparison]:
    """Ours against every peer of its case, each by its ratio to what both took turns with."""
    one_machine(found, "wins and losses")
    pairs = []
    for source, rows in cases(found):
        for ours in standing(rows, source.gpu):
            for peer in rows:
                if is_ours(peer) or peer.ratio is None or ours.ratio is None:
                    continue
                known = ours.peak_bytes is not None and peer.peak_bytes
                memory = ours.peak_bytes / peer.peak_bytes if known else None  # type: ignore[operator]
                pairs.append(Comparison(ours, peer, peer.ratio / ours.ratio, memory))
    return pairs


def _line(c: Comparison, factor: float) -> list[str]:
    wrong = "" if c.peer.status == "ok" else " (its numbers are wrong)"
    memory = "" if c.memory is None else f"{c.memory:.2f}"
    return [f"{c.ours.group}: {c.ours.case}", words(c.ours), f"{words(c.peer)}{wrong}", f"{factor:.2f} ×", memory]


def wins_and_losses(found: Sequence[Source]) -> str:
    """The largest wins, and every peer that is faster."""
    pairs = comparisons(found)
    wins = sorted((c for c in pairs if c.factor > 1), key=lambda c: -c.factor)
    losses = sorted((c for c in pairs if c.factor < 1), key=lambda c: c.factor)
    header = ["case", "ours", "against"]
    tail = ["our peak memory / its"]
    lines = [f"{len(pairs)} comparisons: ours is faster in {len(wins)}, the other in {len(losses)}.", ""]
    if wins:
        shown = [_line(c, c.factor) for c in wins[:MOST]]
        lines += [f"The largest wins ({min(MOST, len(wins))} of {len(wins)}):", ""]
        lines += [table([*header, "ours is faster by", *tail], shown), ""]
    if losses:
        lines += ["Where the other is faster, all of them:", ""]
        lines += [table([*header, "it is faster by", *tail], [_line(c, 1 / c.factor) for c in losses]), ""]
    else:
        lines += ["No other is faster in any case that was measured.", ""]
    return "\n".join(lines).rstrip()


# ------------------------------------------------------------------------------------------------------------ tables


def roofline_shares(found: Sequence[Source]) -> list[tuple[Row, float, float]]:
    """Rows of the attention module that the roofline has a path for; share of peak's time, and of reachable rates'."""
    one_machine(found, "fraction of the roofline")
    chip = chip_of(found[0].environment["device"])
    shares = []
    for source in found if chip is not None else ():
        for r in source.rows:
            if r.group == "block" and r.seconds and r.contender in PATHS and r.extra:
                shape = SETTINGS[r.extra["setting"]].shape(r.extra["batch"])
                assert chip is not None
                shares.append((r, *shares_of(r.contender, shape, r.extra["ranks"][0], chip, r.seconds["median"])))
    return shares


def machine_section(found: Sequence[Source], folder: str) -> str:
    """Everything of one machine: contests, sweeps, roofline, with their charts in `folder`."""
    one_machine(found, "a section")
    lines = [f"### {found[0].machine}", ""]
    group = ""
    for source, rows in cases(found):
        if rows[0].group != group:
            group = rows[0].group
            lines += [f"#### {TITLES[group]}", ""]
            lines += _picture(found, group, folder)
        lines += [f"**{rows[0].case}** ({source.caption()})", ""]
        lines += [contest_table(rows, words_of(rows)), ""]
    for source in found:
        for name in dict.fromkeys(r.group for r in source.rows if r.group.endswith(" sweep")):
            lines += [f"#### Against the {charts.AXES[name]}", "", *_picture([source], name, folder)]
            lines += [f"({source.caption()})", "", *sweep_tables(source.rows, name)]
    shares = roofline_shares(found)
    if shares:
        cells = [[r.case, words(r), f"{peak:.0%}", f"{reached:.0%}"] for r, peak, reached in shares]
        lines += ["#### Fraction of the roofline", "", *_picture(found, "roofline", folder)]
        lines += [table(["case", "", "of the datasheet's peaks", "of reachable rates"], cells), ""]
        lines += [f"({s.caption()})" for s in found if any(r in s.rows for r, _, _ in shares)] + [""]
    return "\n".join(lines).rstrip()


def _picture(found: Sequence[Source], what: str, folder: str) -> list[str]:
    chart = chart_of(found, what)
    return [] if chart is None else [f"![{chart.alt}]({folder}/{chart.file})", ""]


# ------------------------------------------------------------------------------------------------------------ charts


@dataclass(frozen=True)
class Chart:
    """A picture and what it is drawn from; `digest` is written into the file, so that a stale one is known."""

    file: str
    alt: str
    caption: str
    panels: tuple[charts.Panel, ...]

    def digest(self) -> str:
        return hashlib.sha256(repr((self.caption, self.panels)).encode()).hexdigest()[:16]


def chart_of(found: Sequence[Source], what: str) -> Chart | None:
    """The chart of a group, a sweep or "roofline" on one machine; None where there is nothing to draw."""
    one_machine(found, f"a chart of {what}")
    own = [s for s in found if any(r.group == what for r in s.rows)]
    if what == "roofline":
        shares = roofline_shares(found)
        own = [s for s in found if any(r in s.rows for r, _, _ in shares)]
        panels = charts.shares([(f"{r.case}\n{words(r)}", reached) for r, _, reached in shares])
    elif what.endswith(" sweep"):
        panels = charts.lines(what, [r for s in own for r in s.rows if r.group == what])
    else:
        rows = [r for s in own for r in s.rows if r.group == what]
        panels = charts.bars(rows, words_of(rows), {r.contender for r in rows if is_ours(r)})
    if not panels:
        return None
    slug = "".join(c if c.isalnum() else "-" for c in found[0].machine.lower()).strip("-")
    while "--" in slug:
        slug = slug.replace("--", "-")
    alt = f"{what} on {found[0].machine}"
    return Chart(f"{slug}-{what.replace(' ', '-')}.png", alt, "\n".join(s.caption() for s in own), panels)


def all_charts(found: Sequence[Source]) -> list[Chart]:
    made = []
    for own in by_machine(found).values():
        names = [g for g in GROUPS if any(r.group == g for s in own for r in s.rows)]
        made += [chart_of(own, name) for name in (*names, "roofline")]
        for s in own:
            made += [chart_of([s], g) for g in dict.fromkeys(r.group for r in s.rows if r.group.endswith(" sweep"))]
    return [chart for chart in made if chart is not None]


# -------------------------------------------------------------------------------------------------------- the pages


NO_GPU = (
    "**No GPU's speed was measured.** What the kernels should reach on an A100, H100 or H200 is the compiler's and a "
    "model's word, further down; `python -m bench.gpu` replaces it by measurements."
)
NOTHING = "No measurement is in the form that this page is made from yet (`python -m pytest bench/ --rows FILE`)."


def answer(found: Sequence[Source]) -> str:
    """What a reader meets first: wins and losses per machine."""
    lines = [] if any(s.gpu for s in found) else [NO_GPU, ""]
    lines += [] if found else [NOTHING]
    for machine, own in by_machine(found).items():
        lines += [f"### On {machine}", "", wins_and_losses(own), "", *(f"({s.caption()})  " for s in own), ""]
    return "\n".join(lines).rstrip()


def measured(found: Sequence[Source], folder: str = "results") -> str:
    return "\n\n".join(machine_section(own, folder) for own in by_machine(found).values()) or NOTHING


def readme(found: Sequence[Source]) -> str:
    """README's figures: ours beside stock and the peers, a line per case; how often a peer is faster."""
    lines = [] if any(s.gpu for s in found) else ["No GPU's speed was measured yet.", ""]
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
        lost = sum(c.factor < 1 for c in pairs)
        header = ["case", "ours", "time / stock's or SDPA's", "fastest other that is right: its time / ours"]
        lines += [f"On {machine}:", "", table(header, cells), ""]
        lines += [f"In {lost} of {len(pairs)} comparisons the other is faster: "
                  "[docs/performance.md](docs/performance.md) lists each.", "",
                  *(f"({s.caption()})  " for s in own), ""]  # fmt: skip
    if not found:
        lines.append("[docs/performance.md](docs/performance.md) has what compiler and roofline say.")
    return "\n".join(lines).rstrip()


def blocks(found: Sequence[Source]) -> dict[tuple[str, str], str]:
    """What stands where: (file, block)."""
    page = "docs/performance.md"
    return {(page, "report answer"): answer(found), (page, "report measured"): measured(found),
            ("README.md", "report"): readme(found)}  # fmt: skip


def stale(found: Sequence[Source], root: Path = ROOT) -> list[str]:
    """What of the pages and charts is not what the files generate, in words."""
    wrong = []
    for (file, name), text in blocks(found).items():
        if read_block((root / file).read_text(encoding="utf-8"), name).strip() != text.strip():
            wrong.append(f"{file}: the block {name!r}")
    for chart in all_charts(found):
        path = root / "docs" / "results" / chart.file
        if not path.exists() or charts.digest_of(path) != chart.digest():
            wrong.append(f"docs/results/{chart.file}")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say what is stale")
    given = parser.parse_args(argv)
    try:
        found = sources(sorted((ROOT / "bench" / "results").glob("*.json")))
        if given.check:
            wrong = stale(found)
            print("\n".join(f"not what the result files generate: {line}" for line in wrong) or "Up to date.")
            return 1 if wrong else 0
        for (file, name), text in blocks(found).items():
            write_block(ROOT / file, name, text)
        for chart in all_charts(found):
            charts.draw(chart.panels, chart.caption, chart.digest(), ROOT / "docs" / "results" / chart.file)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(found)} files, {sum(len(s.rows) for s in found)} rows, {len(all_charts(found))} charts")
    return 0
