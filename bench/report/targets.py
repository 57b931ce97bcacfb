"""The targets on a GPU, each met, missed or not measured, from rows: of the attention module, a step, the MMD.

A ratio of two contenders is a ratio of their ratios to the baseline, with which each took turns. The module's numbers
are means over a tower's layers at their published ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.base.results import Row
from bench.base.towers import BATCHES, SETTINGS, SHAPES
from bench.roofline.chips import chip_of
from bench.roofline.costs import cost
from bench.roofline.passes import PATHS

# What "auto" takes: stacked for a base in float32, delta for one in 16 bits.
CHOSEN = {"amp": "stacked", "bf16": "delta"}
LARGE, PAPER = (1, 2, 8192, 768, "domainbed"), (12, 3, 12, 768, "domainbed")
LAUNCHES = "mmd, 12 × 36 × 768"


@dataclass(frozen=True)
class Target:
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
        sign = "≤" if self.at_most else "≥"
        shown = "" if self.value is None else f"{self.value:.3g}"
        return [self.where, self.what, f"{sign} {self.limit:g}", shown, self.verdict()]


class _MissingError(Exception):
    """What a target needs is not among the rows; the text says what."""


def _target(where: str, what: str, limit: float, at_most: bool, value: Callable[[], float]) -> Target:
    try:
        return Target(where, what, limit, at_most, value())
    except _MissingError as error:
        return Target(where, what, limit, at_most, None, str(error))


def _one(rows: Sequence[Row], group: str, name: str, **extra: Any) -> Row:
    for row in rows:
        own = row.extra or {}
        if (row.group, row.contender) == (group, name) and all(own.get(k) == v for k, v in extra.items()):
            if row.status == "not run":
                raise _MissingError(f"{name}: {row.why}")
            if row.seconds is None:
                raise _MissingError(f"{name}: not timed")
            return row
    raise _MissingError(f"{name} has no row")


def _field(row: Row, field: str) -> float:
    value = getattr(row, field)
    if value is None:
        raise _MissingError(f"{row.contender} has no {field}")
    return float(value)


def module_mean(rows: Sequence[Row], setting: str, precision: str, name: str, value: Callable[[Row], float]) -> float:
    """Of the attention module, over the tower's layers."""
    ranks = SETTINGS[setting].ranks()
    each = {}
    for rank in set(ranks):
        each[rank] = value(
            _one(rows, "block", name, setting=setting, precision=precision, ranks=[rank], batch=BATCHES[setting])
        )
    return sum(each[rank] for rank in ranks) / len(ranks)


def module_targets(rows: Sequence[Row], device: str, setting: str, precision: str) -> list[Target]:
    where = f"{SETTINGS[setting].name}, batch {BATCHES[setting]}, {precision}: attention module"
    ours, shape = CHOSEN[precision], SHAPES[setting]

    def ratio(name: str) -> float:
        return module_mean(rows, setting, precision, name, lambda r: _field(r, "ratio"))

    def saved(name: str) -> float:  # the module's input, which the residual keeps, is counted too
        return module_mean(rows, setting, precision, name, lambda r: _field(r, "saved_bytes") + shape.row)

    def share(reached: bool) -> float:
        chip = chip_of(device)
        if chip is None or ours not in PATHS:
            raise _MissingError("no roofline for this chip")
        taken = module_mean(rows, setting, precision, ours, lambda r: (r.seconds or {})["median"])
        return cost(ours, shape, [chip]).seconds(chip.name, reached) / taken

    return [
        _target(where, f"{ours} / stock frozen", 1.05, True, lambda: ratio(ours)),
        _target(where, f"plain PyTorch / {ours}", 1.6, False, lambda: ratio("plain") / ratio(ours)),
        _target(where, f"PEFT / {ours}", 1.4, False, lambda: ratio("peft") / ratio(ours)),
        _target(where, f"merged through autograd / {ours}", 1.25, False, lambda: ratio("merged") / ratio(ours)),
        _target(where, f"saved: {ours} / plain", 0.6, True, lambda: saved(ours) / saved("plain")),
        _target(where, f"saved: {ours}, recompute / plain", 0.4, True,
                lambda: saved(f"{ours}, recompute") / saved("plain")),
        _target(where, "share of the roofline, datasheet's peaks", 0.7, False, lambda: share(False)),
        _target(where, "share of the roofline, reachable rates", 0.7, False, lambda: share(True)),
    ]  # fmt: skip


def step_target(rows: Sequence[Row], setting: str, precision: str) -> Target:
    where = f"{SETTINGS[setting].name}, batch {BATCHES[setting]}, {precision}: training step"
    ours = CHOSEN[precision]

    def value() -> float:
        row = _one(rows, "model step", ours, setting=setting, precision=precision, batch=BATCHES[setting])
        return _field(row, "ratio")

    return _target(where, f"{ours} / the frozen model", 1.03, True, value)


def mmd_targets(
    rows: Sequence[Row], rates: Mapping[str, float] | None, profile: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Target]:
    def row(name: str, case: tuple[int, int, int, int, str]) -> Row:
        return _one(rows, "mmd", name, **dict(zip(("layers", "domains", "each", "width", "kernel"), case, strict=True)))

    def times(name: str, case: tuple[int, int, int, int, str]) -> float:
        return _field(row(name, case), "ratio")

    def share() -> float:
        if not rates or "tf32" not in rates:
            raise _MissingError("the matmul rate was not measured")
        layers, domains, each, width, _ = LARGE
        taken = (row("auto", LARGE).seconds or {})["median"]
        return 3 * layers * (domains * each) ** 2 * width / taken / rates["tf32"]

    def memory() -> float:
        layers, domains, each, width, _ = LARGE
        features = 4 * layers * domains * each * width
        return (_field(row("auto", LARGE), "peak_bytes") + features) / (2 * features)

    def launches() -> float:
        if LAUNCHES not in profile:
            raise _MissingError("no profile")
        return float(sum(k["calls"] for k in profile[LAUNCHES]))

    paper, large = "12 layers × 36 × 768", "16,384 × 768"
    return [
        _target(paper, "launches, forward and gradient", 3, True, launches),
        _target(paper, "DomainBed's loop / ours", 50, False, lambda: times("DomainBed", PAPER)),
        _target(large, "materialised PyTorch (DomainBed's) / ours", 5, False, lambda: times("DomainBed", LARGE)),
        _target(large, "KeOps / ours", 3, False, lambda: times("KeOps", LARGE)),
        _target(large, "share of the tf32 matmul rate, 3 N²D", 0.6, False, share),
        _target(large, "memory / inputs and gradients", 1.2, True, memory),
    ]


def targets(content: Mapping[str, Any]) -> list[Target]:
    """Of gpu.json's content: rows as `Row`, environment with its rates, profile."""
    rows, device = content["rows"], content["environment"]["device"]
    found = []
    for setting in BATCHES:
        for precision in CHOSEN:
            found += module_targets(rows, device, setting, precision)
            found.append(step_target(rows, setting, precision))
    return found + mmd_targets(rows, content["environment"].get("rates"), content.get("profile", {}))
