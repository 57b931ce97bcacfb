"""Attention forward: every head's deltas, softmax and gate in one kernel; q, k and v are read where the projection's
product left them, `[B, N, 3E]`.

    q_h = q0_h + s·T_h B_hᵀ, the same for k and v where they have a delta;      T_h = x A_hᵀ
    o_h = g_h · softmax(q_h k_hᵀ / sqrt(dh) + mask) v_h                         lse_h = log Σ exp(…)

q0 is rounded already: a delta added to it and rounded again would vanish under half a unit in the last place. So it
stays a product of its own, as columns beside those of the head, with k = k0 + T_k (s·B_k)ᵀ:

    q kᵀ = q0 k0ᵀ + T_q (k s·B_q)ᵀ + (q0 s·B_k) T_kᵀ        P v = P v0 + (P T_v) (s·B_v)ᵀ

Sequences of ViT length keep k and v on chip, in chunks that add up to little more than N; longer ones stream them.
"""

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels import heads
from fastheads.kernels.launch import architecture, check_contiguous, launch, on_grid, packed
from fastheads.kernels.low_rank import LowRank, given
from fastheads.kernels.tiles import FORWARD, Row, Tiles, cdiv, row_for

# p_cls: `[B, H, 1 | blocks of queries, dh]`; not gated. token: the pooled one of every image, or
# the first of a mean; where p_tokens `[B]` is given each image has its own.
Pool = namedtuple("Pool", "p_cls p_tokens token")
OutOfHead = namedtuple("OutOfHead", "o p_lse gate p_cls token")


@triton.jit
def load_queries(q, b_up, o_m, rows, HEAD: tl.constexpr, LOW: tl.constexpr):
    """Queries as tiles `[R, P]`, and the columns of the deltas: T_q, q0 s·B_k."""
    dtype: tl.constexpr = q.p.dtype.element_ty
    b_q0 = heads.load_head(q, o_m, rows, HEAD, dtype)
    b_q = b_q0
    if len(b_up[0]) > 0:
        b_q = b_q + (heads.load_t(q, o_m, rows, LOW),)
    if len(b_up[1]) > 0:
        b_q = b_q + (heads.dot_over(b_q0, b_up[1], HEAD).to(dtype),)
    return b_q


@triton.jit
def load_keys(k, v, b_up, o_n, rows, HEAD: tl.constexpr, LOW: tl.constexpr):
    """Keys and values as tiles `[R, P]`, and the columns of the deltas: k s·B_q, T_k; T_v."""
    dtype: tl.constexpr = k.p.dtype.element_ty
    b_k0 = heads.load_head(k, o_n, rows, HEAD, dtype)
    b_k = b_k0
    b_v = heads.load_head(v, o_n, rows, HEAD, dtype)
    if len(b_up[0]) > 0:
        b_ku = heads.dot_over(b_k0, b_up[0], HEAD)
        if len(b_up[1]) > 0:
            # k is k0 + T_k s·B_kᵀ: the deltas' product with each other, small but at large deltas not nothing.
            b_uu = heads.dot_over(heads.transposed(b_up[1]), b_up[0], HEAD)
            b_ku = tl.dot(heads.load_t(k, o_n, rows, LOW), b_uu.to(dtype), b_ku, input_precision=HEAD.precision)
        b_k = b_k + (b_ku.to(dtype),)
    if len(b_up[1]) > 0:
        b_k = b_k + (heads.load_t(k, o_n, rows, LOW),)
    if len(b_up[2]) > 0:
        b_v = b_v + (heads.load_t(v, o_n, rows, LOW),)
    return b_k, b_v


@triton.jit
def softmax_step(
    state, b_q, b_k, b_v, o_m, o_n, rows, mask, EDGE: tl.constexpr, CAUSAL: tl.constexpr, HEAD: tl.constexpr
):
    """More keys: m' = max(m, S), l' = l·2^(m − m') + Σ 2^(S − m'), o' = o·2^(m − m') + 2^(S − m') v."""
    b_max, b_sum, b_acc = state
    # [M, N]
    b_s, factor = heads.scores(b_q, b_k, o_m[:, None], o_n[None, :], rows, mask, HEAD)
    b_s = heads.hide(b_s, o_m[:, None], o_n[None, :], rows, float("-inf"), EDGE, CAUSAL)
    b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)
    # A row whose keys are all masked has no maximum yet: subtract 0, not -inf.
    b_zero = tl.where(b_max_new == float("-inf"), 0.0, b_max_new)
    # Where no mask was added the scores are scaled here, at no cost: a multiply-add.
    b_p = tl.exp2(b_s * factor - b_zero[:, None])
    b_alpha = tl.exp2(b_max - b_zero)
    b_w = b_p.to(b_v[0].dtype)
    b_out = ()
    for i in tl.static_range(len(b_v)):
        b_out = b_out + (tl.dot(b_w, b_v[i], b_acc[i] * b_alpha[:, None], input_precision=HEAD.precision),)
    return b_max_new, b_sum * b_alpha + tl.sum(b_p, 1), b_out


@triton.jit
def softmax_of_none(ROWS: tl.constexpr, b_up, HEAD: tl.constexpr):
    """The running maximum m `[M]`, sum l `[M]` and outputs o, tiles `[M, P]`, before any key. b_up: that of v."""
    b_max, b_sum = tl.full([ROWS], float("-inf"), tl.float32), tl.full([ROWS], 0.0, tl.float32)
    return b_max, b_sum, heads.zero_head(ROWS, b_up, HEAD)


@triton.jit
def softmax_store(
    state, b_up, out, start, rows, ROWS: tl.constexpr, TILES: tl.constexpr, HEAD: tl.constexpr, POOL: tl.constexpr
):
    """o / l, and (P T_v / l) (s·B_v)ᵀ where v has a delta. The pooled token un-gated, in float32; all gated, then
    rounded once."""
    b_max, b_sum, b_acc = state
    o_m = start + tl.arange(0, ROWS)
    m_m = o_m < rows
    m_none = b_sum == 0.0
    b_sum = tl.where(m_none, 1.0, b_sum)
    b_inverse = (1.0 / b_sum)[:, None]
    b_out = ()
    for i in tl.static_range(len(HEAD.pieces)):
        # [M, P]
        b_o = b_acc[i] * b_inverse
        if len(b_up) > 0:
            b_pt = (b_acc[len(HEAD.pieces)] * b_inverse).to(b_up[i].dtype)
            b_o = tl.dot(b_pt, tl.trans(b_up[i]), b_o, input_precision=HEAD.precision)
        o_d = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
        m_d = o_d < HEAD.dim
        if POOL == "token":
            # A sum of one row: to store that row alone, the whole tile would go through shared memory.
            b_cls = tl.sum(tl.where((o_m == out.token)[:, None], b_o, 0.0), 0)
            here = (start <= out.token) & (out.token < tl.minimum(start + ROWS, rows))
            tl.store(out.p_cls + o_d, b_cls, mask=m_d & here)
        if POOL == "mean":
            p_cls = out.p_cls + start // TILES.block_m * HEAD.dim + o_d
            tl.store(p_cls, tl.sum(tl.where((m_m & (o_m >= out.token))[:, None], b_o, 0.0), 0), mask=m_d)
        b_out = b_out + (b_o,)
    tl.store(out.p_lse + o_m, tl.where(m_none, float("-inf"), (b_max + tl.log2(b_sum)) * heads.LN2), mask=m_m)
    heads.store_head(out.o, o_m, rows, b_out, out.gate, HEAD)


@triton.jit
def out_of_head(o, p_lse, p_gate, pool, b, h, rows, TILES: tl.constexpr, HEAD: tl.constexpr, POOL: tl.constexpr):
    """Where one head's outputs go, its gate, and the pooled token, or the first that a mean is over."""
    i_bh = b * HEAD.heads + h
    p_cls, token = i_bh, 0  # of the type that a field needs; without a POOL nobody reads them
    if POOL == "mean":
        p_cls = pool.p_cls + i_bh * tl.cdiv(rows, TILES.block_m) * HEAD.dim
        token = pool.token
    if POOL == "token":
        p_cls = pool.p_cls + i_bh * HEAD.dim
        token = pool.token
        if pool.p_tokens is not None:
            token = tl.load(pool.p_tokens + b)
    gate = heads.load_gate(p_gate, h, HEAD)
    return OutOfHead(heads.rows_of_head(o, b, h, HEAD), p_lse + i_bh * rows, gate, p_cls, token)


@triton.jit
def attend_chunks(
    b_q, b_ks, b_vs, b_up, mask, out, start, rows,
    ROWS: tl.constexpr, TILES: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Queries start … start + ROWS - 1 against all keys, which are on chip. b_up: v's."""
    o_m = start + tl.arange(0, ROWS)
    state = softmax_of_none(ROWS, b_up, HEAD)
    LAST: tl.constexpr = len(TILES.chunks) - 1
    for c in tl.static_range(len(TILES.chunks)):
        o_n = TILES.chunks[c][0] + tl.arange(0, TILES.chunks[c][1])
        # Only the last chunk has rows to spare; of the others a causal program skips those above the diagonal.
        if not CAUSAL or c == 0 or start + ROWS > TILES.chunks[c][0]:
            state = softmax_step(state, b_q, b_ks[c], b_vs[c], o_m, o_n, rows, mask, c == LAST, CAUSAL, HEAD)
    softmax_store(state, b_up, out, start, rows, ROWS, TILES, HEAD, POOL)


@triton.jit
def attention_fwd_kernel(
    qkv, delta, mask, p_gate, o, p_lse, pool, rows,
    TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """o_h = g_h · softmax(q_h k_hᵀ / sqrt(dh) + mask) v_h and lse_h; q, k, v with their deltas.

    With chunks a program per (image, head): keys and values `[N, dh]` stay on chip while the queries go by, block_m at
    a time. Else one per (image, head, block_m queries): keys and values stream by, block_n at a time.
    """
    blocks = 1 if len(TILES.chunks) > 0 else tl.cdiv(rows, TILES.block_m)
    b, h, i_block = heads.program(blocks, HEAD)
    q, k, v = heads.parts_of_head(qkv, delta, b, h, HEAD, LOW)
    b_up = heads.load_ups(delta, h, o.p.dtype.element_ty, HEAD, LOW)
    b_mask = heads.mask_of_head(mask, b, h)
    out = out_of_head(o, p_lse, p_gate, pool, b, h, rows, TILES, HEAD, POOL)
    if len(TILES.chunks) > 0:
        b_ks = ()
        b_vs = ()
        for c in tl.static_range(len(TILES.chunks)):
            o_n = TILES.chunks[c][0] + tl.arange(0, TILES.chunks[c][1])
            b_k, b_v = load_keys(k, v, b_up, o_n, rows, HEAD, LOW)
            b_ks = b_ks + (b_k,)
            b_vs = b_vs + (b_v,)
        full = rows - rows % TILES.block_m if TILES.tail > 0 else rows
        # Full blocks, then the tail, in a loop of one round: outside of a loop the compiler moves keys and values from
        # shared memory to registers.
        bounds = (0, full, rows)
        ROWS: tl.constexpr = (TILES.block_m, TILES.tail)
        for t in tl.static_range(2 if TILES.tail > 0 else 1):
            for start in range(bounds[t], bounds[t + 1], ROWS[t]):
                b_q = load_queries(q, b_up, start + tl.arange(0, ROWS[t]), rows, HEAD, LOW)
                attend_chunks(b_q, b_ks, b_vs, b_up[2], b_mask, out, start, rows, ROWS[t], TILES, HEAD, CAUSAL, POOL)
    else:
        # Where causal, the blocks with most keys start first, so that none is left over at the end.
        i_m = blocks - 1 - i_block
        o_m = i_m * TILES.block_m + tl.arange(0, TILES.block_m)
        b_q = load_queries(q, b_up, o_m, rows, HEAD, LOW)
        state = softmax_of_none(TILES.block_m, b_up[2], HEAD)
        last, full_keys = rows, rows // TILES.block_n * TILES.block_n
        if CAUSAL:
            last = tl.minimum(rows, (i_m + 1) * TILES.block_m)
            full_keys = i_m * TILES.block_m // TILES.block_n * TILES.block_n
        # Full blocks of keys, of which nothing is masked but by the mask given; then those at the edge.
        bounds = (0, full_keys, last)
        for edge in tl.static_range(2):
            for start in range(bounds[edge], bounds[edge + 1], TILES.block_n):
                o_n = start + tl.arange(0, TILES.block_n)
                b_k, b_v = load_keys(k, v, b_up, o_n, rows, HEAD, LOW)
                state = softmax_step(state, b_q, b_k, b_v, o_m, o_n, rows, b_mask, edge, CAUSAL and edge, HEAD)
        softmax_store(state, b_up[2], out, i_m * TILES.block_m, rows, TILES.block_m, TILES, HEAD, POOL)


def attend(
    kernel: Any, blocks: int, inputs: tuple[Any, ...], x: Tensor, tiles: Tiles, head: heads.Head, low: heads.Low, *,
    gate: Tensor | None, mask: Tensor | None, causal: bool, pool: int | Tensor | str | slice | None, **meta: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Launches `kernel` on its inputs, `blocks` programs for each head of x `[B, N, …]`: o, lse, cls.

    meta: what else it is compiled for.
    """
    B, N = x.shape[:2]
    o = torch.empty(B, N, head.heads * head.dim, dtype=x.dtype, device=x.device)
    lse = torch.empty(B, head.heads, N, dtype=torch.float32, device=x.device)
    form = None if pool is None else "mean" if isinstance(pool, (str, slice)) else "token"
    first = pool.start if isinstance(pool, slice) else 1 if form == "mean" else 0
    cls, pooled = None, None
    if form is not None:
        parts = max(1, cdiv(N, tiles.block_m)) if form == "mean" else 1  # every block of queries has its own
        cls = torch.empty(B, head.heads, parts, head.dim, dtype=torch.float32, device=x.device)
        tokens = pool if isinstance(pool, Tensor) else None
        if tokens is not None or not N:
            cls.fill_(float("nan"))  # what a token that is not there leaves
        pooled = Pool(cls, packed(tokens), pool % N if isinstance(pool, int) and N else first)
    grid = (on_grid(B * head.heads * blocks, "attention_fwd"),)
    outputs = (heads.as_mask(mask, B, head.heads, N), packed(gate), heads.as_rows(o), lse, pooled, N)
    launch(kernel, grid, *inputs, *outputs, **heads.compiled_for(tiles, head, low, causal), POOL=form, **meta)
    if cls is not None:
        cls = cls.sum(2) / (N - first) if form == "mean" else cls.view(B, head.heads, head.dim)
    return o, lse, cls


def attention_fwd(
    qkv: Tensor,
    *,
    num_heads: int,
    gate: Tensor | None = None,
    gate_form: str = "",
    mask: Tensor | None = None,
    causal: bool = False,
    delta: LowRank | None = None,
    pool: int | Tensor | str | slice | None = None,
    _row: Row | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of every head, and its pooled token.

    Args:
        qkv: `[B, N, 3E]`, fp16, bf16 or fp32; any strides, the last dimension contiguous.
        num_heads: H.
        gate: `[H]` float32; their values, or with a gate_form (of `reference.GATES`) theta.
        mask: broadcasts to `[B, H, N, N]`: boolean, True = masked, or additive, of any float dtype; any strides.
        causal: token i sees tokens 0 … i.
        delta: each head's low-rank delta to q, k or v.
        pool: which token's heads to return: an index, int64 `[B]`, `"mean"` over tokens 1 … N-1, or a
            slice(first, None) over these. Where an image's
            index is not in 0 … N-1, and of no tokens, they are NaN.

    Returns o `[B, N, E]`, gated, in qkv's dtype; lse `[B, H, N]` float32, natural log; cls `[B, H, dh]` float32,
    un-gated, or None. A row that sees no key is 0, its lse -inf.
    """
    check_contiguous(qkv=qkv)
    N, dh = qkv.shape[1], qkv.shape[2] // 3 // num_heads
    on_chip, low, deltas = given(delta)
    row = _row or row_for(FORWARD, architecture(qkv), dh, N, qkv.dtype, deltas=deltas, rank=low.rank)
    tiles, head = row.tiles(N), heads.head_of(num_heads, dh, qkv.dtype, gate_form)
    kernel, blocks = attention_fwd_kernel, 1 if tiles.chunks else cdiv(N, tiles.block_m)
    inputs = (heads.as_rows(qkv), on_chip)
    return attend(kernel, blocks, inputs, qkv, tiles, head, low, gate=gate, mask=mask, causal=causal, pool=pool)
