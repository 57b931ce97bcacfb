"""Markdown: tables, those of rows among them, and the blocks of a document that a command fills in."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.base.results import Row, by_case

NUMBER = re.compile(r"[-–≤≥~]?[\d,.]*[ ]?[×%]?")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, columns padded so that it reads well unrendered; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(cells) and all(NUMBER.fullmatch(c) for c in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(header), f"|{rule}|", *map(line, cells)])


def contest_table(rows: Sequence[Row], words: Mapping[str, str] | None = None, errors: bool = False) -> str:
    """A case's contenders, the fastest first; what is wrong says so, what did not run comes last.

    words: a contender's, where they are not its name. errors: whether what is right says by how much it is off.
    """
    baseline = next((r.baseline for r in rows if r.baseline), "")
    ran = sorted((r for r in rows if r.seconds), key=lambda r: (r.ratio or 1, r.median))
    cells = []
    for r in [*ran, *(r for r in rows if not r.seconds)]:
        times = [f"{r.seconds['median'] * 1e3:,.2f}" if r.seconds else "–", f"{r.ratio:.2f}" if r.ratio else "–"]
        memory = ["" if b is None else f"{b / 1e6:,.1f}" for b in (r.peak_bytes, r.saved_bytes)]
        right = f"right, off by {r.error:.0e}" if errors and r.error is not None else ""
        note = {"ok": right, "wrong": f"**wrong: {r.why}**", "not run": f"not run: {r.why}"}[r.status]
        cells.append([(words or {}).get(r.contender, r.contender), *times, *memory, note])
    return table(["", "ms", f"/ {baseline}" if baseline else "ratio", "peak MB", "saved MB", ""], cells)


def sweep_tables(rows: Sequence[Row], group: str) -> list[str]:
    """Images per second against x, contenders across; of the batch sweep the largest batch of each."""
    lines = []
    label = group.removesuffix(" sweep")
    for (_, case), own in by_case(r for r in rows if r.group == group).items():
        ran = [r for r in own if r.seconds]
        names = list(dict.fromkeys(r.contender for r in ran))
        at = {(r.x, r.contender): f"{r.per_second:,.1f}" for r in ran}
        cells = [[f"{x:g}", *(at.get((x, name), "") for name in names)] for x in sorted({r.x for r in ran})]
        if cells:
            lines += [f"{case}, images per second:", "", table([label, *names], cells), ""]
        for r in ran:
            if r.extra and "ended" in r.extra:
                word = "largest batch" if r.extra["largest"] else "largest batch tried"
                lines.append(f"- {r.contender}: {word} {r.x:g}, {at[r.x, r.contender]} images/s; {r.extra['ended']}")
        reasons: dict[str, list[str]] = {}
        for r in own:
            if r.status != "ok":
                reasons.setdefault(f"{r.contender}: {r.status}, {r.why}", []).append(f"{r.x:g}")
        lines += [f"- {why} ({label} {', '.join(x)})" for why, x in reasons.items()]
        lines.append("")
    return lines


def _around(text: str, name: str) -> tuple[str, str, str]:
    """What stands before, in and after the block between `<!-- name -->` and the next `<!-- end -->`."""
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    inside, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError(f"no block <!-- {name} --> … <!-- end -->")
    return before + mark, inside, end + after


def read_block(text: str, name: str) -> str:
    return _around(text, name)[1]


def write_block(file: Path, name: str, content: str) -> None:
    before, _, after = _around(file.read_text(encoding="utf-8"), name)
    file.write_text(f"{before}{content.rstrip()}\n{after}", encoding="utf-8")


def put(made: Mapping[str, str], doc: Path | None) -> None:
    """Prints blocks by their names, and puts them into the document, if there is one."""
    for name, text in made.items():
        print(f"\n{name}\n\n{text}")
        if doc:
            write_block(doc, name, text)
