"""One head's rows as Triton tiles: loaded, multiplied and stored in pieces along head_dim, 80 = 64 + 16."""

# Triton grows tuples of tiles from (); to mypy that is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(p_x, s_n, s_d, o_n, m_n, PIECES: tl.constexpr, DH: tl.constexpr):
    """Rows o_n of one head, `[BN, dh]`, as a tuple of tiles along dh: PIECES is ((first column, width), …)."""
    b_x = ()
    p_n = p_x + o_n.to(tl.int64)[:, None] * s_n
    for i in tl.static_range(len(PIECES)):
        o_d = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        m_x = m_n[:, None]
        if PIECES[i][0] + PIECES[i][1] > DH:
            m_x = m_x & (o_d < DH)[None, :]
        b_x = b_x + (tl.load(p_n + o_d.to(tl.int64)[None, :] * s_d, mask=m_x, other=0.0),)
    return b_x


@triton.jit
def load_part(
    part, o_n, m_n, PIECES: tl.constexpr, DH: tl.constexpr, LOW: tl.constexpr, R: tl.constexpr, PREC: tl.constexpr
):
    """Rows of q, k or v; with LOW > 0 the head's delta of rank LOW (padded to R) is added in float32, then rounded."""
    p_y, s_n, p_low, s_low, p_up, scale = part
    b_y = load_rows(p_y, s_n, 1, o_n, m_n, PIECES, DH)
    if LOW > 0:
        o_r = tl.arange(0, R)
        m_r = o_r < LOW
        p_t = p_low + o_n.to(tl.int64)[:, None] * s_low + o_r[None, :]
        # [BN, R]
        b_t = tl.load(p_t, mask=m_n[:, None] & m_r[None, :], other=0.0)
        b_z = ()
        for i in tl.static_range(len(PIECES)):
            o_d = PIECES[i][0] + tl.arange(0, PIECES[i][1])
            # [R, piece]
            b_up = tl.load(p_up + o_d[None, :] * LOW + o_r[:, None], mask=m_r[:, None] & (o_d < DH)[None, :], other=0.0)
            b_d = tl.dot(b_t, b_up.to(b_t.dtype), input_precision=PREC)
            b_z = b_z + ((b_y[i].to(tl.float32) + scale * b_d).to(b_y[i].dtype),)
        b_y = b_z
    return b_y


@triton.jit
def store_rows(p_x, s_n, o_n, m_n, b_x, factor, PIECES: tl.constexpr, DH: tl.constexpr):
    """factor · b_x, in the dtype of p_x."""
    p_n = p_x + o_n.to(tl.int64)[:, None] * s_n
    for i in tl.static_range(len(PIECES)):
        o_d = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        m_x = m_n[:, None]
        if PIECES[i][0] + PIECES[i][1] > DH:
            m_x = m_x & (o_d < DH)[None, :]
        tl.store(p_n + o_d[None, :], (b_x[i] * factor).to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def cast_rows(b_x, dtype: tl.constexpr):
    b_y = ()
    for i in tl.static_range(len(b_x)):
        b_y = b_y + (b_x[i].to(dtype),)
    return b_y


@triton.jit
def zero_rows(BN: tl.constexpr, PIECES: tl.constexpr):
    b_x = ()
    for i in tl.static_range(len(PIECES)):
        b_x = b_x + (tl.full([BN, PIECES[i][1]], 0.0, tl.float32),)
    return b_x


@triton.jit
def dot_rows(b_x, b_y, PREC: tl.constexpr):
    """x yᵀ `[BX, BY]` over all pieces."""
    b_z = tl.dot(b_x[0], tl.trans(b_y[0]), input_precision=PREC)
    for i in tl.static_range(1, len(b_x)):
        b_z = tl.dot(b_x[i], tl.trans(b_y[i]), b_z, input_precision=PREC)
    return b_z


@triton.jit
def add_product(b_acc, b_w, b_x, PREC: tl.constexpr):
    """acc + w x, piece by piece."""
    b_y = ()
    for i in tl.static_range(len(b_x)):
        b_y = b_y + (tl.dot(b_w.to(b_x[i].dtype), b_x[i], b_acc[i], input_precision=PREC),)
    return b_y


@triton.jit
def probabilities(b_s, b_lse, o_q, o_k, N, mask, scale, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """exp(S - lse) of the products b_s = q kᵀ or its transpose: b_lse, o_q, o_k broadcast to b_s; lse is in base 2."""
    b_s = b_s * (scale * LOG2E)
    dead = o_k >= N
    if CAUSAL:
        dead = dead | (o_k > o_q)
    if MASK:
        p_mask, s_q, s_k = mask
        p_m = p_mask + o_q.to(tl.int64) * s_q + o_k.to(tl.int64) * s_k
        if MASK == 1:
            dead = dead | (tl.load(p_m, mask=(o_q < N) & (o_k < N), other=0) != 0)
        else:
            b_s += tl.load(p_m, mask=(o_q < N) & (o_k < N), other=0.0).to(tl.float32) * LOG2E
    return tl.where(dead, 0.0, tl.exp2(b_s - b_lse))


@triton.jit
def load_lse(p_lse, o_n, N):
    """lse in base 2. Rows that see nothing, and rows that aren't there, get +inf: their P is 0, never NaN. So do rows
    that see only keys masked by a huge number: float32 cannot tell such a lse from its neighbours 100 away."""
    b_lse = tl.load(p_lse + o_n, mask=o_n < N, other=float("inf")) * LOG2E
    return tl.where(b_lse < -1.2e7, float("inf"), b_lse)  # -1 / float32's epsilon
