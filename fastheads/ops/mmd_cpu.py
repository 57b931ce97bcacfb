"""The sweep on a CPU, block by block: inner products by the library, then csrc/ (or PyTorch) in place."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastheads import reference
from fastheads.ops import native
from fastheads.ops.mmd_panels import Gradient, Samples, bytes_of, unit, workspace
from fastheads.reference.precision import less

BLOCK, SIDE = 64, 1024  # the fewest and the most samples of a block's side
SHARE = 0.95  # of the columns' bytes, for the blocks


class Side(NamedTuple):
    """Samples in order of their domains, so that a row meets each domain as one run of columns."""

    x: Tensor  # [L, N, D], as they came
    order: Tensor | None  # [R] in order, those of no domain left out; None: as they came
    domains: Tensor  # [R]
    starts: Tensor  # [S + 1] where each domain begins
    centre: Tensor  # [L, 1, D]

    def add(self, part: Tensor, into: Tensor, i: int, e: int) -> None:
        """Adds the part `[L, e - i, D]` to its samples'."""
        part = part.to(into.dtype)
        if self.order is None:
            into[:, i:e] += part
        else:
            into.index_add_(1, self.order[i:e], part)


def load(side: Side, at: slice, i: int, e: int) -> Tensor:
    """`[L, e - i, D]`, centred, at least float32."""
    x = side.x[at]
    return less(x[:, i:e] if side.order is None else x.index_select(1, side.order[i:e]), side.centre[at])


def by_domain(x: Tensor, dom: Tensor, num_domains: int, centre: Tensor) -> Side:
    order = torch.argsort(dom, stable=True)
    starts = torch.searchsorted(dom[order], torch.arange(num_domains + 1))
    order, starts = order[starts[0] : starts[-1]], starts - starts[0]
    as_it_is = len(order) == len(dom) and bool((order[1:] > order[:-1]).all())
    return Side(x, None if as_it_is else order, dom[order], starts, centre)


def sides(samples: Samples) -> tuple[Side, Side, Tensor]:
    """Rows, columns, and the column that a row is, `[R]`, -1 for none."""
    (y, dom_y), S = samples.columns, samples.num_domains
    c = reference.centre(y, reference.is_counted(dom_y, S))
    columns = by_domain(y, dom_y, S, c)
    n = len(columns.domains)
    if samples.y is None:
        return columns, columns, torch.arange(n)
    rows = by_domain(samples.x, samples.dom_x, S, c)
    order = torch.arange(len(samples.dom_x)) if rows.order is None else rows.order
    if samples.row_offset is None:
        return rows, columns, torch.full_like(order, -1)
    # one place more, for rows that are no column
    at = torch.full((len(dom_y) + 1,), -1)
    at[slice(n) if columns.order is None else columns.order] = torch.arange(n)
    same = order + samples.row_offset
    return rows, columns, at[torch.where((same >= 0) & (same < len(dom_y)), same, -1)]


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


def side_of(room: int, width: int) -> int:
    """Samples of a block's side: rows, columns and what they pull, `[side, D]`, and side² pairs take up `room`."""
    side = (math.isqrt(9 * width * width + 4 * room) - 3 * width) // 2
    return max(BLOCK, min(SIDE, side // BLOCK * BLOCK))


def blocks(first: int, last: int, side: int) -> list[tuple[int, int]]:
    """First and last + 1 of each block."""
    return [(i, min(last, i + side)) for i in range(first, last, side)]


def norms(x: Tensor) -> Tensor:
    """`‖x_i‖²`, `[L, N]`, without the squares of all features in memory."""
    return torch.linalg.vector_norm(x, dim=-1).square_()


def pull_(dx: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """dx −= w y. It has rowsum(w) x of the same w: equal points pull on each other by exactly nothing."""
    return dx.baddbmm_(w, y, alpha=-1)


def sweep(samples: Samples, coeff: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """K `[L, S, S]` float64 and, with coeff, the gradient `[L, N, D]` of `Σ coeff ∘ K` in x's dtype and its `unit`."""
    rows, columns, same = sides(samples)
    itself, (L, _, D), R, C = rows is columns, rows.x.shape, len(rows.domains), len(columns.domains)
    wide, room = columns.centre.dtype, workspace(SHARE * bytes_of(columns.x))
    side = side_of(room, D)
    one = itself and side >= R
    # Of one block what pulls may be added up where it is to lie; and many layers go together.
    there = one and rows.order is None and rows.x.dtype == wide
    layers = max(1, min(L, room // (R * (R + (2 - there) * D) or 1))) if one else 1
    gammas, powers = samples.gammas.to(wide), torch.tensor(samples.powers, dtype=torch.int32)
    K = torch.zeros((L, samples.num_domains, samples.num_domains), dtype=torch.float64)
    buffer = torch.empty(layers * min(side, R) * min(side, C), dtype=wide)
    gradient = scale = None
    if coeff is not None:
        scale = unit(samples, coeff.to(wide))
        coeff = coeff.to(wide) * (-4 / scale)[:, None, None]
        gradient = Gradient(samples.x, several=itself and not one)

    def weights(at: slice, x: Tensor, y: Tensor, i: int, j: int) -> Tensor:
        """Of rows from i on and columns from j on, after K has had its part."""
        shape, e, f = (len(x), x.shape[1], y.shape[1]), i + x.shape[1], j + y.shape[1]
        w = torch.bmm(x, y.mT, out=buffer[: math.prod(shape)].view(shape))
        runs, domains, x2 = columns.starts.clamp(j, f) - j, rows.domains[i:e], norms(x)
        given = gammas[at], powers, None if coeff is None else coeff[at], same[i:e] - j
        sums = tile(w, x2, x2 if y is x else norms(y), runs, domains, *given)
        k = torch.zeros_like(K[at]).index_add_(1, domains, sums)
        K[at] += k + k.mT if itself and y is not x else k
        return w

    def panel(at: slice, i: int, e: int, into: Tensor | None) -> None:
        """Rows i … e-1, block by block."""
        x = load(rows, at, i, e)
        dx = None if into is None else into if there else torch.zeros_like(x)
        for j, f in blocks(i if itself else 0, C, side):
            y = x if itself and i == j else load(columns, at, j, f)
            w = weights(at, x, y, i, j)
            if into is not None and dx is not None:
                pull_(dx.addcmul_(w.sum(-1, keepdim=True), x), w, y)
                if itself and y is not x:
                    columns.add(pull_(y.mul_(w.sum(-2).unsqueeze(-1)), w.mT, x), into, j, f)
            del y  # before the next is made
        if into is not None and dx is not None and not there:
            rows.add(dx, into, i, e)

    for at in (slice(first, min(L, first + layers)) for first in range(0, L, layers)):
        into = None if gradient is None else gradient.begin(at)
        for i, e in blocks(0, R, side):
            panel(at, i, e, into)
        if gradient is not None and into is not None:
            gradient.end(at, into)
    return K, None if gradient is None else gradient.whole, scale
