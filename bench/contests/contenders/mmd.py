"""Other ways to a multi-kernel MMD between two domains, as their authors write them, to be measured against.

A formula takes the features of two domains, `[n, D]` each. `PEERS` says which of our presets computes the same.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.base.memory import available_bytes
from fastheads.reference import PRESETS

DOMAINBED_GAMMAS = PRESETS["domainbed"].numbers


def domainbed(x: Tensor, y: Tensor) -> Tensor:
    """DomainBed's `MMD.mmd`, in its own operations (domainbed/algorithms.py, AbstractMMD)."""

    def squared(a: Tensor, b: Tensor) -> Tensor:
        a2, b2 = a.pow(2).sum(-1, keepdim=True), b.pow(2).sum(-1, keepdim=True)
        return torch.addmm(b2.mT, a, b.mT, alpha=-2).add_(a2).clamp_min_(1e-30)

    def gaussian(a: Tensor, b: Tensor) -> Tensor:
        d2 = squared(a, b)
        k = torch.zeros_like(d2)
        for gamma in DOMAINBED_GAMMAS:
            k.add_(torch.exp(d2.mul(-gamma)))
        return k

    return gaussian(x, x).mean() + gaussian(y, y).mean() - 2 * gaussian(x, y).mean()


def tllib(x: Tensor, y: Tensor) -> Tensor:
    """TLlib's `MultipleKernelMaximumMeanDiscrepancy` (tllib/alignment/dan.py), less its constant; equal sizes."""
    n, both = len(x), torch.cat((x, y))
    index, kernel = x.new_zeros(2 * n, 2 * n), x.new_zeros(2 * n, 2 * n)
    index[:n, :n] = index[n:, n:] = 1 / (n * (n - 1))
    index[:n, n:] = index[n:, :n] = -1 / (n * n)
    index.fill_diagonal_(0)
    for power in range(-3, 2):  # each of its kernels takes the distances for itself
        d2 = ((both.unsqueeze(0) - both.unsqueeze(1)) ** 2).sum(2)
        kernel = kernel + torch.exp(-d2 / (2 * 2.0**power * d2.detach().mean()))
    return (kernel * index).sum()


def dan(x: Tensor, y: Tensor) -> Tensor:
    """The snippet that goes round as DAN's MMD; equal sizes."""
    both = torch.cat((x, y))
    n, size = len(x), len(both)
    one = both.unsqueeze(0).expand(size, size, both.shape[1])
    other = both.unsqueeze(1).expand(size, size, both.shape[1])
    d2 = ((one - other) ** 2).sum(2)
    bandwidth = d2.detach().sum() / (size**2 - size) / 4
    kernels = sum(torch.exp(-d2 / (bandwidth * 2**i)) for i in range(5))
    return (kernels[:n, :n] + kernels[n:, n:] - kernels[:n, n:] - kernels[n:, :n]).mean()


def keops(x: Tensor, y: Tensor) -> Tensor:
    """DomainBed's formula by KeOps, whose reductions hold no matrix."""
    from pykeops.torch import LazyTensor

    def mean(a: Tensor, b: Tensor) -> Tensor:
        d2 = ((LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])) ** 2).sum(-1)
        k = sum((-gamma * d2).exp() for gamma in DOMAINBED_GAMMAS)
        return k.sum(1).sum() / (len(a) * len(b))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


class Peer(NamedTuple):
    """kernel: our preset that is the same. kept: the least bytes that a pair, `[n, D]` each, keeps at once."""

    formula: Callable[[Tensor, Tensor], Tensor]
    kernel: str
    kept: Callable[[int, int], int] = lambda n, D: 0  # not of concern


# DomainBed keeps three blocks, of each its distances and exponentials, and in the backward pass as much again; the
# other two differences, [2n, 2n, D], that their squares' backward needs.
PEERS = {
    "DomainBed": Peer(domainbed, "domainbed", lambda n, D: 4 * 3 * 2 * (len(DOMAINBED_GAMMAS) + 1) * n**2),
    "TLlib": Peer(tllib, "adaptive", lambda n, D: 5 * 4 * (2 * n) ** 2 * D),
    "DAN snippet": Peer(dan, "dan", lambda n, D: 4 * (2 * n) ** 2 * D),
    "KeOps": Peer(keops, "domainbed"),
}


def refusal(name: str, layers: int, domains: int, each: int, width: int) -> str:
    """Why a peer does not run here; empty where it does."""
    if name == "KeOps" and (domains * each > 1024 or layers > 1):
        return "minutes a call; it is measured on 3 × 256 × 768"
    if name == "KeOps" and importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed (`pip install pykeops`)"
    needed, there = domains * (domains - 1) // 2 * PEERS[name].kept(each, width), available_bytes()
    if needed > 0.8 * there:
        return f"would keep {needed / 1e9:.0f} GB, of {there / 1e9:.0f} GB that are free"
    return ""
