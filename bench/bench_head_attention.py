"""The attention module and the tower's training step, ours beside the peers of `bench.variants`, for pytest-benchmark.

    make bench RESULT=bench/results/<chip>.json

On a GPU in bfloat16 under autocast, ViT-B/16 at batch 256 and ViT-L/14 at 128; on a CPU tiny shapes, as a dry run.
Ratios of medians within a group are what counts. `python -m bench.gpu` measures the same without pytest-benchmark, the
variants taking turns, with memory and targets.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.memory import held_bytes
from bench.peers import blocks_of
from bench.variants import SETTINGS, VARIANTS, UnavailableError, build, module_step, tower_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = "amp" if DEVICE == "cuda" else "fp32"
KEYS = ("B/16", "L/14") if DEVICE == "cuda" else ("tiny",)


def built(name: str, key: str, ranks: list[int]) -> Any:
    try:
        return build(name, SETTINGS[key], ranks, DEVICE, PRECISION)
    except UnavailableError as error:
        pytest.skip(f"{name}: {error}")


def timed(benchmark: Any, run: Callable[[], Any]) -> None:
    def synchronised() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=10, warmup_rounds=3)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("key", KEYS)
def test_module(benchmark: Any, key: str, rank: int, name: str) -> None:
    """Forward and backward, from the block's LayerNorm to the residual."""
    benchmark.group = f"{SETTINGS[key].name}, rank {rank}: attention module"
    step = module_step(blocks_of(built(name, key, [rank]))[0], SETTINGS[key], DEVICE, PRECISION)
    timed(benchmark, step.both)
    benchmark.extra_info["saved_bytes"] = held_bytes(step.forward, step.known)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("key", KEYS)
def test_training_step(benchmark: Any, key: str, name: str) -> None:
    """Forward and backward of the whole tower at the published ranks, without the optimiser."""
    benchmark.group = f"{SETTINGS[key].name}: training step"
    ranks = SETTINGS[key].shape.ranks()
    timed(benchmark, tower_step(built(name, key, ranks), SETTINGS[key], DEVICE, PRECISION).both)
