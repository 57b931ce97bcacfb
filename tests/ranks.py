"""What a process of a distributed test runs: importable by name, so that a spawned process finds it."""

import os

import torch

from fastheads.train.loop import fit, trainable
from fastheads.train.objectives import METHODS


def train_on_rank(rank, world, port, base, problem, recipe, out):
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in own.items()} | {"ACCELERATE_USE_CPU": "true"})
    fit(base, METHODS["hap"], problem, recipe, out=out)
    torch.save({n: p.detach() for n, p in trainable(base).items()}, out / f"rank{rank}.pt")
