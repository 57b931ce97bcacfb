"""The attention module, from its LayerNorm to the residual: forward and backward, at both published ranks."""

from __future__ import annotations

from collections.abc import Callable

from bench.contest import Contender
from bench.vision import VisionCase, group
from bench.ways import TRAINING


def cases(device: str, full: bool) -> list[VisionCase]:
    if device == "cuda":
        shapes = [(key, batch, p) for p in ("amp", "bf16") for key, batch in (("B/16", 256), ("L/14", 128))]
    else:
        shapes = [("B/32", 8, "fp32"), ("B/16", 2, "fp32")] if full else [("B/32", 8, "fp32")]
    ranks = (2, 8) if full or device == "cuda" else (8,)
    return [VisionCase("block", key, batch, device, p, (rank,)) for key, batch, p in shapes for rank in ranks]


GROUP = group("block", TRAINING, cases)


def test_block(compete: Callable[..., None], case: VisionCase, contender: Contender) -> None:
    compete(GROUP, case, contender)
