"""The sections on runs side by side: paired differences, accuracy over a setting, published numbers; CSV and LaTeX."""

import csv
import io
from collections.abc import Mapping
from html import escape
from typing import Any

from fastheads.train.data.presets import preset_of
from fastheads.train.report import figures, markup
from fastheads.train.report.markup import NONE
from fastheads.train.report.record import Score
from fastheads.train.report.robustness import Line, Point, Robustness, effective

# ViT-B/16, in per cent: HAP (arXiv 2412.07226) for OfficeHome, DomainNet and PACS, and CAR-FT (arXiv 2211.16175).
_HAP, _CAR_FT = "HAP, arXiv 2412.07226", "CAR-FT, arXiv 2211.16175"
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    _HAP: {
        "Zero-shot CLIP": (82.4, 57.7, 96.1),
        "HA-LoRA": (85.0, 58.8),
        "DIG": (83.6, 58.2),
        "HA-LoRA + DIG": (87.0, 61.1, 98.1),
    },
    _CAR_FT: {
        "Zero-shot CLIP": (82.4, 96.1, 82.3, 34.4, 49.7),
        "Linear probe": (83.4, 97.2, 82.3, 57.3, 58.2),
        "MIRO": (82.2, 95.6, 82.5, 54.3, 54.0),
        "CLIPood": (85.0, 97.3, 87.0, 60.4, 63.5),
        "CAR-FT": (85.5, 96.8, 85.7, 61.9, 62.5),
    },
}
_COLUMNS = {
    _HAP: ("OfficeHome", "DomainNet", "PACS"),
    _CAR_FT: ("VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet"),
}


def published(dataset: str) -> list[tuple[str, float, str]]:
    """The method, its average over the held-out domains of a data set, and where that was published."""
    found = []
    for source, rows in PUBLISHED.items():
        for method, values in rows.items():
            values_by_name = dict(zip(_COLUMNS[source], values, strict=False))
            found += [(method, values_by_name[dataset], source)] if dataset in values_by_name else []
    return found


class Comparison(Robustness):
    """Rows against each other."""

    def differences(self) -> str:
        """Each row less each other, on the average of the targets, image by image."""
        found: dict[tuple[str, str], Mapping[str, Any]] = {}
        for each in self.experiment.get("differences") or ():
            found[each["method"], each["than"]] = each  # the last of them is the average
        if not found:
            return ""
        rows = []
        for mine in self.ids:
            cells = [self.key(mine)]
            for other in self.ids:
                pair, sign = found.get((mine, other)), 1
                if pair is None:
                    pair, sign = found.get((other, mine)), -1
                if pair is None:
                    cells.append(NONE)
                    continue
                score = Score(sign * pair["mean"], pair["error"])
                seeds = "" if pair["seeds_error"] is None else f"; ± {pair['seeds_error']:.1f} over seeds"
                told = f"{len(pair['by_seed'])} seeds, {pair['images']:,} images{seeds}"
                cells.append(
                    f'<td{" class=best" if score.clear else ""} title="{told}">{markup.gain(score)}<br>'
                    f"<small>{told}</small></td>"
                )
            rows.append(cells)
        caption = (
            "The row less the column, in points of accuracy, on the same images and with the same seeds. ±: standard "
            "error clustered over images, whose differences are averaged over seeds first; then that over seeds. "
            "Bold: more than two standard errors over images."
        )
        return markup.table(["Less →", *(escape(self.brief(m)) for m in self.ids)], rows, caption)

    def curves(self) -> str:
        """Accuracy over a setting, where rows differ in it alone."""
        html = ""
        for each in self.experiment.get("curves") or ():
            lines = []
            for method, points in each["lines"].items():
                scores = [(value, self.average(name)) for value, name in points]
                known = [(value, score) for value, score in scores if score]
                lines.append((method, self.colour(points[0][1]), known))
            name = each["setting"].replace("_", " ")
            alt = f"Line chart. Accuracy over {name}: " + "; ".join(
                f"{method} " + ", ".join(f"{value:g}: {score}" for value, score in known) for method, _, known in lines
            )
            html += self.picture(f"over-{each['setting']}", figures.over(lines, name), alt, f"Accuracy over {name}.")
        return f'<div class="figures">{html}</div>' if html else ""

    def published(self, dataset: str) -> str:
        """Published numbers of a data set."""
        rows = [[escape(method), f"{value:.1f}", escape(source)] for method, value, source in published(dataset)]
        words = f"Published for {dataset} with CLIP's ViT-B/16: the average over its held-out domains. Not run here."
        return markup.table(["Method", "Published, %", "Where"], rows, words) if rows else ""

    def _cells(self) -> list[tuple[str, str, Score, int]]:
        """Row, target or average, score, seeds."""
        found = []
        for method in self.ids:
            scores = [(target, self.score(method, target)) for target in self.targets]
            scores += [("average", self.average(method))] if len(self.targets) > 1 else []
            for target, score in scores:
                runs = self.of(method) if target == "average" else self.of(method, target=target)
                found += [(method, target, score, len({run.get("seed") for run in runs}))] if score else []
        return found

    def csv(self) -> str:
        """A line for each row on each target, and for each paired difference (`than` names the other row).

        And one for each point of a row's curves on a target, over the "step" of training or the "alpha" of WiSE-FT's
        mixture (`over`, `at`). source: accuracy on the sources' held-out images; effective: effective robustness, where
        there is a baseline.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ("method", "than", "target", "mean", "error", "seeds_error", "seeds", "images")
        writer.writerow((*head, "over", "at", "source", "effective"))
        lines = self.lines()
        for method, target, score, seeds in self._cells():
            images = self.images.get(target, "")
            error = "" if score.error is None else f"{score.error:.4f}"
            row = (method, "", target, f"{score.mean:.4f}", "", error, seeds, images)
            every = self.means(method, target) if target in lines else []
            kept = [_placed(point, lines[target]) for point in every if not point.over]
            writer.writerow((*row, *(kept or [("",) * 4])[0]))
            for point in every:
                if point.over:
                    mean = f"{100 * point.target:.4f}"
                    writer.writerow((method, "", target, mean, "", "", seeds, images, *_placed(point, lines[target])))
        for each in self.experiment.get("differences") or ():
            spread = "" if each["seeds_error"] is None else f"{each['seeds_error']:.4f}"
            numbers = (f"{each['mean']:.4f}", f"{each['error']:.4f}", spread, len(each["by_seed"]), each["images"])
            writer.writerow((each["method"], each["than"], each["target"], *numbers, "", "", "", ""))
        return text.getvalue()

    def latex(self) -> str:
        """The table of accuracies, for booktabs; of a known data set with the published averages below, marked so."""
        cells = {(method, target): score for method, target, score, _ in self._cells()}
        columns = [*self.targets, *["average"] * (len(self.targets) > 1)]
        lines = [
            f"% {self.error_kind()}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            " & ".join(["Method", *map(_tex, columns)]) + r" \\",
            r"\midrule",
        ]
        for method in self.ids:
            row = [_tex(self.label(method))]
            for column in columns:
                score = cells.get((method, column))
                error = "" if score is None or score.error is None else rf" \pm {score.error:.1f}"
                row.append("--" if score is None else f"${score.mean:.1f}{error}$")
            lines.append(" & ".join(row) + r" \\")
        known = preset_of(str(self.dataset.get("name") or ""))
        rows = published(known) if known and len(columns) > 1 else []
        lines += [r"\midrule"] * bool(rows)
        for method, value, source in rows:
            name = _tex(f"{method} (published: {source}, ViT-B/16)")
            lines.append(" & ".join([name, *["--"] * (len(columns) - 1), f"${value:.1f}$"]) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _placed(point: Point, line: Line | None) -> tuple[str, str, str, str]:
    """Of a point, the last four columns of the CSV."""
    gained = effective(point, line)
    at = f"{point.at:g}" if point.over else ""
    return point.over, at, f"{100 * point.source:.4f}", "" if gained is None else f"{gained:.4f}"


def _tex(text: str) -> str:
    for sign in "&%#_{}$":
        text = text.replace(sign, f"\\{sign}")
    return text
