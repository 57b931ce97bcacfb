"""Tables in markdown, and the blocks of a document that a command fills in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, columns padded so that it reads well unrendered; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in (list(header), *cells)) for i in range(len(header))]
    right = [
        bool(cells) and all(re.fullmatch(r"[-–≤≥~]?[\d,.]*[ ]?[×%]?", row[i]) for row in cells)
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(list(header)), rule, *map(line, cells)])


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)


def read_block(text: str, name: str) -> str:
    """What stands in `text` between `<!-- name -->` and the next `<!-- end -->`."""
    found = _block(name).search(text)
    if found is None:
        raise ValueError(f"no block <!-- {name} --> … <!-- end -->")
    return found.group(0)[len(found.group(1)) : -len(found.group(2))]


def write_block(file: Path, name: str, content: str) -> None:
    """Puts `content` into the block `name` of `file`."""
    text = file.read_text(encoding="utf-8")
    read_block(text, name)
    file.write_text(
        _block(name).sub(lambda m: m.group(1) + content.rstrip() + "\n" + m.group(2), text), encoding="utf-8"
    )
