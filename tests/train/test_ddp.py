"""Training on two processes (gloo, CPU): both end with the same weights, from the batches of both."""

import dataclasses

import pytest
import torch
from processes import free_port, on_ranks
from ranks import train_on_rank

from fastheads.train.loop import fit, trainable
from fastheads.train.methods import METHODS
from fastheads.train.recipe import Recipe

RECIPE = Recipe(steps=3, per_domain=4, lr=5e-3, gate_lr=5e-2, mmd_weight=0.1, evaluate_every=3, save_every=2)


@pytest.mark.slow
@pytest.mark.parametrize("features", ["heads", "embedding"])
def test_two_processes_train_one_model(base, problem, tmp_path, features):
    recipe = dataclasses.replace(RECIPE, mmd_features=features)
    on_ranks(train_on_rank, 2, 2, free_port(), base, problem, recipe, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = tmp_path / "alone"
    fit(base, METHODS["hap"], problem, recipe, out=alone)
    single = {n: p.detach() for n, p in trainable(base).items()}
    assert any(not torch.equal(first[name], single[name]) for name in first)  # the second process's images count
