"""Attention forward with per-head gates and, by a compile-time switch, per-head low-rank deltas; q, k, v are read where
the projection's GEMM left them, `[B, N, 3D]`.

    y_t = y0_t + scale · low_t up_tᵀ  for targets t of q, k, v;    o_h = gate_h · softmax(q kᵀ / sqrt(dh) + mask) v

y0 is rounded already: a delta added to it and rounded again would vanish under half a unit in the last place. So it
stays a product of its own, as columns beside those of the head (T = low, U = scale · up):

    q kᵀ = q0 k0ᵀ + T_q (k U_q)ᵀ + (q0 U_k) T_kᵀ        P v = P v0 + (P T_v) U_vᵀ

Sequences of ViT length keep k and v on chip, in chunks that add up to little more than N; longer ones stream them.
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
    attend_keys,
    attend_none,
    attend_store,
    chunks_of,
    cls_of_block,
    load_head,
    load_tile,
    load_up,
    low_form,
    mask_of_head,
    out_of_head,
    outputs_of,
    pieces_of,
)
from fastheads.kernels.launch import architecture, dot_precision, launch, on_grid, packed, rows_of, strides
from fastheads.kernels.low_rank import LowRank

LONGEST_ON_CHIP = 272  # 257 tokens, and what a multiple of 16 adds


def tiles_of(arch: int, head_dim: int, length: int, dtype: torch.dtype, deltas: int = 0, rank: int = 0) -> Tiles:
    """The tile table; `deltas`: how many of q, k, v have one, of `rank`.

    Chosen with the compiler only: bf16, without deltas and with those of q and v at rank 8, nothing spills.
    """
    columns = sum(width for _, width in pieces_of(head_dim))
    low = deltas * max(16, triton.next_power_of_2(rank))
    if dtype == torch.float32:
        return Tiles((), 64, 0, 32 if columns <= 64 else 16, 8, 1)
    if arch == 80:
        # Keys, values and the deltas' columns beside them, of 163 KB, of which queries and up-projections need a fifth.
        fits = triton.cdiv(length, 16) * 16 * 2 * (2 * columns + low) <= 128 * 1024
        # Of 80 columns more keys than these spill.
        if length <= (LONGEST_ON_CHIP if columns <= 64 else 80) and columns <= 80 and fits:
            # 16 more queries are as dear as 64 where the head's last tile is 16 wide: every warp does all of them.
            tail = 16 if columns <= 64 and length > 64 and 0 < length % 64 <= 16 else 0
            return on_chip(length, 128, tail)
        if deltas:
            return Tiles((), 64, 0, 32 if columns <= 80 else 16, 4, 2)
        return Tiles((), 128, 0, 64, 8, 3) if columns <= 64 else Tiles((), 64, 0, 64, 4, 2)
    if arch == 90:
        # Of what stays on chip every address is kept in registers: three deltas, or two at 80 columns, are too many.
        longest = LONGEST_ON_CHIP if columns <= 64 and deltas < 3 else 208 if columns <= 80 and not deltas else 80
        if length <= longest and columns <= 80:
            return on_chip(length, 64 if deltas and length > 208 else 128, 0)
        if length <= LONGEST_ON_CHIP:
            return Tiles((), 64, 0, 64, 4, 2)
        return Tiles((), 128, 0, 64, 4, 3) if columns <= 64 and not deltas else Tiles((), 128, 0, 64, 8, 2)
    # Chips that nobody has looked at, and the interpreter.
    return Tiles((), 64, 0, 32, 4, 1)


def on_chip(length: int, largest: int, tail: int) -> Tiles:
    """Keys on chip in chunks of at most `largest` rows."""
    return Tiles(chunks_of(length, largest), 64 if length > 32 else 32 if length > 16 else 16, tail, 0, 4, 1)


# --------------------------------------------------------------------------------------------------------- deltas


@triton.jit
def load_low(p_low, o_r, stride, rows, h, heads, part: tl.constexpr, LOW: tl.constexpr):
    """T of one head for q, k or v, `[R, r]`."""
    if LOW.shared:
        column = LOW.targets[part] * LOW.rank
    else:
        column = (LOW.targets[part] * heads + h) * LOW.rank
    return load_tile(p_low + column, o_r, stride, rows, 0, LOW.tile, LOW.rank)


@triton.jit
def dot_up(b_x, b_up, HEAD: tl.constexpr):
    """x U, `[R, r]` in float32, of tiles `[R, P]` and `[P, r]`."""
    b_y = tl.dot(b_x[0], b_up[0], input_precision=HEAD.precision)
    for i in tl.static_range(1, len(b_up)):
        b_y = tl.dot(b_x[i], b_up[i], b_y, input_precision=HEAD.precision)
    return b_y


@triton.jit
def load_queries(p_q, o_m, stride, rows, p_low, stride_low, b_up, h, heads, HEAD: tl.constexpr, LOW: tl.constexpr):
    """Queries as tiles `[R, P]`, and the columns of the deltas: T_q, q0 U_k."""
    b_q0 = load_head(p_q, o_m, stride, rows, HEAD)
    b_q = b_q0
    if LOW is not None:
        if LOW.targets[0] >= 0:
            b_q = b_q + (load_low(p_low, o_m, stride_low, rows, h, heads, 0, LOW),)
        if LOW.targets[1] >= 0:
            b_q = b_q + (dot_up(b_q0, b_up[1], HEAD).to(b_q0[0].dtype),)
    return b_q


@triton.jit
def load_keys(p_q, o_n, stride, rows, p_low, stride_low, b_up, h, heads, HEAD: tl.constexpr, LOW: tl.constexpr):
    """Keys and values as tiles `[R, P]`, and the columns of the deltas: k U_q, T_k; T_v. They lie D and 2D after q."""
    p_k = p_q + heads * HEAD.dim
    p_v = p_k + heads * HEAD.dim
    b_k0 = load_head(p_k, o_n, stride, rows, HEAD)
    b_k = b_k0
    b_v = load_head(p_v, o_n, stride, rows, HEAD)
    if LOW is not None:
        dtype: tl.constexpr = b_k0[0].dtype
        if LOW.targets[0] >= 0:
            b_ku = dot_up(b_k0, b_up[0], HEAD)
            if LOW.targets[1] >= 0:
                # k is k0 + T_k U_kᵀ: the deltas' product with each other, small but at large deltas not nothing.
                b_uu = tl.dot(tl.trans(b_up[1][0]), b_up[0][0], input_precision=HEAD.precision)
                for i in tl.static_range(1, len(HEAD.pieces)):
                    b_uu = tl.dot(tl.trans(b_up[1][i]), b_up[0][i], b_uu, input_precision=HEAD.precision)
                b_tk = load_low(p_low, o_n, stride_low, rows, h, heads, 1, LOW)
                b_ku = tl.dot(b_tk, b_uu.to(dtype), b_ku, input_precision=HEAD.precision)
            b_k = b_k + (b_ku.to(dtype),)
        if LOW.targets[1] >= 0:
            b_k = b_k + (load_low(p_low, o_n, stride_low, rows, h, heads, 1, LOW),)
        if LOW.targets[2] >= 0:
            b_v = b_v + (load_low(p_low, o_n, stride_low, rows, h, heads, 2, LOW),)
    return b_k, b_v


# -------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def attention_fwd_chunks_kernel(
    p_qkv, stride_b, stride_n, p_gate, mask, low, p_tokens, token, p_o, p_lse, p_cls, heads, rows, tail_start, blocks,
    scale, TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """A program per (image, head): its keys and values stay on chip while the queries go by."""
    h = tl.program_id(0) % heads
    b = (tl.program_id(0) // heads).to(tl.int64)
    p_q = p_qkv + b * stride_b + h * HEAD.dim
    b_mask = mask_of_head(mask, b, h)
    out = out_of_head(p_o, p_lse, p_gate, p_tokens, token, b, h, heads, rows, HEAD)
    p_low = None
    stride_low = None
    b_up = None
    if LOW is not None:
        p_low = low[0] + b * low[1]
        stride_low = low[2]
        b_up = load_up(low[3], low[4], h, heads, p_o.dtype.element_ty, HEAD, LOW)

    b_ks = ()
    b_vs = ()
    for c in tl.static_range(len(TILES.chunks)):
        o_n = TILES.chunks[c][0] + tl.arange(0, TILES.chunks[c][1])
        b_k, b_v = load_keys(p_q, o_n, stride_n, rows, p_low, stride_low, b_up, h, heads, HEAD, LOW)
        b_ks = b_ks + (b_k,)
        b_vs = b_vs + (b_v,)

    i_bh = b * heads + h
    for start in range(0, tail_start, TILES.block_m):
        o_m = start + tl.arange(0, TILES.block_m)
        b_q = load_queries(p_q, o_m, stride_n, rows, p_low, stride_low, b_up, h, heads, HEAD, LOW)
        p_part = cls_of_block(p_cls, i_bh, start // TILES.block_m, blocks, HEAD, POOL)
        attend_chunks(
            b_q, b_ks, b_vs, b_up, b_mask, out, p_part, start, rows, scale,
            TILES.block_m, TILES, HEAD, LOW, CAUSAL, POOL,
        )  # fmt: skip
    if TILES.tail > 0:
        # A loop of one round: outside of one, keys and values would leave shared memory for registers.
        for start_tail in range(tail_start, rows, TILES.tail):
            o_t = start_tail + tl.arange(0, TILES.tail)
            b_qt = load_queries(p_q, o_t, stride_n, rows, p_low, stride_low, b_up, h, heads, HEAD, LOW)
            p_tail = cls_of_block(p_cls, i_bh, blocks - 1, blocks, HEAD, POOL)
            attend_chunks(
                b_qt, b_ks, b_vs, b_up, b_mask, out, p_tail, start_tail, rows, scale,
                TILES.tail, TILES, HEAD, LOW, CAUSAL, POOL,
            )  # fmt: skip


@triton.jit
def attention_fwd_stream_kernel(
    p_qkv, stride_b, stride_n, p_gate, mask, low, p_tokens, token, p_o, p_lse, p_cls, heads, rows, tail_start, blocks,
    scale, TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """A program per (image, head, block of queries): keys and values stream by."""
    # Causal: the blocks with most keys first, so that none is left over at the end.
    i_m = blocks - 1 - tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % heads
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    p_q = p_qkv + b * stride_b + h * HEAD.dim
    b_mask = mask_of_head(mask, b, h)
    out = out_of_head(p_o, p_lse, p_gate, p_tokens, token, b, h, heads, rows, HEAD)
    p_low = None
    stride_low = None
    b_up = None
    if LOW is not None:
        p_low = low[0] + b * low[1]
        stride_low = low[2]
        b_up = load_up(low[3], low[4], h, heads, p_o.dtype.element_ty, HEAD, LOW)

    o_m = i_m * TILES.block_m + tl.arange(0, TILES.block_m)
    b_q = load_queries(p_q, o_m, stride_n, rows, p_low, stride_low, b_up, h, heads, HEAD, LOW)
    state = attend_none(TILES.block_m, HEAD, LOW)
    # Whole blocks of keys first: nothing of them is masked but by the mask given.
    last = rows
    whole = rows // TILES.block_n * TILES.block_n
    if CAUSAL:
        last = tl.minimum(rows, (i_m + 1) * TILES.block_m)
        whole = i_m * TILES.block_m // TILES.block_n * TILES.block_n
    for start in range(0, whole, TILES.block_n):
        o_n = start + tl.arange(0, TILES.block_n)
        b_k, b_v = load_keys(p_q, o_n, stride_n, rows, p_low, stride_low, b_up, h, heads, HEAD, LOW)
        state = attend_keys(state, b_q, b_k, b_v, o_m, o_n, rows, b_mask, scale, False, False, HEAD)
    for start_edge in range(whole, last, TILES.block_n):
        o_e = start_edge + tl.arange(0, TILES.block_n)
        b_ke, b_ve = load_keys(p_q, o_e, stride_n, rows, p_low, stride_low, b_up, h, heads, HEAD, LOW)
        state = attend_keys(state, b_q, b_ke, b_ve, o_m, o_e, rows, b_mask, scale, True, CAUSAL, HEAD)
    attend_store(state, b_up, out, cls_of_block(p_cls, b * heads + h, i_m, blocks, HEAD, POOL), o_m, rows, HEAD, POOL)


# ------------------------------------------------------------------------------------------------------- launcher


def attention_fwd(
    qkv: Tensor,
    *,
    num_heads: int,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    delta: LowRank | None = None,
    pool: int | Tensor | str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of every head, and its pooled token.

    Args:
        qkv: `[B, N, 3D]`, fp16, bf16 or fp32; any strides, the last dimension contiguous.
        num_heads: H.
        gate: `[H]` float32.
        mask: broadcasts to `[B, H, N, N]`: boolean, True = masked, or additive, of any float dtype; any strides.
        causal: token i sees tokens 0 … i.
        delta: each head's low-rank delta to q, k or v.
        pool: which token's heads to return: an index, int64 `[B]`, or `"mean"` over tokens 1 … N-1. Where an image's
            index is not in 0 … N-1 they are NaN.

    Returns o `[B, N, D]`, gated, in qkv's dtype; lse `[B, H, N]` float32, natural log; cls `[B, H, dh]` float32,
    un-gated, or None. A row that sees no key is 0, its lse -inf.
    """
    rows_of(qkv=qkv)
    B, N, _ = qkv.shape
    dh = qkv.shape[2] // 3 // num_heads
    deltas, rank = (0, 0) if delta is None else (len(delta.parts), delta.up.shape[-1])
    tiles = tiles_of(architecture(qkv), dh, N, qkv.dtype, deltas, rank)
    out = outputs_of(qkv, num_heads, dh, tiles, pool)
    low, form = None, None
    if delta is not None:
        rows_of(low=delta.low)
        low = (delta.low, *strides(delta.low, 0, 1), packed(delta.up), float(delta.scale))
        form = low_form(delta.parts, delta.up.shape[-1], delta.shared)
    if mask is not None:
        mask = mask.expand(B, num_heads, N, N)
    kernel, programs = attention_fwd_stream_kernel, B * num_heads * out.blocks
    if tiles.chunks:
        kernel, programs = attention_fwd_chunks_kernel, B * num_heads
    launch(
        kernel,
        (on_grid(programs, "attention_fwd"),),
        qkv,
        *strides(qkv, 0, 1),
        packed(gate),
        None if mask is None else (mask, *strides(mask, 0, 1, 2, 3)),
        low,
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
        HEAD=Head(dh, pieces_of(dh), dot_precision(qkv.dtype)),
        LOW=form,
        CAUSAL=causal,
        POOL=out.pool,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out.o, out.lse, out.cls()
