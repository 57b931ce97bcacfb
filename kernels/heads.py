"""One head inside an attention kernel: its rows as tiles, its deltas, its mask, its scores, its gate.

Names say what a thing is: p_ a pointer, o_ offsets, m_ a mask, b_ a tile or what else is on chip; o_m are queries, o_n
keys, o_r either. A head's rows are tuples of tiles `[R, P]`, in pieces along head_dim: 80 columns are 64 and 16, not
128. What is not there is None in a launch and () on chip, whose type is known when a kernel is compiled.

In shapes T counts targets and B images. q, k and v are parts 0, 1 and 2. Side by side in a row, part p of head h is the
head p·H + h of 3·H.

A delta, `y += s·T Bᵀ` with `T = x Aᵀ`, goes by these names:

    LowRank      (low_rank.py) what a launcher is given: low, which is T, up, which is B, and what they are of
    Low          what of it a kernel is compiled for: rank, and which parts have a delta
    Delta        what of it a kernel is given: pointers to T and B, strides, s
    DeltaOfHead  one head's and part's: its columns of T and its B
    b_t, b_up    T `[R, r]` and s·B `[P, r]` on chip
"""

import functools
import math
from collections import namedtuple
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.launch import dot_precision, strides
from fastheads.kernels.tiles import Tiles, dot_width, next_power_of_2, pieces_of

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


class Head(NamedTuple):
    """At compile time. heads: H; dim: dh; pieces: (first column, columns); scale: 1 / sqrt(dh).

    precision: of products; gates: numbers in a tile of all gates, which is H padded to a power of two; gate_form: ""
    where they are given as they are, else what makes them of theta.
    """

    heads: int
    dim: int
    pieces: tuple[tuple[int, int], ...]
    scale: float
    precision: str
    gates: int
    gate_form: str


class Low(NamedTuple):
    """The deltas at compile time. target_of: of each part, which target it is, -1 where it has no delta; tile: rank,
    padded for tl.dot; shared: all heads have one A."""

    target_of: tuple[int, int, int] = (-1, -1, -1)
    rank: int = 0
    tile: int = 0
    shared: bool = False


# What kernels are given: x `[B, N, …]`, its last dimension contiguous; a mask `[B, H, N, N]`, boolean (True: masked) or
# additive; T = x Aᵀ `[B, N, C]`, its columns over (target, H or 1, rank), with B `[T, H, dh, r]` and the scale s.
Rows = namedtuple("Rows", "p stride_b stride_n")
Mask = namedtuple("Mask", "p stride_b stride_h stride_m stride_n")
Delta = namedtuple("Delta", "p stride_b stride_n p_up scale")
# One image's head of these; delta: a DeltaOfHead or ().
RowsOfHead = namedtuple("RowsOfHead", "p stride delta")
DeltaOfHead = namedtuple("DeltaOfHead", "p stride p_up scale")


def as_rows(x: Tensor) -> Rows:
    every = x.stride()
    return Rows(x, every[0], every[1])


def as_mask(mask: Tensor | None, batch: int, heads: int, length: int) -> Mask | None:
    if mask is None:
        return None
    mask = mask.expand(batch, heads, length, length)
    return Mask(mask, *strides(mask, 0, 1, 2, 3))


@functools.lru_cache(maxsize=1024)
def low_of(parts: tuple[int, ...], rank: int, shared: bool) -> Low:
    """parts: which part each target is."""
    q, k, v = (parts.index(part) if part in parts else -1 for part in range(3))
    return Low((q, k, v), rank, dot_width(rank), shared)


def head_of(heads: int, head_dim: int, dtype: torch.dtype, gate_form: str = "") -> Head:
    return _head_of(heads, head_dim, dot_precision(dtype), gate_form)


@functools.lru_cache(maxsize=1024)
def _head_of(heads: int, head_dim: int, precision: str, gate_form: str) -> Head:
    gates = next_power_of_2(heads)
    return Head(heads, head_dim, pieces_of(head_dim), head_dim**-0.5, precision, gates, gate_form)


def compiled_for(tiles: Tiles, head: Head, low: Low, causal: bool) -> dict[str, Any]:
    """What every attention kernel is compiled for."""
    warps = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return {"TILES": tiles, "HEAD": head, "LOW": low, "CAUSAL": causal, **warps}


@triton.jit
def program(blocks, HEAD: tl.constexpr):
    """Image, head and block of this program; blocks of a head stand beside each other."""
    i_bh = tl.program_id(0) // blocks
    return (i_bh // HEAD.heads).to(tl.int64), i_bh % HEAD.heads, tl.program_id(0) % blocks


@triton.jit
def rows_of_head(x, b, h, HEAD: tl.constexpr):
    """Rows of head h of x: of H heads, or of 3·H where x is qkv; h = 0 begins at x's first column."""
    return RowsOfHead(x.p + b * x.stride_b + h * HEAD.dim, x.stride_n, ())


@triton.jit
def part_of_head(qkv, delta, b, h, PART: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr):
    """Part PART of one head, with its delta."""
    own = ()
    if LOW.target_of[PART] >= 0:
        i_th = LOW.target_of[PART] * HEAD.heads + h
        p_t = delta.p + b * delta.stride_b + (LOW.target_of[PART] if LOW.shared else i_th) * LOW.rank
        own = DeltaOfHead(p_t, delta.stride_n, delta.p_up + i_th * (HEAD.dim * LOW.rank), delta.scale)
    y = rows_of_head(qkv, b, PART * HEAD.heads + h, HEAD)
    return RowsOfHead(y.p, y.stride, own)


@triton.jit
def parts_of_head(qkv, delta, b, h, HEAD: tl.constexpr, LOW: tl.constexpr):
    """q, k and v."""
    q = part_of_head(qkv, delta, b, h, 0, HEAD, LOW)
    k = part_of_head(qkv, delta, b, h, 1, HEAD, LOW)
    return q, k, part_of_head(qkv, delta, b, h, 2, HEAD, LOW)


@triton.jit
def mask_of_head(mask, b, h):
    """(pointer, strides) of the mask of one image and head."""
    b_mask = ()
    if mask is not None:
        b_mask = (mask.p + b * mask.stride_b + h.to(tl.int64) * mask.stride_h, mask.stride_m, mask.stride_n)
    return b_mask


@triton.jit
def load_gate(p_gate, h, HEAD: tl.constexpr):
    """g of one head, or of several `[X]`, from all that are given: their values or theta, `reference.GATES`' formulas.

    1 without gates. Divisions are exact, so that theta = 0 gives exactly 1.
    """
    b_gate = 1.0
    if p_gate is not None:
        b_gate = tl.load(p_gate + h, mask=h < HEAD.heads, other=0.0)
        if HEAD.gate_form == "sigmoid":
            b_gate = tl.div_rn(2.0, 1.0 + tl.exp(-b_gate))
        if HEAD.gate_form == "softmax":
            o_h = tl.arange(0, HEAD.gates)
            b_theta = tl.load(p_gate + o_h, mask=o_h < HEAD.heads, other=float("-inf"))
            b_most = tl.max(b_theta, 0)
            b_gate = tl.div_rn(HEAD.heads * tl.exp(b_gate - b_most), tl.sum(tl.exp(b_theta - b_most), 0))
    return b_gate


@triton.jit
def theta_gradient(b_dg, p_gate, h, HEAD: tl.constexpr):
    """dL/dθ of the heads h `[X]`, all there are, from dL/dg; dg itself where the gates are given by value.

    softmax   g_h = H e^θ_h / Σ e^θ     dθ_h = g_h (dg_h − Σ_j g_j dg_j / H)
    sigmoid   g_h = 2 / (1 + e^−θ_h)    dθ_h = dg_h · 2 e^−|θ_h| / (1 + e^−|θ_h|)²
    """
    if HEAD.gate_form == "sigmoid":
        b_e = tl.exp(-tl.abs(tl.load(p_gate + h, mask=h < HEAD.heads, other=0.0)))
        b_dg = b_dg * 2.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))
    if HEAD.gate_form == "softmax":
        b_gate = tl.where(h < HEAD.heads, load_gate(p_gate, h, HEAD), 0.0)
        b_dg = b_gate * (b_dg - tl.sum(b_gate * b_dg, 0) / HEAD.heads)
    return b_dg


@triton.jit
def load_tile(p_x, o_r, stride, rows, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr):
    """Columns first … first + WIDTH - 1 of rows o_r, `[R, WIDTH]`; zero past `rows` and (RAGGED: some are) COLUMNS."""
    o_c = first + tl.arange(0, WIDTH)
    m_x = (o_r < rows)[:, None]
    if RAGGED:
        m_x = m_x & (o_c < COLUMNS)[None, :]
    return tl.load(p_x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], mask=m_x, other=0.0)


@triton.jit
def load_head(x, o_r, rows, HEAD: tl.constexpr, dtype: tl.constexpr):
    """Rows o_r of a head as they lie in memory, tiles `[R, P]` in dtype."""
    b_x = ()
    for i in tl.static_range(len(HEAD.pieces)):
        b_p = load_tile(
            x.p, o_r, x.stride, rows, HEAD.pieces[i][0], HEAD.pieces[i][1], HEAD.dim,
            HEAD.pieces[i][0] + HEAD.pieces[i][1] > HEAD.dim,
        )  # fmt: skip
        b_x = b_x + (b_p.to(dtype),)
    return b_x


@triton.jit
def load_t(x, o_r, rows, LOW: tl.constexpr):
    """T of one head, `[R, r]`."""
    return load_tile(x.delta.p, o_r, x.delta.stride, rows, 0, LOW.tile, LOW.rank, LOW.rank < LOW.tile)


@triton.jit
def load_up(p_up, scale, dtype: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr):
    """scale · B of one head, tiles `[P, r]`, rounded once."""
    b_up = ()
    for i in tl.static_range(len(HEAD.pieces)):
        o_d = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
        b_p = load_tile(p_up, o_d, LOW.rank, HEAD.dim, 0, LOW.tile, LOW.rank, LOW.rank < LOW.tile)
        b_up = b_up + ((b_p * scale).to(dtype),)
    return b_up


@triton.jit
def load_ups(delta, h, dtype: tl.constexpr, HEAD: tl.constexpr, LOW: tl.constexpr):
    """s·B of one head for q, k and v."""
    b_ups = ()
    for part in tl.static_range(3):
        b_up = ()
        if LOW.target_of[part] >= 0:
            p_up = delta.p_up + (LOW.target_of[part] * HEAD.heads + h) * (HEAD.dim * LOW.rank)
            b_up = load_up(p_up, delta.scale, dtype, HEAD, LOW)
        b_ups = b_ups + (b_up,)
    return b_ups


@triton.jit
def load_part(x, o_r, rows, HEAD: tl.constexpr, LOW: tl.constexpr):
    """Rows o_r of q, k or v with their delta, y0 + T (s·B)ᵀ: added in float32, then rounded.

    For gradients that will do. The sum loses what is under half a unit of y0, which in the forward pass is the whole
    effect of a small delta; a gradient is only as far off as 16 bits put any. (What that does to P's sum:
    `attention_bwd.inverse_of`.)
    """
    b_y = load_head(x, o_r, rows, HEAD, x.p.dtype.element_ty)
    if len(x.delta) > 0:
        b_t = load_t(x, o_r, rows, LOW)
        b_up = load_up(x.delta.p_up, x.delta.scale, b_t.dtype, HEAD, LOW)
        b_sum = ()
        for i in tl.static_range(len(HEAD.pieces)):
            b_y32 = tl.dot(b_t, tl.trans(b_up[i]), b_y[i].to(tl.float32), input_precision=HEAD.precision)
            b_sum = b_sum + (b_y32.to(b_y[i].dtype),)
        b_y = b_sum
    return b_y


@triton.jit
def store_head(x, o_r, rows, b_x, factor, HEAD: tl.constexpr):
    """factor · b_x, in the dtype of x."""
    for i in tl.static_range(len(HEAD.pieces)):
        o_d = HEAD.pieces[i][0] + tl.arange(0, HEAD.pieces[i][1])
        m_x = (o_r < rows)[:, None]
        if HEAD.pieces[i][0] + HEAD.pieces[i][1] > HEAD.dim:
            m_x = m_x & (o_d < HEAD.dim)[None, :]
        p_x = x.p + o_r.to(tl.int64)[:, None] * x.stride + o_d[None, :]
        tl.store(p_x, (b_x[i] * factor).to(x.p.dtype.element_ty), mask=m_x)


@triton.jit
def zero_head(ROWS: tl.constexpr, b_up, HEAD: tl.constexpr):
    """Zeros `[R, P]`, and beside them `[R, r]` where b_up, the B of a delta, is there."""
    b_x = ()
    for i in tl.static_range(len(HEAD.pieces)):
        b_x = b_x + (tl.full([ROWS, HEAD.pieces[i][1]], 0.0, tl.float32),)
    if len(b_up) > 0:
        b_x = b_x + (tl.full([ROWS, b_up[0].shape[1]], 0.0, tl.float32),)
    return b_x


@triton.jit
def transposed(b_x):
    b_y = ()
    for i in tl.static_range(len(b_x)):
        b_y = b_y + (tl.trans(b_x[i]),)
    return b_y


@triton.jit
def dot_over(b_x, b_y, HEAD: tl.constexpr):
    """x y in float32, of tiles `[X, P]` and `[P, Y]`: summed over the pieces."""
    b_z = tl.dot(b_x[0], b_y[0], input_precision=HEAD.precision)
    for i in tl.static_range(1, len(b_x)):
        b_z = tl.dot(b_x[i], b_y[i], b_z, input_precision=HEAD.precision)
    return b_z


@triton.jit
def add_product(b_acc, b_w, b_x, HEAD: tl.constexpr):
    """acc + w x, piece by piece, w rounded as x is."""
    b_y = ()
    for i in tl.static_range(len(b_x)):
        b_y = b_y + (tl.dot(b_w.to(b_x[i].dtype), b_x[i], b_acc[i], input_precision=HEAD.precision),)
    return b_y


@triton.jit
def scores(b_x, b_y, o_m, o_n, rows, mask, HEAD: tl.constexpr):
    """S and f: the scores q kᵀ / sqrt(dh) + mask, in base 2, are S · f; -inf where masked.

    f is 1 / sqrt(dh) in base 2, left to the caller as a multiply-add is free where it subtracts the maximum; 1 where a
    mask was added. b_x: q and b_y: k, queries o_m `[M, 1]`, keys o_n `[1, N]`; or k and q, `[1, M]` and `[N, 1]`, for
    the transpose.
    """
    b_s = dot_over(b_x, transposed(b_y), HEAD)
    factor = HEAD.scale * LOG2E
    if len(mask) > 0:
        p_mask, stride_m, stride_n = mask
        o_s = o_m.to(tl.int64) * stride_m + o_n.to(tl.int64) * stride_n
        m_s = (o_m < rows) & (o_n < rows)
        if p_mask.dtype.element_ty == tl.int1:
            b_s = tl.where(tl.load(p_mask + o_s, mask=m_s, other=0) != 0, float("-inf"), b_s)
        else:
            b_mask = tl.load(p_mask + o_s, mask=m_s, other=0.0).to(tl.float32)
            # A finite mask stays finite in base 2 too, so that a row of nothing else still has a softmax.
            b_mask = tl.where(b_mask == float("-inf"), b_mask, tl.maximum(b_mask, -2e38) * LOG2E)
            b_s = b_s * factor + b_mask
            factor = 1.0
    return b_s, factor


@triton.jit
def hide(b_x, o_m, o_n, rows, value: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr):
    """b_x with `value` where a key is past the last (EDGE: some may be) or after the query (CAUSAL).

    The forward pass hides scores by -inf, for it takes their maximum; the backward, which doesn't, probabilities by 0:
    -inf before the exponential takes sm_90 20 registers more.
    """
    if EDGE:
        b_x = tl.where(o_n < rows, b_x, value)
    if CAUSAL:
        b_x = tl.where(o_n <= o_m, b_x, value)
    return b_x
