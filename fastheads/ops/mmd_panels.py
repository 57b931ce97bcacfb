"""What the sweeps of every device share: whom they are over, panels of rows, where features are centred, what a 16-bit
gradient is kept in.

For C symmetric, and a and b the domains of i and j,

    d Σ (C ∘ K) / dx_i = −4 Σ_j w_ij (x_i − x_j),    w_ij = C_ab Σ_u γ_u e_u
    K_ab = Σ_{i∈a, j∈b} Σ_u e_u,                     e_u = exp(−γ_u ‖x_i − x_j‖²)

Nobody holds N × N of anything: of each panel its inner products, K's part, w in their place, and what w pulls.
Panels of a sample set with itself begin at the diagonal; what is right of a panel's own square serves rows and columns.
The square itself is made whole. Beyond the features and their gradient a sweep takes about the features' bytes once
more; of 16 bits, where there are several panels, the gradient's float32 sums as well.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastheads import reference

WORKSPACE = 2**25  # elements of a panel at the most: 128 MB in float32
LARGEST = 2.0**15  # what a float16 gradient is kept below, in its unit


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

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """y and its domains, which without y are x's."""
        if self.y is None or self.dom_y is None:
            return self.x, self.dom_x
        return self.y, self.dom_y


def workspace(size: float) -> int:
    """Float32s in `size` bytes that a sweep may take for a panel."""
    return min(WORKSPACE, int(size) // 4)


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Gradient:
    """The gradient `[L, N, D]` of a sweep over x, made some layers at a time.

    several: more than one panel adds to a row. Their sums are float32 at least; of 16 bits they are a copy of their
    own, and only when it is whole there is room for the gradient.
    """

    def __init__(self, x: Tensor, several: bool) -> None:
        self.x, self._copied = x, several and x.dtype.itemsize == 2
        self._whole: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        if self._whole is None:
            self._whole = torch.zeros(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        return self._whole

    def begin(self, at: slice) -> Tensor:
        """Zeros, for the panels of these layers."""
        if self._copied:
            return torch.zeros(self.x[at].shape, dtype=torch.float32, device=self.x.device)
        return self.whole[at]

    def end(self, at: slice, sums: Tensor) -> None:
        """These layers' `sums`, which `begin` gave, are whole."""
        if self._copied:
            self.whole[at].copy_(sums)


def panels(L: int, rows: int, columns: int, room: int, block: int, itself: bool) -> tuple[list[tuple[int, int]], int]:
    """First and last + 1 row of every panel, and how many layers take their panels together.

    A panel has up to `room` elements, in whole blocks of rows where others follow, one at the least. Of a set with
    itself later ones have fewer columns, and more rows.
    """
    cuts, i = list[tuple[int, int]](), 0
    while i < rows and columns:
        height = room // (columns - i * itself)
        e = rows if height >= rows - i else min(rows, i + max(block, height // block * block))
        cuts.append((i, e))
        i = e
    return cuts, max(1, min(L, room // (cuts[0][1] * columns))) if cuts else 1


def unit(samples: Samples, coeff: Tensor) -> Tensor:
    """`[L]`, a power of two: the gradient is kept in multiples of it, for the loss's scale is yet to come. 1 but for
    float16, which would lose what is under 6e-8.

    `‖dx_i‖ ≤ 4 Σ_b n_b |C_ab| Σ_u √(γ_u / 2e)`, the largest that `γ d exp(−γ d²)` becomes: under `LARGEST` of the unit.
    """
    if samples.x.dtype != torch.float16:
        return coeff.new_ones(len(coeff))
    counts = reference.in_domain(samples.columns[1], samples.num_domains).sum(0)
    bound = 4 * (coeff.abs() * counts).sum(-1).amax(-1) * (samples.gammas.to(coeff) / (2 * math.e)).sqrt().sum(-1)
    return (bound / LARGEST).log2().ceil().clamp(-120, 120).exp2()
