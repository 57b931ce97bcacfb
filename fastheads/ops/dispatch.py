"""Which implementation computes a layer, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass

# In the order in which "auto" asks them. An implementation enters this table with its kernel, never before it.
IMPLEMENTATIONS = ("reference",)
PLANNED = ("cpu", "stacked", "delta", "one_pass")


@dataclass(frozen=True)
class Problem:
    """What one layer asks of an implementation.

    `extras` names what the fused operator does not cover ("ln_q", "attention dropout" …): the reference path does.
    """

    device: str
    dtype: str
    num_heads: int
    head_dim: int
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for a layer, and for each other the reasons why not."""

    name: str
    refused: dict[str, list[str]]

    @property
    def falls_back(self) -> bool:
        """True where the plain reference computes the layer."""
        return self.name == "reference"


def not_supported_reasons(name: str, problem: Problem) -> list[str]:
    """Why implementation `name` cannot compute `problem`; empty where it can."""
    if name == "reference":
        return []
    reasons = ["not part of this version of fastheads"]
    reasons += [f"does not cover {extra}" for extra in problem.extras]
    return reasons


def check_impl(impl: str) -> None:
    """Raises ValueError for a name that is no implementation, or not one of this version."""
    if impl == "auto" or impl in IMPLEMENTATIONS:
        return
    takes = ", ".join(map(repr, ("auto", *IMPLEMENTATIONS)))
    if impl in PLANNED:
        raise ValueError(f"impl: {impl!r} is not part of this version of fastheads; takes {takes}")
    raise ValueError(f"impl: got {impl!r}; takes {takes}")


def choose(impl: str, problem: Problem) -> Choice:
    """The implementation for `problem`: the one asked for, or with "auto" the first that supports it."""
    check_impl(impl)
    refused = {name: not_supported_reasons(name, problem) for name in (*PLANNED, *IMPLEMENTATIONS)}
    able = [name for name in IMPLEMENTATIONS if not refused[name]]
    name = able[0] if impl == "auto" else impl
    return Choice(name, {k: v for k, v in refused.items() if k != name})
