"""The attention module, from its LayerNorm to the residual: forward and backward, at both published ranks."""

from bench.contests.contenders.towers import TRAINING
from bench.contests.vision import VisionCase, group, shapes


def cases(device: str, size: str) -> list[VisionCase]:
    found = shapes(device, size, quick=[("B/32", 8)])
    ranks = (2, 8) if size == "full" else (8,)
    return [VisionCase("block", key, batch, device, p, (rank,)) for key, batch, p in found for rank in ranks]


GROUP = group("block", TRAINING, cases)


def test_block(compete, case, contender):
    compete(GROUP, case, contender)
