"""A training step of the image tower at the published ranks: forward and backward, the optimiser left out."""

from bench.contests.contenders.towers import TRAINING
from bench.contests.vision import group

GROUP = group("model step", TRAINING, quick=[("tiny", 8), ("B/32", 1)])


def test_model_step(compete, case, contender):
    compete(GROUP, case, contender)
