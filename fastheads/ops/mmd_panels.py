"""What the sweeps of every device share: whom they are over, panels of rows, the gradient of a panel.

For C symmetric, and a and b the domains of i and j,

    d Σ (C ∘ K) / dx_i = −4 Σ_j w_ij (x_i − x_j),    w_ij = C_ab Σ_u γ_u e_u
    K_ab = Σ_{i∈a, j∈b} Σ_u e_u,                     e_u = exp(−γ_u ‖x_i − x_j‖²)

Nobody holds N × N of anything: of each panel its inner products, K's part, w in their place, and `w y` by the library.
Panels of a sample set with itself begin at the diagonal; what is right of a panel's own square serves rows and columns.
The square itself is made whole: up to 2,048 samples, which are one panel, every pair is formed in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE = 2**22  # elements of a panel: 16 MB in float32


class Samples(NamedTuple):
    """Rows x against columns y, and their kernels."""

    x: Tensor  # [L, N, D]
    dom_x: Tensor  # [N]
    y: Tensor | None  # [L, M, D]; None: x itself
    dom_y: Tensor | None
    num_domains: int
    gammas: Tensor  # [L, U]
    powers: list[int]  # [U], as `ops.kernel_sums` takes them
    row_offset: int | None  # x's row i is y's row i + row_offset


def centre_(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """`reference.centred`, in place: x `[L, N, D]` minus its first row, minus the mean of that."""
    if not x.shape[1]:
        return x
    if counted is None:
        x -= x[:, :1].clone()
        x -= x.mean(1, keepdim=True)
        return x
    others = ~counted.unsqueeze(1)
    x -= x.index_select(1, counted.to(torch.uint8).argmax(0, keepdim=True))
    x.masked_fill_(others, 0)
    x -= x.sum(1, keepdim=True) / counted.sum().clamp_min(1)
    return x.masked_fill_(others, 0)


def panel_rows(columns: int, block: int) -> int:
    """How many rows, a multiple of `block`, a panel of so many columns has."""
    return max(block, WORKSPACE // columns // block * block)


def panels(L: int, rows: int, layers: int, height: int) -> Iterator[tuple[slice, int, int]]:
    """Layers, so many at a time, and first and last + 1 row of every panel."""
    for first in range(0, L, layers):
        for i in range(0, rows, height):
            yield slice(first, min(L, first + layers)), i, min(rows, i + height)


def add_gradient_(dx: Tensor, w: Tensor, x: Tensor, y: Tensor, i: int, e: int, itself: bool) -> None:
    """dx `[L, R, D]` += −1/4 of the gradient by the panel w of rows i … e-1 of x, whose columns are y's from i on."""
    pull_(dx[:, i:e], w, x[:, i:e], y[:, i if itself else 0 :])
    if itself and e < x.shape[1]:
        pull_(dx[:, e:], w[:, :, e - i :].mT, x[:, e:], x[:, i:e])


def pull_(dx: Tensor, w: Tensor, x: Tensor, y: Tensor) -> None:
    """dx += rowsum(w) x − w y, both from the same w, so that equal points pull on each other by exactly nothing."""
    dx.addcmul_(w.sum(-1, keepdim=True), x)
    dx.baddbmm_(w, y, alpha=-1)
