"""A batch spread over processes (gloo, CPU) and micro-batches is one batch: same losses, same adapters."""

import copy
import dataclasses
import os

import pytest
import torch
from processes import free_port, on_ranks
from ranks import train_on_rank
from training import weights

from fastheads.train.loop import fit
from fastheads.train.methods import METHODS
from fastheads.train.recipe import Recipe

STEPS = int(os.environ.get("FASTHEADS_RANKS", 5))  # `make ranks` takes 200, and 4 processes
RECIPE = Recipe(
    steps=STEPS,
    per_domain=4,
    lr=5e-4,
    gate_lr=5e-3,
    mmd_weight=0.1,
    context_weight=0.5,
    evaluate_every=STEPS,
    save_every=STEPS,
    cache=True,
)
SPLITS = {"2 processes, 2 parts": (2, 2)}
if "FASTHEADS_RANKS" in os.environ:
    SPLITS |= {"2 processes": (2, 1), "4 processes": (4, 1), "3 parts": (1, 3)}


@pytest.fixture(scope="module")
def one_process():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "accumulate"), SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("features", ["heads", "embedding"])
def test_a_split_batch_trains_as_the_whole(base, problem, tmp_path, one_process, features, processes, accumulate):
    recipe = dataclasses.replace(RECIPE, mmd_features=features)
    if features not in one_process:
        model = copy.deepcopy(base)
        alone = dataclasses.replace(problem, loaders={})
        one_process[features] = fit(model, METHODS["hap"], alone, recipe)["history"], weights(model)
    history, whole = one_process[features]
    recipe = dataclasses.replace(recipe, accumulate=accumulate)
    if processes > 1:
        on_ranks(train_on_rank, processes, processes, free_port(), base, problem, recipe, tmp_path)
        found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(processes)]
    else:
        run = fit(base, METHODS["hap"], problem, recipe)
        found = [{"history": run["history"], "weights": weights(base)}]
    for each in found:
        for name in ("loss", "cross_entropy", "mmd", "context_kl"):
            assert each["history"][name] == pytest.approx(history[name], rel=1e-4, abs=1e-6)
        assert max(float((each["weights"][name] - whole[name]).abs().max()) for name in whole) < 1e-5
        assert all(torch.equal(each["weights"][name], found[0]["weights"][name]) for name in whole)
