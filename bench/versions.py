"""On which versions the tests ran whole, and how that ended.

    python -m bench.versions oldest build/tests-oldest.xml --json bench/results/versions.json --doc docs/questions.md

`make test-oldest` and `make test-latest` end with it, in the environment that they tested. A row of the same name is
replaced.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench.base.results import environment, read_json, write_json
from bench.base.tables import put, table

PACKAGES = ("torch", "triton", "open_clip_torch", "timm", "transformers", "numpy")


def run_of(name: str, report: Path) -> dict[str, Any]:
    """What pytest's `--junitxml` says, and where this is. Expected failures count as skipped, as they do there."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "name": name,
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
        "skipped": len(skipped),
        "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
    }


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table, and the names of what failed."""
    rows, notes = [], []
    for run in runs:
        e = run["environment"]
        versions = [e["versions"].get(package, "–").partition("+")[0] for package in PACKAGES]
        counts = [run["passed"], len(run["failed"]), run["skipped"]]
        rows.append([run["name"], e["python"], *versions, *counts, e["date"][:10]])
        changed = " with uncommitted changes" if e["changed"] else ""
        notes.append(f"- {run['name']}: {e['device']}, {e['cores']} cores; commit {e['commit'][:10]}{changed}.")
        notes += [f"- {run['name']}, failed: `{test}`." for test in run["failed"]]
    header = ["", "Python", *PACKAGES, "passed", "failed", "skipped", "date"]
    return "\n".join([table(header, rows), "", *notes])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the row")
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the rows of other names stay")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="fills the table in this document")
    given = parser.parse_args(argv)
    before = (read_json(given.json) or {"rows": []})["rows"]
    runs = [run for run in before if run["name"] != given.name] + [run_of(given.name, given.report)]
    runs.sort(key=lambda run: run["environment"]["versions"]["torch"])
    write_json(given.json, {"rows": runs})
    put({"versions": page(runs)}, given.doc)
    return 0


if __name__ == "__main__":
    sys.exit(main())
