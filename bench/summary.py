"""What `bench.gpu` found, as markdown: where, the tests, the issue's targets each met or missed, the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.markdown import table
from bench.variants import OURS, SETTINGS, WORDS

AGAINST = ("stock", "plain", "peft", "merged")


@dataclass(frozen=True)
class Target:
    """A number that must not be over, or under, its limit; value None: could not be measured, `why` says it."""

    what: str
    limit: float
    at_most: bool
    value: float | None
    why: str = ""

    def verdict(self) -> str:
        if self.value is None:
            return f"not measured: {self.why}"
        met = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "met" if met else "missed"

    def row(self) -> list[str]:
        sign = "≤" if self.at_most else "≥"
        return [self.what, f"{sign} {self.limit:g}", "" if self.value is None else f"{self.value:.3g}", self.verdict()]


def chosen(found: Mapping[str, Any]) -> str | None:
    """Which of ours stands for us: what "auto" takes, stacked for a base in float32 and delta for one in 16 bits."""
    prefer = ("delta", "stacked") if found["precision"] == "bf16" else ("stacked", "delta")
    return next((n for n in (*prefer, *OURS) if n in found["variants"]), None)


def module_targets(found: Mapping[str, Any]) -> list[Target]:
    """The issue's targets of the attention module."""
    variants, refused = found["variants"], found["refused"]
    ours = chosen(found)

    def ratio(one: str | None, other: str | None, key: str = "both_ms") -> tuple[float | None, str]:
        for name in (one, other):
            if name is None or name not in variants:
                return None, refused.get(name or "", "none of our implementations ran")
        assert one is not None and other is not None
        return variants[one][key] / variants[other][key], ""

    recompute = "stacked, recompute"
    targets = [
        Target("time / stock frozen", 1.05, True, *ratio(ours, "stock")),
        Target("plain PyTorch / ours", 1.6, False, *ratio("plain", ours)),
        Target("PEFT / ours", 1.4, False, *ratio("peft", ours)),
        Target("merged through autograd / ours", 1.25, False, *ratio("merged", ours)),
        Target("saved / plain PyTorch's", 0.6, True, *ratio(ours, "plain", "saved_mb")),
        Target("saved with recompute / plain's", 0.4, True, *ratio(recompute, "plain", "saved_mb")),
    ]
    shares = (("share_of_peak", "the datasheet's peaks"), ("share_of_reached", "reachable rates"))
    for key, words in shares:
        share = variants[ours].get(key) if ours else None
        targets.append(Target(f"share of the roofline at {words}", 0.7, False, share, "no roofline for this chip"))
    return targets


def tower_targets(found: Mapping[str, Any]) -> list[Target]:
    """The issue's target of the whole training step."""
    ours, variants = chosen(found), found["variants"]
    known = ours is not None and "stock" in variants
    value = variants[ours]["both_ms"] / variants["stock"]["both_ms"] if known else None
    return [
        Target("training step / the frozen model's", 1.03, True, value, found["refused"].get("stock", "did not run"))
    ]


def _times(found: Mapping[str, Any]) -> str:
    stock = found["variants"].get("stock", {}).get("both_ms")
    rows = []
    for name, v in found["variants"].items():
        row = [WORDS.get(name, name), f"{v['both_ms']:.3f}", f"{v['both_ms'] / stock:.2f}" if stock else ""]
        row += [f"{v['inference_ms']:.3f}", f"{v['saved_mb']:.1f}"] if "saved_mb" in v else []
        row.append("" if v["peak_mb"] is None else f"{v['peak_mb']:.0f}")
        if "saved_mb" in v:
            row.append(f"{v['share_of_peak']:.0%} / {v['share_of_reached']:.0%}" if "share_of_peak" in v else "")
        rows.append(row)
    header = ["variant", "fwd + bwd ms", "/ stock"]
    if any("saved_mb" in v for v in found["variants"].values()):
        return table([*header, "inference ms", "saved MB", "peak MB", "of the roofline: peak / reachable"], rows)
    return table([*header, "peak MB"], rows)


def _section(title: str, found: Mapping[str, Any], targets: Sequence[Target]) -> list[str]:
    setting = SETTINGS[found["setting"]]
    ours = chosen(found)
    lines = [f"## {title}: {setting.name}, {found['precision']}", ""]
    lines += [f"Ours is `{ours}`. Medians; the variants took turns.", ""] if ours else []
    lines += [table(["target", "limit", "measured", ""], [t.row() for t in targets]), "", _times(found), ""]
    lines += [f"- {WORDS.get(name, name)}: not run, {why}" for name, why in found["refused"].items()]
    return [*lines, ""] if found["refused"] else lines


def summary(where: Mapping[str, Any], tests: Mapping[str, Any], found: Mapping[str, Any], *, rehearsal: bool) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        "# A rehearsal on the CPU: no number here means anything" if rehearsal else f"# {where['device']}",
        "",
        f"{where['device']}, Python {where['python']}, CUDA {where['cuda']}, {versions}; commit {where['commit']}"
        f"{' with uncommitted changes' if where['changed'] else ''}; {where['date']}",
        "",
        "## Tests",
        "",
    ]
    for name, result in tests.items():
        counts = result.get("counts")
        words = (
            f"{counts['passed']} passed, {counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped"
            if counts
            else "no report"
        )
        verdict = ""
        if result["exit"]:
            why = "stopped for want of time" if result.get("stopped") else f"exit status {result['exit']}"
            verdict = f" **{why}: the numbers below are not to be trusted**"
        lines.append(f"- {name}: {words} in {result['seconds']:.0f} s.{verdict}")
        lines += [
            f"  - {f['test']}: {f['message'].splitlines()[0] if f['message'] else ''}" for f in result["failures"][:20]
        ]
    lines.append("")
    for module in found["modules"]:
        lines += _section("Attention module, LayerNorm to residual", module, module_targets(module))
    for tower in found["towers"]:
        lines += _section("Training step of the tower, without the optimiser", tower, tower_targets(tower))
    for name, rows in found["profiles"].items():
        cells = [[r["kernel"][:100], f"{r['microseconds']:.0f}", f"{r['calls']:.0f}"] for r in rows]
        lines += [f"## Where the time goes: {name}, rank 2", "", table(["kernel", "µs", "calls"], cells), ""]
    lines += [f"- left out: {line}" for line in found["left_out"]]
    return "\n".join(lines).rstrip() + "\n"
