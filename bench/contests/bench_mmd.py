"""The MMD between domains: loss and gradient, ours beside the ways that others publish."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.contests.contenders.mmd_peers import PEERS, Features, refusal
from bench.contests.contest import Contender, Group, NotRunError, Trial
from fastheads.losses import mmd

Loss = Callable[[Tensor, Tensor, "MMDCase"], Tensor]  # x [L, N, D], domain ids [N] → a scalar
KERNELS = {"domainbed": "DomainBed's", "adaptive": "TLlib's", "dan": "the DAN snippet's"}
FORMULAS = {"domainbed": "DomainBed", "adaptive": "TLlib", "dan": "DAN snippet"}  # a kernel's own peer


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

    def small(self, draw: int) -> MMDCase:
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
    if device == "cuda" or size == "full":
        return [*paper, middle, large]
    one_layer = [replace(case, layers=1) for case in paper[1:]]
    return [paper[0], *one_layer, replace(middle, each=128)]


def ours(x: Tensor, ids: Tensor, case: MMDCase, impl: str) -> Tensor:
    return mmd(x, ids, num_domains=case.domains, kernel=case.kernel, impl=impl)


def layer_by_layer(x: Tensor, ids: Tensor, case: MMDCase, formula: Callable[[Features], Tensor]) -> Tensor:
    """None of the peers knows layers."""
    return torch.stack([formula(layer.chunk(case.domains)) for layer in x.unbind(0)]).mean()


@functools.cache
def _compiled(domains: int, kernel: str) -> Any:
    def loss(x: Tensor, ids: Tensor) -> Tensor:
        return mmd(x, ids, num_domains=domains, kernel=kernel, impl="reference")

    return torch.compile(loss)


def compiled(x: Tensor, ids: Tensor, case: MMDCase) -> Tensor:
    return _compiled(case.domains, case.kernel)(x, ids)


def trial(case: MMDCase, loss: Loss) -> Trial:
    x, ids = case.tensors()

    def forward() -> Tensor:
        return loss(x, ids, case)

    def outputs() -> dict[str, Tensor]:
        value = forward()
        (dx,) = torch.autograd.grad(value, [x])
        return {"loss": value.detach(), "dx": dx}

    return Trial(lambda: torch.autograd.grad(forward(), [x]), outputs, forward, lambda: (x, ids))


def _ours(case: MMDCase, impl: str) -> Trial:
    made = trial(case, functools.partial(ours, impl=impl))
    try:
        made.run()
    except ValueError as error:
        raise NotRunError(str(error).rpartition(": it ")[2].removesuffix("; takes 'auto'")) from error
    return made


def _peer(case: MMDCase, name: str) -> Trial:
    reason = refusal(name, case.domains * case.each, case.width, case.domains, case.layers)
    if reason:
        raise NotRunError(reason)
    return trial(case, functools.partial(layer_by_layer, formula=PEERS[name][0]))


def _same_kernel(case: MMDCase, name: str) -> bool:
    return PEERS[name][1] == case.kernel


def pair_by_pair(x: Tensor, ids: Tensor, case: MMDCase) -> Tensor:
    """The peers' mathematics: every pair of domains on its own, bandwidths too, which we take over all domains."""
    pairs = list(itertools.combinations(range(case.domains), 2))
    losses = []
    for pair in pairs:
        rows = torch.isin(ids, torch.tensor(pair, device=ids.device))
        own = (ids[rows] == pair[1]).long()
        losses.append(mmd(x[:, rows], own, num_domains=2, kernel=case.kernel, impl="reference"))
    return torch.stack(losses).mean()


def exact(case: MMDCase, maths: str) -> dict[str, Tensor]:
    loss = functools.partial(ours, impl="reference") if maths == "together" else pair_by_pair
    return trial(replace(case, exact=True), loss).outputs()


def plain(case: MMDCase, maths: str) -> dict[str, Tensor]:
    """The formula in float32: `fastheads.reference`, or for the peers' mathematics the peer whose kernels they are."""
    if maths == "together":
        return trial(case, functools.partial(ours, impl="reference")).outputs()
    return _peer(case, FORMULAS[case.kernel]).outputs()


OURS = {"auto": "fastheads, auto", "triton": "fastheads, Triton", "cpu": "fastheads, cpu"}
OURS["reference"] = "fastheads, reference"
GROUP = Group(
    "mmd",
    "auto",
    (
        *(Contender(n, words, functools.partial(_ours, impl=n), "together", ours=True) for n, words in OURS.items()),
        *(
            Contender(
                name,
                name,
                functools.partial(_peer, name=name),
                "pairs",
                slow_start=name == "KeOps",
                applies=functools.partial(_same_kernel, name=name),
            )
            for name in PEERS
            if name != "reference"
        ),
        Contender(
            "compiled", "torch.compile of the plain formula", lambda c: trial(c, compiled), "together", slow_start=True
        ),
    ),
    cases,
    exact,
    plain,
    draws=8,
)


def test_mmd(compete: Callable[..., None], case: MMDCase, contender: Contender) -> None:
    compete(GROUP, case, contender)
