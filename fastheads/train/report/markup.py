"""Small pieces of the report's HTML: tables, lists of facts, sample images, and numbers in cells."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastheads.train.data.images import UnreadableImageError, decode
from fastheads.train.report.record import Score

NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of ready HTML cells in a box of its own that scrolls; column 1 names the row."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = ""
    for first, *rest in rows:
        cells = "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in rest)
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    foot = f"<caption><span>{caption}</span></caption>" if caption else ""
    content = f"{foot}<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{content}</table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Names and values as text; empty ones are left out."""
    known = {name: value for name, value in values.items() if value not in (None, "")}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in known.items())
    return f"<dl>{rows}</dl>"


def absent(what: str) -> str:
    """A note in place of a section's content."""
    return f'<p class="note">{what}</p>'


def source(content: bytes, kind: str = "png") -> str:
    """The image itself, for `src`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def cell(score: Score | None, best: float | None, *, split: bool) -> str:
    """A score in a table; `split`: with a rule at its left."""
    if score is None:
        return f"<td>{NONE}</td>"
    names = " ".join(["best"] * (score.mean == best) + ["split"] * split)
    error = "" if score.error is None else f" <small>± {score.error:.1f}</small>"
    return f'<td class="{names}">{score.mean:.1f}{error}</td>'


def signed(value: float) -> str:
    """With its sign, and a true minus; what rounds to 0 is +0.0."""
    return f"{round(value, 1) or 0:+.1f}".replace("-", "−")


def power(value: float) -> str:
    """For example 2.4 · 10⁻⁷, as HTML."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} · 10<sup>{int(exponent)}</sup>".replace("-", "−") if value else "0"


def sample(path: Path, label: str, domain: str, at: int) -> str:
    """One image with its class; small ones are shown pixel by pixel."""
    try:
        image = decode(path)
    except UnreadableImageError:
        return ""
    tiny = max(image.size) <= 64
    image.thumbnail((240, 240))
    buffer, kind = io.BytesIO(), "png" if tiny else "jpeg"
    image.save(buffer, kind)
    alt = escape(f"{domain}, sample {at}: {label}")
    style = ' class="tiny"' if tiny else ""
    return f'<div><img src="{source(buffer.getvalue(), kind)}" alt="{alt}"{style}><span>{escape(label)}</span></div>'
