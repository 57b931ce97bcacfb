"""What a process of a test of `mmd(..., group=)` runs: importable by name, so that a spawned process finds it."""

import os

import torch
import torch.distributed as dist
from torch import nn

import fastheads


def build():
    """A model small enough to compare gradients of, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def batch(case):
    """Samples `[N, 6]`, domains and the rows each rank holds."""
    torch.manual_seed(1)
    sizes = case["sizes"]
    n = sum(sizes)
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return torch.randn(n, 6).double(), torch.randint(0, 3, (n,)), list(zip(ends[:-1], ends[1:], strict=True))


def loss_of(features, domains, case, group=None):
    options = dict(kernel=case["kernel"], num_domains=3, group=group, impl=case["impl"])
    if case["reduction"] == "mean":
        return fastheads.mmd(features, domains, **options)
    pairs = fastheads.mmd(features, domains, reduction="none", **options)
    return (pairs * torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]]).double()).nansum()


def mmd_on_rank(rank, world, port, cases, out):
    torch.set_num_threads(1)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for i, case in enumerate(cases):
        model = nn.parallel.DistributedDataParallel(build())
        x, domains, rows = batch(case)
        own = slice(*rows[rank])
        loss = loss_of(model(x[own]), domains[own], case, dist.group.WORLD)
        loss.backward()
        torch.save({"loss": loss.detach(), "grads": [p.grad for p in model.parameters()]}, out / f"{i}-{rank}.pt")
    dist.destroy_process_group()
