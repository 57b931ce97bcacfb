"""What `bench.gpu` found, as markdown: where, parts, targets each met, missed or not measured, tables, profile."""

from collections.abc import Mapping
from typing import Any

from bench.base.results import by_case
from bench.base.tables import contest_table, table
from bench.report.targets import targets


def _parts(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    cells = []
    for name, part in parts.items():
        c = part.get("counts")
        shown = f"{c['passed']} passed, {c['failures'] + c['errors']} failed, {c['skipped']} skipped" if c else ""
        cells.append([name, part["status"], f"{part['seconds']:.0f}", shown, part["why"][:160]])
    lines = [table(["part", "", "s", "tests", ""], cells), ""]
    failed = [f for part in parts.values() for f in part.get("failures", ())]
    if failed:
        lines += ["**Tests failed: the numbers below are not to be trusted.**", ""]
        lines += [f"- {f['test']}: {(f['message'].splitlines() or [''])[0]}" for f in failed[:20]] + [""]
    return lines


def summary(content: Mapping[str, Any]) -> str:
    """The whole report, of gpu.json's content with rows as `Row`."""
    where, rows = content["environment"], content["rows"]
    title = "A rehearsal on the CPU: no number here means anything" if content["rehearsal"] else where["device"]
    commit = f"commit {where['commit'][:10]}{' with uncommitted changes' if where['changed'] else ''}"
    versions, driver = (", ".join(map(" ".join, (where.get(k) or {}).items())) for k in ("versions", "driver"))
    told = [where["device"], f"Python {where['python']}", versions, commit, where["date"][:10], driver]
    lines = [f"# {title}", "", "; ".join(filter(None, told)), ""]
    if where.get("missing"):
        lines += [f"Not installed: {', '.join(where['missing'])}.", ""]
    if rates := where.get("rates"):
        shown = [f"copy {rates['copy'] / 1e9:,.0f} GB/s (read and written)"]
        shown += [f"{k} {v / 1e12:,.1f} TFLOP/s" for k, v in rates.items() if k in ("bf16", "fp16", "tf32", "fp32")]
        lines += [f"Measured: {', '.join(shown)} (products of {rates['n']}).", ""]
    lines += _parts(content["parts"])
    cells = [t.row() for t in targets(content)]
    lines += ["## Targets", "", table(["where", "what", "limit", "measured", ""], cells), ""]
    for (group, case), own in by_case(r for r in rows if not r.group.endswith("sweep")).items():
        lines += [f"## {group}: {case}", "", contest_table(own), ""]
    for name, kernels in content.get("profile", {}).items():
        cells = [[k["kernel"][:90], f"{k['microseconds']:.0f}", f"{k['calls']:.0f}"] for k in kernels]
        lines += [f"## Where the time goes: {name}", "", table(["kernel", "µs", "launches"], cells), ""]
    return "\n".join(lines).rstrip() + "\n"
