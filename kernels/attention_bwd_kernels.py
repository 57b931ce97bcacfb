"""The kernel of the attention backward (attention_bwd.py has the formulas), and the two sweeps it is made of."""

# Triton grows tuples of tiles from (); to mypy that is another type.
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import triton
import triton.language as tl

from fastheads.kernels.head_rows import (
    add_product,
    cast_rows,
    dot_rows,
    load_lse,
    load_part,
    load_rows,
    probabilities,
    store_rows,
    zero_rows,
)


@triton.jit
def whole_rows(b_delta, b_lse, b_one):
    """delta, lse and row sums with P's rows made to sum to 1: they do so only as far as q and k are rounded here as
    they were for lse, and where they don't, a common mean of dP stays in dS. A row that sees nothing is left at 0."""
    b_one = tl.where(b_one > 0, b_one, 1.0)
    return b_delta / b_one, b_lse + tl.log2(b_one), b_one


@triton.jit
def query_rows(
    first, q, k, v, do, p_lse, mask, p_delta, p_lse2, p_dq, s_dq, gate, scale, N,
    DH: tl.constexpr, PIECES: tl.constexpr, LOW: tl.constexpr, R: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, PREC: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """delta and dQ of the queries first … first + BQ; returns the sum of delta. Two passes over the keys: delta must be
    known before dS, for Σ P dP K - delta Σ P K would cancel where the values have a common mean."""
    o_q = first + tl.arange(0, BQ)
    m_q = o_q < N
    b_q = load_part(q, o_q, m_q, PIECES, DH, LOW[0], R, PREC)
    b_do = cast_rows(load_rows(do[0], do[1], do[2], o_q, m_q, PIECES, DH), b_q[0].dtype)
    b_lse = load_lse(p_lse, o_q, N)
    end = N
    if CAUSAL:
        end = tl.minimum(N, first + BQ)
    b_delta = tl.zeros([BQ], tl.float32)
    b_one = tl.zeros([BQ], tl.float32)
    for j in range(0, end, BK):
        o_k = j + tl.arange(0, BK)
        b_k = load_part(k, o_k, o_k < N, PIECES, DH, LOW[1], R, PREC)
        b_v = load_part(v, o_k, o_k < N, PIECES, DH, LOW[2], R, PREC)
        # [BQ, BK]
        b_s = dot_rows(b_q, b_k, PREC)
        b_p = probabilities(b_s, b_lse[:, None], o_q[:, None], o_k[None, :], N, mask, scale, MASK, CAUSAL)
        b_dp = dot_rows(b_do, b_v, PREC)
        b_delta += tl.sum(b_p * b_dp, 1)
        b_one += tl.sum(b_p, 1)
    b_delta, b_lse, b_one = whole_rows(b_delta, b_lse, b_one)
    b_dq = zero_rows(BQ, PIECES)
    for j in range(0, end, BK):
        o_k = j + tl.arange(0, BK)
        b_k = load_part(k, o_k, o_k < N, PIECES, DH, LOW[1], R, PREC)
        b_v = load_part(v, o_k, o_k < N, PIECES, DH, LOW[2], R, PREC)
        # [BQ, BK]
        b_s = dot_rows(b_q, b_k, PREC)
        b_p = probabilities(b_s, b_lse[:, None], o_q[:, None], o_k[None, :], N, mask, scale, MASK, CAUSAL)
        b_dp = dot_rows(b_do, b_v, PREC)
        b_dq = add_product(b_dq, b_p * (b_dp - b_delta[:, None]), b_k, PREC)
    tl.store(p_delta + o_q, b_delta, mask=m_q)
    tl.store(p_lse2 + o_q, b_lse, mask=m_q)
    store_rows(p_dq, s_dq, o_q, m_q, b_dq, gate * scale, PIECES, DH)
    return tl.sum(b_delta, 0)


@triton.jit
def query_rows_at_once(
    first, b_k, b_v, q, do, p_lse, mask, p_delta, p_lse2, p_dq, s_dq, gate, scale, N,
    DH: tl.constexpr, PIECES: tl.constexpr, LOW: tl.constexpr, R: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, PREC: tl.constexpr, BQ: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """query_rows with k, v, P and dP of all keys on chip, in chunks: every product once."""
    o_q = first + tl.arange(0, BQ)
    m_q = o_q < N
    b_q = load_part(q, o_q, m_q, PIECES, DH, LOW[0], R, PREC)
    b_do = cast_rows(load_rows(do[0], do[1], do[2], o_q, m_q, PIECES, DH), b_q[0].dtype)
    b_lse = load_lse(p_lse, o_q, N)
    b_delta = tl.zeros([BQ], tl.float32)
    b_one = tl.zeros([BQ], tl.float32)
    b_ps = ()
    b_dps = ()
    for c in tl.static_range(len(CHUNKS)):
        o_k = CHUNKS[c][0] + tl.arange(0, CHUNKS[c][1])
        # [BQ, chunk]
        b_s = dot_rows(b_q, b_k[c], PREC)
        b_p = probabilities(b_s, b_lse[:, None], o_q[:, None], o_k[None, :], N, mask, scale, MASK, CAUSAL)
        b_dp = dot_rows(b_do, b_v[c], PREC)
        b_delta += tl.sum(b_p * b_dp, 1)
        b_one += tl.sum(b_p, 1)
        b_ps = b_ps + (b_p,)
        b_dps = b_dps + (b_dp,)
    b_delta, b_lse, b_one = whole_rows(b_delta, b_lse, b_one)
    b_dq = zero_rows(BQ, PIECES)
    for c in tl.static_range(len(CHUNKS)):
        b_ds = b_ps[c] * (b_dps[c] - b_delta[:, None]) / b_one[:, None]
        b_dq = add_product(b_dq, b_ds, b_k[c], PREC)
    tl.store(p_delta + o_q, b_delta, mask=m_q)
    tl.store(p_lse2 + o_q, b_lse, mask=m_q)
    store_rows(p_dq, s_dq, o_q, m_q, b_dq, gate * scale, PIECES, DH)
    return tl.sum(b_delta, 0)


@triton.jit
def key_rows(
    first, q, k, v, do, mask, p_delta, p_lse2, p_dk, p_dv, s_dk, gate, scale, N,
    DH: tl.constexpr, PIECES: tl.constexpr, LOW: tl.constexpr, R: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, PREC: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dK and dV of the keys first … first + BK. Scores are formed transposed, [BK, BQ]: as they come out of the
    product they are the left operand of the next one."""
    o_k = first + tl.arange(0, BK)
    m_k = o_k < N
    b_k = load_part(k, o_k, m_k, PIECES, DH, LOW[1], R, PREC)
    b_v = load_part(v, o_k, m_k, PIECES, DH, LOW[2], R, PREC)
    b_dk = zero_rows(BK, PIECES)
    b_dv = zero_rows(BK, PIECES)
    begin = 0
    if CAUSAL:
        begin = first // BQ * BQ
    for i in range(begin, N, BQ):
        o_q = i + tl.arange(0, BQ)
        m_q = o_q < N
        b_q = load_part(q, o_q, m_q, PIECES, DH, LOW[0], R, PREC)
        b_do = cast_rows(load_rows(do[0], do[1], do[2], o_q, m_q, PIECES, DH), b_q[0].dtype)
        b_lse = tl.load(p_lse2 + o_q, mask=m_q, other=float("inf"))
        b_delta = tl.load(p_delta + o_q, mask=m_q, other=0.0)
        # [BK, BQ]
        b_s = dot_rows(b_k, b_q, PREC)
        b_p = probabilities(b_s, b_lse[None, :], o_q[None, :], o_k[:, None], N, mask, scale, MASK, CAUSAL)
        b_dv = add_product(b_dv, b_p, b_do, PREC)
        b_dp = dot_rows(b_v, b_do, PREC)
        b_dk = add_product(b_dk, b_p * (b_dp - b_delta[None, :]), b_q, PREC)
    store_rows(p_dv, s_dk, o_k, m_k, b_dv, gate, PIECES, DH)
    store_rows(p_dk, s_dk, o_k, m_k, b_dk, gate * scale, PIECES, DH)


@triton.jit
def load_chunks(
    part, N, PIECES: tl.constexpr, DH: tl.constexpr, LOW: tl.constexpr, R: tl.constexpr, PREC: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """All rows of k or of v: a tuple of chunks, each a tuple of pieces."""
    b_x = ()
    for c in tl.static_range(len(CHUNKS)):
        o_k = CHUNKS[c][0] + tl.arange(0, CHUNKS[c][1])
        b_x = b_x + (load_part(part, o_k, o_k < N, PIECES, DH, LOW, R, PREC),)
    return b_x


@triton.jit
def attention_bwd_kernel(
    p_do, s_do_b, s_do_n, s_do_d, p_qkv, s_qkv_b, s_qkv_n, p_lse, p_gate, p_mask, s_mask_b, s_mask_h, s_mask_q,
    s_mask_k, p_low, s_low_b, s_low_n, p_up, low_scale, p_delta, p_lse2, p_out, s_out_b, s_out_n, p_dgate, scale, N,
    blocks, whole_q, whole_k,
    H: tl.constexpr, DH: tl.constexpr, PIECES: tl.constexpr, LOW: tl.constexpr, SLOTS: tl.constexpr,
    SHARED: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PREC: tl.constexpr, SWEEP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BQ2: tl.constexpr, BK2: tl.constexpr,
    CHUNKS: tl.constexpr, TAIL_Q: tl.constexpr, TAIL_K: tl.constexpr,
):  # fmt: skip
    """SWEEP 0: one program per (image, head), queries then keys. 1, 2: a program per block of queries, or of keys."""
    pid = tl.program_id(0).to(tl.int64)
    i_bh = pid // blocks
    i_b, i_h = i_bh // H, i_bh % H
    D: tl.constexpr = H * DH
    p_q = p_qkv + i_b * s_qkv_b + i_h * DH
    p_l = p_low + i_b * s_low_b
    lows = ()
    ups = ()
    for part in tl.static_range(3):
        # SLOTS: which target this part is, -1 for none; then nothing is read
        if SHARED:
            lows = lows + (p_l + SLOTS[part] * LOW[part],)
        else:
            lows = lows + (p_l + (SLOTS[part] * H + i_h) * LOW[part],)
        ups = ups + (p_up + (SLOTS[part] * H + i_h) * DH * LOW[part],)
    q = (p_q, s_qkv_n, lows[0], s_low_n, ups[0], low_scale)
    k = (p_q + D, s_qkv_n, lows[1], s_low_n, ups[1], low_scale)
    v = (p_q + 2 * D, s_qkv_n, lows[2], s_low_n, ups[2], low_scale)
    do = (p_do + i_b * s_do_b + i_h * DH * s_do_d, s_do_n, s_do_d)
    mask = (p_mask + i_b * s_mask_b + i_h * s_mask_h, s_mask_q, s_mask_k)
    p_lse += i_bh * N
    p_delta += i_bh * N
    p_lse2 += i_bh * N
    p_dq = p_out + i_b * s_out_b + i_h * DH
    gate = 1.0
    if GATE:
        gate = tl.load(p_gate + i_h).to(tl.float32)
    if SWEEP == 0:
        dgate = 0.0
        if len(CHUNKS) > 0:
            b_k = load_chunks(k, N, PIECES, DH, LOW[1], R, PREC, CHUNKS)
            b_v = load_chunks(v, N, PIECES, DH, LOW[2], R, PREC, CHUNKS)
            for i in range(0, whole_q, BQ):
                dgate += query_rows_at_once(
                    i, b_k, b_v, q, do, p_lse, mask, p_delta, p_lse2, p_dq, s_out_n, gate, scale, N,
                    DH, PIECES, LOW, R, MASK, CAUSAL, PREC, BQ, CHUNKS,
                )  # fmt: skip
            if TAIL_Q:
                for i in range(whole_q, N, 16):
                    dgate += query_rows_at_once(
                        i, b_k, b_v, q, do, p_lse, mask, p_delta, p_lse2, p_dq, s_out_n, gate, scale, N,
                        DH, PIECES, LOW, R, MASK, CAUSAL, PREC, 16, CHUNKS,
                    )  # fmt: skip
        else:
            for i in range(0, whole_q, BQ):
                dgate += query_rows(
                    i, q, k, v, do, p_lse, mask, p_delta, p_lse2, p_dq, s_out_n, gate, scale, N,
                    DH, PIECES, LOW, R, MASK, CAUSAL, PREC, BQ, BK,
                )  # fmt: skip
            if TAIL_Q:
                for i in range(whole_q, N, 16):
                    dgate += query_rows(
                        i, q, k, v, do, p_lse, mask, p_delta, p_lse2, p_dq, s_out_n, gate, scale, N,
                        DH, PIECES, LOW, R, MASK, CAUSAL, PREC, 16, BK,
                    )  # fmt: skip
        tl.store(p_dgate + pid, dgate)
        # delta and lse, written by other threads of this program, are read below
        tl.debug_barrier()
        for j in range(0, whole_k, BK2):
            key_rows(
                j, q, k, v, do, mask, p_delta, p_lse2, p_dq + D, p_dq + 2 * D, s_out_n, gate, scale, N,
                DH, PIECES, LOW, R, MASK, CAUSAL, PREC, BQ2, BK2,
            )  # fmt: skip
        if TAIL_K:
            for j in range(whole_k, N, 16):
                key_rows(
                    j, q, k, v, do, mask, p_delta, p_lse2, p_dq + D, p_dq + 2 * D, s_out_n, gate, scale, N,
                    DH, PIECES, LOW, R, MASK, CAUSAL, PREC, BQ2, 16,
                )  # fmt: skip
    elif SWEEP == 1:
        dgate = query_rows(
            (pid % blocks).to(tl.int32) * BQ, q, k, v, do, p_lse, mask, p_delta, p_lse2, p_dq, s_out_n, gate, scale, N,
            DH, PIECES, LOW, R, MASK, CAUSAL, PREC, BQ, BK,
        )  # fmt: skip
        tl.store(p_dgate + pid, dgate)
    else:
        key_rows(
            (pid % blocks).to(tl.int32) * BK2, q, k, v, do, mask, p_delta, p_lse2, p_dq + D, p_dq + 2 * D, s_out_n,
            gate, scale, N, DH, PIECES, LOW, R, MASK, CAUSAL, PREC, BQ2, BK2,
        )  # fmt: skip
