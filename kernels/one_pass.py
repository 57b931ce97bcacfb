"""Head attention in one pass: a program per (image, head) projects its own queries, keys and values, which never reach
memory, attends and gates.

    y_t = x W_{t,h}ᵀ + scale · (x A_{t,h}ᵀ) B_{t,h}ᵀ + b_{t,h}  for q, k, v, in float32, rounded once; then attention

Every head reads all of x, so this is for short sequences and small batches, and for where memory runs out.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.attend import (
    Head,
    Tiles,
    attend_chunks,
    chunks_of,
    cls_of_block,
    load_up,
    low_form,
    mask_of_head,
    out_of_head,
    outputs_of,
    pieces_of,
)
from fastheads.kernels.launch import architecture, dot_precision, launch, on_grid, packed, rows_of, strides

LONGEST = 272  # tokens whose keys and values stay on chip


@triton.jit
def load_columns(p_x, o_r, stride, rows, start, width, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Columns start … start + BLOCK - 1 of the rows o_r; zero past the last row and column."""
    o_c = start + tl.arange(0, BLOCK)
    m_x = (o_r < rows)[:, None]
    if not EVEN:
        m_x = m_x & (o_c < width)[None, :]
    # [R, BLOCK]
    return tl.load(p_x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], mask=m_x, other=0.0)


@triton.jit
def project_rows(
    x, weight, lora, b_up, o_r, rows, h, heads,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, HEAD: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """The parts (of q 0, k 1, v 2) of one head for the rows o_r of x: for each a tuple of tiles `[R, P]`."""
    p_x, stride_x = x
    p_w, stride_w, p_b = weight
    width = heads * HEAD.dim
    # Of every part its columns, and those of x Aᵀ.
    b_ys = ()
    for j in tl.static_range(len(PARTS)):
        b_y = ()
        for i in tl.static_range(len(HEAD.pieces)):
            b_y = b_y + (tl.full([ROWS, HEAD.pieces[i][1]], 0.0, tl.float32),)
        if LOW is not None:
            if LOW.targets[PARTS[j]] >= 0:
                b_y = b_y + (tl.full([ROWS, LOW.tile], 0.0, tl.float32),)
        b_ys = b_ys + (b_y,)
    for start in range(0, width, BLOCK):
        # [R, BLOCK]
        b_x = load_columns(p_x, o_r, stride_x, rows, start, width, BLOCK, EVEN)
        b_new = ()
        for j in tl.static_range(len(PARTS)):
            p_wh = p_w + (PARTS[j] * width + h * HEAD.dim).to(tl.int64) * stride_w
            b_sums = ()
            for i in tl.static_range(len(HEAD.pieces)):
                o_d = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
                # [P, BLOCK]
                b_w = load_columns(p_wh, o_d, stride_w, HEAD.dim, start, width, BLOCK, EVEN)
                b_sums = b_sums + (tl.dot(b_x, tl.trans(b_w), b_ys[j][i], input_precision=HEAD.precision),)
            if LOW is not None:
                if LOW.targets[PARTS[j]] >= 0:
                    p_a, stride_t, stride_h, stride_r = lora
                    p_ah = p_a + LOW.targets[PARTS[j]] * stride_t + h * stride_h
                    # [r, BLOCK]
                    b_a = load_columns(p_ah, tl.arange(0, LOW.tile), stride_r, LOW.rank, start, width, BLOCK, EVEN)
                    b_low = tl.dot(b_x, tl.trans(b_a), b_ys[j][len(HEAD.pieces)], input_precision=HEAD.precision)
                    b_sums = b_sums + (b_low,)
            b_new = b_new + (b_sums,)
        b_ys = b_new
    b_out = ()
    for j in tl.static_range(len(PARTS)):
        b_part = ()
        for i in tl.static_range(len(HEAD.pieces)):
            b_sum = b_ys[j][i]
            if LOW is not None:
                if LOW.targets[PARTS[j]] >= 0:
                    b_t = b_ys[j][len(HEAD.pieces)].to(p_x.dtype.element_ty)
                    b_sum = tl.dot(b_t, tl.trans(b_up[PARTS[j]][i]), b_sum, input_precision=HEAD.precision)
            if p_b is not None:
                o_b = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
                p_bias = p_b + PARTS[j] * width + h * HEAD.dim + o_b
                b_sum += tl.load(p_bias, mask=o_b < HEAD.dim, other=0.0).to(tl.float32)[None, :]
            b_part = b_part + (b_sum.to(p_x.dtype.element_ty),)
        b_out = b_out + (b_part,)
    return b_out


@triton.jit
def one_pass_fwd_kernel(
    x, weight, lora, p_gate, mask, p_tokens, token, p_o, p_lse, p_cls, heads, rows, tail_start, blocks, scale,
    TILES: tl.constexpr, EVEN: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
    POOL: tl.constexpr,
):  # fmt: skip
    """A program per (image, head): keys and values first, which stay on chip; then the queries, a block at a time."""
    h = tl.program_id(0) % heads
    b = (tl.program_id(0) // heads).to(tl.int64)
    b_mask = mask_of_head(mask, b, h)
    out = out_of_head(p_o, p_lse, p_gate, p_tokens, token, b, h, heads, rows, HEAD)
    x_b = (x[0] + b * x[1], x[2])
    lora_a = ()
    b_up = None
    if LOW is not None:
        lora_a = (lora[0], lora[1], lora[2], lora[3])
        b_up = load_up(lora[4], lora[5], h, heads, p_o.dtype.element_ty, HEAD, LOW)

    b_ks = ()
    b_vs = ()
    for c in tl.static_range(len(TILES.chunks)):
        o_n = TILES.chunks[c][0] + tl.arange(0, TILES.chunks[c][1])
        b_k, b_v = project_rows(
            x_b, weight, lora_a, b_up, o_n, rows, h, heads,
            (1, 2), TILES.chunks[c][1], TILES.block_n, EVEN, HEAD, LOW,
        )  # fmt: skip
        b_ks = b_ks + (b_k,)
        b_vs = b_vs + (b_v,)

    i_bh = b * heads + h
    for start in range(0, tail_start, TILES.block_m):
        o_m = start + tl.arange(0, TILES.block_m)
        b_q = project_rows(
            x_b, weight, lora_a, b_up, o_m, rows, h, heads, (0,), TILES.block_m, TILES.block_n, EVEN, HEAD, LOW
        )
        p_part = cls_of_block(p_cls, i_bh, start // TILES.block_m, blocks, HEAD, POOL)
        attend_chunks(
            b_q[0], b_ks, b_vs, None, b_mask, out, p_part, start, rows, scale,
            TILES.block_m, TILES, HEAD, None, CAUSAL, POOL,
        )  # fmt: skip
    if TILES.tail > 0:
        for start_tail in range(tail_start, rows, TILES.tail):
            o_t = start_tail + tl.arange(0, TILES.tail)
            b_qt = project_rows(
                x_b, weight, lora_a, b_up, o_t, rows, h, heads, (0,), TILES.tail, TILES.block_n, EVEN, HEAD, LOW
            )
            p_tail = cls_of_block(p_cls, i_bh, blocks - 1, blocks, HEAD, POOL)
            attend_chunks(
                b_qt[0], b_ks, b_vs, None, b_mask, out, p_tail, start_tail, rows, scale,
                TILES.tail, TILES, HEAD, None, CAUSAL, POOL,
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- launcher


def one_pass_fits(length: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a head's keys and values fit on chip, beside what projects them."""
    wide = sum(width for _, width in pieces_of(head_dim)) * dtype.itemsize
    rows = sum(rows for _, rows in chunks_of(length, 64)) if length else 0
    return 0 < length <= LONGEST and head_dim <= 128 and 2 * rows * wide <= 96 * 1024


def one_pass_tiles(arch: int, head_dim: int, length: int, dtype: torch.dtype) -> Tiles:
    """The tile table; block_n: columns of x at a time. Chosen with the compiler only (bf16, head size 64, rank 8).

    Up to 80 tokens nothing spills; at 197 8 bytes on sm_80, at 257 8 on sm_80 and 48 on sm_90.
    """
    block_m = 64 if length > 32 else 32 if length > 16 else 16
    tail = 16 if arch == 80 and 64 < length <= 80 else 0
    # Where one block of keys leaves registers for it, more of x is under way at a time.
    small = arch in (80, 90) and length <= (80 if arch == 90 else 64) and dtype != torch.float32 and head_dim <= 64
    warps = 8 if dtype == torch.float32 else 4
    return Tiles(chunks_of(length, 64), block_m, tail, 64 if small else 32, warps, 3 if small else 2)


def one_pass_fwd(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    num_heads: int,
    parts: tuple[int, ...] = (),
    scale: float = 1.0,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    pool: int | Tensor | str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Projection, attention and gates; where `one_pass_fits`.

    Args:
        x: `[B, N, D]`, fp16, bf16 or fp32; any strides, the last dimension contiguous.
        w_in, b_in: `[3D, D]`, `[3D]` or None, in x's dtype; rows of any stride.
        lora_A: `[T, H | 1, r, D]` in x's dtype, or None; its last dimension contiguous.
        lora_B: `[T, H, dh, r]` float32, or None.
        num_heads: H.
        parts: which of q (0), k (1), v (2) target t is, T of them.
        scale, gate, mask, causal, pool: as in `attention_fwd`.

    Returns o `[B, N, D]`, lse `[B, H, N]`, cls `[B, H, dh]` as `attention_fwd` does.
    """
    rows_of(x=x, w_in=w_in, lora_A=lora_A)
    B, N, D = x.shape
    dh = D // num_heads
    tiles = one_pass_tiles(architecture(x), dh, N, x.dtype)
    out = outputs_of(x, num_heads, dh, tiles, pool)
    lora, form = None, None
    if lora_A is not None and lora_B is not None:
        shared = lora_A.shape[1] < num_heads
        s_t, s_h, s_r = strides(lora_A, 0, 1, 2)
        lora = (lora_A, s_t, 0 if shared else s_h, s_r, packed(lora_B), float(scale))
        form = low_form(parts, lora_A.shape[2], shared)
    if mask is not None:
        mask = mask.expand(B, num_heads, N, N)
    launch(
        one_pass_fwd_kernel,
        (on_grid(B * num_heads, "one_pass_fwd"),),
        (x, *strides(x, 0, 1)),
        (w_in, w_in.stride(0), packed(b_in)),
        lora,
        packed(gate),
        None if mask is None else (mask, *strides(mask, 0, 1, 2, 3)),
        packed(pool) if isinstance(pool, Tensor) else None,
        pool % N if isinstance(pool, int) else 0,
        out.o,
        out.lse,
        out.parts,
        num_heads,
        N,
        out.tail_start,
        out.blocks,
        dh**-0.5 * math.log2(math.e),
        TILES=tiles,
        EVEN=D % tiles.block_n == 0,
        HEAD=Head(dh, pieces_of(dh), dot_precision(x.dtype)),
        LOW=form,
        CAUSAL=causal,
        POOL=out.pool,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out.o, out.lse, out.cls()
