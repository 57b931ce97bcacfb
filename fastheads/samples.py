"""The samples an MMD is over: one process's own, or its rows among those of all processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastheads import ops, reference

# How each preset's kernels follow from each other, in order of growing gamma: 0 is an exponential of its own, 2 or 10
# that power of the one before. Powers multiply the relative error of an exponential: no chain is longer than 10.
_POWERS = {"adaptive": (0, 2, 2, 0, 2), "dan": (0, 2, 2, 0, 2), "domainbed": (0, 10, 0, 10, 0, 10, 0)}


def bandwidths(features: Tensor, kernel: str | Sequence[float] | Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """gammas `[L, U]` of `reference.kernel_gammas` in the order of `powers` (as `ops.mmd_fused` takes both)."""
    gammas = reference.kernel_gammas(features, kernel)
    if not isinstance(kernel, str):
        return gammas, (0,) * gammas.shape[1]
    return (gammas if kernel == "domainbed" else gammas.flip(-1)), _POWERS[kernel]


@dataclass(frozen=True)
class Rows:
    """Samples `x [L, N, D]` of domains `[N]`; in a group, this process's rows of `y`, from `offset` on."""

    x: Tensor
    domains: Tensor
    y: Tensor | None = None
    y_domains: Tensor | None = None
    offset: int | None = None
    group: Any = None

    @property
    def all(self) -> Tensor:
        """`[L, M, D]`, every process's."""
        return self.x if self.y is None else self.y

    @property
    def all_domains(self) -> Tensor:
        """`[M]`."""
        return self.domains if self.y_domains is None else self.y_domains

    def kernel_sums(self, num_domains: int, gammas: Tensor, powers: tuple[int, ...], impl: str) -> Tensor:
        """K `[L, S, S]` of all samples with all, differentiable in x."""
        K = ops.kernel_sums(
            self.x, self.domains, self.y, self.y_domains, num_domains, gammas, self._offset, powers=powers, impl=impl
        )
        if self.group is None:
            return K
        # Of a pair of different rows this process differentiates its own; K is symmetric, so both count alike.
        return self._global(K, K + K.mT)

    def weighted_sums(
        self, num_domains: int, gammas: Tensor, powers: tuple[int, ...], coeff: Tensor, impl: str
    ) -> Tensor:
        """`Σ coeff ∘ K`, `[L]`, for a symmetric `coeff [S, S]`, differentiable in x."""
        loss = ops.mmd_fused(
            self.x,
            self.domains,
            gammas,
            coeff,
            y=self.y,
            dom_y=self.y_domains,
            row_offset=self._offset,
            powers=powers,
            impl=impl,
        )
        return loss if self.group is None else self._global(loss, loss)

    @property
    def _offset(self) -> int | None:
        return 0 if self.y is None else self.offset

    def _global(self, own: Tensor, differentiable: Tensor) -> Tensor:
        """The sum of `own` over the group, with world size times the gradient of `differentiable`."""
        total = own.detach().clone()
        dist.all_reduce(total, group=self.group)
        scaled = dist.get_world_size(self.group) * differentiable
        return total + (scaled - scaled.detach())


def gather_rows(x: Tensor, domains: Tensor, group: Any) -> Rows:
    """This process's rows among those of all processes of `group`, whose batches may differ in size."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: takes an initialised process group; call torch.distributed.init_process_group first")
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([x.shape[1]], device=x.device), group=group)
    counts = [int(n) for n in sizes]
    longest = max(counts)

    def gather(mine: Tensor) -> Tensor:
        """`[N, ...]` of every process, one after the other."""
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        found = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(found, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)])

    y = gather(x.detach().transpose(0, 1)).transpose(0, 1)
    return Rows(x, domains, y, gather(domains), sum(counts[:rank]), group)
