"""What `bench.mmd` measured, as a document and a picture: targets met or not, tables, where the time goes, growth."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.base.results import Row, rows_of
from bench.base.tables import table
from bench.contests.contenders.mmd import PEERS
from bench.report import figures

OURS = "ours: domainbed"
# part: least speed-up over DomainBed, largest share of its extra memory, largest extra MB, least speed-up over KeOps
TARGETS: dict[str, dict[str, float]] = {
    "12 × 36 × 768": {"DomainBed": 10.0},
    "3 × 2048 × 768": {"DomainBed": 3.0, "share": 0.05},
    "3 × 256 × 768": {"KeOps": 50.0},
    "16384 × 768": {"MB": 300},
}
MATMUL = 0.7  # aim: share of the machine's matmul rate
GROWTH_WIDTH, GROWTH_SAMPLES = 768, 4096
HEAD = """# The MMD on a CPU

Written by `python -m bench.mmd --json bench/results/mmd-cpu.json --doc docs/results/mmd-cpu.md
--plot docs/results/mmd-growth.png`; the numbers are those of `bench/results/mmd-cpu.json`.

Forward and backward, float32. Times are medians of one run in which the candidates take turns, in brackets
quartiles or, of runs of seconds, the extremes; of 16384 × 768 one call each, in processes of their own.
Memory is what a process of its own adds at its peak, the gradient included, beyond the features. The matmul
rate is that of float32 `[2048, 2048]` products taken in turn with the rest; ours does 4 N²D operations in
them for few samples, which are one block, and near 3 N²D for many more, where blocks below the diagonal are
left out.
"""


def ran(content: Mapping[str, Any]) -> dict[str, Row]:
    """A part's rows that have times, by contender."""
    return {r.contender: r for r in rows_of(content) if r.seconds}


def verdicts(content: Mapping[str, Any], parts: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Part, target, what came out, and whether it is met."""
    rows = []
    for part in parts:
        found, targets = ran(content[part]), TARGETS[part]
        ours, others = found[OURS], {name: found[name] for name in ("DomainBed", "KeOps") if name in found}
        for peer in (name for name in others if name in targets):
            ratio, least = others[peer].median / ours.median, targets[peer]
            rows.append((part, f"≥ {least:.0f} × faster than {peer}", f"{ratio:.1f} ×", ratio >= least))
        if "share" in targets and "DomainBed" in others:
            share, most = ours.peak_bytes / (others["DomainBed"].peak_bytes or 1), targets["share"]
            rows.append((part, f"≤ {most:.0%} of its extra memory", f"{share:.1%}", share <= most))
        if "MB" in targets:
            memory, most = ours.peak_bytes / 1e6, targets["MB"]
            rows.append((part, f"≤ {most:.0f} MB extra", f"{memory:.0f} MB", memory <= most))
        got = content[part]["share_of_matmul"]
        rows.append((part, f"aim: ≥ {MATMUL:.0%} of the matmul rate", f"{got:.0%}", got >= MATMUL))
    return [(part, target, got, "yes" if met else "no") for part, target, got, met in rows]


def document(content: Mapping[str, Any], parts: Sequence[str], plot: Path | None) -> str:
    there = [part for part in parts if part in content]
    lines = [HEAD, table(("problem", "target", "measured", "met"), verdicts(content, there))]
    for part in there:
        lines += ["", f"## {part}", "", *_part(content[part])]
    if "growth" in content:
        lines += ["", "## Growth with N and D", "", *_growth(content["growth"], plot)]
    return "\n".join(lines).rstrip() + "\n"


def _machine(content: Mapping[str, Any]) -> str:
    m = content["environment"]
    return (
        f"{m['device']}, {m['cores']} cores, {m['threads']} threads, native kernels: {m['native']}, "
        f"torch {m['versions']['torch']}, {m['date'][:10]}; load average when it began {m['load']:.1f}."
    )


def _part(content: Mapping[str, Any]) -> list[str]:
    rows, found = [], ran(content)
    for name, row in found.items():
        t = row.seconds
        same = f"ours: {PEERS[name].kernel}" if name in PEERS else name
        base = found[same if same in found and name != "reference" else OURS].median
        spread = f" [{t['low'] * 1e3:,.1f}, {t['high'] * 1e3:,.1f}]" if t["samples"] > 1 else ""
        times = f"{row.median * 1e3:,.1f}{spread}", f"{row.median / base:.1f} ×"
        rows.append((name, *times, f"{(row.peak_bytes or 0) / 1e6:,.0f}"))
    lines = [table(("", "ms", "of ours", "extra MB"), rows), ""]
    refused = [f"- {r.contender} did not run: {r.why}" for r in rows_of(content) if r.status == "not run"]
    rate, share = f"{content['matmul_rate'] / 1e9:.0f} GFLOP/s", content["share_of_matmul"]
    lines += [*refused, ""] if refused else []
    lines.append(f"The products' rate is {rate}; ours (domainbed) reaches {share:.0%} of it.")
    if "stages" in content:
        lines += ["", _where(content["stages"], share)]
    return [*lines, "", _machine(content)]


def _where(stages: dict[str, float], share: float) -> str:
    """In words: what a step's time goes into."""
    whole = sum(stages.values())
    parts = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in stages.items())
    text = f"A step of {whole * 1e3:,.1f} ms goes into: {parts}."
    if share >= MATMUL:
        return text
    products = stages["inner products"] + stages["gradient's products"]
    if products > 0.6 * whole:
        return text + " What is missing is mostly in the products: of this shape they run below the large ones' rate."
    text += " What is missing is in passes over the features and in fixed costs per call: at this size the products"
    return f"{text} are {products * 1e3:,.1f} ms."


def along(rows: Sequence[Row], key: str) -> list[tuple[int, Row]]:
    """Ours where only `key`, N or D, changes, by its value."""
    other, fixed = ("D", GROWTH_WIDTH) if key == "N" else ("N", GROWTH_SAMPLES)
    own = (r for r in rows if r.contender == OURS and r.extra[other] == fixed)
    return sorted(((r.extra[key], r) for r in own), key=lambda pair: pair[0])


def _growth(content: Mapping[str, Any], plot: Path | None) -> list[str]:
    found, cells = rows_of(content), []
    theirs = {r.case: f"{r.median * 1e3:,.1f}" for r in found if r.contender == "DomainBed"}
    for r in (r for r in found if r.contender == OURS):
        own = [f"{r.median * 1e3:,.1f}", f"{r.extra['share_of_matmul']:.0%}"]
        cells.append([r.extra["N"], r.extra["D"], *own, theirs.get(r.case, "–")])
    lines = [table(("N", "D", "ms", "of the matmul rate", "DomainBed, ms"), cells), ""]
    if plot is not None:
        lines += [f"![Time against N and against D, ours and DomainBed's]({plot.name})", ""]
    return [*lines, *_slopes(found), "", _machine(content)]


def _slope(line: Sequence[tuple[int, Row]]) -> float:
    """The exponent with which time goes between the last two."""
    (x, before), (further, after) = line[-2:]
    return math.log(after.median / before.median) / math.log(further / x)


def _slopes(rows: Sequence[Row]) -> list[str]:
    """The exponents of N and D, and what they come from, in words."""
    by_d = along(rows, "D")
    (narrowest, first), (widest, last) = by_d[0], by_d[-1]
    per_feature = (last.median - first.median) / (widest - narrowest)
    rest = max(first.median - per_feature * narrowest, 0.0)
    share = [r.extra["stages"]["exponentials"] / sum(r.extra["stages"].values()) for r in (first, last)]
    text = (
        f"Against N the last step has slope {_slope(along(rows, 'N')):.2f}: products, distances and exponentials go "
        "with N²; products fall from 4 to 3 N²D where panels leave out what is below the diagonal. The first steps are "
        "flatter: there fixed costs per call and passes over the `[N, D]` features count. Against D, at N = "
        f"{GROWTH_SAMPLES}, the last slope is {_slope(by_d):.2f}: only the products grow with D, while distances, "
        "exponentials and sums cost the same per pair at any width. A line through the narrowest and the widest puts "
        f"that constant part at {rest * 1e3:.0f} ms and the products of {GROWTH_WIDTH} features at "
        f"{per_feature * GROWTH_WIDTH * 1e3:.0f} ms; distances, exponentials and sums are {share[0]:.0%} of a step at "
        f"D = {narrowest} and {share[1]:.0%} at D = {widest}."
    )
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def plot(content: Mapping[str, Any], file: Path) -> None:
    """Milliseconds against N and against D, on logarithmic axes, with the slope that the products alone would have."""
    rows, panels = rows_of(content), []
    theirs = {r.case: r.median * 1e3 for r in rows if r.contender == "DomainBed"}
    for key, slope, fixed in (("N", 2, f"D = {GROWTH_WIDTH}"), ("D", 1, f"N = {GROWTH_SAMPLES}")):
        x, found = zip(*along(rows, key), strict=True)
        ms = tuple(r.median * 1e3 for r in found)
        other = [(v, theirs[r.case]) for v, r in zip(x, found, strict=True) if r.case in theirs]
        products = tuple(ms[-1] * (v / x[-1]) ** slope for v in x)
        lines = (("fastheads", x, ms), ("DomainBed", *zip(*other, strict=True)))
        lines += ((f"slope {slope}: the products", x, products),)
        title = f"against {key}, {fixed}"
        panels.append(figures.Panel("lines", title, "ms, forward + backward", lines=lines, x_label=key, log="xy"))
    figures.draw(panels, "", "", file)
