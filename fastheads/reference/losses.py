"""Kernel sums, the MMD made of them, and CAR-FT's context KL. Differentiable by autograd; at least float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastheads.reference.precision import autocast_off, transformed, widened

BLOCK = 2**24  # pairs of samples of all layers at a time in `kernel_sums`: 64 MB in float32


class Preset(NamedTuple):
    """A convention of the MMD under a name.

    of: what the bandwidths are of: "nothing" (numbers are the gammas), "mean square" (gamma = 1 / (2 number σ²)), or
    "mean square of pairs" (gamma = 1 / (number bw)); see `kernel_gammas`. numbers: in order of growing gamma.
    estimator: its own. powers: how each kernel follows from the one before: 0 is an exponential of its own, 2 or 10
    that power of the one before. Powers multiply the relative error of an exponential: no chain is longer than 10.
    """

    of: str
    numbers: tuple[float, ...]
    estimator: str
    powers: tuple[int, ...]


PRESETS = {
    "domainbed": Preset("nothing", (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3), "biased", (0, 10, 0, 10, 0, 10, 0)),
    "adaptive": Preset("mean square", (2.0, 1.0, 0.5, 0.25, 0.125), "unbiased", (0, 2, 2, 0, 2)),  # TLlib
    "dan": Preset("mean square of pairs", (16.0, 8.0, 4.0, 2.0, 1.0), "biased", (0, 2, 2, 0, 2)),  # the common snippet
}


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """`[U]` in like's dtype on its device, by fills: a tensor made of a list is copied from the host, which waits."""
    return torch.stack([like.new_full((), value) for value in values])


def in_domain(domains: Tensor, num_domains: int) -> Tensor:
    """`[N, S]`, True where sample i is of domain s; a sample with an id out of range is of none."""
    return domains.unsqueeze(-1) == torch.arange(num_domains, device=domains.device)


def is_counted(domains: Tensor, num_domains: int) -> Tensor:
    """`[N]`, True for samples with an id in 0 … S-1: what the losses are of. The others count nowhere."""
    return (domains >= 0) & (domains < num_domains)


def centred(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """x `[..., N, D]` minus a constant near its mean: distances stay, rounding does not grow with the offset.

    The first row goes first, so that identical rows become exactly zero. counted: `[N]`; rows that are not have no part
    in the mean, and become zero, whatever they held.
    """
    if not x.shape[-2]:
        return x
    with torch.no_grad():
        if counted is None:
            first = x[..., :1, :]
            shift = (x - first).mean(-2, keepdim=True)
        else:
            first = x.index_select(-2, counted.to(torch.uint8).argmax(-1, keepdim=True))
            inside = (x - first).masked_fill(~counted.unsqueeze(-1), 0)
            shift = inside.sum(-2, keepdim=True) / counted.sum().clamp_min(1)
    centred = (x - first) - shift
    return centred if counted is None else centred.masked_fill(~counted.unsqueeze(-1), 0)


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


def kernel_gammas(features: Tensor, kernel: str | Sequence[float] | Tensor, counted: Tensor | None = None) -> Tensor:
    """The bandwidths γ `[L, U]` of a preset, detached, for features `[L, N, D]`, at least float32.

    counted: `[N]`, the samples they are taken over; None: all.

    - `"domainbed"`: 1e-3 … 1e3, seven values.
    - `"adaptive"` (TLlib): `γ_u = 1 / (2 α_u σ²)`, α from 2 down to 1/8; σ² the mean squared distance over all pairs of
      all samples, the zero diagonal included.
    - `"dan"` (the common snippet): `γ_i = 1 / (bw·2^i)`, i = 4 … 0, `bw = Σd² / (n² − n) / 4`.
    - numbers: these, for every layer.

    `Σd² = 2n Σ‖x_i − x̄‖²` needs no pass over pairs. It is bounded below by what the features' own rounding resolves, so
    that identical features give a finite kernel.
    """
    with torch.no_grad(), autocast_off(features):
        x = widened(features.detach())
        L, n, _ = x.shape
        if isinstance(kernel, Tensor):
            return kernel.detach().to(x).reshape(1, -1).expand(L, -1)
        if not isinstance(kernel, str):
            return constants(kernel, x).expand(L, -1)
        if kernel not in PRESETS:
            takes = ", ".join(map(repr, PRESETS))
            raise ValueError(f"kernel: got {kernel!r}; takes {takes} or a sequence of gammas")
        preset = PRESETS[kernel]
        numbers = constants(preset.numbers, x)
        if preset.of == "nothing":
            return numbers.expand(L, -1)
        size: Tensor | int = max(n, 1)
        if counted is not None:
            x = x.masked_fill(~counted.unsqueeze(-1), 0)
            size = counted.sum().clamp_min(1).to(x.dtype)
        eps = torch.finfo(x.dtype).eps
        floor = eps * eps * x.square().sum(-1).sum(-1) / size + torch.finfo(torch.float32).tiny * 1e6
        mean_square = torch.maximum(2 / size * centred(x, counted).square().sum((-2, -1)), floor)  # [L]
        if preset.of == "mean square":
            return 1 / (2 * mean_square.unsqueeze(-1) * numbers)
        pairs = size / (size - 1).clamp_min(1) if isinstance(size, Tensor) else size / max(size - 1, 1)
        return 1 / (mean_square.unsqueeze(-1) * pairs / 4 * numbers)


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


def context_kl(
    features: Tensor, teacher_features: Tensor, context_weights: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """CAR-FT's loss: `KL( p_ctx of the original encoder ‖ p_ctx of the tuned one )`, mean over the batch.

        p_ctx(x) = softmax(logit_scale · f(x) W_ctxᵀ), f L2-normalised

    Args:
        features, teacher_features: `[B, E]` of the tuned and of the original image encoder; no gradient to the latter.
        context_weights: `[C, E]`, normalised.
        logit_scale: the factor itself (100 for CLIP), not its logarithm. Without it the softmax is near uniform and
            the loss near zero.

    Source: CAR-FT (arXiv 2211.16175).
    """
    with autocast_off(features):
        w = widened(context_weights)
        student = F.normalize(widened(features), dim=-1) @ w.to(widened(features).dtype).T
        teacher = F.normalize(widened(teacher_features.detach()), dim=-1) @ w.to(widened(teacher_features).dtype).T
        student, teacher = (logit_scale * student).log_softmax(-1), (logit_scale * teacher).log_softmax(-1)
        return F.kl_div(student, teacher.to(student.dtype), reduction="batchmean", log_target=True)
