"""What every section of the report is made with: a method's colour and name, and the pictures gathered on the way."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastheads.train.report import figures, markup
from fastheads.train.report.figures import Bar
from fastheads.train.report.record import Record


class Shown(Record):
    """The record with what its sections share; a section is a method that returns HTML."""

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
