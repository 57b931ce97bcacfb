"""A contest: contenders on one case, in turn, each checked against the mathematics it stands for.

A group (`bench_*.py`) has cases and contenders. A contender makes a `Trial` of a case, and that one trial gives
time, memory and the numbers to be checked. What cannot run says why; what is wrong stands in the table as wrong.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.base.memory import held_bytes, peak_bytes
from bench.base.results import Row

FORWARD, BACKWARD, FLOOR = 2.0, 3.0, 1e-6  # the numerics rule of CONTRIBUTING.md
SIZES = ("rehearsal", "quick", "full")
SLOW_START = "compiles for a minute or more; in the full set (--full)"


class NotRunError(Exception):
    """A contender that cannot run here; its text says why."""


class Case(Protocol):
    """One problem: its name in tables, where it runs, what it says of itself in a result file, and a small likeness."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    def extra(self) -> dict[str, Any]: ...

    def small(self, draw: int) -> Any:
        """The same mathematics with few samples, for the check; `draw`: which random input."""


@dataclass(frozen=True)
class Trial:
    """run: what is timed. outputs: results by name; a gradient's name begins with "d".

    forward: what the saved memory is measured of, beyond `known()`, which exists anyway. samples: images of one call.
    """

    run: Callable[[], Any]
    outputs: Callable[[], dict[str, Tensor]]
    forward: Callable[[], Tensor] | None = None
    known: Callable[[], Iterable[Tensor]] = tuple
    samples: int = 0


@dataclass(frozen=True)
class Contender:
    """One way to do what a group measures.

    words: what stands in tables. build: makes the trial; raises NotRunError. maths: what it claims to compute, a key of
    the group's `exact`. fault: what is known to be wrong with it, said where the check finds it wrong. ours: must never
    be wrong. slow_start: compiles for a minute or more, so on a CPU it is in the full set only.
    """

    name: str
    words: str
    build: Callable[[Any], Trial]
    maths: str = ""
    fault: str = ""
    ours: bool = False
    slow_start: bool = False
    applies: Callable[[Any], bool] = lambda case: True


@dataclass(frozen=True)
class Group:
    """A question with its contenders.

    exact, plain: outputs of a case, of the mathematics of that name, in float64 and as plain PyTorch has them in the
    case's own precision, its error the largest over `draws` of inputs. cases: for a device and one of SIZES.
    baseline: the contender of the ratios.
    """

    name: str
    baseline: str
    contenders: tuple[Contender, ...]
    cases: Callable[[str, str], Sequence[Any]]
    exact: Callable[[Any, str], dict[str, Tensor]]
    plain: Callable[[Any, str], dict[str, Tensor]]
    draws: int = 3  # a gate's gradient is a dozen numbers, a loss is one

    def of(self, case: Any) -> list[Contender]:
        return [c for c in self.contenders if c.applies(case)]

    def named(self, name: str) -> Contender:
        return next(c for c in self.contenders if c.name == name)


@dataclass(frozen=True)
class Verdict:
    """status: "ok" or "wrong". error, allowed: of the output that is worst by the rule, over its largest value."""

    status: str
    why: str
    error: float
    allowed: float


def build(contender: Contender, case: Any) -> Trial:
    """The trial, run once. Raises NotRunError: also for a peer that breaks, since it must not end the whole run."""
    try:
        trial = contender.build(case)
        trial.run()
        return trial
    except NotRunError:
        raise
    except Exception as error:
        if contender.ours:
            raise
        raise NotRunError(f"broke: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _worst(found: Tensor, exact: Tensor, plain_errors: Mapping[str, float], factor: float) -> tuple[float, float]:
    """Error and what is allowed, relative to exact's largest value; of max and RMS the one that is worse."""
    difference = found.detach().double().cpu() - exact
    if not bool(torch.isfinite(difference).all()):
        return float("inf"), 0.0
    scale = max(float(exact.abs().max()), 1e-300)
    pairs = []
    for size, error in _sizes(difference).items():
        pairs.append((error / scale, factor * plain_errors[size] / scale + FLOOR))
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-300))


def _sizes(difference: Tensor) -> dict[str, float]:
    return {"max": float(difference.abs().max()), "rms": float(difference.square().mean().sqrt())}


class Judge:
    """Checks contenders; keeps what was computed in float64 of a case, since all its contenders are held to it."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._known: dict[Any, tuple[dict[str, Tensor], dict[str, dict[str, float]]]] = {}

    def _standard(self, case: Any, maths: str) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Exact outputs of the first draw, and plain PyTorch's errors, the largest over all draws."""
        if (case, maths) not in self._known:
            first: dict[str, Tensor] = {}
            errors: dict[str, dict[str, float]] = {}
            for draw in range(self.group.draws):
                exact = {k: v.detach().double().cpu() for k, v in self.group.exact(case.small(draw), maths).items()}
                plain = self.group.plain(case.small(draw), maths)
                first = first or exact
                for name, value in exact.items():
                    off = _sizes(plain[name].detach().double().cpu() - value)
                    before = errors.setdefault(name, off)
                    errors[name] = {size: max(off[size], before[size]) for size in off}
            self._known[case, maths] = first, errors
        return self._known[case, maths]

    def check(self, contender: Contender, case: Any) -> Verdict:
        """The verdict on a contender, by a small likeness of the case. Raises NotRunError as `build` does."""
        exact, plain_errors = self._standard(case, contender.maths)
        found = build(contender, case.small(0)).outputs()
        missing = sorted(set(exact) - set(found))
        if missing:
            raise ValueError(f"{contender.name}: gives no {', '.join(missing)}")
        worst = {
            name: _worst(found[name], value, plain_errors[name], BACKWARD if name.startswith("d") else FORWARD)
            for name, value in exact.items()
        }
        first, *others = sorted(worst, key=lambda name: worst[name][0] / max(worst[name][1], 1e-300), reverse=True)
        error, allowed = worst[first]
        if error <= allowed:
            return Verdict("ok", "", error, allowed)
        also = [name for name in others if worst[name][0] > worst[name][1]]
        why = f"{first} is off by {error:.2g} of its largest, {allowed:.1g} allowed"
        why += f"; so are {', '.join(also)}" if also else ""
        return Verdict("wrong", why + (f": {contender.fault}" if contender.fault else ""), error, allowed)


def memory_of(trial: Trial, device: str) -> dict[str, int | None]:
    """Peak and saved bytes of a trial, for a Row."""

    def known() -> Iterator[Tensor]:  # asked after the forward pass: PEFT makes its weights anew in each
        yield from trial.known()

    saved = None if trial.forward is None else held_bytes(trial.forward, known())
    return {"peak_bytes": peak_bytes(trial.run, device), "saved_bytes": saved}


def not_run(group: str, case: Any, contender: Contender, why: str) -> Row:
    return Row(group, case.name, contender.name, "not run", why, extra=case.extra())


def free() -> None:
    """Gives back what nobody holds: of models, Python's own collector comes first."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
