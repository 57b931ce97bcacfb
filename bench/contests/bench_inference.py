"""Image features without gradients: what an adapter costs before and after it is merged."""

from bench.contests.contenders.towers import INFERENCE
from bench.contests.vision import group

GROUP = group("inference", INFERENCE, quick=[("tiny", 8), ("B/32", 1)])


def test_inference(compete, case, contender):
    compete(GROUP, case, contender)
