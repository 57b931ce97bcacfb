"""The sweep on a GPU: inner products and kernels of a panel in one launch, and what its weights pull in another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastheads import reference
from fastheads.kernels.mmd import Points, mmd_norms, mmd_pull, mmd_tile
from fastheads.ops.mmd_panels import Gradient, Samples, bytes_of, panels, unit, workspace

BLOCK = 128  # rows of a panel are multiples of it
SPANS = 5 * 2**20  # bytes, about, that the spans of `mmd_pull` take at the most


def sweep(samples: Samples, coeff: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """K `[L, S, S]` float64 and, with coeff, the gradient `[L, N, D]` of `Σ coeff ∘ K` in x's dtype and its `unit`.

    Where products may be in TF32, the centred features are rounded to it wherever they are loaded: all that follows is
    then as exact as in float32, of features a little off. Distances of unrounded ones would lose digits that cancel.
    """
    rows, columns, c, itself = points(samples)
    (L, R, _), C, S = rows.x.shape, columns.x.shape[1], samples.num_domains
    K = torch.zeros((L, S, S), dtype=torch.float64, device=rows.x.device)
    cuts, layers = panels(L, R, C, room_for(bytes_of(columns.x)), BLOCK, itself)
    several = itself and len(cuts) > 1  # columns right of a panel's own square get their part of it, too
    step: dict[str, Any] = {"num_domains": S, "powers": tuple(samples.powers), "itself": itself}
    gradient = scale = None
    if coeff is not None:
        scale = unit(samples, coeff.float())
        coeff = coeff.float() * (-4 / scale)[:, None, None]
        gradient = Gradient(samples.x, several)

    def panel(at: slice, i: int, e: int, into: Tensor | None) -> None:
        """Rows i … e-1; its weights are gone before the next has its own."""
        own, others = rows.part(at, slice(i, e)), columns.part(at, slice(i * itself, None))
        w = None if into is None else c.new_empty(len(own.x), e - i, others.x.shape[1])
        given = {"gammas": samples.gammas[at].float(), "coeff": None if coeff is None else coeff[at], "out": w}
        offset = None if samples.row_offset is None else samples.row_offset + i
        K[at] += mmd_tile(own, others, c[at], own=offset, **given, **step)
        if into is None or w is None:
            return
        mmd_pull(w, own.x, others.x, c[at], into[:, i:e], add=several)
        if itself and e < C:
            mmd_pull(w[:, :, e - i :].mT, others.x[:, e - i :], own.x, c[at], into[:, e:], add=True)

    for at in (slice(first, min(L, first + layers)) for first in range(0, L, layers)):
        into = None if gradient is None else gradient.begin(at)
        for i, e in cuts:
            panel(at, i, e, into)
        if gradient is not None and into is not None:
            gradient.end(at, into)
    return K, None if gradient is None else gradient.whole, scale


def room_for(size: int) -> int:
    """Elements of a panel, of features of so many bytes: beside spans nine tenths of them, four at the least."""
    return workspace(max(0.9 * size - SPANS, 0.4 * size))


def points(samples: Samples) -> tuple[Points, Points, Tensor, bool]:
    """Rows, columns, the constant near the columns' mean `[L, D]`, and whether rows and columns are one set."""
    S, itself, (y, dom_y) = samples.num_domains, samples.y is None, samples.columns
    y = y if y.stride(2) == 1 else y.contiguous()
    c = reference.centre(y, reference.is_counted(dom_y, S)).squeeze(1)
    columns = Points(y, mmd_norms(y, dom_y, c, S), dom_y)
    if itself:
        return columns, columns, c, itself
    x, dom = samples.x if samples.x.stride(2) == 1 else samples.x.contiguous(), samples.dom_x
    return Points(x, mmd_norms(x, dom, c, S), dom), columns, c, itself
