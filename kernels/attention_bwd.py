"""Attention backward: dQ, dK, dV and the gate's gradient from qkv, the log-sum-exp and dO alone, for every head h.

    P = exp(q kᵀ / sqrt(dh) + mask − lse)     dP = dO Vᵀ      δ_i = Σ_j P_ij dP_ij     dg_h = Σ_{b,i} δ_i
    dS = g P ∘ (dP − δ) / sqrt(dh)            dQ = dS K                      dK = dSᵀ Q               dV = g Pᵀ dO

dO is the gradient of the gated output, not multiplied by g. δ_i is the mean of row i of dP under P: in code b_mean and
p_mean, for delta is LoRA's. Nothing reads the output o: δ comes from a whole row of keys, so dg is right at g = 0 too.
Each form is right for some problems (`tiles.BACKWARD`); its products, of `[N, dh]` and `[dh, N]`, are what it costs:

    at once   all keys on chip, with their dK and dV; queries go by: S, dP, dQ, dK, dV                           5
    apart     δ and dQ (S, dP; again, and dQ), then dK and dV (S, dP, dK, dV), in one launch or two              9

q, k and v are with their deltas, y0 + s·T_h B_hᵀ, rounded as `heads.load_part` says, and so is dY.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels import heads
from fastheads.kernels.launch import architecture, check_contiguous, launch, on_grid, packed
from fastheads.kernels.low_rank import LowRank, given
from fastheads.kernels.tiles import BACKWARD, Row, cdiv, is_spread, row_for

# One head of one image. gate: () without gates; (g,), made at the start, where all is one launch; else (pointer to all,
# h), for each of two launches to make it at its end: at the start takes sm_80 168 registers for 128 in the query sweep,
# and spills 8 bytes at head size 80.
# p_lse: as the forward left it; p_mean, p_inverse: δ and 1 / ΣP of each query, from a first sweep for a second; ()
# where there is one alone.
Problem = namedtuple("Problem", "q k v do dq dk dv mask gate p_lse p_mean p_inverse")


@triton.jit
def problem_of(
    do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, b, h, rows,
    TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    q, k, v = heads.parts_of_head(qkv, delta, b, h, HEAD, LOW)
    dq = heads.rows_of_head(dqkv, b, h, HEAD)
    dk = heads.rows_of_head(dqkv, b, HEAD.heads + h, HEAD)
    dv = heads.rows_of_head(dqkv, b, 2 * HEAD.heads + h, HEAD)
    do_h, b_mask = heads.rows_of_head(do, b, h, HEAD), heads.mask_of_head(mask, b, h)
    b_gate = ()
    if p_gate is not None:
        if TILES.one_launch or len(TILES.chunks) > 0:
            b_gate = (heads.load_gate(p_gate, h, HEAD),)
        else:
            b_gate = (p_gate, h)
    o_l = (b * HEAD.heads + h) * rows
    p_mean = ()
    p_inverse = ()
    if p_scratch is not None:
        p_mean = p_scratch + 2 * o_l
        p_inverse = p_mean + rows
    return Problem(q, k, v, do_h, dq, dk, dv, b_mask, b_gate, p_lse + o_l, p_mean, p_inverse)


@triton.jit
def gate_of(x, HEAD: tl.constexpr):
    """g of the head, from whichever form it has."""
    b_gate = 1.0
    if len(x.gate) == 1:
        b_gate = x.gate[0]
    if len(x.gate) == 2:
        b_gate = heads.load_gate(x.gate[0], x.gate[1], HEAD)
    return b_gate


@triton.jit
def load_lse(p_lse, o_m, rows):
    """lse in base 2. Rows that see nothing, and rows that aren't there, get +inf: their P is 0, never NaN. So do rows
    that see only keys masked by a huge number, where float32's numbers are 1 or more apart: at −1e9 exp(S − lse) is
    anything from 0 to infinity. They pass no gradient, though the forward gave them an output."""
    b_lse = tl.load(p_lse + o_m, mask=o_m < rows, other=float("inf")) * heads.LOG2E
    return tl.where(b_lse < -1.2e7, float("inf"), b_lse)  # -1 / float32's epsilon, in base 2


@triton.jit
def probabilities(b_x, b_y, b_lse, o_m, o_n, rows, mask, CAUSAL: tl.constexpr, HEAD: tl.constexpr):
    """exp(S − lse) of queries and keys, or its transpose, as `scores` takes them; b_lse broadcasts as o_m does."""
    b_s, factor = heads.scores(b_x, b_y, o_m, o_n, rows, mask, HEAD)
    return heads.hide(tl.exp2(b_s * factor - b_lse), o_m, o_n, rows, 0.0, True, CAUSAL)


@triton.jit
def load_keys(x, start, rows, ROWS: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr):
    """Keys and values start … start + ROWS - 1 with their deltas, and which they are."""
    o_n = start + tl.arange(0, ROWS)
    return heads.load_part(x.k, o_n, rows, HEAD, LOW), heads.load_part(x.v, o_n, rows, HEAD, LOW), o_n


@triton.jit
def load_queries(x, first, rows, ROWS: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr):
    """Queries first … first + ROWS - 1 with their delta, their dO and lse, and which they are."""
    o_m = first + tl.arange(0, ROWS)
    b_q = heads.load_part(x.q, o_m, rows, HEAD, LOW)
    return b_q, heads.load_head(x.do, o_m, rows, HEAD, b_q[0].dtype), load_lse(x.p_lse, o_m, rows), o_m


@triton.jit
def inverse_of(b_sum):
    """1 / ΣP of each query; 1 where it sees nothing.

    Rows of exp(S − lse) sum to 1 only as far as lse is exact and q and k are rounded here as they were for it, and
    where they don't, a common mean of dP would stay in dS: so they are divided by their sum. Not by a corrected lse: at
    −1e6 the correction would be rounded away.
    """
    return 1.0 / tl.where(b_sum > 0, b_sum, 1.0)


@triton.jit
def rows_at_once(
    x, b_ks, b_vs, b_dks, b_dvs, first, rows,
    ROWS: tl.constexpr, TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """All that comes of the queries first … first + ROWS - 1: Σ δ, and dK and dV with their part added; writes dQ."""
    b_q, b_do, b_lse, o_m = load_queries(x, first, rows, ROWS, HEAD, LOW)
    b_mean = tl.zeros([ROWS], tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_ps = ()
    b_dps = ()
    for c in tl.static_range(len(TILES.chunks)):
        o_c = TILES.chunks[c][0] + tl.arange(0, TILES.chunks[c][1])
        # [M, chunk]
        b_p = probabilities(b_q, b_ks[c], b_lse[:, None], o_m[:, None], o_c[None, :], rows, x.mask, CAUSAL, HEAD)
        b_dp = heads.dot_over(b_do, heads.transposed(b_vs[c]), HEAD)
        b_mean += tl.sum(b_p * b_dp, 1)
        b_sum += tl.sum(b_p, 1)
        b_ps = b_ps + (b_p,)
        b_dps = b_dps + (b_dp,)
    b_inverse = inverse_of(b_sum)
    b_mean = b_mean * b_inverse
    b_dq = heads.zero_head(ROWS, (), HEAD)
    b_dk = ()
    b_dv = ()
    for c in tl.static_range(len(TILES.chunks)):
        b_p = b_ps[c] * b_inverse[:, None]
        b_dv = b_dv + (heads.add_product(b_dvs[c], tl.trans(b_p.to(b_do[0].dtype)), b_do, HEAD),)
        b_ds = (b_p * (b_dps[c] - b_mean[:, None])).to(b_q[0].dtype)
        b_dk = b_dk + (heads.add_product(b_dks[c], tl.trans(b_ds), b_q, HEAD),)
        b_dq = heads.add_product(b_dq, b_ds, b_ks[c], HEAD)
    heads.store_head(x.dq, o_m, rows, b_dq, gate_of(x, HEAD) * HEAD.scale, HEAD)
    return tl.sum(b_mean, 0), b_dk, b_dv


@triton.jit
def query_rows(
    x, first, rows,
    ROWS: tl.constexpr, TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """δ and dQ of the queries first … first + ROWS - 1; returns Σ δ.

    δ must be known before dS, for Σ P dP K − δ Σ P K would cancel where the values have a common mean: so dQ is another
    pass over the keys.
    """
    b_q, b_do, b_lse, o_m = load_queries(x, first, rows, ROWS, HEAD, LOW)
    b_mean = tl.zeros([ROWS], tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    end = rows
    if CAUSAL:
        end = tl.minimum(rows, first + ROWS)
    for start in range(0, end, TILES.block_n):
        b_k, b_v, o_n = load_keys(x, start, rows, TILES.block_n, HEAD, LOW)
        # [M, N]
        b_p = probabilities(b_q, b_k, b_lse[:, None], o_m[:, None], o_n[None, :], rows, x.mask, CAUSAL, HEAD)
        b_dp = heads.dot_over(b_do, heads.transposed(b_v), HEAD)
        b_mean += tl.sum(b_p * b_dp, 1)
        b_sum += tl.sum(b_p, 1)
    b_inverse = inverse_of(b_sum)
    b_mean = b_mean * b_inverse
    tl.store(x.p_mean + o_m, b_mean, mask=o_m < rows)
    tl.store(x.p_inverse + o_m, b_inverse, mask=o_m < rows)
    b_dq = heads.zero_head(ROWS, (), HEAD)
    for start in range(0, end, TILES.block_n):
        b_k, b_v, o_n = load_keys(x, start, rows, TILES.block_n, HEAD, LOW)
        b_p = probabilities(b_q, b_k, b_lse[:, None], o_m[:, None], o_n[None, :], rows, x.mask, CAUSAL, HEAD)
        b_dp = heads.dot_over(b_do, heads.transposed(b_v), HEAD)
        b_dq = heads.add_product(b_dq, b_p * (b_dp - b_mean[:, None]), b_k, HEAD)
    heads.store_head(x.dq, o_m, rows, b_dq, (b_inverse * (gate_of(x, HEAD) * HEAD.scale))[:, None], HEAD)
    return tl.sum(b_mean, 0)


@triton.jit
def key_rows(
    x, first, rows,
    ROWS: tl.constexpr, TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dK and dV of the keys first … first + ROWS - 1. P and dP are formed transposed, `[N, M]`: as they come out of
    the product they are the left operand of the next one."""
    b_k, b_v, o_n = load_keys(x, first, rows, ROWS, HEAD, LOW)
    b_dk = heads.zero_head(ROWS, (), HEAD)
    b_dv = heads.zero_head(ROWS, (), HEAD)
    begin = 0
    if CAUSAL:
        begin = first // TILES.key_m * TILES.key_m
    for start in range(begin, rows, TILES.key_m):
        b_q, b_do, b_lse, o_m = load_queries(x, start, rows, TILES.key_m, HEAD, LOW)
        # [N, M]
        b_p = probabilities(b_k, b_q, b_lse[None, :], o_m[None, :], o_n[:, None], rows, x.mask, CAUSAL, HEAD)
        # What is of each query is loaded where it is needed: all at once takes more registers.
        b_p *= tl.load(x.p_inverse + o_m, mask=o_m < rows, other=0.0)[None, :]
        # dV before dP is formed, so not both by one function as for the queries: that takes more registers too.
        b_dv = heads.add_product(b_dv, b_p, b_do, HEAD)
        b_mean = tl.load(x.p_mean + o_m, mask=o_m < rows, other=0.0)
        b_dp = heads.dot_over(b_v, heads.transposed(b_do), HEAD)
        b_dk = heads.add_product(b_dk, b_p * (b_dp - b_mean[None, :]), b_q, HEAD)
    b_gate = gate_of(x, HEAD)
    heads.store_head(x.dv, o_n, rows, b_dv, b_gate, HEAD)
    heads.store_head(x.dk, o_n, rows, b_dk, b_gate * HEAD.scale, HEAD)


@triton.jit
def attention_bwd_at_once_kernel(
    do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, p_dgate, rows,
    TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV `[N, dh]` and Σ δ `[B, H]`: a program per (image, head) keeps all keys and values on chip, and their
    gradients, while the queries go by."""
    b, h, _ = heads.program(1, HEAD)
    x = problem_of(do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, b, h, rows, TILES, HEAD, LOW)
    b_ks = ()
    b_vs = ()
    b_dks = ()
    b_dvs = ()
    for c in tl.static_range(len(TILES.chunks)):
        b_k, b_v, _ = load_keys(x, TILES.chunks[c][0], rows, TILES.chunks[c][1], HEAD, LOW)
        b_ks = b_ks + (b_k,)
        b_vs = b_vs + (b_v,)
        b_dks = b_dks + (heads.zero_head(TILES.chunks[c][1], (), HEAD),)
        b_dvs = b_dvs + (heads.zero_head(TILES.chunks[c][1], (), HEAD),)
    b_dgate = 0.0
    full = rows - rows % TILES.block_m if TILES.tail > 0 else rows
    bounds = (0, full, rows)  # as in attention_fwd_kernel
    ROWS: tl.constexpr = (TILES.block_m, TILES.tail)
    for t in tl.static_range(2 if TILES.tail > 0 else 1):
        for start in range(bounds[t], bounds[t + 1], ROWS[t]):
            b_part, b_dks, b_dvs = rows_at_once(
                x, b_ks, b_vs, b_dks, b_dvs, start, rows, ROWS[t], TILES, HEAD, LOW, CAUSAL
            )
            b_dgate += b_part
    tl.store(p_dgate + tl.program_id(0), b_dgate)
    b_gate = gate_of(x, HEAD)
    for c in tl.static_range(len(TILES.chunks)):
        o_c = TILES.chunks[c][0] + tl.arange(0, TILES.chunks[c][1])
        heads.store_head(x.dv, o_c, rows, b_dvs[c], b_gate, HEAD)
        heads.store_head(x.dk, o_c, rows, b_dks[c], b_gate * HEAD.scale, HEAD)


@triton.jit
def attention_bwd_kernel(
    do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, p_dgate, rows,
    TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV `[N, dh]` and Σ δ `[B, H]`: a program per (image, head) makes both sweeps."""
    b, h, _ = heads.program(1, HEAD)
    x = problem_of(do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, b, h, rows, TILES, HEAD, LOW)
    b_dgate = 0.0
    full = rows - rows % TILES.block_m if TILES.tail > 0 else rows
    for start in range(0, full, TILES.block_m):
        b_dgate += query_rows(x, start, rows, TILES.block_m, TILES, HEAD, LOW, CAUSAL)
    if TILES.tail > 0:
        for start in range(full, rows, TILES.tail):
            b_dgate += query_rows(x, start, rows, TILES.tail, TILES, HEAD, LOW, CAUSAL)
    tl.store(p_dgate + tl.program_id(0), b_dgate)
    # δ and 1 / ΣP, written by other threads of this program, are read below
    tl.debug_barrier()
    full_keys = rows - rows % TILES.key_n if TILES.key_tail > 0 else rows
    for start in range(0, full_keys, TILES.key_n):
        key_rows(x, start, rows, TILES.key_n, TILES, HEAD, LOW, CAUSAL)
    if TILES.key_tail > 0:
        for start in range(full_keys, rows, TILES.key_tail):
            key_rows(x, start, rows, TILES.key_tail, TILES, HEAD, LOW, CAUSAL)


@triton.jit
def attention_bwd_queries_kernel(
    do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, p_dgate, rows,
    TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The first sweep, a program per (image, head, block_m queries): dQ, δ and 1 / ΣP; Σ δ of each block."""
    blocks = tl.cdiv(rows, TILES.block_m)
    b, h, i_m = heads.program(blocks, HEAD)
    x = problem_of(do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, b, h, rows, TILES, HEAD, LOW)
    b_dgate = query_rows(x, i_m * TILES.block_m, rows, TILES.block_m, TILES, HEAD, LOW, CAUSAL)
    tl.store(p_dgate + (b * blocks + i_m) * HEAD.heads + h, b_dgate)


@triton.jit
def attention_bwd_keys_kernel(
    do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, p_dgate, rows,
    TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The second sweep, a program per (image, head, key_n keys): dK and dV."""
    b, h, i_n = heads.program(tl.cdiv(rows, TILES.key_n), HEAD)
    x = problem_of(do, qkv, delta, mask, p_gate, p_lse, p_scratch, dqkv, b, h, rows, TILES, HEAD, LOW)
    key_rows(x, i_n * TILES.key_n, rows, TILES.key_n, TILES, HEAD, LOW, CAUSAL)


def attention_bwd(
    do: Tensor,
    qkv: Tensor,
    lse: Tensor,
    *,
    num_heads: int,
    gate: Tensor | None = None,
    gate_form: str = "",
    mask: Tensor | None = None,
    causal: bool = False,
    delta: LowRank | None = None,
    out: Tensor | None = None,
    _row: Row | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gated attention: dqkv `[B, N, 3E]` in qkv's dtype, and partial sums of the gates' `[G, H]`, float32,
    for `sums` to add up (None without a gate).

    Args:
        do: `[B, N, E]`, gradient of the gated output, any strides and float dtype.
        qkv: `[B, N, 3E]`, float16, bfloat16 or float32; a view, its last dimension contiguous.
        lse: `[B, H, N]` float32: natural log-sum-exp of the scaled, masked scores; -inf: nothing seen.
        gate: `[H]` float32; their values, or with a gate_form (of `reference.GATES`) theta: dg is of the values.
        mask: broadcasts to `[B, H, N, N]`; boolean with True = masked, or additive.
        delta: what the heads' q, k, v have beside qkv. The gradient is that of their sum.
        out: `[B, N, 3E]` view to write dqkv to, its last dimension contiguous; None: allocated.
    """
    check_contiguous(qkv=qkv, out=out)
    B, N, E = do.shape
    H, dh = num_heads, E // num_heads
    do = do if do.stride(-1) == 1 else do.contiguous()
    dqkv = torch.empty((B, N, 3 * E), dtype=qkv.dtype, device=qkv.device) if out is None else out
    on_chip, low, deltas = given(delta)
    masked, spread = mask is not None, is_spread(N, B * H)
    row = _row or row_for(BACKWARD, architecture(qkv), dh, N, qkv.dtype, deltas=deltas, masked=masked, spread=spread)
    tiles = row.tiles(N)
    meta = heads.compiled_for(tiles, heads.head_of(H, dh, qkv.dtype, gate_form), low, causal)
    scratch = None  # what a first sweep leaves to the second: δ and 1 / ΣP
    if tiles.chunks:
        sweeps = ((attention_bwd_at_once_kernel, 1),)
    else:
        scratch = torch.empty((B, H, 2, N), dtype=torch.float32, device=qkv.device)
        queries, keys = cdiv(N, tiles.block_m), cdiv(N, tiles.key_n)
        apart = ((attention_bwd_queries_kernel, queries), (attention_bwd_keys_kernel, keys))
        sweeps = ((attention_bwd_kernel, 1),) if tiles.one_launch else apart
    dgate = torch.empty((B * sweeps[0][1], H), dtype=torch.float32, device=qkv.device)
    inputs = (heads.as_rows(do), heads.as_rows(qkv), on_chip, heads.as_mask(mask, B, H, N), packed(gate), packed(lse))
    for kernel, blocks in sweeps:
        grid = (on_grid(B * H * blocks, "attention_bwd"),)
        launch(kernel, grid, *inputs, scratch, heads.as_rows(dqkv), dgate, N, **meta)
    return dqkv, None if gate is None else dgate
