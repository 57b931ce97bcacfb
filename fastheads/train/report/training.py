"""The sections on training: the methods, their gates, what the losses did, and which step was kept."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from fastheads.train.report import figures, markup
from fastheads.train.report.figures import Curve, Pair
from fastheads.train.report.record import Grid, curve, gates_by_step, number, validation_and_target
from fastheads.train.report.shown import Shown

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
    "context_accuracy": ("Context told right", "accuracy, %"),
    "context_change": ("Context forgotten", "KL from original CLIP, nats"),
    "target": ("Target, not used", "accuracy, %"),
}


class Training(Shown):
    """What was trained, and how it went."""

    def methods(self) -> str:
        parts = ""
        for method in dict.fromkeys([*self.entries, *self.ids]):
            entry = self.entries.get(method, {})
            values = {name: number(entry.get(key)) for key, name in SETTINGS.items()}
            settings = [f"{name} {value:g}" for name, value in values.items() if value is not None]
            by_target = {SETTINGS[key]: each for key, each in (entry.get("by_target") or {}).items() if key in SETTINGS}
            settings += [
                f"{name} {', '.join(f'{v:g}' for v in each)} ({', '.join(self.targets)} held out)"
                for name, each in by_target.items()
            ]
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
        for key, (title, unit) in HISTORIES.items():
            lines, percent = [], unit == "accuracy, %"
            for method in self.ids:
                runs = self.of(method)
                if found := curve(runs, key):
                    x, y = found
                    kept = number(runs[0].get("selected_step")) if percent and len(runs) == 1 else None
                    y = 100 * y if percent else y
                    lines.append(Curve(self.brief(method), self.colour(method), x, y, method == "hap", kept))
            if lines:
                names = ", ".join(f"{line.label} ends at {line.y[-1]:.3g}" for line in lines)
                png = figures.curves(lines, title=title, ylabel=unit, percent=percent)
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
