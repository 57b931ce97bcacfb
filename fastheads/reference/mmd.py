"""Kernel sums, and the MMD made of them. Differentiable by autograd; at least float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastheads.reference.precision import autocast_off, centred, transformed, widened

BLOCK = 2**24  # pairs of samples of all layers at a time in `kernel_sums`: 64 MB in float32


def in_domain(domains: Tensor, num_domains: int) -> Tensor:
    """`[N, S]`, True where sample i is of domain s; a sample with an id out of range is of none."""
    return domains.unsqueeze(-1) == torch.arange(num_domains, device=domains.device)


def is_counted(domains: Tensor, num_domains: int) -> Tensor:
    """`[N]`, True for samples with an id in 0 … S-1: what the losses are of. The others count nowhere."""
    return (domains >= 0) & (domains < num_domains)


def _centred_together(x: Tensor, y: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x and y, at least float32, minus one constant near the mean of both. counted: of x's rows, then y's."""
    n = x.shape[-2]
    both = centred(torch.cat((widened(x), widened(y)), -2), counted)
    return both[..., :n, :], both[..., n:, :]


def _squared_distances(x: Tensor, y: Tensor, row_offset: int | None) -> Tensor:
    d2 = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2) - 2 * x @ y.mT
    d2 = d2.clamp_min(0)
    if row_offset is not None:
        same = torch.arange(x.shape[-2], device=x.device).unsqueeze(1) + row_offset
        d2 = d2.masked_fill(same == torch.arange(y.shape[-2], device=x.device), 0)
    return d2


def squared_distances(x: Tensor, y: Tensor, row_offset: int | None = None) -> Tensor:
    """`[L, N, M]` of `‖x_i − y_j‖²`, at least float32, never negative; the diagonal of shared rows exactly zero."""
    with autocast_off(x):
        return _squared_distances(*_centred_together(x, y), row_offset)


def kernel_sums(
    x: Tensor,
    dom_x: Tensor,
    y: Tensor,
    dom_y: Tensor,
    num_domains: int,
    gammas: Tensor,
    row_offset: int | None = None,
) -> Tensor:
    """`K[l, a, b] = Σ_{i∈a, j∈b} Σ_u exp(−γ_lu ‖x_li − y_lj‖²)`: all that any MMD needs.

    Args:
        x, y: `[L, N, D]`, `[L, M, D]`; dom_x, dom_y: int64 `[N]`, `[M]` with values in 0 … S-1; samples with another
            id count nowhere, and have no gradient.
        num_domains: S.
        gammas: `[L, U]`.
        row_offset: x's row i is y's row `i + row_offset` (their distance is then exactly zero); None: unrelated rows.

    Returns `[L, S, S]`, at least float32. Memory O(L·(N + M)·D): rows go by in blocks, which a backward pass computes
    again.
    """

    def block(x: Tensor, y: Tensor, dom_x: Tensor, row_offset: int | None) -> Tensor:
        with autocast_off(x):
            d2 = _squared_distances(x, y, row_offset)
            kernel = torch.zeros_like(d2)
            for gamma in gammas.to(d2.dtype).unbind(-1):
                kernel = kernel + torch.exp(-gamma.view(-1, 1, 1) * d2)
            in_x = in_domain(dom_x, num_domains).to(d2.dtype)
            in_y = in_domain(dom_y, num_domains).to(d2.dtype)
            return in_x.T @ kernel @ in_y

    n = x.shape[-2]
    x, y = _centred_together(x, y, is_counted(torch.cat((dom_x, dom_y)), num_domains))
    rows = max(1, BLOCK // max(1, y[..., 0].numel()))
    if n <= rows:
        return block(x, y, dom_x, row_offset)
    sums = []
    for i in range(0, n, rows):
        offset = None if row_offset is None else row_offset + i
        part = (x[..., i : i + rows, :], y, dom_x[i : i + rows], offset)
        again = torch.is_grad_enabled() and not transformed()
        sums.append(checkpoint(block, *part, use_reentrant=False) if again else block(*part))
    return torch.stack(sums).sum(0)


def mmd_from_sums(K: Tensor, counts: Tensor, num_kernels: int, estimator: str) -> Tensor:
    """MMD² of every pair of domains, `[L, S, S]`, from the kernel sums of one sample set with itself.

    Args:
        K: `[L, S, S]`; counts: `[S]` samples per domain; num_kernels: U.
        estimator: `"biased"`: `K_aa/n_a² + K_bb/n_b² − 2 K_ab/(n_a n_b)`; `"unbiased"`: the diagonal `n_a·U` taken
            out of K_aa, and `n_a (n_a − 1)` below.

    The diagonal is zero; pairs with an absent domain (unbiased: or a domain of one sample) are NaN.
    """
    n = counts.to(K.dtype)
    within = K.diagonal(dim1=-2, dim2=-1)  # [L, S]
    if estimator == "biased":
        present = counts > 0
        within = within / n.clamp_min(1).square()
    elif estimator == "unbiased":
        present = counts > 1
        within = (within - n * num_kernels) / (n * (n - 1)).clamp_min(1)
    else:
        raise ValueError(f'estimator: got {estimator!r}; takes "biased" or "unbiased"')
    across = (K + K.mT) / (n.unsqueeze(-1) * n).clamp_min(1)  # 2 K_ab, symmetric also in rounding
    pairs = within.unsqueeze(-1) + within.unsqueeze(-2) - across
    diagonal = torch.eye(len(counts), dtype=torch.bool, device=K.device)
    pairs = pairs.masked_fill(diagonal, 0.0)
    return pairs.masked_fill(~(present.unsqueeze(-1) & present), float("nan"))


def mmd_weights(
    counts: Tensor, num_kernels: int, estimator: str, pair_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`C [S, S]`, symmetric, and c, so that the mean of `mmd_from_sums` over pairs of present domains is `Σ C ∘ K + c`.

    pair_weights: `[S, S]`, symmetric: the mean is weighted by them. Without a pair of present domains C and c are 0.
    """
    n = counts.double()
    present = n > (1 if estimator == "unbiased" else 0)
    pairs = (present.unsqueeze(1) & present).double().fill_diagonal_(0)
    if pair_weights is not None:
        pairs = pairs * pair_weights.to(pairs)
    total = pairs.sum() / 2
    pairs = pairs / torch.where(total > 0, total, 1)
    own = pairs.sum(1)  # the weight of the pairs that a domain is in
    if estimator == "biased":
        within, constant = own / n.clamp_min(1).square(), own.new_zeros(())
    else:
        within = own / (n * (n - 1)).clamp_min(1)
        constant = -num_kernels * (within * n).sum()
    return torch.diag(within) - pairs / (n.unsqueeze(1) * n).clamp_min(1), constant
