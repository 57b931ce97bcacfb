"""The core that the attention kernels share: tiles of a head, the online softmax, what is stored of it.

Inside a kernel names say what a thing is: p_ a pointer, o_ offsets, m_ a mask, b_ a tile or what else is on chip.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


class Tiles(NamedTuple):
    """How a launch is cut up.

    chunks: (first row, rows) of the keys, all kept on chip; none: keys stream by, block_n at a time.
    block_m: queries at a time; tail: queries of the last block, where so few are left (0: never).
    """

    chunks: tuple[tuple[int, int], ...]
    block_m: int
    tail: int
    block_n: int
    num_warps: int
    num_stages: int


class Head(NamedTuple):
    """A head at compile time. pieces: (first column, columns) of its tiles; 80 columns are 64 and 16, not 128."""

    dim: int
    pieces: tuple[tuple[int, int], ...]
    precision: str


class Low(NamedTuple):
    """The deltas at compile time. targets: the place of q, k, v among them, or -1; tile: rank, padded for tl.dot."""

    targets: tuple[int, int, int]
    rank: int
    tile: int
    shared: bool


# ----------------------------------------------------------------------------------------------------- host side


def pieces_of(head_dim: int) -> tuple[tuple[int, int], ...]:
    """(first column, columns) of the tiles of a head: powers of two that add up to head_dim, or little more."""
    pieces, first = [], 0
    rest = -(-head_dim // 16) * 16
    while rest:
        width = 1 << (rest.bit_length() - 1)
        pieces.append((first, width))
        first, rest = first + width, rest - width
    return tuple(pieces)


def chunks_of(length: int, largest: int = 128) -> tuple[tuple[int, int], ...]:
    """(first row, rows) of the chunks of keys: largest ones, then one or two smaller powers of two."""
    chunks, first = [], 0
    rest = -(-length // 16) * 16
    while rest:
        rows = min(largest, 1 << (rest.bit_length() - 1))
        if rows < largest and (rest - rows).bit_count() > 1:
            rows *= 2
        chunks.append((first, rows))
        first, rest = first + rows, max(rest - rows, 0)
    return tuple(chunks)


def low_form(parts: tuple[int, ...], rank: int, shared: bool) -> Low:
    """Which deltas there are, as the kernels are compiled for them."""
    q, k, v = (parts.index(part) if part in parts else -1 for part in range(3))
    return Low((q, k, v), rank, max(16, triton.next_power_of_2(rank)), shared)


class Outputs(NamedTuple):
    """Memory for what an attention kernel returns. parts: `[B, H, 1 | blocks, dh]` of the pooled token, or its mean."""

    o: Tensor
    lse: Tensor
    parts: Tensor | None
    tail_start: int
    blocks: int
    pool: str | None

    def cls(self) -> Tensor | None:
        """The pooled token, once the kernel has run: of a mean every block of queries has its own part."""
        if self.parts is None or self.pool == "token":
            return None if self.parts is None else self.parts[:, :, 0]
        return self.parts.sum(2) / (self.o.shape[1] - 1)


def outputs_of(x: Tensor, heads: int, head_dim: int, tiles: Tiles, pool: int | Tensor | str | None) -> Outputs:
    """For x `[B, N, …]`; tail_start: from where on blocks of `tail` queries take over."""
    B, N = x.shape[:2]
    tail_start = N - N % tiles.block_m if tiles.tail else N
    blocks = triton.cdiv(tail_start, tiles.block_m) + (1 if tiles.tail else 0)
    o = torch.empty(B, N, heads * head_dim, dtype=x.dtype, device=x.device)
    lse = torch.empty(B, heads, N, dtype=torch.float32, device=x.device)
    if pool is None:
        return Outputs(o, lse, None, tail_start, blocks, None)
    form, parts = ("mean", blocks) if isinstance(pool, str) else ("token", 1)
    cls = torch.empty(B, heads, parts, head_dim, dtype=torch.float32, device=x.device)
    if isinstance(pool, Tensor):
        cls.fill_(float("nan"))  # what an index out of range leaves
    return Outputs(o, lse, cls, tail_start, blocks, form)


# ---------------------------------------------------------------------------------------------------------- tiles


@triton.jit
def load_tile(p_x, o_r, stride, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns FIRST … FIRST + WIDTH - 1 of the rows o_r; zero past COLUMNS and past `rows`."""
    o_c = FIRST + tl.arange(0, WIDTH)
    m_x = (o_r < rows)[:, None]
    if FIRST + WIDTH > COLUMNS:
        m_x = m_x & (o_c < COLUMNS)[None, :]
    # [R, WIDTH]
    return tl.load(p_x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], mask=m_x, other=0.0)


@triton.jit
def load_head(p_x, o_r, stride, rows, HEAD: tl.constexpr):
    """Rows o_r of a head, as tiles `[R, P]`."""
    b_x = ()
    for i in tl.static_range(len(HEAD.pieces)):
        b_x = b_x + (load_tile(p_x, o_r, stride, rows, HEAD.pieces[i][0], HEAD.pieces[i][1], HEAD.dim),)
    return b_x


@triton.jit
def load_up(p_up, scale, h, heads, dtype: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr):
    """U = scale · up of one head for q, k and v: each as tiles `[P, r]`, rounded once; none where there is no delta."""
    b_up = ()
    for part in tl.static_range(3):
        b_u = ()
        if LOW.targets[part] >= 0:
            p_u = p_up + (LOW.targets[part] * heads + h) * (HEAD.dim * LOW.rank)
            for i in tl.static_range(len(HEAD.pieces)):
                o_d = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
                b_u = b_u + ((load_tile(p_u, o_d, LOW.rank, HEAD.dim, 0, LOW.tile, LOW.rank) * scale).to(dtype),)
        b_up = b_up + (b_u,)
    return b_up


# ---------------------------------------------------------------------------------------------------- of one head


@triton.jit
def mask_of_head(mask, b, h):
    """(pointer, strides) of the mask of one image and head; () without a mask."""
    b_mask = ()
    if mask is not None:
        b_mask = (mask[0] + b * mask[1] + h.to(tl.int64) * mask[2], mask[3], mask[4])
    return b_mask


@triton.jit
def out_of_head(p_o, p_lse, p_gate, p_tokens, token, b, h, heads, rows, HEAD: tl.constexpr):
    """Where the outputs of one image and head go, with their row stride; gate; pooled token."""
    b_gate = 1.0
    if p_gate is not None:
        b_gate = tl.load(p_gate + h)
    if p_tokens is not None:
        token = tl.load(p_tokens + b)
    width = heads * HEAD.dim
    return p_o + b * rows * width + h * HEAD.dim, width, p_lse + (b * heads + h) * rows, b_gate, token


@triton.jit
def cls_of_block(p_cls, i_bh, i_block, blocks, HEAD: tl.constexpr, POOL: tl.constexpr):
    """Where a block of queries leaves the pooled token, or its part of the mean."""
    if POOL == "mean":
        p_block = p_cls + (i_bh * blocks + i_block) * HEAD.dim
    elif POOL == "token":
        p_block = p_cls + i_bh * HEAD.dim
    else:
        # Nowhere, and nobody reads it; a function that is compiled cannot return None.
        p_block = i_bh
    return p_block


# ------------------------------------------------------------------------------------------------------ attention


@triton.jit
def attend_none(ROWS: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr):
    """The softmax's running maximum `[R]`, sum `[R]` and outputs, tiles `[R, P]`, before any key."""
    b_acc = ()
    for i in tl.static_range(len(HEAD.pieces)):
        b_acc = b_acc + (tl.full([ROWS, HEAD.pieces[i][1]], 0.0, tl.float32),)
    if LOW is not None:
        if LOW.targets[2] >= 0:
            b_acc = b_acc + (tl.full([ROWS, LOW.tile], 0.0, tl.float32),)
    return tl.full([ROWS], float("-inf"), tl.float32), tl.full([ROWS], 0.0, tl.float32), b_acc


@triton.jit
def attend_keys(
    state, b_q, b_k, b_v, o_m, o_n, rows, mask, scale, EDGE: tl.constexpr, CAUSAL: tl.constexpr, HEAD: tl.constexpr
):
    """One step of the online softmax, base 2. EDGE: some keys are past the last; scale: log2(e) / sqrt(dh)."""
    b_m, b_l, b_acc = state
    # [R, M]
    b_s = tl.dot(b_q[0], tl.trans(b_k[0]), input_precision=HEAD.precision)
    for i in tl.static_range(1, len(b_q)):
        b_s = tl.dot(b_q[i], tl.trans(b_k[i]), b_s, input_precision=HEAD.precision)
    factor = scale
    if len(mask) > 0:
        p_mask, stride_m, stride_n = mask
        o_s = o_m.to(tl.int64)[:, None] * stride_m + o_n.to(tl.int64)[None, :] * stride_n
        m_s = (o_m < rows)[:, None] & (o_n < rows)[None, :]
        if p_mask.dtype.element_ty == tl.int1:
            b_s = tl.where(tl.load(p_mask + o_s, mask=m_s, other=0) != 0, float("-inf"), b_s)
        else:
            b_mask = tl.load(p_mask + o_s, mask=m_s, other=0.0).to(tl.float32)
            # A finite mask stays finite in base 2 too, so that a row of nothing else still has a softmax.
            b_mask = tl.where(b_mask == float("-inf"), b_mask, tl.maximum(b_mask, -2e38) * LOG2E)
            b_s = b_s * scale + b_mask
            factor = 1.0
    if EDGE:
        b_s = tl.where((o_n < rows)[None, :], b_s, float("-inf"))
    if CAUSAL:
        b_s = tl.where(o_n[None, :] <= o_m[:, None], b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
    # A row whose keys are all masked has no maximum yet: subtract 0, not -inf.
    b_zero = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    # Where no mask was added the scores are scaled here, at no cost: a multiply-add.
    b_p = tl.exp2(b_s * factor - b_zero[:, None])
    b_alpha = tl.exp2(b_m - b_zero)
    b_w = b_p.to(b_v[0].dtype)
    b_out = ()
    for i in tl.static_range(len(b_v)):
        b_out = b_out + (tl.dot(b_w, b_v[i], b_acc[i] * b_alpha[:, None], input_precision=HEAD.precision),)
    return b_m_new, b_l * b_alpha + tl.sum(b_p, 1), b_out


@triton.jit
def attend_store(state, b_up, out, p_cls, o_m, rows, HEAD: tl.constexpr, POOL: tl.constexpr):
    """Normalises, adds v's delta, keeps the pooled token as it is, gates, rounds once, stores."""
    b_m, b_l, b_acc = state
    p_o, stride_o, p_lse, b_gate, token = out
    m_m = o_m < rows
    b_sum = tl.where(b_l == 0.0, 1.0, b_l)
    tl.store(p_lse + o_m, tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_sum)) * LN2), mask=m_m)
    b_inverse = (1.0 / b_sum)[:, None]
    for i in tl.static_range(len(HEAD.pieces)):
        # [R, P]
        b_o = b_acc[i] * b_inverse
        if len(b_acc) > len(HEAD.pieces):
            b_low = (b_acc[len(HEAD.pieces)] * b_inverse).to(b_up[2][i].dtype)
            b_o = tl.dot(b_low, tl.trans(b_up[2][i]), b_o, input_precision=HEAD.precision)
        o_d = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
        m_d = o_d < HEAD.dim
        if POOL == "token":
            # Every row points at the same place; the pooled token's alone is written.
            o_cls = tl.zeros_like(o_m)[:, None] + o_d[None, :]
            tl.store(p_cls + o_cls, b_o, mask=(m_m & (o_m == token))[:, None] & m_d[None, :])
        if POOL == "mean":
            tl.store(p_cls + o_d, tl.sum(tl.where((m_m & (o_m > 0))[:, None], b_o, 0.0), 0), mask=m_d)
        b_o = (b_o * b_gate).to(p_o.dtype.element_ty)
        tl.store(p_o + o_m.to(tl.int64)[:, None] * stride_o + o_d[None, :], b_o, mask=m_m[:, None] & m_d[None, :])


@triton.jit
def attend_chunks(
    b_q, b_ks, b_vs, b_up, mask, out, p_cls, start, rows, scale,
    ROWS: tl.constexpr, TILES: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr, CAUSAL: tl.constexpr,
    POOL: tl.constexpr,
):  # fmt: skip
    """Queries start … start + ROWS - 1 against all keys, which are on chip."""
    o_m = start + tl.arange(0, ROWS)
    state = attend_none(ROWS, HEAD, LOW)
    for c in tl.static_range(len(TILES.chunks)):
        o_n = TILES.chunks[c][0] + tl.arange(0, TILES.chunks[c][1])
        # Only the last chunk has rows to spare; of the others a causal program skips those above the diagonal.
        if CAUSAL and c > 0:
            if start + ROWS > TILES.chunks[c][0]:
                state = attend_keys(
                    state, b_q, b_ks[c], b_vs[c], o_m, o_n, rows, mask, scale, c == len(TILES.chunks) - 1, CAUSAL, HEAD
                )
        else:
            state = attend_keys(
                state, b_q, b_ks[c], b_vs[c], o_m, o_n, rows, mask, scale, c == len(TILES.chunks) - 1, CAUSAL, HEAD
            )
    attend_store(state, b_up, out, p_cls, o_m, rows, HEAD, POOL)
