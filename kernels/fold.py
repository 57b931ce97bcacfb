"""The weights of the stacked projection, `[W + s·B A; A]` or `[W; A]`, in float32, rounded once; and its bias."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.heads import low_of
from fastheads.kernels.launch import launch, on_grid, packed, strides
from fastheads.kernels.tiles import cdiv

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128


def padded_rank(columns: int) -> int:
    """The rows that A takes below the weights: its own, up to a multiple of 16. Triton loads a row of `[B, N, 3D + R]`
    16 bytes at a time only where it knows its length for a multiple of 16 elements."""
    return -(-columns // 16) * 16


@triton.jit
def fold_kernel(
    p_w, stride_m, stride_n, p_a, p_b, p_bias, p_out, p_out_bias, scale, D, rank, rows, R, columns,
    HEADS: tl.constexpr, DIM: tl.constexpr, TARGETS: tl.constexpr, SHARED: tl.constexpr, MERGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """W_h + s·B_h A_h, or W_h; below, A. A program: BM rows of a head of q, k or v, or BM rows of A, by BN columns.

    The bias, and zeros below it, by the programs of the first columns.
    """
    i_m, i_n = tl.program_id(0) // columns, tl.program_id(0) % columns
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < D
    o_n = o_n.to(tl.int64)
    BLOCKS: tl.constexpr = (DIM + BM - 1) // BM
    if i_m < 3 * HEADS * BLOCKS:
        i_p, i_h = i_m // (HEADS * BLOCKS), i_m // BLOCKS % HEADS
        o_d = (i_m % BLOCKS) * BM + tl.arange(0, BM)
        m_w = (o_d < DIM)[:, None] & m_n[None, :]
        o_m = ((i_p * HEADS + i_h) * DIM + o_d).to(tl.int64)
        # [BM, BN]
        b_w = tl.load(p_w + o_m[:, None] * stride_m + o_n[None, :] * stride_n, mask=m_w, other=0.0).to(tl.float32)
        if MERGE:
            i_t = -1
            for part in tl.static_range(3):
                i_t = tl.where(i_p == part, TARGETS[part], i_t)
            if i_t >= 0:
                i_a = i_t if SHARED else i_t * HEADS + i_h
                p_ar = p_a + i_a * rank * D + o_n
                p_br = p_b + ((i_t * HEADS + i_h) * DIM + o_d) * rank
                b_d = tl.zeros([BM, BN], tl.float32)
                # a rank of 2 to 64 would be padding in tl.dot, and this is exact float32 on every chip
                for r in range(rank):
                    b_a = tl.load(p_ar + r * D, mask=m_n, other=0.0)
                    b_b = tl.load(p_br + r, mask=o_d < DIM, other=0.0)
                    b_d += b_b[:, None] * b_a[None, :]
                b_w += scale * b_d
        tl.store(p_out + o_m[:, None] * D + o_n[None, :], b_w.to(p_out.dtype.element_ty), mask=m_w)
        if p_bias is not None:
            m_b = (o_d < DIM) & (i_n == 0)
            b_b = tl.load(p_bias + o_m, mask=m_b, other=0.0).to(tl.float32)
            tl.store(p_out_bias + o_m, b_b.to(p_out.dtype.element_ty), mask=m_b)
    else:
        o_c = ((i_m - 3 * HEADS * BLOCKS) * BM + tl.arange(0, BM)).to(tl.int64)
        b_a = tl.load(p_a + o_c[:, None] * D + o_n[None, :], mask=(o_c < rows)[:, None] & m_n[None, :], other=0.0)
        p_o = p_out + (3 * HEADS * DIM + o_c)[:, None] * D + o_n[None, :]
        tl.store(p_o, b_a.to(p_out.dtype.element_ty), mask=(o_c < R)[:, None] & m_n[None, :])
        if p_bias is not None:
            b_z = tl.zeros([BM], p_out.dtype.element_ty)
            tl.store(p_out_bias + 3 * HEADS * DIM + o_c, b_z, mask=(o_c < R) & (i_n == 0))


def fold(
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    parts: tuple[int, ...],
    scale: float,
    shared: bool,
    merge: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """`[3D + R, D]` in `dtype`: W + scale·B_h A_h (merge) or W, then A's rows over (target, H or 1, rank), then zeros;
    and the bias `[3D + R]` in `dtype`, zeros after it, or None.

    w_in: `[3D, D]`, b_in: `[3D]` or None, any float dtype. lora_A: `[T, H|1, r, D]`, lora_B: `[T, H, dh, r]`,
    float32. Any strides.
    parts: which of q (0), k (1), v (2) each target is. R: `padded_rank` of A's rows.
    """
    _, H, dh, r = lora_B.shape
    D, rows = w_in.shape[1], lora_A.numel() // lora_A.shape[-1]
    R = padded_rank(rows)
    out = torch.empty((3 * D + R, D), dtype=dtype, device=w_in.device)
    bias = None if b_in is None else torch.empty(3 * D + R, dtype=dtype, device=w_in.device)
    columns = cdiv(D, BLOCK_COLUMNS)
    row_blocks = 3 * H * cdiv(dh, BLOCK_ROWS) + cdiv(R, BLOCK_ROWS)
    low, size = (packed(lora_A), packed(lora_B)), (D, r, rows, R, columns)
    args = (w_in, *strides(w_in, 0, 1), *low, packed(b_in), out, bias, float(scale), *size)
    meta = {"HEADS": H, "DIM": dh, "TARGETS": low_of(parts, r, shared).targets, "SHARED": shared, "MERGE": merge}
    grid = (on_grid(row_blocks * columns, "fold"),)
    launch(fold_kernel, grid, *args, **meta, BM=BLOCK_ROWS, BN=BLOCK_COLUMNS, num_warps=4, num_stages=1)
    return out, bias
