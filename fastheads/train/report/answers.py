"""The sections on what the methods answered: how many right, and on which images and classes."""

from html import escape

from fastheads.train.report import markup
from fastheads.train.report.markup import NONE
from fastheads.train.report.record import target_accuracy
from fastheads.train.report.shown import Shown


class Answers(Shown):
    """Accuracy on the domains held out."""

    def accuracy(self) -> str:
        several = len(self.targets) > 1
        columns = {t: {m: self.score(m, t) for m in self.ids} for t in self.targets}
        if several:
            columns["Average"] = {m: self.average(m) for m in self.ids}
        rows = []
        for method in self.ids:
            cells = [self.key(method, full=True)]
            for name, scores in columns.items():
                best = max((s.mean for s in scores.values() if s), default=None)
                cells.append(markup.cell(scores[method], best, split=several and name == "Average"))
            gain = self.gain(method) if method != "zero-shot" else None
            rows.append([*cells, markup.gain(gain) if gain else NONE])
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
