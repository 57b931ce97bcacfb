"""A training step of the image tower at the published ranks: forward and backward, the optimiser left out."""

from __future__ import annotations

from collections.abc import Callable

from bench.contest import Contender
from bench.models import SETTINGS
from bench.vision import VisionCase, group
from bench.ways import TRAINING


def cases(device: str, full: bool) -> list[VisionCase]:
    if device == "cuda":
        shapes = [(key, batch, p) for p in ("amp", "bf16") for key, batch in (("B/16", 256), ("L/14", 128))]
    else:
        shapes = [("B/32", 8, "fp32"), ("B/16", 2, "fp32")] if full else [("tiny", 8, "fp32"), ("B/32", 2, "fp32")]
    return [VisionCase("model step", key, batch, device, p, SETTINGS[key].ranks()) for key, batch, p in shapes]


GROUP = group("model step", TRAINING, cases)


def test_model_step(compete: Callable[..., None], case: VisionCase, contender: Contender) -> None:
    compete(GROUP, case, contender)
