"""The sections on what it costs: sizes, the merge, time and memory."""

from html import escape

from fastheads.train.report import figures, markup
from fastheads.train.report.figures import Bar
from fastheads.train.report.markup import NONE
from fastheads.train.report.record import number, present
from fastheads.train.report.shown import Shown


def _ratio(part: float | None, whole: float | None) -> str:
    return NONE if part is None or not whole else f"{part / whole:.2f} ×"


class Cost(Shown):
    """Size, merge, time and memory."""

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
        return markup.table(head, rows, escape(caption)) + f'<div class="figures">{charts}</div>' + self.beside_plain()

    def beside_plain(self) -> str:
        """The same training steps by fastheads and by plain PyTorch; empty where they weren't timed."""
        rows = []
        for each in self.experiment.get("beside_plain") or []:
            keys = ("seconds", "plain_seconds", "memory_mb", "plain_memory_mb", "steps")
            mine, plain, memory, plain_memory, steps = (number(each.get(key)) for key in keys)
            cells = [markup.step(mine), markup.step(plain), _ratio(plain, mine)]
            cells += [NONE if m is None else f"{m:,.0f} MB" for m in (memory, plain_memory)]
            cells += [_ratio(memory, plain_memory), NONE if steps is None else f"{steps:,.0f}"]
            rows.append([self.key(each["method"]), *cells])
        if not rows:
            return ""
        head = ["Method", "A step", "Plain's step", "Times as fast", "Memory", "Plain's memory", "Beside it", "Steps"]
        caption = (
            "The same training steps by fastheads and by plain PyTorch (FASTHEADS_IMPL=reference) in turn, on the same "
            "machine; medians a step. Below 1 times as fast, fastheads is the slower one."
        )
        table = markup.table(head, rows, caption)
        return f"<h3>Beside plain PyTorch on the same machine</h3>{table}"
