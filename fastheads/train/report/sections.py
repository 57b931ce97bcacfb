"""The sections of an experiment's report: its numbers as HTML, and its pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastheads.train.report import figures, markup
from fastheads.train.report.figures import Bar, Curve, Pair
from fastheads.train.report.markup import NONE
from fastheads.train.report.record import (
    Grid,
    Record,
    curve,
    gates_by_step,
    number,
    present,
    target_accuracy,
    validation_and_target,
)

PLAIN_WORDS = {
    "zero-shot": "CLIP as it comes: an image gets the class whose sentence it matches best. Nothing is trained; "
    "every other method starts from here.",
    "linear-probe": "The image encoder stays as it is. Only a simple classifier on top of its features is trained.",
    "fine-tune": "Every weight of the image encoder may change: the most freedom to learn, and to forget.",
    "car-ft": "Context-aware robust fine-tuning: every weight may change, but the model is held to the original "
    "CLIP's opinion on what kind of picture it sees, a photo or a drawing, say.",
    "lora": "The weights are frozen, and a small correction is trained beside them, which passes through a narrow "
    "waist. All heads of a layer look at the image through the same waist.",
    "ha-lora": "Head-aware LoRA: as LoRA, but each attention head has a correction and a waist of its own.",
    "dig": "Domain-invariant gating: the weights are frozen. One number per attention head is trained, which turns "
    "the head up or down, also so that pictures of all source domains look alike to the model.",
    "hap": "Attention head purification: head-aware LoRA and the gates, trained together. The wish that domains "
    "look alike moves the gates only, not the corrections.",
}
# The settings and the histories of the record that are shown, and how each is called.
SETTINGS = {
    "lr": "learning rate",
    "gate_lr": "gate learning rate",
    "mmd_weight": "MMD weight",
    "context_weight": "context weight",
}
HISTORIES = {
    "loss": ("Loss", "whole loss"),
    "cross_entropy": ("Cross-entropy", "cross-entropy, nats"),
    "mmd": ("Domain discrepancy (MMD)", "MMD between sources"),
    "context_kl": ("Context divergence", "KL from original CLIP, nats"),
    "validation": ("Source validation", "accuracy, %"),
}


class Page(Record):
    """The sections of the page, each a method that returns HTML; pictures gather on the way."""

    def __init__(self, experiment: Mapping[str, Any]) -> None:
        super().__init__(experiment)
        self.pictures: dict[str, bytes] = {}

    def colour(self, method: str) -> str:
        return figures.colour(method, self.ids)

    def key(self, method: str, *, full: bool = False) -> str:
        """The method's colour and its name, brief as on the pictures or `full`."""
        name = self.label(method) if full else self.brief(method)
        return f'<i class="key" style="background:{self.colour(method)}"></i>{escape(name)}'

    def picture(self, name: str, png: bytes, alt: str, caption: str) -> str:
        """Keeps the picture for `figures/` and returns it as HTML; `alt` and `caption` are text."""
        self.pictures[name] = png
        image = f'<img src="{markup.source(png)}" alt="{escape(alt)}">'
        return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"

    def bars(self, name: str, rows: Sequence[Bar], **options: Any) -> str:
        alt = f"Bar chart. {options['title']}: " + "; ".join(f"{r.label} {r.text}" for r in rows)
        return self.picture(name, figures.bars(rows, **options), alt, "")

    def bar(self, method: str, value: float, text: str, error: float | None = None) -> Bar:
        return Bar(self.brief(method), value, self.colour(method), text, error)

    def headline(self) -> str:
        names = ", ".join(self.targets)
        held = f"{names} was held out: no method was trained on it."
        if len(self.targets) > 1:
            held = f"Each of {len(self.targets)} domains was held out in turn ({names})."
        if not self.ranked:
            return f'<p class="lead">{escape(held)} No method has a run on all of them.</p>'
        (best, top), base = next(iter(self.ranked.items())), self.ranked.get("zero-shot")
        others = [m for m in self.ranked if m not in (best, "zero-shot")]
        first, rest = self.label(best), ""
        lead = f"{first} came first with {top} %."
        if base and best != "zero-shot":
            gain = f"{top.mean - base.mean:.1f} points above it."
            lead = f"Zero-shot CLIP got {base} %. {first} did best with {top} %, {gain}"
        elif base and others:
            closest = f"{self.label(others[0])} came closest with {self.ranked[others[0]]} %."
            lead = f"Zero-shot CLIP got {base} %, and no trained method did better; {closest}"
        close = [m for m in self.ranked if m != best and top.near(self.ranked[m])]
        if close:
            rest += f"Within two standard errors of the first, so too close to call: {self.names(close)}. "
        below = [m for m in others if base and self.ranked[m].mean < base.mean]
        if below:
            rest += f"Below zero-shot: {self.names(below)}. "
        order = ", ".join(f"{self.label(m)} {score.mean:.1f}" for m, score in self.ranked.items())
        rest += f"In order, in per cent: {order}."
        lead = escape(f"{held} {lead}").replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")
        return f'<p class="lead">{lead}</p><p>{escape(rest)}</p>'

    def meta(self) -> str:
        e, seeds = self.experiment, len(self.seeds)
        parts = [
            f"{len(self.runs)} runs",
            "one seed" if seeds == 1 else f"{seeds} seeds",
            str(e.get("date") or "")[:16].replace("T", " "),
            str(e.get("device") or ""),
        ]
        return escape(" · ".join(filter(None, parts))) + f"<br>{escape(self.error_kind())}"

    def tiles(self) -> str:
        whole = f"{len(self.targets)} domains" if len(self.targets) > 1 else self.targets[0]
        shown = [("Held out", whole, "in turn" if len(self.targets) > 1 else "never trained on")]
        best = next((m for m in self.ranked if m != "zero-shot"), "zero-shot")
        for method in dict.fromkeys(m for m in ("zero-shot", best, "hap") if m in self.ranked):
            place = f"place {self.place(method)} of {len(self.ranked)} on the target"
            shown.append((self.label(method), f"{self.ranked[method].mean:.1f} %", place))
        adapter, full = self.adapter(), number(self.model.get("bytes"))
        saved = self.mean_of(adapter, "saved_bytes") if adapter else None
        if adapter and saved and full:
            note = f"on disk, {figures.percent(saved, full)} of the model's {figures.size(full)}"
            shown.append((f"{self.brief(adapter)} adapter", figures.size(saved), note))
        wall = number(self.experiment.get("wall_seconds"))
        if wall is not None:
            shown.append(("Whole experiment", figures.duration(wall), f"{len(self.runs)} runs"))
        return "".join(
            f'<div class="tile"><span>{escape(a)}</span><b>{escape(b)}</b><span>{escape(c)}</span></div>'
            for a, b, c in shown
        )

    def data(self, samples: Mapping[str, Sequence[tuple[Path, str]]]) -> str:
        counts = {d: f"{n:,} images" for d, n in self.images.items()}
        classes = self.dataset.get("class_names") or self.dataset.get("classes") or []
        facts = {
            "Data set": self.dataset.get("name"),
            "Folder": self.dataset.get("root"),
            "Classes": f"{len(classes)}: {', '.join(map(str, classes[:20]))}" if classes else None,
            "Files": self.dataset.get("skipped"),
        }
        strips = ""
        for domain, paths in samples.items():
            cells = "".join(markup.sample(path, label, domain, at) for at, (path, label) in enumerate(paths, 1))
            held = ", held out" if [domain] == self.targets else ""
            note = (counts.get(domain, "") + held).removeprefix(", ")
            caption = f"{escape(domain)} <small>{escape(note)}</small>"
            strips += f"<figure><figcaption>{caption}</figcaption><div>{cells}</div></figure>"
        html = markup.facts(facts if samples else {**facts, **counts}) + self.unreadable()
        return html + f'<div class="samples">{strips}</div>'

    def unreadable(self) -> str:
        """The images that were left out, if any were."""
        rows = [(escape(each["file"]), escape(each["reason"])) for each in self.dataset.get("unreadable") or []]
        if not rows:
            return ""
        summary = f"{len(rows):,} images could not be read and were left out"
        return f"<details><summary>{summary}</summary>{markup.table(['File', 'Reason'], rows)}</details>"

    def accuracy(self) -> str:
        several = len(self.targets) > 1
        columns = {t: {m: self.score(m, t) for m in self.ids} for t in self.targets}
        if several:
            columns["Average"] = {m: self.average(m) for m in self.ids}
        base, rows = self.ranked.get("zero-shot"), []
        for method in self.ids:
            cells = [self.key(method, full=True)]
            for name, scores in columns.items():
                best = max((s.mean for s in scores.values() if s), default=None)
                cells.append(markup.cell(scores[method], best, split=several and name == "Average"))
            mine = self.ranked.get(method) if method != "zero-shot" else None
            rows.append([*cells, markup.signed(mine.mean - base.mean) if mine and base else NONE])
        head = ["Method", *map(escape, columns), "vs zero-shot"]
        rows += [[escape(f"{self.label(m)} + WiSE-FT"), *self.averaged(m), NONE] for m in self.ids if self.averaged(m)]
        caption = f"Accuracy in per cent on each held-out domain. {self.error_kind()} Bold: best."
        if any(self.averaged(m) for m in self.ids):
            caption += " WiSE-FT: the weights half-way between the original and the tuned encoder, not ranked."
        charts = ""
        chance = 100 / len(self.dataset.get("classes") or [1])
        for at, (name, scores) in enumerate(sorted(columns.items(), key=lambda c: c[0] != "Average")):
            found = {m: score for m, score in scores.items() if score}
            title = "Average over held-out domains" if several and at == 0 else f"Held out: {name}"
            charts += self.bars(
                f"accuracy-{at}" if several else "accuracy",
                [self.bar(m, score.mean, str(score), score.error) for m, score in found.items()],
                title=title,
                unit="accuracy, %",
                full=100.0,
                guide=(chance, f"chance {chance:.3g} %") if chance < 100 else None,
            )
        return markup.table(head, rows, escape(caption)) + f'<div class="figures">{charts}</div>' + self.every()

    def averaged(self, method: str) -> list[str]:
        """The cells of a fully tuned encoder averaged with the original; none where no run has them."""
        cells = []
        for target in self.targets:
            runs = [run for run in self.runs if run["method"] == method and run["target"] == target]
            values = [run["wise_ft_accuracy"][target] for run in runs if run.get("wise_ft_accuracy")]
            cells += [f"{100 * sum(values) / len(values):.1f}"] if values else []
        return [*cells, NONE] if len(self.targets) > 1 and cells else cells

    def every(self) -> str:
        rows = []
        for run in self.runs:
            hit, kept = target_accuracy(run), run.get("selected_step")
            cells = [escape(run["target"]), escape(str(run.get("seed", NONE)))]
            cells += [NONE if hit is None else f"{100 * hit:.2f}", NONE if kept is None else f"{kept:,}"]
            rows.append([self.key(run["method"]), *cells])
        head = ["Method", "Held out", "Seed", "Accuracy, %", "Step kept"]
        return f"<details><summary>All {len(rows)} runs</summary>{markup.table(head, rows)}</details>"

    def methods(self) -> str:
        parts = ""
        for method in dict.fromkeys([*self.entries, *self.ids]):
            entry = self.entries.get(method, {})
            values = {name: number(entry.get(key)) for key, name in SETTINGS.items()}
            settings = [f"{name} {value:g}" for name, value in values.items() if value is not None]
            settings += [] if method in self.ids else ["no run in this experiment"]
            words = [PLAIN_WORDS.get(method), entry.get("description")]
            body = "".join(f"<p>{escape(text)}</p>" for text in words if text)
            parts += f"<div><h3>{self.key(method, full=True)}</h3>{body}"
            parts += f'<p class="note">{escape(", ".join(settings))}</p></div>'
        return parts

    def gates(self) -> str:
        found = {(m, r["target"], r.get("seed")): gates_by_step(r) for m in self.ids for r in self.of(m)}
        found = {key: grids for key, grids in found.items() if grids}
        if not found:
            return markup.absent("No gates were recorded in this experiment.")
        last = {key: list(grids.values())[-1] for key, grids in found.items()}
        norm = figures.gate_norm([grid for grids in found.values() for grid in grids.values()])
        gated = sorted({m for m, _, _ in found}, key=lambda m: (m != "hap", self.ids.index(m)))
        main, small, over_time = "", "", ""
        for method in gated:
            name, mine = self.brief(method), {k: g for k, g in last.items() if k[0] == method}
            main += self.gate_map(f"gates-{method}", name, list(mine.values()), norm)
            for at, target in enumerate(self.targets if len(self.targets) > 1 else []):
                grids = [grid for key, grid in mine.items() if key[1] == target]
                if grids and method == gated[0]:
                    title = f"{name}, held out: {target}"
                    small += self.gate_map(f"gates-{method}-{at}", title, grids, norm)
            key = next(iter(mine))
            steps = list(found[key])
            picked = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, 6)})
            over_time += self.picture(
                f"gates-{method}-steps",
                figures.gate_history({s: found[key][s] for s in picked}, title=name, norm=norm),
                f"Heat maps of {name}'s gates at steps {', '.join(map(str, picked))}.",
                f"One run: held out {key[1]}, seed {key[2]}. Colours as above; the step kept may be an earlier one.",
            )
        html = f'<div class="figures">{main}</div>'
        if small:
            html += f'<h3>By held-out domain</h3><div class="figures">{small}</div>'
        return html + f'<h3>Over training</h3><div class="figures">{over_time}</div>'

    def gate_map(self, name: str, title: str, grids: Sequence[Grid], norm: Any) -> str:
        grids = [grid for grid in grids if grid.shape == grids[0].shape]
        mean = np.mean(grids, axis=0)
        low, high = (np.unravel_index(f(mean), mean.shape) for f in (np.argmin, np.argmax))
        words = (
            f"Lowest {mean[low]:.2f} (layer {low[0] + 1}, head {low[1] + 1}), "
            f"highest {mean[high]:.2f} (layer {high[0] + 1}, head {high[1] + 1})."
        )
        kind = f"After training, mean over {len(grids)} runs. " if len(grids) > 1 else "After training. "
        png = figures.gate_map(mean, title=title, norm=norm)
        return self.picture(name, png, f"Heat map of the gates, {title}. {words}", kind + words)

    def training(self) -> str:
        charts = ""
        several = f"Mean over {len(self.targets)} held-out domains × {len(self.seeds)} seeds. "
        for key, (title, ylabel) in HISTORIES.items():
            lines, percent = [], key == "validation"
            for method in self.ids:
                runs = self.of(method)
                if found := curve(runs, key):
                    x, y = found
                    kept = number(runs[0].get("selected_step")) if percent and len(runs) == 1 else None
                    y = 100 * y if percent else y
                    lines.append(Curve(self.brief(method), self.colour(method), x, y, method == "hap", kept))
            if lines:
                names = ", ".join(f"{line.label} ends at {line.y[-1]:.3g}" for line in lines)
                png = figures.curves(lines, title=title, ylabel=ylabel, percent=percent)
                note = several if len(self.targets) * len(self.seeds) > 1 else ""
                note += "The point marks the step that was kept." if any(c.mark for c in lines) else ""
                charts += self.picture(f"training-{key}", png, f"Line chart, {title}: {names}.", note)
        return f'<div class="figures">{charts}</div>' if charts else markup.absent("No history was kept.")

    def selection(self) -> str:
        pairs, rows = [], []
        for method in self.ids:
            points = [p for run in self.of(method) if (p := validation_and_target(run))]
            if points:
                source, target = (100 * float(v) for v in np.mean(points, axis=0))
                pairs.append(Pair(self.brief(method), self.colour(method), source, target))
                rows.append([self.key(method), f"{source:.1f}", f"{target:.1f}", markup.signed(target - source)])
        if not pairs:
            return markup.absent("No source validation accuracy was recorded.")
        alt = "; ".join(f"{p.label} {p.source:.1f} to {p.target:.1f} %" for p in pairs)
        png = figures.source_and_target(pairs)
        chart = self.picture("source-and-target", png, f"Source validation to target: {alt}.", "")
        table = markup.table(["Method", "Sources, %", "Target, %", "Gap"], rows)
        return f'<div class="figures">{chart}</div>{table}'

    def size(self) -> str:
        html = ""
        for key, unit, title, text in (
            ("trainable_parameters", "parameters", "Trained parameters", "{:,.0f}".format),
            ("saved_bytes", "bytes", "What is saved", figures.size),
        ):
            full = number(self.model.get(unit))
            rows = [Bar("Whole model", full, "#d0d3d7", text(full))] if full else []
            for method in self.ids:
                if value := self.mean_of(method, key):
                    share = f" ({figures.percent(value, full)})" if full else ""
                    rows.append(self.bar(method, value, text(value) + share))
            if rows:
                html += self.bars(f"size-{unit}", rows, title=title, unit=unit)
        return f'<div class="figures">{html}</div>' if html else markup.absent("No sizes were recorded.")

    def merge(self) -> str:
        worst = {m: present(r.get("merge_max_difference") for r in self.of(m)) for m in self.ids}
        rows = [[self.key(m), markup.power(max(v)), str(len(v))] for m, v in worst.items() if v]
        head = ["Method", "Largest relative difference", "Runs checked"]
        return markup.table(head, rows) if rows else markup.absent("The merge was not checked.")

    def time(self) -> str:
        rows, charts = [], ""
        columns = {
            "seconds": ("Time per run", "seconds", figures.duration),
            "images_per_second": ("Training speed", "images per second", "{:,.0f}".format),
            "peak_memory_mb": ("Peak memory", "MB", "{:,.0f} MB".format),
            "steps": ("Steps", "steps", "{:,.0f}".format),
        }
        table = {m: {key: self.mean_of(m, key) for key in columns} for m in self.ids}
        for method, values in table.items():
            cells = [NONE if v is None else columns[k][2](v) for k, v in values.items()]
            rows.append([self.key(method), *cells])
        for key in ("seconds", "images_per_second"):
            title, unit, text = columns[key]
            bars = [self.bar(m, value, text(value)) for m, v in table.items() if (value := v[key])]
            charts += self.bars(f"time-{key}", bars, title=title, unit=unit) if bars else ""
        memory = number(self.experiment.get("peak_memory_mb"))
        caption = f"Means over runs, on {self.experiment.get('device', 'an unnamed device')}."
        caption += f" Peak memory of the whole experiment: {memory:,.0f} MB." if memory else ""
        head = ["Method", *(title for title, _, _ in columns.values())]
        return markup.table(head, rows, escape(caption)) + f'<div class="figures">{charts}</div>'

    def evaluation(self) -> str:
        part = self.dataset.get("evaluation", "all")
        if part == "all":
            return "The accuracy reported is over all of the target's images."
        return f"The accuracy reported is over this part of the target's images: {escape(str(part))}."

    def limits(self) -> str:
        limits = [str(limit) for limit in self.experiment.get("limits") or []]
        if not self.over_seeds:
            limits.append("One seed: another seed may order the methods differently.")
        if len(self.targets) == 1:
            limits.append("One held-out domain: the result may differ on another.")
        alone = [m for m in self.ids if any(len(run.get("sources") or ()) == 1 for run in self.of(m))]
        gated = [m for m in alone if number(self.entries.get(m, {}).get("mmd_weight"))]
        if gated:
            limits.append(f"One source domain has no MMD: {self.names(gated)} learned from the cross-entropy alone.")
        limits.append("The settings are those listed above; other settings may order them differently.")
        return "".join(f"<li>{escape(limit)}</li>" for limit in limits)

    def repeat(self) -> str:
        e = self.experiment
        tuning = e.get("tuning") or {}
        shape = [f"{n:,} {what}" for what in ("parameters", "layers", "heads") if (n := self.model.get(what))]
        facts = {
            "Model": ", ".join([str(self.model.get("name") or ""), *shape]).strip(", "),
            "Pretrained": self.model.get("pretrained"),
            "Settings": " ".join(filter(None, [tuning.get("file"), tuning.get("note")])),
            "Date": e.get("date"),
            "Commit": e.get("commit") or "unknown",
            "Device": e.get("device"),
            "Seeds": ", ".join(map(str, self.seeds)),
            **{str(name): version for name, version in (e.get("versions") or {}).items()},
        }
        return f"<pre><code>{escape(str(e.get('command') or ''))}</code></pre>{markup.facts(facts)}"
