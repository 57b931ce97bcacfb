"""The sweep on a CPU: inner products by the library, then csrc/ (or PyTorch) in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastheads.ops import mmd_panels, native
from fastheads.ops.mmd_panels import Samples, add_gradient_, centre_, panel_rows, panels
from fastheads.reference import widened


class Ordered(NamedTuple):
    """Columns in order of their domains, so that a row meets each domain as one run of them."""

    rows: Tensor  # [L, R, D], centred, float32 or float64
    columns: Tensor  # [L, C, D]
    rows2: Tensor  # [L, R] squared norms
    columns2: Tensor
    row_domains: Tensor  # [R]
    starts: Tensor  # [S + 1] where each domain's columns begin
    row_order: Tensor  # rows[:, i] is x[:, row_order[i]]; x's rows of no domain are left out
    self: Tensor  # [R] the column that is the row itself, -1 for none
    itself: bool  # rows and columns are one sample set


def by_domain(dom: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    """The samples `[R ≤ N]` in order of their domains, those of none left out; where each domain begins, `[S + 1]`."""
    order = torch.argsort(dom, stable=True)
    starts = torch.searchsorted(dom[order], torch.arange(num_domains + 1, device=dom.device))
    return order[starts[0] : starts[-1]], starts - starts[0]


def ordered(samples: Samples) -> Ordered:
    x, dom_x, y, dom_y, num_domains, _, _, row_offset = samples
    order_x, starts = by_domain(dom_x, num_domains)
    x, n = widened(x).index_select(1, order_x), len(order_x)
    itself = y is None or dom_y is None
    if y is None or dom_y is None:
        rows = columns = centre_(x)
        self = torch.arange(n, device=x.device)
    else:
        order_y, starts = by_domain(dom_y, num_domains)
        both = centre_(torch.cat((x, widened(y).index_select(1, order_y)), 1))
        rows, columns = both[:, :n], both[:, n:]
        at = torch.full_like(dom_y, -1)
        at[order_y] = torch.arange(len(order_y), device=x.device)
        self = torch.full_like(order_x, -1)
        if row_offset is not None:
            same = order_x + row_offset
            inside = (same >= 0) & (same < len(at))
            self[inside] = at[same[inside]]
    rows2 = rows.square().sum(-1)
    columns2 = rows2 if itself else columns.square().sum(-1)
    return Ordered(rows, columns, rows2, columns2, dom_x[order_x], starts, order_x, self, itself)


def torch_tile(
    gram: Tensor,
    x2: Tensor,
    y2: Tensor,
    segments: Tensor,
    domains: Tensor,
    gammas: Tensor,
    powers: Tensor,
    coeff: Tensor | None,
    self: Tensor,
) -> Tensor:
    """`native.mmd_tile` in PyTorch, where csrc/ was not built."""
    d2 = gram.mul_(-2).add_(x2.unsqueeze(-1)).add_(y2.unsqueeze(-2)).clamp_min_(0)
    here = ((self >= 0) & (self < gram.shape[2])).nonzero().squeeze(1)
    d2[:, here, self[here]] = 0
    kernel, weight = torch.zeros_like(d2), torch.zeros_like(d2)
    for gamma in gammas.unbind(-1):
        gamma = gamma.view(-1, 1, 1)
        e = torch.exp(-gamma * d2)
        kernel += e
        weight.addcmul_(gamma.expand_as(e), e)
    runs = list(zip(segments[:-1].tolist(), segments[1:].tolist(), strict=True))
    sums = torch.stack([kernel[..., a:b].sum(-1, dtype=torch.float64) for a, b in runs], -1)
    if coeff is not None:
        sizes = segments.diff()
        torch.mul(weight, coeff[:, domains].repeat_interleave(sizes, -1), out=gram)
        gram[:, here, self[here]] = 0
    return sums


def tile(gram: Tensor, *args: Any) -> Tensor:
    there = gram.device.type == "cpu" and native.library() is not None
    return (native.mmd_tile if there else torch_tile)(gram, *args)


def sweep(samples: Samples, coeff: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """K `[L, S, S]` float64 and, with coeff, the gradient `[L, N, D]` of `Σ coeff ∘ K`, at least float32."""
    s = ordered(samples)
    (L, R, _), C, wide = s.rows.shape, s.columns.shape[1], s.rows.dtype
    K = s.rows.new_zeros((L, samples.num_domains, samples.num_domains), dtype=torch.float64)
    dx = None if coeff is None else torch.zeros_like(s.rows)
    together = L * R * C <= mmd_panels.WORKSPACE  # small ones: all layers in one panel
    layers, height = (L, max(1, R)) if together else (1, panel_rows(C, 64))
    buffer = s.rows.new_empty(layers * min(height, R) * C)
    powers = torch.tensor(samples.powers, dtype=torch.int32)
    for at, i, e in panels(L, R if C else 0, layers, height):
        x, y, x2, y2, gammas = s.rows[at], s.columns[at], s.rows2[at], s.columns2[at], samples.gammas[at].to(wide)
        own = None if coeff is None else coeff[at].to(wide)
        start = i if s.itself else 0
        gram = buffer[: len(x) * (e - i) * (C - start)].view(len(x), e - i, C - start)
        torch.bmm(x[:, i:e], y[:, start:].mT, out=gram)
        for a, b in ((i, e), (e, C)) if s.itself and e < C else ((start, C),):
            part, runs = gram[:, :, a - start : b - start], s.starts.clamp(a, b) - a
            domains, self = s.row_domains[i:e], s.self[i:e] - a
            sums = tile(part, x2[:, i:e], y2[:, a:b], runs, domains, gammas, powers, own, self)
            k = torch.zeros_like(K[at]).index_add_(1, domains, sums)
            K[at] += k + k.mT if s.itself and a == e else k
        if dx is not None:
            add_gradient_(dx[at], gram, x, y, i, e, s.itself)
    if dx is None:
        return K, None
    N, dx = samples.x.shape[1], dx.mul_(-4)
    if N == R:
        return K, dx.index_select(1, s.row_order.argsort())
    return K, dx.new_zeros(samples.x.shape).index_copy_(1, s.row_order, dx)
