"""The samples an MMD is over: one process's own, or its rows among those of all processes of a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastheads import ops, reference


def bandwidths(
    features: Tensor, kernel: str | Sequence[float] | Tensor, counted: Tensor | None = None
) -> tuple[Tensor, tuple[int, ...]]:
    """gammas `[L, U]` of `reference.kernel_gammas`, and their `powers` (as `ops.mmd_fused` takes both)."""
    gammas = reference.kernel_gammas(features, kernel, counted)
    return gammas, reference.PRESETS[kernel].powers if isinstance(kernel, str) else (0,) * gammas.shape[1]


@dataclass(frozen=True)
class Rows:
    """Samples `x [L, N, D]` of domains `[N]`; in a group, this process's rows of `y`, from `offset` on."""

    x: Tensor
    domains: Tensor
    y: Tensor | None = None
    y_domains: Tensor | None = None
    offset: int | None = None
    group: Any = None

    def renumbered(self, num_domains: int, known: bool) -> tuple[Rows, Tensor]:
        """The same samples with the ids of `renumbered`, and which id each number stands for."""
        ids, which = renumbered(self.all_domains, num_domains, known)
        if self.y is None:
            return dataclasses.replace(self, domains=ids), which
        first = self.offset or 0
        return dataclasses.replace(self, domains=ids[first : first + len(self.domains)], y_domains=ids), which

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


def renumbered(domains: Tensor, num_domains: int, known: bool) -> tuple[Tensor, Tensor]:
    """`domains [N]` with the ids that occur as 0, 1, … in their order, and which id each number stands for.

    known: values may be looked at; else nothing waits for a GPU, and there are as many numbers as samples; some
    stand for nothing. An id out of range is -1.
    """
    if known:
        which, ids = torch.unique(domains, return_inverse=True)
        return ids, which
    counted = reference.is_counted(domains, num_domains)
    ordered, order = torch.where(counted, domains, num_domains).sort()
    number = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
    ids = torch.empty_like(number).scatter_(0, order, number)
    which = torch.zeros_like(number).scatter_(0, number, ordered.clamp_max(num_domains - 1))
    return torch.where(counted, ids, -1), which


def gather_rows(x: Tensor, domains: Tensor, group: Any) -> Rows:
    """This process's rows among those of all processes of `group`, whose batches may differ in size.

    The sizes, which the host must know, go over the group's CPU backend where it has one ("cpu:gloo,cuda:nccl", the
    default of `init_process_group`); over a GPU's alone they wait for it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: takes an initialised process group; call torch.distributed.init_process_group first")
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    host = "cpu" if "cpu:" in dist.get_backend_config(group) else x.device
    own = torch.full((1,), x.shape[1], dtype=torch.int64, device=host)
    sizes = [torch.zeros_like(own) for _ in range(world)]
    dist.all_gather(sizes, own, group=group)
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
