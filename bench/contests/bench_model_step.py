"""A training step of the image tower at the published ranks: forward and backward, the optimiser left out."""

from bench.base.towers import SETTINGS
from bench.contests.contenders.towers import TRAINING
from bench.contests.vision import VisionCase, group, shapes


def cases(device: str, size: str) -> list[VisionCase]:
    found = shapes(device, size, quick=[("tiny", 8), ("B/32", 2)])
    return [VisionCase("model step", key, batch, device, p, SETTINGS[key].ranks()) for key, batch, p in found]


GROUP = group("model step", TRAINING, cases)


def test_model_step(compete, case, contender):
    compete(GROUP, case, contender)
