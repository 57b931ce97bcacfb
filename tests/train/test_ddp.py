"""Training on two processes (gloo, CPU): both end with the same weights, from the batches of both."""

import dataclasses
import socket

import pytest
import torch
import torch.multiprocessing as mp
from ranks import train_on_rank

from fastheads.train.loop import Recipe, fit, trainable
from fastheads.train.objectives import METHODS

RECIPE = Recipe(steps=3, per_domain=2, lr=5e-3, gate_lr=5e-2, mmd_weight=0.1, evaluate_every=3, save_every=2)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("features", ["heads", "embedding"])
def test_two_processes_train_one_model(base, problem, tmp_path, features):
    recipe = dataclasses.replace(RECIPE, mmd_features=features)
    mp.spawn(train_on_rank, args=(2, _free_port(), base, problem, recipe, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = tmp_path / "alone"
    fit(base, METHODS["hap"], problem, recipe, out=alone)
    single = {n: p.detach() for n, p in trainable(base).items()}
    assert any(not torch.equal(first[name], single[name]) for name in first)  # the second process's images count
