"""What `bench.gpu` found, as markdown: where, parts, targets each met, missed or not measured, tables, profile.

A target's ratio of two contenders is a ratio of their ratios to the baseline, with which each took turns. Those of the
attention module are means over a tower's layers at their published ranks.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from bench.base.results import Row, by_case
from bench.base.tables import contest_table, table
from bench.base.towers import BATCHES, SHAPES
from bench.contests.contest import NotRunError
from bench.roofline.chips import chip_of
from bench.roofline.costs import cost

# What "auto" takes: stacked for a base in float32, delta for one in 16 bits.
CHOSEN = {"amp": "stacked", "bf16": "delta"}
MMD = ("layers", "domains", "each", "width", "kernel")
LARGE, PAPER = (1, 2, 8192, 768, "domainbed"), (12, 3, 12, 768, "domainbed")
LAUNCHES = "mmd, 12 × 36 × 768"


class Target(NamedTuple):
    """A number that must not be over, or under, its limit; value None: not measured, `why` says it. where: the case."""

    where: str
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
        shown = "" if self.value is None else f"{self.value:.3g}"
        return [self.where, self.what, f"{'≤' if self.at_most else '≥'} {self.limit:g}", shown, self.verdict()]


def _target(where: str, what: str, sign: str, limit: float, value: Callable[[], float]) -> Target:
    try:
        return Target(where, what, limit, sign == "≤", value())
    except NotRunError as error:
        return Target(where, what, limit, sign == "≤", None, str(error))


def _value(rows: Sequence[Row], group: str, name: str, field: str, extra: Mapping[str, Any]) -> float:
    """A field of the contender's row whose `extra` has these."""
    for row in rows:
        if (row.group, row.contender) == (group, name) and extra.items() <= (row.extra or {}).items():
            if row.seconds is None:
                raise NotRunError(f"{name}: {row.why or 'not timed'}")
            if getattr(row, field) is None:
                raise NotRunError(f"{name} has no {field}")
            return float(getattr(row, field))
    raise NotRunError(f"{name} has no row")


def module_targets(rows: Sequence[Row], device: str, setting: str, precision: str) -> list[Target]:
    shape, ours = SHAPES[setting], CHOSEN[precision]
    where = f"{shape.name}, {precision}: attention module"

    def mean(name: str, field: str) -> float:
        ranks, own = shape.ranks(), {"setting": setting, "precision": precision, "batch": shape.batch}
        each = {rank: _value(rows, "block", name, field, own | {"ranks": [rank]}) for rank in set(ranks)}
        return sum(each[rank] for rank in ranks) / len(ranks)

    def over_ours(name: str) -> float:
        return mean(name, "ratio") / mean(ours, "ratio")

    def of_plains_saved(name: str) -> float:  # the module's input, which the residual keeps, is counted too
        return (mean(name, "saved_bytes") + shape.row) / (mean("plain", "saved_bytes") + shape.row)

    def share(reached: bool) -> float:
        if (chip := chip_of(device)) is None:
            raise NotRunError("no roofline for this chip")
        return cost(ours, shape, [chip]).seconds(chip.name, reached) / mean(ours, "median")

    recompute = f"{ours}, recompute"
    return [
        _target(where, f"{ours} / stock frozen", "≤", 1.05, lambda: mean(ours, "ratio")),
        _target(where, f"plain PyTorch / {ours}", "≥", 1.6, lambda: over_ours("plain")),
        _target(where, f"PEFT / {ours}", "≥", 1.4, lambda: over_ours("peft")),
        _target(where, f"merged through autograd / {ours}", "≥", 1.25, lambda: over_ours("merged")),
        _target(where, f"saved: {ours} / plain", "≤", 0.6, lambda: of_plains_saved(ours)),
        _target(where, f"saved: {recompute} / plain", "≤", 0.4, lambda: of_plains_saved(recompute)),
        _target(where, "share of the roofline, datasheet's peaks", "≥", 0.7, lambda: share(False)),
        _target(where, "share of the roofline, reachable rates", "≥", 0.7, lambda: share(True)),
    ]


def step_target(rows: Sequence[Row], setting: str, precision: str) -> Target:
    where, ours = f"{SHAPES[setting].name}, {precision}: training step", CHOSEN[precision]
    own = {"setting": setting, "precision": precision, "batch": BATCHES[setting]}
    what = f"{ours} / the frozen model"
    return _target(where, what, "≤", 1.03, lambda: _value(rows, "model step", ours, "ratio", own))


def host_targets(rows: Sequence[Row], launched: Mapping[str, Any]) -> list[Target]:
    """launched: by "form: layer", kernels of a step."""

    def count(form: str) -> float:
        for name, kernels in launched.items():
            if name.startswith(f"{form}: "):
                return float(sum(k["calls"] for k in kernels))
        raise NotRunError("no launches were counted")

    found = []
    for form in CHOSEN.values():
        found += [
            _target("a layer, forward and backward", f"launches, {form}", "≤", 12, partial(count, form)),
            _target("a layer, forward and backward", f"host time, {form} / stock", "≤", 1,
                    partial(_value, rows, "launches", f"{form}, ours", "ratio", {})),
        ]  # fmt: skip
    return found


def mmd_targets(rows: Sequence[Row], rates: Mapping[str, float] | None, profile: Mapping[str, Any]) -> list[Target]:
    layers, domains, each, width, _ = LARGE
    features = 4 * layers * domains * each * width  # bytes

    def of(name: str, case: tuple[Any, ...], field: str) -> float:
        return _value(rows, "mmd", name, field, dict(zip(MMD, case, strict=True)))

    def share() -> float:
        if not rates or "tf32" not in rates:
            raise NotRunError("the matmul rate was not measured")
        return 3 * layers * (domains * each) ** 2 * width / of("auto", LARGE, "median") / rates["tf32"]

    def launches() -> float:
        if LAUNCHES not in profile:
            raise NotRunError("no profile")
        return float(sum(k["calls"] for k in profile[LAUNCHES]))

    paper, large = "12 layers × 36 × 768", "16,384 × 768"
    return [
        _target(paper, "launches, forward and gradient", "≤", 3, launches),
        _target(paper, "DomainBed's loop / ours", "≥", 50, lambda: of("DomainBed", PAPER, "ratio")),
        _target(large, "materialised PyTorch (DomainBed's) / ours", "≥", 5, lambda: of("DomainBed", LARGE, "ratio")),
        _target(large, "KeOps / ours", "≥", 3, lambda: of("KeOps", LARGE, "ratio")),
        _target(large, "share of the tf32 matmul rate, 3 N²D", "≥", 0.6, share),
        _target(large, "memory / inputs and gradients", "≤", 1.2,
                lambda: (of("auto", LARGE, "peak_bytes") + features) / (2 * features)),
    ]  # fmt: skip


def targets(content: Mapping[str, Any]) -> list[Target]:
    """Of gpu.json's content: rows as `Row`, environment with its rates, profile."""
    rows, device = content["rows"], content["environment"]["device"]
    found = []
    for which in itertools.product(BATCHES, CHOSEN):
        found += [*module_targets(rows, device, *which), step_target(rows, *which)]
    found += host_targets(rows, content.get("host", {}))
    return found + mmd_targets(rows, content["environment"].get("rates"), content.get("profile", {}))


def tile_table(result: Mapping[str, Any]) -> str:
    """Of a result of `bench.tune`: the table's row ("default") and those that stand against it."""
    cells = [
        [name, f"{seconds * 1e3:.3f}", f"{result['ratios'][name]:.3f}", "won" if name == result["winner"] else ""]
        for name, seconds in sorted(result["times"].items(), key=lambda one: one[1])
    ]
    cells += [[name, "", "", why] for name, why in result["refused"].items()]
    return table(["row", "ms", "/ default", ""], cells)


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
    cells, failed = [], []
    for name, part in content["parts"].items():
        c = part.get("counts")
        shown = f"{c['passed']} passed, {c['failures'] + c['errors']} failed, {c['skipped']} skipped" if c else ""
        cells.append([name, part["status"], f"{part['seconds']:.0f}", shown, part["why"][:160]])
        failed += part.get("failures", ())
    lines += [table(["part", "", "s", "tests", ""], cells), ""]
    if failed:
        lines += ["**Tests failed: the numbers below are not to be trusted.**", ""]
        lines += [f"- {f['test']}: {(f['message'].splitlines() or [''])[0]}" for f in failed[:20]] + [""]
    cells = [t.row() for t in targets(content)]
    lines += ["## Targets", "", table(["where", "what", "limit", "measured", ""], cells), ""]
    for (group, case), own in by_case(r for r in rows if not r.group.endswith("sweep")).items():
        lines += [f"## {group}: {case}", "", contest_table(own), ""]
    for part in ("tiles", "tune"):
        for problem, result in content.get(part, {}).items():
            lines += [f"## Tile rows: {problem}", "", tile_table(result), ""]
    for name, kernels in (content.get("host", {}) | content.get("profile", {})).items():
        cells = [[k["kernel"][:90], f"{k['microseconds']:.0f}", f"{k['calls']:.0f}"] for k in kernels]
        lines += [f"## Where the time goes: {name}", "", table(["kernel", "µs", "launches"], cells), ""]
    return "\n".join(lines).rstrip() + "\n"
