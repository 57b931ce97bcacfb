"""What was measured, as the page a user decides by: docs/performance.md's tables, its figures, README's numbers.

Written from every file of rows in bench/results/; `--check` says what is not what the files generate: exit status 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.base.checkout import ROOT
from bench.base.tables import read_block, write_block
from bench.report.figures import all_figures, digest_of, draw
from bench.report.performance_page import answer, cases_table, measured, readme
from bench.report.sources import Source, sources


def blocks(found: Sequence[Source]) -> dict[tuple[str, str], str]:
    """What stands where: (file, block)."""
    page = "docs/performance.md"
    texts = {"report answer": answer(found), "report cases": cases_table(found), "report measured": measured(found)}
    return {(page, name): text for name, text in texts.items()} | {("README.md", "report"): readme(found)}


def stale(found: Sequence[Source], root: Path = ROOT) -> list[str]:
    """What of the pages and figures is not what the files generate, in words."""
    wrong = []
    for (file, name), text in blocks(found).items():
        if read_block((root / file).read_text(encoding="utf-8"), name).strip() != text.strip():
            wrong.append(f"{file}: the block {name!r}")
    for figure in all_figures(found):
        path = root / "docs" / "results" / figure.file
        if not path.exists() or digest_of(path) != figure.digest():
            wrong.append(f"docs/results/{figure.file}")
    return wrong


def write(found: Sequence[Source], root: Path = ROOT) -> None:
    for (file, name), text in blocks(found).items():
        write_block(root / file, name, text)
    for figure in all_figures(found):
        draw(figure.panels, figure.caption, figure.digest(), root / "docs" / "results" / figure.file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say what is stale")
    given = parser.parse_args(argv)
    try:
        found = sources(sorted((ROOT / "bench" / "results").glob("*.json")))
        if given.check:
            wrong = stale(found)
            print("\n".join(f"not what the result files generate: {line}" for line in wrong) or "Up to date.")
            return 1 if wrong else 0
        write(found)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(found)} files, {sum(len(s.rows) for s in found)} rows, {len(all_figures(found))} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
