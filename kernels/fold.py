"""The weights of the stacked projection, `[W + s·B A; A]` or `[W; A]`, in float32, rounded once, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.launch import launch, on_grid, strides

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128


def padded_rank(columns: int) -> int:
    """The rows that A takes below the weights: its own, up to a multiple of 16. Triton loads a row of `[B, N, 3D + R]`
    16 bytes at a time only where it knows its length for a multiple of 16 elements."""
    return -(-columns // 16) * 16


@triton.jit
def fold_kernel(
    p_w, s_w_m, s_w_n, p_a, s_a_t, s_a_h, s_a_r, s_a_d, p_b, s_b_t, s_b_h, s_b_d, s_b_r, p_out, scale,
    D, R, head_blocks, columns, RANK,
    T: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, MERGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: BM rows of one head of q, k or v, or BM rows of A, by BN columns."""
    pid = tl.program_id(0)
    i_m, i_n = pid // columns, pid % columns
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < D
    o_n = o_n.to(tl.int64)
    if i_m < 3 * H * head_blocks:
        i_p, i_h = i_m // (H * head_blocks), i_m // head_blocks % H
        o_d = (i_m % head_blocks) * BM + tl.arange(0, BM)
        m_w = (o_d < DH)[:, None] & m_n[None, :]
        o_m = ((i_p * H + i_h) * DH + o_d).to(tl.int64)
        # [BM, BN]
        b_w = tl.load(p_w + o_m[:, None] * s_w_m + o_n[None, :] * s_w_n, mask=m_w, other=0.0).to(tl.float32)
        if MERGE:
            i_t = -1
            for t in tl.static_range(T):
                i_t = tl.where(i_p == PARTS[t], t, i_t)
            if i_t >= 0:
                i_a = 0 if SHARED else i_h
                p_ar = p_a + i_t * s_a_t + i_a * s_a_h + o_n * s_a_d
                p_br = p_b + i_t * s_b_t + i_h * s_b_h + o_d * s_b_d
                b_d = tl.zeros([BM, BN], tl.float32)
                # a rank of 2 to 64 would be padding in tl.dot, and this is exact float32 on every chip
                for r in range(RANK):
                    b_a = tl.load(p_ar + r * s_a_r, mask=m_n, other=0.0)
                    b_b = tl.load(p_br + r * s_b_r, mask=o_d < DH, other=0.0)
                    b_d += b_b[:, None] * b_a[None, :]
                b_w += scale * b_d
        tl.store(p_out + o_m[:, None] * D + o_n[None, :], b_w.to(p_out.dtype.element_ty), mask=m_w)
    else:
        o_c = (i_m - 3 * H * head_blocks) * BM + tl.arange(0, BM)
        HA: tl.constexpr = 1 if SHARED else H
        o_t, o_h, o_r = o_c // (HA * RANK), o_c // RANK % HA, o_c % RANK
        m_a = (o_c < T * HA * RANK)[:, None] & m_n[None, :]
        p_ac = p_a + (o_t * s_a_t + o_h * s_a_h + o_r * s_a_r)[:, None] + o_n[None, :] * s_a_d
        b_a = tl.load(p_ac, mask=m_a, other=0.0)
        p_o = p_out + (3 * H * DH + o_c).to(tl.int64)[:, None] * D + o_n[None, :]
        tl.store(p_o, b_a.to(p_out.dtype.element_ty), mask=(o_c < R)[:, None] & m_n[None, :])


def fold(
    w_in: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    parts: tuple[int, ...],
    scale: float,
    shared: bool,
    merge: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`[3D + R, D]` in `dtype`: W + scale·B_h A_h (merge) or W, then A's rows over (target, H or 1, rank), then zeros.

    w_in: `[3D, D]`, any float dtype. lora_A: `[T, H|1, r, D]`, lora_B: `[T, H, dh, r]`, float32. Any strides.
    parts: which of q (0), k (1), v (2) each target is. R: `padded_rank` of A's rows.
    """
    T, H, dh, r = lora_B.shape
    D = w_in.shape[1]
    R = padded_rank(T * (1 if shared else H) * r)
    out = torch.empty((3 * D + R, D), dtype=dtype, device=w_in.device)
    head_blocks, columns = triton.cdiv(dh, BLOCK_ROWS), triton.cdiv(D, BLOCK_COLUMNS)
    row_blocks = 3 * H * head_blocks + triton.cdiv(R, BLOCK_ROWS)
    launch(
        fold_kernel,
        (on_grid(row_blocks * columns, "fold"),),
        w_in,
        *strides(w_in, 0, 1),
        lora_A,
        *strides(lora_A, 0, 1, 2, 3),
        lora_B,
        *strides(lora_B, 0, 1, 2, 3),
        out,
        float(scale),
        D,
        R,
        head_blocks,
        columns,
        r,
        T=T,
        H=H,
        DH=dh,
        PARTS=parts,
        SHARED=shared,
        MERGE=merge,
        BM=BLOCK_ROWS,
        BN=BLOCK_COLUMNS,
        num_warps=4,
        num_stages=1,
    )
    return out
