"""Dropout whose mask is a function of a seed and the element's index: the backward draws it again, nothing is kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.launch import launch, on_grid, rows_of, strides

BLOCK_ROWS, BLOCK_GROUPS = 4, 64


@triton.jit
def dropout_kernel(
    p_x, s_x_b, s_x_n, p_seed, p_out, p, keep_scale, N, D, groups, columns, rows, BN: tl.constexpr, BG: tl.constexpr
):
    """BN rows by BG groups of four columns: Philox gives four numbers a call."""
    pid = tl.program_id(0)
    i_n = (pid // columns).to(tl.int64) * BN + tl.arange(0, BN)
    o_g = pid % columns * BG + tl.arange(0, BG)
    # [BN, BG, 2, 2] -> [BN, 4 BG]: the four numbers of a group side by side
    b_0, b_1, b_2, b_3 = tl.rand4x(tl.load(p_seed), i_n[:, None] * groups + o_g[None, :])
    b_u = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [BN, 4 * BG])
    o_d = pid % columns * (4 * BG) + tl.arange(0, 4 * BG)
    m_x = (i_n < rows)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + (i_n // N * s_x_b + i_n % N * s_x_n)[:, None] + o_d[None, :], mask=m_x, other=0.0)
    b_y = tl.where(b_u >= p, b_x.to(tl.float32) * keep_scale, 0.0)
    tl.store(p_out + i_n[:, None] * D + o_d[None, :], b_y.to(p_out.dtype.element_ty), mask=m_x)


def dropout(x: Tensor, p: float, seed: Tensor, out: Tensor | None = None) -> Tensor:
    """`x · keep / (1 - p)`, one draw per element, in x's dtype, contiguous. Of the output's gradient: the backward.

    x: `[..., D]`, its last dimension contiguous; seed: int64 `[1]` on x's device; out: contiguous, of x's shape.
    """
    rows_of(x=x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    D = x.shape[-1]
    x3 = x.reshape(1, 1, D) if x.dim() == 1 else x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
    B, N, _ = x3.shape
    groups = triton.cdiv(D, 4)
    columns = triton.cdiv(groups, BLOCK_GROUPS)
    launch(
        dropout_kernel,
        (on_grid(triton.cdiv(B * N, BLOCK_ROWS) * columns, "dropout"),),
        x3,
        *strides(x3, 0, 1),
        seed,
        out,
        float(p),
        1.0 / (1.0 - p) if p < 1 else 0.0,
        N,
        D,
        groups,
        columns,
        B * N,
        BN=BLOCK_ROWS,
        BG=BLOCK_GROUPS,
        num_warps=4,
        num_stages=1,
    )
    return out
