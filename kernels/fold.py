"""The weights of a layer's products in one dtype: `[W + s·B A; A]` or `[W; A]`, formed in float32 and rounded once, its
bias, and out_proj's."""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.heads import low_of
from fastheads.kernels.launch import launch, on_grid, packed, strides
from fastheads.kernels.tiles import cdiv, up_to_16

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128

# `[rows, D]`, of any strides.
Matrix = namedtuple("Matrix", "p stride_m stride_n")


def padded_rank(columns: int) -> int:
    """The rows that A takes below the weights: its own, up to a multiple of 16. Triton loads a row of `[B, N, 3E + R]`
    16 bytes at a time only where it knows its length for a multiple of 16 elements."""
    return up_to_16(columns)


@triton.jit
def load_block(matrix, o_m, o_n, m_w):
    """Weights `[BM, BN]`, in float32."""
    p_w = matrix.p + o_m[:, None] * matrix.stride_m + o_n[None, :] * matrix.stride_n
    return tl.load(p_w, mask=m_w, other=0.0).to(tl.float32)


@triton.jit
def store_block(p_out, p_out_bias, p_bias, b_w, o_m, o_n, m_w, first, m_b, D):
    """Weights, and their bias where m_b, as the rows from `first` on."""
    tl.store(p_out + (first + o_m)[:, None] * D + o_n[None, :], b_w.to(p_out.dtype.element_ty), mask=m_w)
    if p_bias is not None:
        b_b = tl.load(p_bias + o_m, mask=m_b, other=0.0).to(tl.float32)
        tl.store(p_out_bias + first + o_m, b_b.to(p_out.dtype.element_ty), mask=m_b)


@triton.jit
def fold_kernel(
    w_in, p_b_in, w_out, p_b_out, p_a, p_b, p_out, p_out_bias, scale, D, rank, rows, R,
    HEADS: tl.constexpr, DIM: tl.constexpr, TARGETS: tl.constexpr, SHARED: tl.constexpr, MERGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """W_h + s·B_h A_h, or W_h; below, A, then out_proj's weights. A program: BM rows of a head of q, k or v, or BM rows
    of the others, by BN columns.

    The biases, and zeros below the first, by the programs of the first columns.
    """
    columns = tl.cdiv(D, BN)
    i_m, i_n = tl.program_id(0) // columns, tl.program_id(0) % columns
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < D
    o_n = o_n.to(tl.int64)
    BLOCKS: tl.constexpr = (DIM + BM - 1) // BM
    i_a = i_m - 3 * HEADS * BLOCKS
    i_o = i_a - tl.cdiv(R, BM)
    if i_a < 0:
        i_p, i_h = i_m // (HEADS * BLOCKS), i_m // BLOCKS % HEADS
        o_d = (i_m % BLOCKS) * BM + tl.arange(0, BM)
        m_w = (o_d < DIM)[:, None] & m_n[None, :]
        o_m = ((i_p * HEADS + i_h) * DIM + o_d).to(tl.int64)
        # [BM, BN]
        b_w = load_block(w_in, o_m, o_n, m_w)
        if MERGE:
            i_t = -1
            for part in tl.static_range(3):
                i_t = tl.where(i_p == part, TARGETS[part], i_t)
            if i_t >= 0:
                i_r = i_t if SHARED else i_t * HEADS + i_h
                p_ar = p_a + i_r * rank * D + o_n
                p_br = p_b + ((i_t * HEADS + i_h) * DIM + o_d) * rank
                b_d = tl.zeros([BM, BN], tl.float32)
                # small ranks would be padded to 16 in tl.dot, and this is exact float32 on every chip
                for r in range(rank):
                    b_a = tl.load(p_ar + r * D, mask=m_n, other=0.0)
                    b_up = tl.load(p_br + r, mask=o_d < DIM, other=0.0)
                    b_d += b_up[:, None] * b_a[None, :]
                b_w += scale * b_d
        store_block(p_out, p_out_bias, p_b_in, b_w, o_m, o_n, m_w, 0, (o_d < DIM) & (i_n == 0), D)
    elif i_o < 0:
        if p_a is not None:
            o_c = (i_a * BM + tl.arange(0, BM)).to(tl.int64)
            b_a = tl.load(p_a + o_c[:, None] * D + o_n[None, :], mask=(o_c < rows)[:, None] & m_n[None, :], other=0.0)
            p_o = p_out + (3 * HEADS * DIM + o_c)[:, None] * D + o_n[None, :]
            tl.store(p_o, b_a.to(p_out.dtype.element_ty), mask=(o_c < R)[:, None] & m_n[None, :])
            if p_b_in is not None:
                b_z = tl.zeros([BM], p_out.dtype.element_ty)
                tl.store(p_out_bias + 3 * HEADS * DIM + o_c, b_z, mask=(o_c < R) & (i_n == 0))
    else:
        if w_out is not None:
            o_o = (i_o * BM + tl.arange(0, BM)).to(tl.int64)
            m_o = (o_o < D)[:, None] & m_n[None, :]
            b_o = load_block(w_out, o_o, o_n, m_o)
            store_block(p_out, p_out_bias, p_b_out, b_o, o_o, o_n, m_o, 3 * D + R, (o_o < D) & (i_n == 0), D)


def fold(
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    num_heads: int,
    parts: tuple[int, ...],
    scale: float,
    shared: bool,
    merge: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`[3E + R, D]` in `dtype`: W + scale·B_h A_h (merge) or W, then A's rows over (target, H or 1, rank), then zeros;
    the bias `[3E + R]`, zeros after it, or None; out_proj's weights `[D, D]` and bias `[D]`, where they are given, for
    E = D alone.

    w_in: `[3E, D]`, b_in: `[3E]` or None, w_out: `[D, D]` or None, b_out: `[D]` or None, any float dtype.
    lora_A: `[T, H|1, r, D]`, lora_B: `[T, H, dh, r]`, float32, or both None. Any strides.
    parts: which of q (0), k (1), v (2) each target is. R: `padded_rank` of A's rows.
    """
    E, D, rank, rows = w_in.shape[0] // 3, w_in.shape[1], 0, 0
    if lora_A is not None:
        rank, rows = lora_A.shape[2], lora_A.shape[0] * lora_A.shape[1] * lora_A.shape[2]
    H, dh, R = num_heads, E // num_heads, padded_rank(rows)
    own, below = 3 * E + R, 0 if w_out is None else D
    out = torch.empty((own + below, D), dtype=dtype, device=w_in.device)
    bias = None if b_in is None and b_out is None else torch.empty(own + below, dtype=dtype, device=w_in.device)
    weights = (_matrix(w_in), packed(b_in), None if w_out is None else _matrix(w_out), packed(b_out))
    args = (*weights, packed(lora_A), packed(lora_B), out, bias, float(scale), D, rank, rows, R)
    targets = low_of(parts, rank, shared).target_of
    meta = {"HEADS": H, "DIM": dh, "TARGETS": targets, "SHARED": shared, "MERGE": merge and rank > 0}
    row_blocks = 3 * H * cdiv(dh, BLOCK_ROWS) + cdiv(R, BLOCK_ROWS) + cdiv(below, BLOCK_ROWS)
    grid = (on_grid(row_blocks * cdiv(D, BLOCK_COLUMNS), "fold"),)
    launch(fold_kernel, grid, *args, **meta, BM=BLOCK_ROWS, BN=BLOCK_COLUMNS, num_warps=4, num_stages=1)
    if w_out is None:
        return out, bias, None, None
    biases = (None, None) if bias is None else (bias.narrow(0, 0, own), bias.narrow(0, own, below))
    above = None if b_in is None else biases[0]
    return out.narrow(0, 0, own), above, out.narrow(0, own, below), None if b_out is None else biases[1]


def _matrix(weight: Tensor) -> Matrix:
    return Matrix(weight, *strides(weight, 0, 1))
