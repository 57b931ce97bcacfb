"""The low-rank path: what the attention kernels are told of it, and its gradients in one read of dQKV."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.heads import Delta, Low, as_rows, head_of, load_tile, low_of
from fastheads.kernels.launch import check_contiguous, launch, on_grid, packed
from fastheads.kernels.tiles import cdiv, dot_width

# Rows per block of 16 bits, and the number of programs to aim for: two to four per SM of an A100 (108) or H100 (132).
# Counted from the shape alone, so that the sums, and the last bits of dB, are the same on every chip.
BLOCK_ROWS, PROGRAMS = 128, 432


class LowRank(NamedTuple):
    """Every head's delta as the kernels take it: `y_{t,h} += s·T_{t,h} B_{t,h}ᵀ` for target t and head h.

    low: `[B, N, C]`, `T = x Aᵀ` in the dtype of qkv; the columns run over (target, H or 1, rank), then padding. A
        strided view; its last dimension is contiguous.
    up: `[T, H, dh, r]`, lora_B, float32.
    parts: which of q (0), k (1), v (2) target t is, T of them.
    scale: s.
    shared: all heads share the down-projection, so low has T·r columns, not T·H·r.
    """

    low: Tensor
    up: Tensor
    parts: tuple[int, ...]
    scale: float
    shared: bool

    def form(self) -> Low:
        """What a kernel is compiled for."""
        return low_of(self.parts, self.up.shape[-1], self.shared)

    def on_chip(self) -> Delta:
        """What a kernel is given."""
        check_contiguous(low=self.low)
        return Delta(*as_rows(self.low), packed(self.up), float(self.scale))


def given(delta: LowRank | None) -> tuple[Delta | None, Low, int]:
    """What a kernel is given of a delta, or of none; what it is compiled for; and how many of q, k and v have one."""
    return (None, Low(), 0) if delta is None else (delta.on_chip(), delta.form(), len(delta.parts))


@triton.jit
def low_rank_bwd_kernel(
    dqkv, delta, u, p_db, N, rows, steps, C,
    T: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """U = dT: U_h = s·dY_h B_h `[rows, r]` (a shared A: summed over heads), of which the caller makes dA = Uᵀ x and
    U A, dx's part; and dB_h = s·dY_hᵀ T_h `[dh, r]`.

    A program: `steps` blocks of rows of one target and head; with a shared A one block of rows of all its heads. DIM:
    dh, padded to a power of two.
    """
    H: tl.constexpr = HEAD.heads
    GROUPS: tl.constexpr = T if LOW.shared else T * H
    OF_HEAD: tl.constexpr = HEAD.dim * LOW.rank
    i_g, i_s = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS
    i_t, i_h = i_g // (GROUPS // T), i_g % (GROUPS // T)
    part = 0  # of target i_t: the inverse of LOW.target_of
    for p in tl.static_range(3):
        part = tl.where(i_t == LOW.target_of[p], p, part)
    o_d, o_c = tl.arange(0, DIM), tl.arange(0, LOW.tile)
    m_c = o_c < LOW.rank
    m_db = (o_d < HEAD.dim)[:, None] & m_c[None, :]
    p_db += i_s.to(tl.int64) * (T * H * OF_HEAD) + o_d[:, None] * LOW.rank + o_c[None, :]
    b_db = tl.full([DIM, LOW.tile], 0.0, tl.float32)
    for i in range(steps):
        o_n = (i_s * steps + i) * BLOCK + tl.arange(0, BLOCK)
        m_n = o_n < rows
        i_b, i_n = (o_n // N).to(tl.int64), (o_n % N).to(tl.int64)
        o_y = i_b * dqkv.stride_b + i_n * dqkv.stride_n + part * (H * HEAD.dim)
        m_y = m_n[:, None] & (o_d < HEAD.dim)[None, :]
        # [R, r]
        p_t = delta.p + (i_b * delta.stride_b + i_n * delta.stride_n + i_g * LOW.rank)[:, None] + o_c[None, :]
        b_t = tl.load(p_t, mask=m_n[:, None] & m_c[None, :], other=0.0)
        b_u = tl.full([BLOCK, LOW.tile], 0.0, tl.float32)
        for h in range(i_h, i_h + (H if LOW.shared else 1)):
            # [R, DIM], the one read of dY; [DIM, r]
            b_dy = tl.load(dqkv.p + (o_y + h * HEAD.dim)[:, None] + o_d[None, :], mask=m_y, other=0.0)
            p_up = delta.p_up + (i_t * H + h) * OF_HEAD
            b_up = load_tile(p_up, o_d, LOW.rank, HEAD.dim, 0, LOW.tile, LOW.rank, LOW.rank < LOW.tile)
            b_u = tl.dot(b_dy, b_up.to(b_dy.dtype), b_u, input_precision=HEAD.precision)
            if LOW.shared:
                b_db = tl.full([DIM, LOW.tile], 0.0, tl.float32)
            b_db = tl.dot(tl.trans(b_dy), b_t, b_db, input_precision=HEAD.precision)
            if LOW.shared:
                tl.store(p_db + (i_t * H + h) * OF_HEAD, b_db * delta.scale, mask=m_db)
        o_u = i_b * u.stride_b + i_n * u.stride_n
        b_u = (b_u * delta.scale).to(u.p.dtype.element_ty)
        tl.store(u.p + (o_u + i_g * LOW.rank)[:, None] + o_c[None, :], b_u, mask=m_n[:, None] & m_c[None, :])
        if i_g == GROUPS - 1:
            # The last group also zeroes the columns that only pad T's width: a product over all of u would read them.
            for c in range(GROUPS * LOW.rank, C, LOW.tile):
                p_z = u.p + o_u[:, None] + (c + o_c)[None, :]
                tl.store(p_z, tl.zeros_like(b_u), mask=m_n[:, None] & (c + o_c < C)[None, :])
    if not LOW.shared:
        tl.store(p_db + i_g * OF_HEAD, b_db * delta.scale, mask=m_db)


def low_rank_bwd(dqkv: Tensor, delta: LowRank, u: Tensor) -> Tensor:
    """Gradients of the low-rank path from that of qkv: writes U, returns partial sums of dB, `[S, T, H, dh, r]`
    float32, for `sums` to add up.

    dqkv: `[B, N, 3E]`; u: `[B, N, C]` in its dtype, laid out as `delta.low`, padding columns set to zero. Views;
    their last dimension is contiguous.
    """
    check_contiguous(dqkv=dqkv, u=u)
    B, N, C = u.shape
    T, H, dh, r = delta.up.shape
    low, dim, rows = delta.form(), dot_width(dh), on_grid(B * N, "low_rank_bwd")
    groups = T if delta.shared else T * H
    # more rows of float32 would spill
    block = BLOCK_ROWS if dqkv.dtype.itemsize == 2 else 32 if low.tile == 16 else 64
    blocks = cdiv(rows, block)
    steps = 1 if delta.shared else cdiv(blocks, max(1, PROGRAMS // groups))
    splits = cdiv(blocks, steps) if blocks else 0
    partial = torch.empty((splits, T, H, dh, r), dtype=torch.float32, device=dqkv.device)
    args = (as_rows(dqkv), delta.on_chip(), as_rows(u), partial, N, rows, steps, C)
    meta = {"T": T, "HEAD": head_of(H, dh, dqkv.dtype), "LOW": low, "BLOCK": block, "DIM": dim, "num_stages": 1}
    warps = 8 if dim * low.tile > 64 * 64 else 4
    launch(low_rank_bwd_kernel, (on_grid(splits * groups, "low_rank_bwd"),), *args, **meta, num_warps=warps)
    return partial
