"""What a process of a test of the MMD runs: importable by name, so that a spawned process finds it."""

import os

import standins
import torch
import torch.distributed as dist
from mmd_formulas import labels, randn
from torch import nn
from torch.utils.data import DataLoader, Dataset

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
    if case.get("weighted"):
        options["pair_weights"] = torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]])
    if case["reduction"] == "mean":
        return fastheads.mmd(features, domains, **options)
    pairs = fastheads.mmd(features, domains, reduction="none", **options)
    return (pairs * torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]]).double()).nansum()


def build_patched():
    """A patched CLIP of a few layers in float64, its deltas and gates not at their start."""
    return standins.patched("clip", fastheads.HeadConfig(), dtype=torch.float64)


def head_loss(model, own, group=None):
    """`head_mmd` of the rows `own` of a batch of 7; model may be wrapped."""
    images, domains = standins.images(7, seed=3).double(), torch.tensor([0, 1, 0, 1, 1, 0, 1])
    inner = getattr(model, "module", model)
    with fastheads.capture_heads(inner) as heads:
        features = model(images[own])
    features = features[0] if isinstance(features, tuple) else features
    # 0 × features: DDP wants every parameter it waits for in the graph
    loss = fastheads.head_mmd(heads, domains[own], num_domains=2, kernel="domainbed", group=group)
    return loss + 0.0 * features.sum()


def join(rank, world, port):
    torch.set_num_threads(1)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    dist.init_process_group("gloo", rank=rank, world_size=world)


def head_mmd_on_rank(rank, world, port, out):
    join(rank, world, port)
    model = nn.parallel.DistributedDataParallel(build_patched(), find_unused_parameters=True)
    loss = head_loss(model, slice(0, 2) if rank == 0 else slice(2, 7), dist.group.WORLD)
    loss.backward()
    grads = [theta.grad for theta in fastheads.gate_parameters(model.module)]
    torch.save({"loss": loss.detach(), "grads": grads}, out / f"{rank}.pt")
    dist.destroy_process_group()


def mmd_on_rank(rank, world, port, cases, out):
    join(rank, world, port)
    for i, case in enumerate(cases):
        model = nn.parallel.DistributedDataParallel(build())
        x, domains, rows = batch(case)
        own = slice(*rows[rank])
        loss = loss_of(model(x[own]), domains[own], case, dist.group.WORLD)
        loss.backward()
        torch.save({"loss": loss.detach(), "grads": [p.grad for p in model.parameters()]}, out / f"{i}-{rank}.pt")
    dist.destroy_process_group()


class _InWorker(Dataset):
    """Threads that torch has in the worker, those that an MMD begins there, and the MMD of each item's samples."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        there = os.listdir("/proc/self/task")  # Linux lists the threads of this process
        loss = fastheads.mmd(randn(80, 6, seed=i), labels(40, 40))
        return torch.get_num_threads(), len(os.listdir("/proc/self/task")) - len(there), loss


def in_a_loaders_worker(rank):
    """The MMD in a data loader's worker is the process's own, on one thread."""
    torch.set_num_threads(2)
    # with a parallel region before the fork
    want = [fastheads.mmd(randn(80, 6, seed=i), labels(40, 40)) for i in range(2)]
    found = list(DataLoader(_InWorker(), batch_size=None, num_workers=1, timeout=60))
    assert found[0][1] == 0  # later the loader begins threads of its own, to hand tensors over
    for (n, _, loss), expected in zip(found, want, strict=True):
        assert n == 1
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
