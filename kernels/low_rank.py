"""The low-rank path: what the attention kernels are told of it, and its gradients in one read of dQKV."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.launch import dot_precision, launch, on_grid, packed, rows_of, strides

# Rows per block of 16 bits, and the number of programs to aim for: two to four per SM of an A100 (108) or H100 (132).
# Counted from the shape alone, so that the sums, and the last bits of dB, are the same on every chip.
BLOCK_ROWS, PROGRAMS = 128, 432


class LowRank(NamedTuple):
    """Every head's delta as the kernels take it: `y_{t,h} += scale · low_{t,h} up_{t,h}ᵀ` for target t and head h.

    low: `[B, N, C]`, `T = x Aᵀ` in the dtype of qkv; the columns run over (target, H or 1, rank), then padding. A
        strided view; its last dimension is contiguous.
    up: `[T, H, dh, r]`, lora_B, float32.
    parts: which of q (0), k (1), v (2) target t is, T of them.
    shared: all heads share the down-projection, so low has T·r columns, not T·H·r.
    """

    low: Tensor
    up: Tensor
    parts: tuple[int, ...]
    scale: float
    shared: bool


@triton.jit
def add_head(
    p_dy, p_up, o_y, m_n, b_low, b_u, b_db,
    DH: tl.constexpr, RANK: tl.constexpr, PREC: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """u + dY B and dB + dYᵀ low for one block of rows of one head: the one read of dY."""
    o_d, o_c = tl.arange(0, BD), tl.arange(0, R)
    m_d = o_d < DH
    # [BR, BD]
    b_dy = tl.load(p_dy + o_y[:, None] + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
    # [BD, R]
    p_b = p_up + o_d[:, None] * RANK + o_c[None, :]
    b_up = tl.load(p_b, mask=m_d[:, None] & (o_c < RANK)[None, :], other=0.0).to(b_dy.dtype)
    b_u = tl.dot(b_dy, b_up, b_u, input_precision=PREC)
    b_db = tl.dot(tl.trans(b_dy), b_low, b_db, input_precision=PREC)
    return b_u, b_db


@triton.jit
def low_rank_bwd_kernel(
    p_dy, s_dy_b, s_dy_n, p_low, s_low_b, s_low_n, p_up, p_u, s_u_b, s_u_n, p_db, scale, N, rows, steps, C,
    T: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr,
    PREC: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A program: `steps` blocks of rows of one target and head; SHARED: one block of rows of all heads of a target."""
    GROUPS: tl.constexpr = T if SHARED else T * H
    pid = tl.program_id(0)
    i_g, i_s = pid % GROUPS, pid // GROUPS
    i_t, i_h = i_g // (GROUPS // T), i_g % (GROUPS // T)
    part = 0
    for t in tl.static_range(T):
        part = tl.where(i_t == t, PARTS[t], part)
    o_d, o_c = tl.arange(0, BD), tl.arange(0, R)
    m_c = o_c < RANK
    m_db = (o_d < DH)[:, None] & m_c[None, :]
    p_db += i_s.to(tl.int64) * (T * H * DH * RANK) + o_d[:, None] * RANK + o_c[None, :]
    b_db = tl.zeros([BD, R], tl.float32)
    for i in range(steps):
        o_n = (i_s * steps + i) * BR + tl.arange(0, BR)
        m_n = o_n < rows
        i_b, i_n = (o_n // N).to(tl.int64), (o_n % N).to(tl.int64)
        o_y = i_b * s_dy_b + i_n * s_dy_n + part * (H * DH)
        # [BR, R]
        p_t = p_low + (i_b * s_low_b + i_n * s_low_n + i_g * RANK)[:, None] + o_c[None, :]
        b_low = tl.load(p_t, mask=m_n[:, None] & m_c[None, :], other=0.0)
        b_u = tl.zeros([BR, R], tl.float32)
        if SHARED:
            for h in range(H):
                b_db = tl.zeros([BD, R], tl.float32)
                i_th = i_t * H + h
                b_u, b_db = add_head(
                    p_dy, p_up + i_th * (DH * RANK), o_y + h * DH, m_n, b_low, b_u, b_db, DH, RANK, PREC, BD, R
                )
                tl.store(p_db + i_th * (DH * RANK), b_db * scale, mask=m_db)
        else:
            b_u, b_db = add_head(
                p_dy, p_up + i_g * (DH * RANK), o_y + i_h * DH, m_n, b_low, b_u, b_db, DH, RANK, PREC, BD, R
            )
        o_u = i_b * s_u_b + i_n * s_u_n
        p_w = p_u + (o_u + i_g * RANK)[:, None] + o_c[None, :]
        tl.store(p_w, (b_u * scale).to(p_u.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])
        if i_g == GROUPS - 1:
            # the columns that only pad low's width, which a product over all of u would read
            for c in range(GROUPS * RANK, C, R):
                p_z = p_u + o_u[:, None] + (c + o_c)[None, :]
                b_z = tl.zeros([BR, R], p_u.dtype.element_ty)
                tl.store(p_z, b_z, mask=m_n[:, None] & (c + o_c < C)[None, :])
    if not SHARED:
        tl.store(p_db + i_g * (DH * RANK), b_db * scale, mask=m_db)


def low_rank_bwd(dqkv: Tensor, delta: LowRank, u: Tensor) -> Tensor:
    """Gradients of the low-rank path from that of qkv: writes u, returns dB `[T, H, dh, r]` float32.

        U_{t,h} = scale · dY_{t,h} B_{t,h}  (shared: summed over heads)        dB_{t,h} = scale · dY_{t,h}ᵀ low_{t,h}

    dqkv: `[B, N, 3D]`; u: `[B, N, C]` in its dtype, laid out as `delta.low`, padding columns set to zero. Views;
    their last dimension is contiguous.
    """
    rows_of(dqkv=dqkv, u=u, low=delta.low)
    B, N, C = u.shape
    T, H, dh, r = delta.up.shape
    BD, R = max(16, triton.next_power_of_2(dh)), max(16, triton.next_power_of_2(r))
    rows = on_grid(B * N, "low_rank_bwd")
    groups = T if delta.shared else T * H
    block = BLOCK_ROWS if dqkv.dtype.itemsize == 2 else 32 if R == 16 else 64  # more rows of float32 would spill
    blocks = triton.cdiv(rows, block)
    steps = 1 if delta.shared else triton.cdiv(blocks, max(1, PROGRAMS // groups))
    splits = triton.cdiv(blocks, steps) if blocks else 0
    partial = torch.empty((splits, T, H, dh, r), dtype=torch.float32, device=dqkv.device)
    launch(
        low_rank_bwd_kernel,
        (on_grid(splits * groups, "low_rank_bwd"),),
        dqkv,
        *strides(dqkv, 0, 1),
        delta.low,
        *strides(delta.low, 0, 1),
        packed(delta.up),
        u,
        *strides(u, 0, 1),
        partial,
        float(delta.scale),
        N,
        rows,
        steps,
        C,
        T=T,
        H=H,
        DH=dh,
        RANK=r,
        PARTS=delta.parts,
        SHARED=delta.shared,
        PREC=dot_precision(dqkv.dtype),
        BR=block,
        BD=BD,
        R=R,
        num_warps=8 if BD * R > 64 * 64 else 4,
        num_stages=1,
    )
    return partial.sum(0)
