"""What `fastheads heads` found, as text and as a page."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from fastheads.files import write_whole
from fastheads.train.report import markup
from fastheads.train.report.markup import NONE
from fastheads.train.report.record import Score

Found = Mapping[str, Any]
CHOSEN = """Each row closes the heads that its criterion names; how many, at most as many as were allowed, is chosen on
the sources' held-out images; or it sets gates and closes none. Gain: over the model with all heads open, on the same
images; ± is its standard error over images. Refitted: the same where a linear head is fitted anew to the measured
images of the sources, over one with all heads open. The oracles alone saw the target, other images of it. Correlation:
Spearman's, over heads, of the criterion's score with what closing the head alone brings on the target (on the oracles'
images)."""
EACH = """Change of accuracy, in points, on each domain when one head is closed. The target's is of the images that the
oracles choose by. The other columns are what criteria say of the head: the larger, the sooner it is closed."""


def table(run: Found) -> str:
    """The selections of one target and seed, as text."""
    plain = 100 * run["selections"][0]["target"]
    lines = [f"{run['target']}, seed {run['seed']}: {plain:.1f} % of {run['test_images']:,} images with all heads open"]
    lines.append(f"{'criterion':<16}{'gain':>14}{'refitted':>14}{'closed':>8}{'correlation':>13}")
    for row in run["selections"][1:]:
        rho = run["correlation"].get(row["name"])
        gains = "".join(f"{'' if gain is None else _ascii(gain):>14}" for gain in _gains(row))
        closed = "gates" if row["heads"] is None else len(row["heads"])
        lines.append(f"{row['name']:<16}{gains}{closed:>8}" + ("" if rho is None else f"{rho:>+13.2f}"))
    return "\n".join(lines)


def _gains(row: Found) -> list[Score | None]:
    """In points: of the classifier as it is, and of one that is fitted anew, where there is one."""
    parts = ("", "refit_")
    return [Score(100 * row[f"{p}gain"], 100 * row[f"{p}error"]) if f"{p}gain" in row else None for p in parts]


def _ascii(gain: Score) -> str:
    return f"{gain.mean:+.1f} ± {gain.error:.1f}"


def _selections(run: Found) -> str:
    rows = []
    for row in run["selections"]:
        rho, plain = run["correlation"].get(row["name"]), row["name"] == "none"
        rows.append(
            [
                escape(row["name"]),
                NONE if row["sources"] is None else f"{100 * row['sources']:.1f}",
                f"{100 * row['target']:.1f}",
                *(NONE if plain or gain is None else markup.gain(gain) for gain in _gains(row)),
                NONE if rho is None else f"{rho:+.2f}".replace("-", "−"),
                escape(", ".join(f"{layer + 1}.{head + 1}" for layer, head in row["heads"] or ())) or NONE,
                escape(row["chosen"]),
            ]
        )
    head = [
        "Criterion",
        "Sources, %",
        "Target, %",
        "Gain",
        "Refitted",
        "Correlation",
        "Heads closed (layer.head)",
        "How",
    ]
    words = f"{run['test_images']:,} images of {run['target']} that nothing was chosen by."
    return markup.table(head, rows, escape(words))


def _each(run: Found) -> str:
    domains, names, rows = [*run["sources"], run["target"]], list(run["correlation"]), []
    for each in run["heads"]:
        changes = [100 * (each["closed"][name] - run["baseline"][name]) for name in domains]
        scores = [f"{each['scores'][name]:.3g}".replace("-", "−") for name in names]
        rows.append([f"{each['layer'] + 1}.{each['head'] + 1}", *map(markup.signed, changes), *scores])
    rows.insert(0, ["all open, %", *(f"{100 * run['baseline'][name]:.1f}" for name in domains), *[NONE] * len(names)])
    counts = ", ".join(f"{name} {run['images'][name]:,}" for name in domains)
    return markup.table(["Layer.head", *map(escape, domains), *names], rows, escape(f"Images: {counts}."))


def write_heads(found: Found, out: Path) -> Path:
    """Writes `out/heads.html` from the record of `fastheads heads`."""
    selections, each = "", ""
    for run in found["runs"]:
        title = f"<h3>Held out: {escape(run['target'])}, seed {run['seed']}</h3>"
        selections += title + _selections(run)
        each += title + _each(run)
    repeat = f"<pre><code>{escape(found['command'])}</code></pre>{markup.facts(found['versions'])}"
    sections = {
        "selections": ("What closing heads brings", f"<p>{CHOSEN}</p>{selections}"),
        "heads": ("Head by head", f"<p>{EACH}</p>{each}"),
        "repeat": ("Repeat it", repeat),
    }
    opening = f'<p class="meta">{escape(found["base_name"])}, frozen</p>'
    return write_whole(out / "heads.html", markup.page(f"Heads to close: {found['title']}", opening, sections))
