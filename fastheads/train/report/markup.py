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


def note(what: str) -> str:
    """Small print, as HTML."""
    return f'<p class="note">{what}</p>'


def absent(what: str) -> str:
    """A note in place of a section's content."""
    return note(what)


def source(content: bytes, kind: str = "png") -> str:
    """The image itself, for `src`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _error(score: Score) -> str:
    return "" if score.error is None else f" <small>± {score.error:.1f}</small>"


def cell(score: Score | None, best: float | None, *, split: bool) -> str:
    """A score in a table; `split`: with a rule at its left."""
    if score is None:
        return f"<td>{NONE}</td>"
    names = " ".join(["best"] * (score.mean == best) + ["split"] * split)
    return f'<td class="{names}">{score.mean:.1f}{_error(score)}</td>'


def gain(difference: Score) -> str:
    """A difference with its sign and its error."""
    return signed(difference.mean) + _error(difference)


def signed(value: float) -> str:
    """With its sign, and a true minus; what rounds to 0 is +0.0."""
    return f"{round(value, 1) or 0:+.1f}".replace("-", "−")


def power(value: float) -> str:
    """For example 2.4 · 10⁻⁷, as HTML."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} · 10<sup>{int(exponent)}</sup>".replace("-", "−") if value else "0"


def step(seconds: float | None) -> str:
    """The time of one training step: `41.2 ms`, `1.2 s`."""
    if seconds is None:
        return NONE
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def thumbnail(path: Path, words: str) -> str:
    """The image, `words` its alternative text; small ones are shown pixel by pixel. Empty where it can't be read."""
    try:
        image = decode(path)
    except UnreadableImageError:
        return ""
    tiny = max(image.size) <= 64
    image.thumbnail((240, 240))
    buffer, kind = io.BytesIO(), "png" if tiny else "jpeg"
    image.save(buffer, kind)
    style = ' class="tiny"' if tiny else ""
    return f'<img src="{source(buffer.getvalue(), kind)}" alt="{escape(words)}"{style}>'


def sample(path: Path, label: str, domain: str, at: int) -> str:
    """One image with its class."""
    image = thumbnail(path, f"{domain}, sample {at}: {label}")
    return f"<div>{image}<span>{escape(label)}</span></div>" if image else ""


def section(name: str, title: str, words: str, content: str) -> str:
    """A section of the page; none where it has no content."""
    intro = f"<p>{words}</p>" if words else ""
    return f'<section id="{name}"><h2>{title}</h2>{intro}{content}</section>' if content else ""


def contents(sections: Mapping[str, str]) -> str:
    """Links to the sections, by their names on the page."""
    return "\n".join(f'<a href="#{name}">{title}</a>' for name, title in sections.items())


def document(title: str, content: str) -> bytes:
    """A whole page, with its style inside; `content` is HTML, `title` text."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{content}</main>
</body>
</html>
""".encode()


def page(title: str, opening: str, sections: Mapping[str, tuple[str, str]]) -> bytes:
    """A page of its own: sections by name, each a title and HTML; one without HTML is left out."""
    shown = {name: (words, html) for name, (words, html) in sections.items() if html}
    links = contents({name: words for name, (words, _) in shown.items()})
    body = "\n".join(section(name, words, "", html) for name, (words, html) in shown.items())
    header = f"""<header>
<h1>{escape(title)}</h1>
{opening}
<nav aria-label="Sections">{links}</nav>
</header>
"""
    return document(title, header + body + "\n")
