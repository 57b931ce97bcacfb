"""Image features without gradients: what an adapter costs before and after it is merged."""

from bench.base.towers import SETTINGS
from bench.contests.contenders.towers import INFERENCE
from bench.contests.vision import VisionCase, group, shapes


def cases(device: str, size: str) -> list[VisionCase]:
    found = shapes(device, size, quick=[("B/32", 4)])
    return [VisionCase("inference", key, batch, device, p, SETTINGS[key].ranks()) for key, batch, p in found]


GROUP = group("inference", INFERENCE, cases)


def test_inference(compete, case, contender):
    compete(GROUP, case, contender)
