"""docs/study.md and its figures: what closing heads brings, and what training does, from docs/results/study-*.json.

`--collect NAME FILE RUNS` puts what is done of a sweep (its folder, or a results.json of the same settings) into
docs/results/study-NAME.json, `--heads NAME RUN…` what `fastheads heads` found; `--check` says what of the page is not
what the files generate: exit status 1.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.base.checkout import ROOT
from bench.base.results import read_json, write_json
from bench.base.tables import table
from bench.report.figures import Figure, Panel, digest_of, draw

RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "study.md"
DEVELOPED = {"pacs144": ("sketch", "art_painting"), "icons": ("sketch", "art")}  # where settings of criteria were tried
ORACLES, PLAIN = ("oracle", "oracle-gates"), "none"
NAMES = {"pacs144": "PACS", "icons": "icons"}

INTRODUCTION = """# The study: does closing heads help?

Written by `python -m bench.study` from `docs/results/study-*.json`. The aim: half of the oracle's gain on the targets
that confirm, by a criterion that sees the sources alone, and more than two standard errors over HAP. On the frozen
model the MMD's choice, HAP's criterion, stands for it; HAP itself is under the trained methods, as far as they are run.
"""
READING = """
±: standard error over seeds. Of three seeds it is itself uncertain by half, and chance alone lies beyond two of it in
one case of five. Nothing was chosen by a target that confirms.
The oracles chose by few images, by the loss of the classifier as it is, and fit those: they are a bound only where they
gain, and under a head fitted anew no bound at all. Which of the two is better is seen on the tested images. By text
there is no head to fit: on the icons `left-out` is `loss`, and so on. The targets of development were
looked at while criteria were written: about sixty forms of gates (objectives, pulls, L1 or
L2) and the form of the oracles were tried there. Of the icons that confirm, what closing single heads brings was seen
before, and used for nothing.

## Heads of the frozen model

Gains in points on the target over all heads open, on the same images. Each criterion orders the heads; how many of the
first four are closed is chosen on the sources. `gates…` set gates and close none; `…left-out` looks at each source
by a head that is fitted to the others. While choosing, what heads do to the features is taken to add up; the test is
exact. Refitted: with a linear head fitted to the sources' measured images under the same choice (by features that add
up), over one with all heads open. Correlation: Spearman's, of a score with what closing the head alone brings on the
oracle's images of the target, mean over runs. In brackets: seeds.
"""
TRAINED = """Accuracy in % on the domain held out, mean ± standard error over seeds (their number). WiSE-FT: the
mixture with the original over the method itself, in points (seeds × targets). Gates: at the end, the smallest and the
largest of any run. MMD: that of the last tenth of the steps over that of the first."""

Record = Mapping[str, Any]
Cells = Mapping[tuple[str, int], float]  # (target, seed): a fraction


class Mean(NamedTuple):
    """In points: over targets, then over seeds; standard error over seeds, None of one."""

    mean: float
    error: float | None
    seeds: int
    targets: int

    def __str__(self) -> str:
        digits = 2 if 0 < max(abs(self.mean), self.error or 0) < 0.05 else 1
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        mean = round(self.mean, digits) or 0.0  # no −0.0
        return f"{mean:+.{digits}f}{error}".replace("-", "−")

    @property
    def clear(self) -> bool:
        return self.error is not None and abs(self.mean) > 2 * self.error


def paired(mine: Cells, other: Cells) -> Mean | None:
    """Mine less the other's on the targets that both have, by the seeds that both have on each of these; None: none."""
    cells = mine.keys() & other.keys()
    targets = {target for target, _ in cells}
    seeds = sorted(seed for seed in {seed for _, seed in cells} if all((target, seed) in cells for target in targets))
    if not seeds:
        return None
    each = [statistics.fmean(100 * (mine[t, s] - other[t, s]) for t in targets) for s in seeds]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    return Mean(statistics.fmean(each), error, len(seeds), len(targets))


# ------------------------------------------------------------------------------------------------- frozen heads


def accuracies(found: Record, name: str, part: str = "", targets: Sequence[str] | None = None) -> dict[Any, float]:
    """On the target, of a selection, by cell; part: "" or "refit_"."""
    return {
        (run["target"], run["seed"]): row[f"{part}target"]
        for run in found["runs"]
        for row in run["selections"]
        if row["name"] == name and f"{part}target" in row and (targets is None or run["target"] in targets)
    }


def gain(found: Record, name: str, part: str = "", targets: Sequence[str] | None = None) -> Mean | None:
    return paired(accuracies(found, name, part, targets), accuracies(found, PLAIN, part, targets))


def parts_of(found: Record) -> tuple[list[str], list[str]]:
    """The targets that criteria were developed on, and those that confirm."""
    targets = list(dict.fromkeys(run["target"] for run in found["runs"]))
    developed = [t for t in targets if t in DEVELOPED[found["dataset_name"]]]
    return developed, [t for t in targets if t not in developed]


def names_of(found: Record) -> list[str]:
    """Of the selections on the sources."""
    return [row["name"] for row in found["runs"][0]["selections"] if row["name"] not in (PLAIN, *ORACLES)]


def best_of(found: Record, names: Sequence[str], targets: Sequence[str], part: str = "") -> tuple[str, Mean]:
    each = [(name, mean) for name in names if (mean := gain(found, name, part, targets)) is not None]
    return max(each, key=lambda pair: pair[1].mean)


def tied(found: Record, name: str, targets: Sequence[str], part: str) -> str:
    """Which others gained as much, in words."""
    most = gain(found, name, part, targets)
    others = [f"`{other}`" for other in names_of(found) if other != name and gain(found, other, part, targets) == most]
    return f", and so were {', '.join(others)}" if others else ""


def verdict(found: Record) -> list[str]:
    """What came out, in words: of the oracle, and of the criterion that development would have chosen."""
    (developed, confirmed), lines = parts_of(found), []
    data = NAMES[found["dataset_name"]]
    for part, words in (("", "With the classifier as it is"), ("refit_", "With a linear head fitted anew")):
        if not developed or gain(found, PLAIN, part) is None:
            continue
        name, before = best_of(found, names_of(found), developed, part)
        if not confirmed:
            bound_name, bound = best_of(found, ORACLES, developed, part)
            lines += [
                f"- **{data}. {words}: nothing is confirmed yet.** Of {len(names_of(found))} criteria `{name}` was",
                f"  best where it was developed ({', '.join(developed)}: {before} points); the better oracle there,",
                f"  `{bound_name}`, gains {bound} ({bound.seeds} seeds).",
            ]
            continue
        bound_name, bound = best_of(found, ORACLES, confirmed, part)
        got = gain(found, name, part, confirmed)
        mmd = paired(accuracies(found, name, part, confirmed), accuracies(found, "mmd", part, confirmed))
        assert got is not None and mmd is not None
        met, count = got.mean >= bound.mean / 2 and mmd.mean > 0 and mmd.clear, len(names_of(found))
        aim = f"the aim is {'met' if met else 'missed'}" if bound.mean > 0 else "there is nothing to recover"
        lines += [
            f"- **{data}. {words}, {aim}.** Of {count} criteria `{name}` was best where it was",
            f"  developed ({', '.join(developed)}: {before} points){tied(found, name, developed, part)}.",
            f"  On those that confirm ({', '.join(confirmed)}) it gains {got}, and {mmd} over the MMD's choice;",
            f"  the better oracle there, `{bound_name}`, gains {bound} ({got.seeds} seeds).",
        ]
        others = [(other, gain(found, other, part, confirmed)) for other in names_of(found) if other != name]
        told = ", ".join(f"`{other}` {mean}" for other, mean in others if mean and mean.mean > 0 and mean.clear)
        if told:
            lines += [
                f"  Seen afterwards, over two standard errors: {told}. One of {count} taken so is a question for other",
                "  data, no result.",
            ]
    return lines


def _heads_table(found: Record) -> str:
    (developed, confirmed), rows = parts_of(found), []
    targets, refit = [*developed, *confirmed], gain(found, PLAIN, "refit_") is not None
    for name in (*names_of(found), *ORACLES):
        cells = [gain(found, name, "", [t]) for t in targets]
        cells += [gain(found, name, "", confirmed)]
        cells += [gain(found, name, "refit_", confirmed)] if refit else []
        rho = [run["correlation"][name] for run in found["runs"] if run["correlation"].get(name) is not None]
        shown = f"{statistics.fmean(rho):+.2f}".replace("-", "−") if rho else "–"
        rows.append([f"`{name}`", *("–" if c is None else f"{c} ({c.seeds})" for c in cells), shown])
    head = ["", *(f"{t} (dev)" for t in developed), *confirmed, "confirmed", *["refitted"] * refit, "correlation"]
    return table(head, rows)


def _heads_figure(found: Record) -> Figure:
    developed, confirmed = parts_of(found)
    names, lines = [*names_of(found), *ORACLES], []
    for label, targets in (("development", developed), ("confirmed", confirmed)):
        each = [gain(found, name, "", targets) for name in names] if targets else []
        lines.append((label, tuple(m.mean for m in each if m), tuple(m.error or 0.0 for m in each if m)))
    data = NAMES[found["dataset_name"]]
    panel = Panel(
        "points",
        f"{data}: closing heads, or gates, of the frozen model",
        "points on the target over all heads open",
        tuple((name, 0.0, "") for name in names),
        tuple(line for line in lines if len(line[1]) == len(names)),
    )
    caption = f"{found['base_name'].split(' ')[0]}, frozen; ± standard error over seeds"
    return Figure(f"study-heads-{data.lower()}.png", f"Gains of criteria on {data}", caption, (panel,))


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"


def _heads_section(found: Record) -> list[str]:
    runs, data = found["runs"], NAMES[found["dataset_name"]]
    images = sorted({n for run in runs for n in run["images"].values()})
    tested = sorted({run["test_images"] for run in runs})
    plain = {t: statistics.fmean(accuracies(found, PLAIN, "", [t]).values()) for part in parts_of(found) for t in part}
    told = ", ".join(f"{t} {100 * value:.1f} %" for t, value in plain.items())
    figure, seeds = _heads_figure(found), {run["seed"] for run in runs}
    count = len(seeds) * len({name for run in runs for name in run["images"]})
    return [
        f"### {data}",
        "",
        f"{found['base_name'].split(' ')[0]}, {len(runs)} of {count} runs (target, seed) are done. Chosen by",
        f"{_span(images)} held-out images of each domain, tested on {_span(tested)} others of the target.",
        f"With all heads open: {told}.",
        "",
        _heads_table(found),
        "",
        f"![{figure.alt}](results/{figure.file})",
        "",
        "Repeat it:",
        "",
        *(f"    {command}" for command in found["commands"]),
        "",
    ]


# ------------------------------------------------------------------------------------------------- trained methods


def collect(file: Path, folder: Path) -> dict[str, Any]:
    """What is done of a sweep: its rows by id and label, targets, seeds, and of each run what the page shows.

    folder: the sweep's, or the results.json of an experiment with the same settings, which the record then names.
    """
    from fastheads.cli.sweep import read

    sweep, runs, domains, of = read(file.read_text()), list[dict[str, Any]](), dict[str, int](), {}
    if folder.is_file():
        whole = json.loads(folder.read_text())
        done, domains = whole["runs"], whole["dataset"]["images"]
        of = {"of": folder.name, "command": whole["command"], "commit": whole["commit"]}
    else:
        contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*/seed*/*/result.json"))]
        done, domains = [each["run"] for each in contents], contents[0]["key"]["image_counts"] if contents else {}
    for run in done:
        if run["method"] not in sweep.rows:
            continue
        history = run["history"] or {}
        kept = {name: run[name] for name in ("method", "target", "seed", "trainable_parameters")}
        kept["accuracy"] = round(run["accuracy"][run["target"]], 6)
        kept["wise_ft"] = round(run["wise_ft_accuracy"][run["target"]], 6) if "wise_ft_accuracy" in run else None
        gates = [gate for layer in run["gates"]["values"][-1] for gate in layer] if run["gates"] else []
        kept["gates"] = [round(min(gates), 4), round(max(gates), 4)] if gates else None
        mmd = [value for value in history.get("mmd", ()) if value is not None]
        few = max(1, len(mmd) // 10)
        kept["mmd"] = [round(statistics.fmean(part), 6) for part in (mmd[:few], mmd[-few:])] if mmd else None
        runs.append(kept)
    return {
        "file": file.as_posix(),
        **of,
        "dataset_name": "icons" if sweep.demo else sweep.args.data.name,
        "methods": [{"id": name, "label": row.method.label} for name, row in sweep.rows.items()],
        "targets": list(domains),
        "seeds": sweep.args.seed,
        "runs": runs,
    }


def trained(found: Record, method: str, part: str = "accuracy") -> dict[Any, float]:
    runs = (run for run in found["runs"] if run["method"] == method and run[part] is not None)
    return {(run["target"], run["seed"]): run[part] for run in runs}


PAIRS = (
    ("hap", "ha-lora", "gates and MMD beside HA-LoRA"),
    ("hap", "ha-lora-gates", "the MMD alone"),
    ("ha-lora-gates", "ha-lora", "gates without the MMD"),
    ("ha-lora", "lora", "a down-projection for each head, at equal parameters"),
    ("lora", "linear-probe", "plain LoRA over a linear probe"),
    ("fine-tune", "linear-probe", "full fine-tuning over a linear probe"),
    ("hap", "linear-probe", "HAP over a linear probe"),
)


def _trained_section(found: Record) -> list[str]:
    data, rows, labels = NAMES[found["dataset_name"]], [], {m["id"]: m["label"] for m in found["methods"]}
    for name, label in labels.items():
        cells, done = [], trained(found, name)
        for target in found["targets"]:
            own = [100 * value for (t, _), value in done.items() if t == target]
            error = f" ± {statistics.stdev(own) / math.sqrt(len(own)):.1f}" if len(own) > 1 else ""
            cells.append(f"{statistics.fmean(own):.1f}{error} ({len(own)})" if own else "missing")
        wise = paired(trained(found, name, "wise_ft"), done)
        gates = [run["gates"] for run in found["runs"] if run["method"] == name and run["gates"]]
        moved = f"{min(g[0] for g in gates):.2f} to {max(g[1] for g in gates):.2f}" if gates else "–"
        mmd = [run["mmd"] for run in found["runs"] if run["method"] == name and run["mmd"]]
        fell = f"{statistics.fmean(last / first for first, last in mmd):.2f}" if mmd else "–"
        rows.append([label, *cells, "–" if wise is None else f"{wise} ({wise.seeds} × {wise.targets})", moved, fell])
    pairs = []
    for mine, other, words in PAIRS:
        each = paired(trained(found, mine), trained(found, other))
        if each is not None:
            pairs.append([f"{labels[mine]} − {labels[other]}", words, str(each), f"{each.seeds} × {each.targets}"])
    theirs = "{of}, by `{command}` at {commit}".format(**found) if "of" in found else ""
    count = len(found["methods"]) * len(found["targets"]) * len(found["seeds"])
    lines = [
        f"### {data}",
        "",
        f"`fastheads sweep {found['file']}`: {len(found['runs'])} of {count} runs are done"
        + (f" ({theirs})." if theirs else "."),
        TRAINED,
        "",
        table(["", *found["targets"], "WiSE-FT", "gates", "MMD"], rows),
        "",
    ]
    told = ["Paired, in points, over the targets and seeds that both have:", ""]
    return lines + ([*told, table(["", "", "difference", "seeds × targets"], pairs), ""] if pairs else [])


def page(heads: Sequence[Record], sweeps: Sequence[Record]) -> str:
    said = [line for found in heads for line in verdict(found)]
    for found in sweeps:
        each = paired(trained(found, "hap"), trained(found, "ha-lora"))
        if each is not None:
            told = "more" if each.clear else "no more"
            lies = f"{each} points from HA-LoRA, {told} than two standard errors"
            said.append(
                f"- **{NAMES[found['dataset_name']]}. HAP lies {lies}** ({each.seeds} seeds, {each.targets} targets)."
            )
    lines = [
        INTRODUCTION,
        *said,
        READING,
        *(line for found in heads for line in _heads_section(found)),
        "## Trained methods",
        "",
        *(line for found in sweeps for line in _trained_section(found)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def records(kind: str) -> list[Record]:
    return [read_json(path) for path in sorted(RESULTS.glob(f"study-{kind}*.json"), reverse=True)]


def made() -> tuple[str, list[Figure]]:
    """The page and its figures."""
    heads = records("heads-")
    sweeps = [found for found in records("") if "methods" in found]
    return page(heads, sweeps), [_heads_figure(found) for found in heads]


def stale() -> list[str]:
    text, figures = made()
    wrong = [] if PAGE.read_text(encoding="utf-8") == text else ["docs/study.md"]
    for figure in figures:
        path = RESULTS / figure.file
        if not path.exists() or digest_of(path) != figure.digest():
            wrong.append(f"docs/results/{figure.file}")
    return wrong


def joined(files: Sequence[Path]) -> dict[str, Any]:
    """The records of `fastheads heads` in some folders as one."""
    found = [json.loads((path / "heads.json").read_text()) for path in files]
    first = {k: v for k, v in found[0].items() if k not in ("command", "runs")}
    return {
        **first,
        "commands": [each["command"] for each in found],
        "runs": [run for each in found for run in each["runs"]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--collect", nargs=3, metavar=("NAME", "FILE", "RUNS"), help="a sweep's runs into its record")
    parser.add_argument("--heads", nargs="+", metavar="NAME RUN", help="runs of `fastheads heads` into their record")
    parser.add_argument("--check", action="store_true", help="write nothing; say what is stale")
    given = parser.parse_args(argv)
    if given.check:
        wrong = stale()
        print("\n".join(f"not what the result files generate: {line}" for line in wrong) or "Up to date.")
        return 1 if wrong else 0
    if given.collect:
        name, file, runs = given.collect
        write_json(RESULTS / f"study-{name}.json", collect(Path(file), Path(runs)))
    if given.heads:
        name, *runs = given.heads
        write_json(RESULTS / f"study-heads-{name}.json", joined([Path(run) for run in runs]))
    text, figures = made()
    PAGE.write_text(text, encoding="utf-8")
    for figure in figures:
        draw(figure.panels, figure.caption, figure.digest(), RESULTS / figure.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
