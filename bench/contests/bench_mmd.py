"""The MMD between domains: loss and gradient, ours beside the ways that others publish."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.contests.contenders.mmd import PEERS, refusal
from bench.contests.contest import Contender, Group, Trial, refusals, training_trial
from fastheads.losses import mmd

Loss = Callable[[Tensor, Tensor, "MMDCase"], Tensor]  # x [L, N, D], domain ids [N] → a scalar
KERNELS = {"domainbed": "DomainBed's", "adaptive": "TLlib's", "dan": "the DAN snippet's"}


@dataclass(frozen=True)
class MMDCase:
    """domains of `each` samples, features of `width`, `layers` of them at once; kernel: a preset of `fastheads.mmd`."""

    layers: int
    domains: int
    each: int
    width: int
    kernel: str
    device: str
    draw: int = 0
    exact: bool = False

    @property
    def name(self) -> str:
        layers = f"{self.layers} layers × " if self.layers > 1 else ""
        return f"{layers}{self.domains} × {self.each} × {self.width}, {KERNELS[self.kernel]} kernels"

    def small(self, draw: int) -> "MMDCase":
        return replace(self, layers=min(self.layers, 2), each=min(self.each, 24), draw=draw)

    def extra(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("layers", "domains", "each", "width", "kernel")}

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Features `[L, N, D]` of the size that ViT features have, the domains a little apart, and their ids `[N]`."""
        g = torch.Generator().manual_seed(self.draw)
        ids = torch.arange(self.domains).repeat_interleave(self.each)
        x = torch.randn(self.layers, len(ids), self.width, generator=g) + 0.1 * ids.unsqueeze(1)
        x = (x / self.width**0.5).to(self.device)
        return (x.double() if self.exact else x).requires_grad_(), ids.to(self.device)


def cases(device: str, size: str) -> list[MMDCase]:
    if size == "rehearsal":
        return [MMDCase(1, 2, 4, 8, kernel, device) for kernel in KERNELS]
    paper = [MMDCase(12, 3, 12, 768, kernel, device) for kernel in KERNELS]
    middle, large = (MMDCase(1, 3, each, 768, "domainbed", device) for each in (256, 2048))
    largest = [MMDCase(1, 2, 8192, 768, "domainbed", device)] if device == "cuda" else []
    if device == "cuda" or size == "full":  # the largest is nothing for a CPU
        return [*paper, middle, large, *largest]
    one_layer = [replace(case, layers=1) for case in paper[1:]]
    return [paper[0], *one_layer, replace(middle, each=128)]


def trial(case: MMDCase, loss: Loss) -> Trial:
    x, ids = case.tensors()
    return training_trial(lambda: loss(x, ids, case), None, lambda: {"x": [x]}, lambda: (x, ids), result="loss")


def ours(x: Tensor, ids: Tensor, case: MMDCase, impl: str) -> Tensor:
    return mmd(x, ids, num_domains=case.domains, kernel=case.kernel, impl=impl)


def peers(x: Tensor, ids: Tensor, case: MMDCase, name: str) -> Tensor:
    """The mean over pairs of domains, layer by layer: none of the peers knows layers."""
    pairs = itertools.chain.from_iterable(itertools.combinations(layer.chunk(case.domains), 2) for layer in x.unbind(0))
    return torch.stack([PEERS[name].formula(*pair) for pair in pairs]).mean()


@functools.cache
def _compiled(domains: int, kernel: str) -> Any:
    def loss(x: Tensor, ids: Tensor) -> Tensor:
        return mmd(x, ids, num_domains=domains, kernel=kernel, impl="reference")

    return torch.compile(loss)


def _ours(name: str, words: str) -> Contender:
    def build(case: MMDCase) -> Trial:
        made = trial(case, functools.partial(ours, impl=name))
        with refusals():
            made.run()
        return made

    return Contender(name, words, build, "together", ours=True)


def _peer(name: str) -> Contender:
    build, own = functools.partial(trial, loss=functools.partial(peers, name=name)), {"slow_start": name == "KeOps"}
    own["why_not"] = lambda case: refusal(name, case.layers, case.domains, case.each, case.width)
    own["applies"] = lambda case: case.kernel == PEERS[name].kernel
    return Contender(name, name, build, "pairs", **own)


COMPILED = functools.partial(trial, loss=lambda x, ids, case: _compiled(case.domains, case.kernel)(x, ids))
CONTENDERS = (
    _ours("auto", "fastheads, auto"),
    _ours("triton", "fastheads, Triton"),
    _ours("cpu", "fastheads, cpu"),
    _ours("reference", "fastheads, reference"),
    *map(_peer, PEERS),
    Contender("compiled", "torch.compile of the plain formula", COMPILED, "together", slow_start=True),
)


def pair_by_pair(x: Tensor, ids: Tensor, case: MMDCase) -> Tensor:
    """The peers' mathematics: every pair of domains on its own, bandwidths too, which we take over all domains."""
    losses = []
    for pair in itertools.combinations(range(case.domains), 2):
        rows = torch.isin(ids, torch.tensor(pair, device=ids.device))
        own = (ids[rows] == pair[1]).long()
        losses.append(mmd(x[:, rows], own, num_domains=2, kernel=case.kernel, impl="reference"))
    return torch.stack(losses).mean()


def standard(case: MMDCase, maths: str) -> Trial:
    """The formula: `fastheads.reference`, or of the peers' mathematics in float32 the peer whose kernels they are."""
    if maths == "together":
        return trial(case, functools.partial(ours, impl="reference"))
    own = next(name for name, peer in PEERS.items() if peer.kernel == case.kernel)
    return trial(case, pair_by_pair if case.exact else functools.partial(peers, name=own))


GROUP = Group("mmd", "auto", CONTENDERS, cases, standard, draws=8)


def test_mmd(compete, case, contender):
    compete(GROUP, case, contender)
