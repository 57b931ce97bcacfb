"""The attention module, from its LayerNorm to the residual: forward and backward, at both published ranks."""

from bench.contests.contenders.towers import TRAINING
from bench.contests.vision import group

GROUP = group("block", TRAINING, quick=[("B/32", 1), ("B/32", 8)])


def test_block(compete, case, contender):
    compete(GROUP, case, contender)
