"""The least time each way of running the attention module can take: bytes, operations and saved activations, per chip.

A path is a list of passes (`passes`); its time is the sum over passes of the slowest of what each needs: bytes
over bandwidth, operations over rate. Nothing here was measured: `chips` says where the rates come from. The
module runs from the block's LayerNorm to the residual, the training step over the whole tower, the MLPs too. Ranks are
the published ones; numbers are per layer, in the mean.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.base.towers import SHAPES, Setting
from bench.roofline.chips import Chip, Rates
from bench.roofline.passes import PATHS, Pass, Run, mlp


@dataclass(frozen=True)
class Cost:
    """A path on a shape, per layer in the mean over the published ranks. Times in seconds: [peak, reached] per chip."""

    shape: str
    path: str
    forward_bytes: float
    backward_bytes: float
    forward_ops: dict[str, float]  # per chip: tiles, and so what is padded, are the architecture's
    backward_ops: dict[str, float]
    forward_exps: dict[str, float]
    backward_exps: dict[str, float]
    saved: float
    forward_seconds: dict[str, tuple[float, float]]
    backward_seconds: dict[str, tuple[float, float]]
    block_seconds: dict[str, tuple[float, float]]  # forward and backward with the MLP

    def seconds(self, chip: str, reached: bool = True) -> float:
        """Forward and backward of the module."""
        return self.forward_seconds[chip][reached] + self.backward_seconds[chip][reached]


@functools.cache
def run_of(path: str, shape: Setting, rank: int, arch: int) -> Run:
    return PATHS[path](shape, rank, arch)


def seconds(passes: Iterable[Pass], rates: Rates) -> float:
    return sum(p.seconds(rates) for p in passes)


def mean(path: str, shape: Setting, arch: int, value: Callable[[Run], float]) -> float:
    """Over the shape's layers."""
    ranks = shape.ranks()
    each = {rank: value(run_of(path, shape, rank, arch)) for rank in set(ranks)}
    return sum(each[rank] for rank in ranks) / len(ranks)


def cost(path: str, shape: Setting, chips: Sequence[Chip]) -> Cost:
    def side(name: str) -> dict[str, Any]:
        def each(value: Callable[[list[Pass], Chip], float]) -> dict[str, float]:
            return {c.name: mean(path, shape, c.arch, lambda run, c=c: value(getattr(run, name), c)) for c in chips}

        peak, reached = each(lambda own, c: seconds(own, c.peak)), each(lambda own, c: seconds(own, c.reached))
        return {
            f"{name}_bytes": each(lambda own, c: sum(p.bytes for p in own))[chips[0].name],
            f"{name}_ops": each(lambda own, c: sum(p.gemm + p.attention for p in own)),
            f"{name}_exps": each(lambda own, c: sum(p.exp for p in own)),
            f"{name}_seconds": {c.name: (peak[c.name], reached[c.name]) for c in chips},
        }

    found, block = side("forward") | side("backward"), {}
    for c in chips:
        forward, backward = (found[f"{name}_seconds"][c.name] for name in ("forward", "backward"))
        other = [seconds(mlp(shape), rates) for rates in (c.peak, c.reached)]
        block[c.name] = tuple(map(sum, zip(forward, backward, other, strict=True)))
    saved = mean(path, shape, chips[0].arch, lambda run: run.saved)
    return Cost(shape.name, path, saved=saved, block_seconds=block, **found)  # type: ignore[arg-type]


def shares_of(path: str, shape: Setting, rank: int, chip: Chip, measured: float) -> tuple[float, float]:
    """The least seconds of a module's forward and backward over `measured`, at the peaks and at reachable rates."""
    run = run_of(path, shape, rank, chip.arch)
    passes = [*run.forward, *run.backward]
    return seconds(passes, chip.peak) / measured, seconds(passes, chip.reached) / measured


def all_costs(chips: Sequence[Chip]) -> list[Cost]:
    return [cost(path, shape, chips) for shape in SHAPES.values() for path in PATHS]
