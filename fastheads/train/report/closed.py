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
the sources' held-out images. Gain: over the model with all heads open, on the same images; ± is its standard error over
images. The oracle alone saw the target, its other half. Correlation: Spearman's, over heads, of the criterion's score
with what closing the head alone brings on the target (on the oracle's images)."""
EACH = """Change of accuracy, in points, on each domain when one head is closed. The target's is of the images that the
oracle chooses by. The other columns are what criteria say of the head: the larger, the sooner it is closed."""


def table(run: Found) -> str:
    """The selections of one target and seed, as text."""
    plain = 100 * run["selections"][0]["target"]
    lines = [f"{run['target']}, seed {run['seed']}: {plain:.1f} % of {run['test_images']:,} images with all heads open"]
    lines.append(f"{'criterion':<14}{'gain':>14}{'closed':>8}{'correlation':>13}")
    for row in run["selections"][1:]:
        rho = run["correlation"].get(row["name"])
        gain = f"{100 * row['gain']:+.1f} ± {100 * row['error']:.1f}"
        lines.append(f"{row['name']:<14}{gain:>14}{len(row['heads']):>8}" + ("" if rho is None else f"{rho:>+13.2f}"))
    return "\n".join(lines)


def _selections(run: Found) -> str:
    rows = []
    for row in run["selections"]:
        rho, gain = run["correlation"].get(row["name"]), Score(100 * row["gain"], 100 * row["error"])
        rows.append(
            [
                escape(row["name"]),
                NONE if row["sources"] is None else f"{100 * row['sources']:.1f}",
                f"{100 * row['target']:.1f}",
                NONE if row["name"] == "none" else markup.gain(gain),
                NONE if rho is None else f"{rho:+.2f}".replace("-", "−"),
                escape(", ".join(f"{layer + 1}.{head + 1}" for layer, head in row["heads"])) or NONE,
                escape(row["chosen"]),
            ]
        )
    head = ["Criterion", "Sources, %", "Target, %", "Gain", "Correlation", "Heads closed (layer.head)", "How"]
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
