"""Image features without gradients: what an adapter costs before and after it is merged."""

from __future__ import annotations

from collections.abc import Callable

from bench.contests.contenders.ways import INFERENCE
from bench.contests.contest import Contender
from bench.contests.models import SETTINGS
from bench.contests.vision import VisionCase, group, shapes


def cases(device: str, size: str) -> list[VisionCase]:
    found = shapes(device, size, quick=[("B/32", 4)])
    return [VisionCase("inference", key, batch, device, p, SETTINGS[key].ranks()) for key, batch, p in found]


GROUP = group("inference", INFERENCE, cases)


def test_inference(compete: Callable[..., None], case: VisionCase, contender: Contender) -> None:
    compete(GROUP, case, contender)
