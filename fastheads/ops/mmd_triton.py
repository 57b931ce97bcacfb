"""The sweep on a GPU, inner products and kernels of a panel in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastheads import reference
from fastheads.kernels.mmd import mmd_tile, product_precision, round_to_tf32_
from fastheads.ops import mmd_panels
from fastheads.ops.mmd_panels import Samples, add_gradient_, centre_, panel_rows, panels


def sweep(samples: Samples, coeff: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """K `[L, S, S]` float64 and, with coeff, the gradient `[L, N, D]` of `Σ coeff ∘ K`, float32.

    Where products may be in TF32, the centred features are rounded to it once: all that follows is then as exact as in
    float32, of features a little off. Distances of unrounded ones would lose the digits that they cancel.
    """
    x, dom, y, dom_y, num_domains, gammas, powers, row_offset = samples
    R, itself = x.shape[1], y is None or dom_y is None
    start = 0 if itself else R
    if y is None or dom_y is None:
        z = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    else:
        z, dom = torch.cat((x.float(), y.float()), 1), torch.cat((dom, dom_y))
    z = centre_(z, reference.is_counted(dom, num_domains))
    if product_precision() == "tf32":
        z = round_to_tf32_(z)
    z2, gammas = torch.linalg.vecdot(z, z), gammas.float()
    coeff = None if coeff is None else coeff.float()
    L, N, _ = z.shape
    K = z.new_zeros(L, num_domains, num_domains, dtype=torch.float64)
    dx = None if coeff is None else torch.zeros_like(z[:, :R])
    height = min(R, panel_rows(N - start, 128))
    layers = max(1, mmd_panels.WORKSPACE // (height * (N - start)))
    given: dict[str, Any] = {"num_domains": num_domains, "powers": tuple(powers), "start": None if itself else start}
    for at, i, e in panels(L, R, layers, height):
        own = None if row_offset is None else i + row_offset
        out = None if coeff is None else z.new_empty(len(z[at]), e - i, N - (i if itself else start))
        parts: dict[str, Any] = {"gammas": gammas[at], "coeff": None if coeff is None else coeff[at]}
        K[at] += mmd_tile(z[at], z2[at], dom, i, e - i, own=own, out=out, **parts, **given)
        if dx is not None and out is not None:
            add_gradient_(dx[at], out, z[at, :R], z[at, start:], i, e, itself)
    return K, None if dx is None else dx.mul_(-4)
