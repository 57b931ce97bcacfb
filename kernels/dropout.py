"""Dropout whose mask is a function of a seed and the element's index: the backward draws it again, nothing is kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.heads import as_rows
from fastheads.kernels.launch import check_contiguous, launch, on_grid
from fastheads.kernels.tiles import cdiv

BLOCK_ROWS, BLOCK_GROUPS = 4, 64


@triton.jit
def dropout_kernel(x, p_seed, p_out, p, keep_scale, N, D, columns, rows, BN: tl.constexpr, BG: tl.constexpr):
    """x · keep / (1 - p): BN rows by BG groups of four columns, for Philox gives four numbers a call."""
    i_n = (tl.program_id(0) // columns).to(tl.int64) * BN + tl.arange(0, BN)
    o_g = tl.program_id(0) % columns * BG + tl.arange(0, BG)
    # [BN, BG, 2, 2] -> [BN, 4 BG]: the four numbers of a group side by side
    b_0, b_1, b_2, b_3 = tl.rand4x(tl.load(p_seed), i_n[:, None] * tl.cdiv(D, 4) + o_g[None, :])
    b_u = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [BN, 4 * BG])
    o_d = tl.program_id(0) % columns * (4 * BG) + tl.arange(0, 4 * BG)
    m_x = (i_n < rows)[:, None] & (o_d < D)[None, :]
    p_x = x.p + (i_n // N * x.stride_b + i_n % N * x.stride_n)[:, None] + o_d[None, :]
    b_y = tl.where(b_u >= p, tl.load(p_x, mask=m_x, other=0.0).to(tl.float32) * keep_scale, 0.0)
    tl.store(p_out + i_n[:, None] * D + o_d[None, :], b_y.to(p_out.dtype.element_ty), mask=m_x)


def dropout(x: Tensor, p: float, seed: Tensor, out: Tensor | None = None) -> Tensor:
    """`x · keep / (1 - p)`, one draw per element, in x's dtype, contiguous. Of the output's gradient: the backward.

    x: `[..., D]`, its last dimension contiguous; seed: int64 `[1]` on x's device; out: contiguous, of x's shape.
    """
    check_contiguous(x=x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    D = x.shape[-1]
    x3 = x.reshape(1, 1, D) if x.dim() == 1 else x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
    B, N, _ = x3.shape
    columns, keep_scale = cdiv(D, 4 * BLOCK_GROUPS), 1.0 / (1.0 - p) if p < 1 else 0.0
    args = (as_rows(x3), seed, out, float(p), keep_scale, N, D, columns, B * N)
    grid = (on_grid(cdiv(B * N, BLOCK_ROWS) * columns, "dropout"),)
    launch(dropout_kernel, grid, *args, BN=BLOCK_ROWS, BG=BLOCK_GROUPS, num_warps=4, num_stages=1)
    return out
