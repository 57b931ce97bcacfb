"""Other ways to a multi-kernel MMD between domains, as their authors write them, to be measured against.

A peer takes features, a list of `[n, D]` of one domain each, and returns the mean over pairs of domains. `PEERS` says
which of our presets computes the same.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastheads.losses import mmd
from fastheads.reference import PRESETS

DOMAINBED_GAMMAS = PRESETS["domainbed"].numbers

Features = Sequence[Tensor]


def _mean_over_pairs(pair: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Features], Tensor]:
    def mean(features: Features) -> Tensor:
        pairs = list(itertools.combinations(features, 2))
        return torch.stack([pair(x, y) for x, y in pairs]).sum() / len(pairs)

    return mean


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
    assert isinstance(kernels, Tensor)
    return (kernels[:n, :n] + kernels[n:, n:] - kernels[:n, n:] - kernels[n:, :n]).mean()


def keops(x: Tensor, y: Tensor) -> Tensor:
    """DomainBed's formula by KeOps, whose reductions hold no matrix."""
    from pykeops.torch import LazyTensor

    def mean(a: Tensor, b: Tensor) -> Tensor:
        d2 = ((LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])) ** 2).sum(-1)
        k = sum((-gamma * d2).exp() for gamma in DOMAINBED_GAMMAS)
        return k.sum(1).sum() / (len(a) * len(b))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def ours(kernel: str, impl: str = "cpu") -> Callable[[Features], Tensor]:
    def loss(features: Features) -> Tensor:
        ids = torch.repeat_interleave(torch.arange(len(features)), torch.tensor([len(f) for f in features]))
        return mmd(torch.cat(tuple(features)), ids, num_domains=len(features), kernel=kernel, impl=impl)

    return loss


# name: the formula, and which of our presets it is
PEERS: dict[str, tuple[Callable[[Features], Tensor], str]] = {
    "DomainBed": (_mean_over_pairs(domainbed), "domainbed"),
    "TLlib": (_mean_over_pairs(tllib), "adaptive"),
    "DAN snippet": (_mean_over_pairs(dan), "dan"),
    "KeOps": (_mean_over_pairs(keops), "domainbed"),
    "reference": (ours("domainbed", "reference"), "domainbed"),
}


def bytes_needed(name: str, samples: int, width: int, domains: int) -> int:
    """The least that a peer's forward and backward keep at once, all pairs of domains together; 0: not of concern."""
    per_domain = samples // domains
    pairs = domains * (domains - 1) // 2
    if name in ("TLlib", "DAN snippet"):
        kept = 5 if name == "TLlib" else 1  # differences [2n, 2n, D] that their squares' backward needs
        return 4 * kept * pairs * (2 * per_domain) ** 2 * width
    if name == "DomainBed":
        # three blocks a pair, of each its distances and exponentials, and in the backward pass as much again
        return 4 * pairs * 3 * 2 * (len(DOMAINBED_GAMMAS) + 1) * per_domain**2
    return 0


def _available() -> int:
    """Bytes that a program can have without anything being pushed out; Linux."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def refusal(name: str, samples: int, width: int, domains: int, layers: int = 1) -> str:
    """Why a peer does not run here; empty where it does."""
    if name == "KeOps" and (samples > 1024 or layers > 1):
        return "minutes a call; it is measured on 3 × 256 × 768"
    if name == "KeOps" and importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed (`pip install pykeops`)"
    there = _available()
    needed = bytes_needed(name, samples, width, domains)
    if needed > 0.8 * there:
        return f"would keep {needed / 1e9:.0f} GB, of {there / 1e9:.0f} GB that are free"
    return ""


def check_peer(name: str) -> float:
    """A peer's largest difference from ours, loss and gradient, relative to each's largest; two domains, float64."""
    loss, kernel = PEERS[name]
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(12, 6, generator=g, dtype=torch.float64) + 0.3 * s for s in range(2)]
    found = []
    for run in (loss, ours(kernel)):
        leaves = [v.clone().requires_grad_() for v in x]
        value = run(leaves)
        found.append((value.detach().view(1), torch.cat(torch.autograd.grad(value, leaves))))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
