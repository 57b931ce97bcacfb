"""The sections that look closer at the answers: images that changed, classes, confusions, calibration."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import islice

import numpy as np

from fastheads.train.report import answer_figures, markup
from fastheads.train.report.answer_figures import ROWS, Moved, Reliability
from fastheads.train.report.clusters import ByClass, by_class
from fastheads.train.report.markup import NONE
from fastheads.train.report.record import Changed, Grid
from fastheads.train.report.shown import Shown

SHOWN = 8  # images of each kind that changed
CONFUSIONS = 5  # of each method


def spread(images: Sequence[Changed]) -> list[Changed]:
    """The first image of each class, then the second of each, and so on."""
    seen: dict[str, int] = {}
    rounds = []
    for image in images:
        seen[image.label] = seen.get(image.label, 0) + 1
        rounds.append(seen[image.label])
    return [images[at] for at in sorted(range(len(images)), key=lambda at: rounds[at])]


class Classes(Shown):
    """Answers image by image and class by class; each section is empty where the record doesn't have them."""

    def changed(self, changed: Mapping[str, Sequence[Changed]]) -> str:
        html = ""
        for method in dict.fromkeys(m for m in (*self.leading(), *self.ids, *changed) if m in changed):
            turned = {
                "Wrong before, right now": [c for c in changed[method] if c.right and c.before != c.label],
                "Right before, wrong now": [c for c in changed[method] if not c.right and c.before == c.label],
            }
            strips = ""
            for name, images in turned.items():
                cells = "".join(islice(self.cards(method, images), SHOWN))
                strips += f"<figure><figcaption>{name}</figcaption><div>{cells}</div></figure>" if cells else ""
            if strips:
                html += f'<h3>{self.key(method, full=True)}</h3><div class="samples changed">{strips}</div>'
        return html

    def cards(self, method: str, images: Sequence[Changed]) -> Iterator[str]:
        """The images that can be read, each with its class and both answers."""
        for image in spread(images):
            answers = {"Class": image.label, "Zero-shot": image.before, self.brief(method): image.after}
            words = "; ".join(f"{name}: {answer}" for name, answer in answers.items())
            if picture := markup.thumbnail(image.path, words):
                lines = "".join(f" <span>{escape(k)}: <b>{escape(v)}</b></span>" for k, v in answers.items())
                yield f"<div>{picture}{lines}</div>"

    def class_name(self, at: int) -> str:
        """The class's name, as a sentence has it where the record says so."""
        names = self.dataset.get("class_names") or self.dataset.get("classes") or []
        return str(names[at]) if at < len(names) else f"class {at + 1}"

    def over_targets(self, method: str) -> ByClass | None:
        """Right answers by class, all targets together; None where a run has no counts."""
        found = [by_class(self.of(method, target=target)) for target in self.targets]
        known = [each for each in found if each is not None]
        if len(known) < len(found) or len({len(each.images) for each in known}) != 1:
            return None
        return ByClass(np.sum([each.images for each in known], axis=0), np.sum([each.right for each in known], axis=0))

    def classes(self) -> str:
        counted = {m: found for m in self.ids if (found := self.over_targets(m))}
        base = counted.get("zero-shot")
        others = {m: c for m, c in counted.items() if m != "zero-shot"}
        moved = {m: c for m, c in others.items() if base and np.array_equal(c.images, base.images)}
        html = self.moved(moved, base) if base and moved else ""
        charts = "".join(self.class_pictures(m, moved[m], base) for m in self.leading() if base and m in moved)
        html += f'<div class="figures">{charts}</div>' if charts else ""
        return html + self.every_class(counted) + self.confusions()

    def moved(self, moved: Mapping[str, ByClass], base: ByClass) -> str:
        """How many classes each method gets better, and worse, than zero-shot."""
        rows = []
        for method, counts in moved.items():
            change = (counts.right - base.right)[base.images > 0].round(6)
            kinds = (change > 0, change == 0, change < 0)
            rows.append([self.key(method), *(str(np.count_nonzero(kind)) for kind in kinds)])
        return markup.table(["Method", "Better classes", "The same", "Worse"], rows)

    def class_pictures(self, method: str, counts: ByClass, base: ByClass) -> str:
        """The classes in order of what they gained; of very many, those that gained and lost most."""
        used = np.flatnonzero(base.images > 0)
        before, after = (100 * c.right[used] / c.images[used] for c in (base, counts))
        order = np.lexsort((-before, before - after))
        parts = np.array_split(order, -(-len(order) // ROWS))
        if few := len(parts) > 2:
            parts = [order[:ROWS], order[-ROWS:]]
        name, html = self.brief(method), ""
        low, high = int(base.images[used].min()), int(base.images[used].max())
        many = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        for at, part in enumerate(parts):
            rows = [Moved(self.class_name(int(used[c])), float(before[c]), float(after[c])) for c in part]
            title = "Most gained first" if at == 0 else "Gained least, or lost"
            png = answer_figures.classes(rows, title=title, method=name, colour=self.colour(method))
            alt = f"Dot chart, accuracy by class, zero-shot against {name}, {len(rows)} of {len(used)} classes"
            alt += f", from {rows[0].label} ({markup.signed(rows[0].after - rows[0].before)} points)"
            alt += f" to {rows[-1].label} ({markup.signed(rows[-1].after - rows[-1].before)})."
            note = f"{many} images a class, so that one image is up to {100 / low:.2g} points."
            note += f" The {len(part)} of {len(used)} classes that {'lost' if at else 'gained'} most." if few else ""
            html += self.picture(f"classes-{method}-{at}" if len(parts) > 1 else f"classes-{method}", png, alt, note)
        return html

    def every_class(self, counted: Mapping[str, ByClass]) -> str:
        """A folded table of all classes and methods, in the data set's order."""
        if not counted:
            return ""
        first = next(iter(counted.values()))
        rows = []
        for at in np.flatnonzero(first.images > 0):
            cells = [f"{first.images[at]:,.0f}"]
            for counts in counted.values():
                known = at < len(counts.images) and counts.images[at] > 0
                cells.append(f"{100 * counts.right[at] / counts.images[at]:.1f}" if known else NONE)
            rows.append([escape(self.class_name(int(at))), *cells])
        head = ["Class", "Images", *(escape(self.brief(method)) for method in counted)]
        table = markup.table(head, rows, "Accuracy in per cent.")
        return f"<details><summary>All {len(rows)} classes</summary>{table}</details>"

    def confusions(self) -> str:
        """The largest of each method."""
        found: dict[str, dict[tuple[int, int], float]] = {}
        seeds = {method: len({run.get("seed") for run in self.of(method)}) for method in self.ids}
        for run in self.runs:
            for true, answer, count in run.get("confusions") or []:
                mine = found.setdefault(run["method"], {})
                mine[true, answer] = mine.get((true, answer), 0.0) + count / seeds[run["method"]]
        if not found:
            return ""
        rows = []
        for method in (m for m in self.ids if m in found):
            largest = sorted(found[method].items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
            words = [f"{self.class_name(true)} → {self.class_name(answer)}: {n:.3g}" for (true, answer), n in largest]
            cells = " ".join(f"<span>{escape(each)}</span>" for each in words)
            rows.append([self.key(method), f'<td class="list">{cells}</td>'])
        caption = (
            "Class → answer, and how many images of the class were taken for it."
            + " Means over seeds." * self.over_seeds
        )
        return "<h3>The largest confusions</h3>" + markup.table(["Method", "Most images first"], rows, caption)

    def calibration(self) -> str:
        panels, rows = [], []
        for method in self.ids:
            bins = [found for run in self.of(method) if (found := _bins(run.get("calibration") or {})) is not None]
            if not bins:
                continue
            sure, right, error = np.mean([_calibrated(each) for each in bins], axis=0)
            images, confidence, hits = np.sum(bins, axis=0)
            used = images > 0
            at = 100 * confidence[used] / images[used], 100 * hits[used] / images[used]
            panels.append(Reliability(self.brief(method), self.colour(method), *at, images[used], error))
            cells = [f"{sure:.1f}", f"{right:.1f}", markup.signed(sure - right), f"{error:.1f}"]
            rows.append([self.key(method), *cells])
        if not rows:
            return ""
        alt = "; ".join(f"{panel.label} {panel.error:.1f}" for panel in panels)
        png = answer_figures.reliability(panels)
        chart = self.picture("calibration", png, f"Reliability diagrams. Expected calibration error: {alt}.", "")
        head = ["Method", "Mean confidence, %", "Accuracy, %", "Too sure by", "Expected calibration error"]
        caption = "In percentage points." + " Means over runs." * (len(self.targets) * len(self.seeds) > 1)
        return f'<div class="figures">{chart}</div>' + markup.table(head, rows, caption)


def _bins(kept: Mapping[str, Sequence[float]]) -> Grid | None:
    """Images, summed confidence and right answers of each bin `[3, bins]`."""
    columns = [kept.get(key) or [] for key in ("images", "confidence", "right")]
    if len({len(column) for column in columns}) != 1 or not sum(columns[0]):
        return None
    return np.array(columns, dtype=np.float64)


def _calibrated(bins: Grid) -> tuple[float, float, float]:
    """Mean confidence, accuracy and expected calibration error, in per cent."""
    images, confidence, right = bins
    gap = np.abs(confidence - right).sum()
    return tuple(100 * float(part) / float(images.sum()) for part in (confidence.sum(), right.sum(), gap))  # type: ignore[return-value]
