"""Head attention in one pass: a program per (image, head) projects its own queries, keys and values, which never reach
memory, attends and gates.

    q_h = x W_q,hᵀ + (x A_hᵀ) (s·B_h)ᵀ + b_q,h        the same for k and v; in float32, rounded once

Every head reads all of x, so this is for short sequences and small batches, and for where memory runs out.
"""

from collections import namedtuple
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels import heads
from fastheads.kernels.attention_fwd import attend, attend_chunks, out_of_head
from fastheads.kernels.launch import architecture, check_contiguous, packed, strides
from fastheads.kernels.tiles import ONE_PASS, row_for

# W `[3E, D]`, bias `[3E]` or None; A `[T, H | 1, r, D]`, stride_h 0 where heads share it, B `[T, H, dh, r]`, scale s.
Weight = namedtuple("Weight", "p stride p_bias")
Lora = namedtuple("Lora", "p stride_t stride_h stride_r p_up scale")


@triton.jit
def add_columns(
    b_y, b_x, weight, lora, start, width, h,
    PART: tl.constexpr, TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """y + x Wᵀ, tiles `[R, P]`, and T + x Aᵀ beside them, for some columns of x."""
    b_sums = ()
    p_w = weight.p + ((PART * HEAD.heads + h) * HEAD.dim).to(tl.int64) * weight.stride
    for i in tl.static_range(len(HEAD.pieces)):
        o_d = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
        # [P, block_n]
        b_w = heads.load_tile(p_w, o_d, weight.stride, HEAD.dim, start, TILES.block_n, width, RAGGED)
        b_sums = b_sums + (tl.dot(b_x, tl.trans(b_w), b_y[i], input_precision=HEAD.precision),)
    if LOW.target_of[PART] >= 0:
        p_a = lora.p + LOW.target_of[PART] * lora.stride_t + h * lora.stride_h
        # [r, block_n]
        o_a = tl.arange(0, LOW.tile)
        b_a = heads.load_tile(p_a, o_a, lora.stride_r, LOW.rank, start, TILES.block_n, width, RAGGED)
        b_sums = b_sums + (tl.dot(b_x, tl.trans(b_a), b_y[len(HEAD.pieces)], input_precision=HEAD.precision),)
    return b_sums


@triton.jit
def add_rest(b_y, b_up, p_bias, dtype: tl.constexpr, h, PART: tl.constexpr, HEAD: tl.constexpr):
    """y + T (s·B)ᵀ + b, rounded once. b_up: s·B of the part, or ()."""
    b_out = ()
    for i in tl.static_range(len(HEAD.pieces)):
        b_sum = b_y[i]
        if len(b_up) > 0:
            b_t = b_y[len(HEAD.pieces)].to(dtype)
            b_sum = tl.dot(b_t, tl.trans(b_up[i]), b_sum, input_precision=HEAD.precision)
        if p_bias is not None:
            o_d = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
            p_b = p_bias + (PART * HEAD.heads + h) * HEAD.dim + o_d
            b_sum += tl.load(p_b, mask=o_d < HEAD.dim, other=0.0).to(tl.float32)[None, :]
        b_out = b_out + (b_sum.to(dtype),)
    return b_out


@triton.jit
def project_rows(
    x, weight, lora, b_up, first, rows, width, h,
    PARTS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """The parts (of q 0, k 1, v 2) of one head for ROWS rows of x: for each a tuple of tiles `[R, P]`."""
    o_r = first + tl.arange(0, ROWS)
    b_ys = ()
    for j in tl.static_range(len(PARTS)):
        b_ys = b_ys + (heads.zero_head(ROWS, b_up[PARTS[j]], HEAD),)
    # width is D, known at run time only: a loop of known length would be unrolled.
    for start in range(0, width, TILES.block_n):
        # [R, block_n]
        b_x = heads.load_tile(x.p, o_r, x.stride, rows, start, TILES.block_n, width, RAGGED)
        b_new = ()
        for j in tl.static_range(len(PARTS)):
            b_new = b_new + (
                add_columns(b_ys[j], b_x, weight, lora, start, width, h, PARTS[j], TILES, HEAD, LOW, RAGGED),
            )
        b_ys = b_new
    b_out = ()
    for j in tl.static_range(len(PARTS)):
        b_out = b_out + (add_rest(b_ys[j], b_up[PARTS[j]], weight.p_bias, x.p.dtype.element_ty, h, PARTS[j], HEAD),)
    return b_out


@triton.jit
def one_pass_fwd_kernel(
    x, weight, lora, width, mask, p_gate, o, p_lse, pool, rows,
    TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr, POOL: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """o_h = g_h · softmax(q_h k_hᵀ / sqrt(dh) + mask) v_h and lse_h of x `[N, D]`.

    A program per (image, head): keys and values first, which stay on chip; then the queries, a block at a time.
    """
    b, h, _ = heads.program(1, HEAD)
    x_b = heads.rows_of_head(x, b, 0, HEAD)
    b_up = heads.load_ups(lora, h, o.p.dtype.element_ty, HEAD, LOW)
    b_mask = heads.mask_of_head(mask, b, h)
    out = out_of_head(o, p_lse, p_gate, pool, b, h, rows, TILES, HEAD, POOL)
    b_ks = ()
    b_vs = ()
    for c in tl.static_range(len(TILES.chunks)):
        b_k, b_v = project_rows(
            x_b, weight, lora, b_up, TILES.chunks[c][0], rows, width, h,
            (1, 2), TILES.chunks[c][1], TILES, HEAD, LOW, RAGGED,
        )  # fmt: skip
        b_ks = b_ks + (b_k,)
        b_vs = b_vs + (b_v,)
    full = rows - rows % TILES.block_m if TILES.tail > 0 else rows
    bounds = (0, full, rows)  # as in attention_fwd_kernel
    ROWS: tl.constexpr = (TILES.block_m, TILES.tail)
    for t in tl.static_range(2 if TILES.tail > 0 else 1):
        for start in range(bounds[t], bounds[t + 1], ROWS[t]):
            b_q = project_rows(x_b, weight, lora, b_up, start, rows, width, h, (0,), ROWS[t], TILES, HEAD, LOW, RAGGED)
            # (): v is complete, its delta is in b_vs
            attend_chunks(b_q[0], b_ks, b_vs, (), b_mask, out, start, rows, ROWS[t], TILES, HEAD, CAUSAL, POOL)


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
    gate_form: str = "",
    mask: Tensor | None = None,
    causal: bool = False,
    pool: int | Tensor | str | slice | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Projection, attention and gates; where `tiles.one_pass_fits`.

    Args:
        x: `[B, N, D]`, fp16, bf16 or fp32; any strides, the last dimension contiguous.
        w_in, b_in: `[3E, D]`, `[3E]` or None, in x's dtype; rows of any stride.
        lora_A: `[T, H | 1, r, D]` in x's dtype, or None; its last dimension contiguous.
        lora_B: `[T, H, dh, r]` float32, or None.
        num_heads: H.
        parts: which of q (0), k (1), v (2) target t is, T of them.
        scale: s.
        gate, gate_form, mask, causal, pool: as in `attention_fwd`.

    Returns o `[B, N, E]`, lse `[B, H, N]`, cls `[B, H, dh]` as `attention_fwd` does.
    """
    check_contiguous(x=x, w_in=w_in, lora_A=lora_A)
    N, dh = x.shape[1], w_in.shape[0] // 3 // num_heads
    tiles = row_for(ONE_PASS, architecture(x), dh, N, x.dtype).tiles(N)
    lora, low, head = None, heads.Low(), heads.head_of(num_heads, dh, x.dtype, gate_form)
    if lora_A is not None and lora_B is not None:
        low = heads.low_of(parts, lora_A.shape[2], lora_A.shape[1] < num_heads)
        s_t, s_h, s_r = strides(lora_A, 0, 1, 2)
        lora = Lora(lora_A, s_t, 0 if low.shared else s_h, s_r, packed(lora_B), float(scale))
    inputs = (heads.as_rows(x), Weight(w_in, w_in.stride(0), packed(b_in)), lora, x.shape[2])
    more: Any = {"gate": gate, "mask": mask, "causal": causal, "pool": pool, "RAGGED": x.shape[2] % tiles.block_n != 0}
    return attend(one_pass_fwd_kernel, 1, inputs, x, tiles, head, low, **more)
