"""The attention module, from its LayerNorm to the residual: forward and backward, at both published ranks."""

from __future__ import annotations

from collections.abc import Callable

from bench.contests.contenders.ways import TRAINING
from bench.contests.contest import Contender
from bench.contests.vision import VisionCase, group, shapes


def cases(device: str, size: str) -> list[VisionCase]:
    found = shapes(device, size, quick=[("B/32", 8)])
    ranks = (2, 8) if size == "full" else (8,)
    return [VisionCase("block", key, batch, device, p, (rank,)) for key, batch, p in found for rank in ranks]


GROUP = group("block", TRAINING, cases)


def test_block(compete: Callable[..., None], case: VisionCase, contender: Contender) -> None:
    compete(GROUP, case, contender)
