"""A contest: contenders on one case, in turn, each checked against the mathematics it stands for.

A group (`bench_*.py`) has cases and contenders. A contender makes a `Trial` of a case, and that one trial gives
time, memory and the numbers to be checked. What cannot run says why; what is wrong stands in the table as wrong.
"""

import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.base.memory import held_bytes, peak_bytes

FORWARD, BACKWARD, FLOOR = 2.0, 3.0, 1e-6  # the numerics rule of CONTRIBUTING.md
SLOW_START = "compiles for a minute or more; in the full set (--full)"


class NotRunError(Exception):
    """A contender that cannot run here; its text says why."""


@contextmanager
def refusals() -> Iterator[None]:
    """What fastheads refuses to run is a NotRunError, with the reason that it gives."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise NotRunError(str(error).rpartition(": it ")[2].removesuffix("; takes 'auto'")) from error


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

    def memory(self, device: str) -> dict[str, int | None]:
        """Peak and saved bytes, as a row has them."""
        saved = None if self.forward is None else held_bytes(self.forward, self.known)
        return {"peak_bytes": peak_bytes(self.run, device), "saved_bytes": saved}


def training_trial(
    forward: Callable[[], Tensor],
    dy: Tensor | None,
    named: Callable[[], Mapping[str, Sequence[Tensor]]],
    known: Callable[[], Iterable[Tensor]],
    *,
    result: str,
    others: Sequence[Tensor] = (),
    samples: int = 0,
) -> Trial:
    """A forward pass, and a backward pass into which `dy` comes; None where forward's result is a loss.

    named: asked after the forward pass, what is checked the gradients of; several tensors of a name are put together.
    others: trained too, but not checked. result: the name of what forward returns.
    """

    def gradients(y: Tensor, wanted: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(y, list(wanted), None if dy is None else dy.to(y.dtype), allow_unused=True)

    def run() -> Any:
        y = forward()
        return gradients(y, dict.fromkeys((*chain(*named().values()), *others)))

    def outputs() -> dict[str, Tensor]:
        y = forward()
        tensors, found = named(), {result: y.detach()}
        grads = iter(gradients(y, chain(*tensors.values())))
        for name, each in tensors.items():
            own = [g for g in islice(grads, len(each)) if g is not None]
            if own:
                found[f"d{name}"] = own[0] if len(own) == 1 else torch.cat([g.flatten() for g in own])
        return found

    return Trial(run, outputs, forward, known, samples)


@dataclass(frozen=True)
class Contender:
    """One way to do what a group measures.

    words: what stands in tables. build: makes the trial. maths: what it claims to compute, a key of the group's
    `exact`. fault: what is known to be wrong with it, said where the check finds it wrong. ours: must never be wrong.
    slow_start: compiles for a minute or more, so on a CPU it is in the full set only. why_not: why it cannot run a
    case, "" where it can. applies: whether a case is any business of it.
    """

    name: str
    words: str
    build: Callable[[Any], Trial]
    maths: str = ""
    fault: str = ""
    ours: bool = False
    slow_start: bool = False
    why_not: Callable[[Any], str] = lambda case: ""
    applies: Callable[[Any], bool] = lambda case: True

    def trial(self, case: Any) -> Trial:
        reason = self.why_not(case)
        if reason:
            raise NotRunError(reason)
        return self.build(case)

    def tried(self, case: Any) -> Trial:
        """The trial, run once. Raises NotRunError: also for a peer that breaks, since it must not end the whole run."""
        try:
            trial = self.trial(case)
            trial.run()
            return trial
        except Exception as error:
            if self.ours or isinstance(error, NotRunError):
                raise
            raise NotRunError(f"broke: {type(error).__name__}: {first_line(error)}") from error


class Verdict(NamedTuple):
    """status: "ok" or "wrong". error, allowed: of the output that is worst by the rule, over its largest value."""

    status: str
    why: str
    error: float
    allowed: float


@dataclass(frozen=True)
class Group:
    """A question with its contenders.

    cases: for a device and a size, "rehearsal", "quick" or "full". A case has a name for tables, a device, `extra()`,
    what it says of itself in a result file, and `small(draw)`: the same mathematics with few samples, for the check,
    of the random input `draw`. standard: the trial of a mathematics, in float64 where `case.exact`, else as plain
    PyTorch has it in the case's own precision; its error is the largest over `draws`. baseline: of the ratios.
    """

    name: str
    baseline: str
    contenders: tuple[Contender, ...]
    cases: Callable[[str, str], Sequence[Any]]
    standard: Callable[[Any, str], Trial]
    draws: int = 3  # a gate's gradient is a dozen numbers, a loss is one

    def of(self, case: Any) -> list[Contender]:
        return [c for c in self.contenders if c.applies(case)]

    def named(self, name: str) -> Contender:
        return next(c for c in self.contenders if c.name == name)

    def check(self, contender: Contender, case: Any) -> Verdict:
        """The verdict on a contender, by a small likeness of the case. Raises NotRunError as `tried` does."""
        found = contender.tried(case.small(0)).outputs()
        exact, plain_errors = _standard(self, case, contender.maths)
        missing = sorted(set(exact) - set(found))
        if missing:
            raise ValueError(f"{contender.name}: gives no {', '.join(missing)}")

        def off(name: str) -> tuple[float, float]:
            """Error, and what is allowed, over the largest value; of max and RMS the one that is worse."""
            if not bool(torch.isfinite(found[name]).all()):
                return float("inf"), FLOOR
            scale, factor = max(float(exact[name].abs().max()), 1e-300), BACKWARD if name.startswith("d") else FORWARD
            each = zip(_errors(found[name], exact[name]), plain_errors[name], strict=True)
            pairs = [(error / scale, factor * plain / scale + FLOOR) for error, plain in each]
            return max(pairs, key=lambda pair: pair[0] / pair[1])

        worst = sorted(((off(name), name) for name in exact), key=lambda one: one[0][0] / one[0][1], reverse=True)
        (error, allowed), first = worst[0]
        if error <= allowed:
            return Verdict("ok", "", error, allowed)
        why = f"{first} is off by {error:.2g} of its largest, {allowed:.1g} allowed"
        also = [name for (own, limit), name in worst[1:] if own > limit]
        why += f"; so are {', '.join(also)}" if also else ""
        return Verdict("wrong", why + (f": {contender.fault}" if contender.fault else ""), error, allowed)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def free() -> None:
    """Gives back what nobody holds: of models, Python's own collector comes first."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest, and their root mean square."""
    difference = found.detach().double().cpu() - exact
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


@functools.cache  # since all contenders of a case are held to it
def _standard(group: Group, case: Any, maths: str) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]]]:
    """Exact outputs of the first draw, and plain PyTorch's errors, the largest over all draws."""
    first, errors = dict[str, Tensor](), dict[str, tuple[float, ...]]()
    for draw in range(group.draws):
        small = case.small(draw)
        exact = group.standard(replace(small, exact=True), maths).outputs()
        exact = {name: value.detach().double().cpu() for name, value in exact.items()}
        plain = group.standard(small, maths).outputs()
        first = first or exact
        for name, value in exact.items():
            off = _errors(plain[name], value)
            errors[name] = tuple(map(max, off, errors.get(name, off)))
    return first, errors
