"""What `bench.mmd` measured, as a document and a picture: targets met or not, tables, where the time goes, growth."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.base.tables import table
from bench.contests.contenders.mmd_peers import PEERS

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


def summary(s: list[float]) -> dict[str, float]:
    return {"median": statistics.median(s), "low": min(s), "high": max(s), "min": min(s), "samples": len(s)}


def verdicts(results: dict[str, Any], parts: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Part, target, what came out, and whether it is met."""
    rows = []
    for part in (p for p in parts if p in results):
        found, targets = results[part], TARGETS[part]
        times, memory = found["times"], found["memory"]
        for peer in ("DomainBed", "KeOps"):
            if peer in targets and peer in times:
                ratio = times[peer]["median"] / times[OURS]["median"]
                wanted = f"≥ {targets[peer]:.0f} × faster than {peer}"
                rows.append((part, wanted, f"{ratio:.1f} ×", ratio >= targets[peer]))
        if "share" in targets and memory.get("DomainBed"):
            share = memory[OURS] / memory["DomainBed"]
            rows.append(
                (part, f"≤ {targets['share']:.0%} of its extra memory", f"{share:.1%}", share <= targets["share"])
            )
        if "MB" in targets:
            megabytes = memory[OURS] / 1e6
            rows.append((part, f"≤ {targets['MB']:.0f} MB extra", f"{megabytes:.0f} MB", megabytes <= targets["MB"]))
        got = found["share_of_matmul"]
        rows.append((part, f"aim: ≥ {MATMUL:.0%} of the matmul rate", f"{got:.0%}", got >= MATMUL))
    return [(part, target, got, "yes" if met else "no") for part, target, got, met in rows]


def document(results: dict[str, Any], parts: Sequence[str], plot: Path | None) -> str:
    lines = [
        "# The MMD on a CPU",
        "",
        "Written by `python -m bench.mmd --json bench/results/mmd-cpu.json --doc docs/results/mmd-cpu.md",
        "--plot docs/results/mmd-growth.png`; the numbers are those of `bench/results/mmd-cpu.json`.",
        "",
        "Forward and backward, float32. Times are medians of one run in which the candidates take turns, in brackets",
        "quartiles or, of runs of seconds, the extremes; of 16384 × 768 one call each, in processes of their own.",
        "Memory is what a process of its own adds at its peak, the gradient included, beyond the features. The matmul",
        "rate is that of float32 `[2048, 2048]` products taken in turn with the rest; ours does 4 N²D operations in",
        "them up to 2,048 samples, which are one panel, and near 3 N²D for many more, where only the pairs above the",
        "diagonal are formed.",
        "",
        table(("problem", "target", "measured", "met"), verdicts(results, parts)),
    ]
    for part in (p for p in parts if p in results):
        lines += ["", f"## {part}", "", *_part(results[part])]
    if "growth" in results:
        lines += ["", "## Growth with N and D", "", *_growth(results["growth"], plot)]
    return "\n".join(lines).rstrip() + "\n"


def _machine(m: dict[str, Any]) -> str:
    return (
        f"{m['device']}, {m['cores']} cores, {m['threads']} threads, native kernels: {m['native']}, "
        f"torch {m['versions']['torch']}, {m['date'][:10]}; load average when it began {m['load']:.1f}."
    )


def _part(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, t in found["times"].items():
        same = name if name.startswith("ours") else f"ours: {PEERS[name][1]}"
        base = found["times"].get(same, found["times"][OURS])["median"]
        spread = f" [{t['low'] * 1e3:,.1f}, {t['high'] * 1e3:,.1f}]" if t["samples"] > 1 else ""
        memory = f"{found['memory'][name] / 1e6:,.0f}"
        rows.append((name, f"{t['median'] * 1e3:,.1f}{spread}", f"{t['median'] / base:.1f} ×", memory))
    lines = [table(("", "ms", "of ours", "extra MB"), rows), ""]
    lines += [f"- {name} did not run: {why}" for name, why in found["refused"].items()]
    lines += [""] if found["refused"] else []
    lines.append(
        f"The products' rate is {found['matmul_rate'] / 1e9:.0f} GFLOP/s; ours (domainbed) reaches "
        f"{found['share_of_matmul']:.0%} of it."
    )
    if "stages" in found:
        lines += ["", _where(found["stages"], found["share_of_matmul"])]
    return [*lines, "", _machine(found["machine"])]


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
    return (
        text + " What is missing is in passes over the features and in fixed costs per call: at this size the products"
        f" are {products * 1e3:,.1f} ms."
    )


def _slope(rows: Sequence[dict[str, Any]], key: str) -> float:
    """The exponent with which time goes with `key` between the last two rows."""
    a, b = rows[-2:]
    return math.log(b["seconds"] / a["seconds"]) / math.log(b[key] / a[key])


def by(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows in which only `key`, N or D, changes."""
    other, fixed = ("D", GROWTH_WIDTH) if key == "N" else ("N", GROWTH_SAMPLES)
    return sorted((r for r in rows if r[other] == fixed), key=lambda r: r[key])


def _growth(found: dict[str, Any], plot: Path | None) -> list[str]:
    rows = found["rows"]
    shown = [
        (
            r["N"],
            r["D"],
            f"{r['seconds'] * 1e3:,.1f}",
            f"{r['share_of_matmul']:.0%}",
            f"{r['DomainBed'] * 1e3:,.1f}" if r["DomainBed"] else "–",
        )
        for r in rows
    ]
    lines = [table(("N", "D", "ms", "of the matmul rate", "DomainBed, ms"), shown), ""]
    if plot is not None:
        lines += [f"![Time against N and against D, ours and DomainBed's]({plot.name})", ""]
    return [*lines, *_slopes(rows), "", _machine(found["machine"])]


def _slopes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The exponents of N and D, and what they come from, in words."""
    by_n, by_d = by(rows, "N"), by(rows, "D")
    first, last = by_d[0], by_d[-1]
    per_feature = (last["seconds"] - first["seconds"]) / (last["D"] - first["D"])
    rest = max(first["seconds"] - per_feature * first["D"], 0.0)
    share = [r["stages"]["exponentials"] / sum(r["stages"].values()) for r in (first, last)]
    text = (
        f"Against N the last step has slope {_slope(by_n, 'N'):.2f}: products, distances and exponentials go with N²; "
        "products fall from 4 to 3 N²D where panels leave out what is below the diagonal. The first steps are "
        "flatter: there fixed costs per call and passes over the `[N, D]` features count. Against D, at N = "
        f"{GROWTH_SAMPLES}, the last slope is {_slope(by_d, 'D'):.2f}: only the products grow with D, while distances, "
        "exponentials and sums cost the same per pair at any width. A line through the narrowest and the widest puts "
        f"that constant part at {rest * 1e3:.0f} ms and the products of {GROWTH_WIDTH} features at "
        f"{per_feature * GROWTH_WIDTH * 1e3:.0f} ms; distances, exponentials and sums are {share[0]:.0%} of a step at "
        f"D = {first['D']} and {share[1]:.0%} at D = {last['D']}."
    )
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Milliseconds against N and against D, on logarithmic axes, with the slope that the products alone would have."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7.6, 3.2), dpi=160, layout="constrained")
    for at, (key, slope, fixed) in enumerate((("N", 2, f"D = {GROWTH_WIDTH}"), ("D", 1, f"N = {GROWTH_SAMPLES}")), 1):
        axes = figure.add_subplot(1, 2, at)
        found = by(rows, key)
        x, ms = [r[key] for r in found], [r["seconds"] * 1e3 for r in found]
        axes.plot(x, ms, "o-", color="#0072b2", label="fastheads")
        theirs = [(r[key], r["DomainBed"] * 1e3) for r in found if r["DomainBed"]]
        axes.plot(*zip(*theirs, strict=True), "s-", color="#d55e00", label="DomainBed")
        line = [ms[-1] * (v / x[-1]) ** slope for v in x]
        axes.plot(x, line, ":", color="#646a73", label=f"slope {slope}: the products")
        axes.set(xscale="log", yscale="log", xlabel=key, title=f"against {key}, {fixed}")
        if at == 1:
            axes.set_ylabel("ms, forward + backward")
        axes.set_xticks(x)
        axes.tick_params(axis="x", labelrotation=45)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, color="#ecedee")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
