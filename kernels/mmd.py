"""Kernel sums and gradient weights of the multi-kernel MMD: a panel of rows against the columns from its start on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.launch import architecture, dot_precision, launch, on_grid, packed, rows_of, strides

MAX_DOMAINS = 64
LOG2E = tl.constexpr(1.4426950408889634)
# The products of sums by domain: three TF32 products add up to float32, and a one-hot side is exact.
EXACT = tl.constexpr("tf32x3")

# (rows, columns, features at a time, warps, stages) by precision and architecture, and for many bandwidths or
# domains. No row spills at widths D that 16 divides.
TILES = {
    ("tf32x3", 80): (64, 64, 32, 4, 3),
    ("tf32x3", 90): (128, 64, 32, 8, 3),
    ("tf32", 80): (128, 64, 32, 8, 3),
    ("tf32", 90): (128, 64, 32, 8, 3),
}
TILE_MANY = (128, 32, 32, 8, 3)
FEW_BANDWIDTHS, BLOCK_DOMAINS = 5, 16


def product_precision() -> str:
    """`input_precision` of inner products in float32: TF32 only where PyTorch's own products may use it.

    Else three TF32 products, each partial sum added in float32: as exact as float32, and on tensor cores.
    """
    return "tf32" if dot_precision(torch.float32) == "tf32" else "tf32x3"


def round_to_tf32_(x: Tensor) -> Tensor:
    """x, float32, rounded in place to the eleven bits of TF32, which a product in TF32 then takes as they are."""
    large = x * 8193  # 2^13 + 1: the sum below keeps 24 − 13 bits (Veltkamp); a NaN stays one
    return x.sub_(large).add_(large)


@triton.jit
def gaussians(b_d2, gammas, POWERS: tl.constexpr):
    """`Σ_u e_u` and `Σ_u γ_u e_u`, with `e_u = exp(−γ_u d²)`, or that power of `e_{u−1}` which POWERS[u] names."""
    b_k = tl.zeros_like(b_d2)
    b_w = tl.zeros_like(b_d2)
    b_e = tl.zeros_like(b_d2)
    for u in tl.static_range(len(POWERS)):
        if POWERS[u] == 0:
            b_e = tl.exp2(b_d2 * (-gammas[u] * LOG2E))
        elif POWERS[u] == 2:
            b_e = b_e * b_e
        else:
            b_e2 = b_e * b_e
            b_e4 = b_e2 * b_e2
            b_e = b_e4 * b_e4 * b_e2
        b_k += b_e
        b_w += gammas[u] * b_e
    return b_k, b_w


@triton.jit
def load_gammas(p_gammas, U: tl.constexpr):
    gammas = ()
    for u in tl.static_range(U):
        gammas = gammas + (tl.load(p_gammas + u),)
    return gammas


@triton.jit
def load_domains(p_dom, s_dom, o_n, m_n, S):
    """`[BN]` int32 ids; -1, which is no domain, for one outside 0 … S-1 and where no sample is."""
    b_dom = tl.load(p_dom + o_n * s_dom, mask=m_n, other=-1)
    return tl.where((b_dom >= 0) & (b_dom < S), b_dom, -1).to(tl.int32)


@triton.jit
def add_coeff(b_c, p_coeff, b_a, b_b, o_s, S):
    """`[BM, BN]` plus coeff[dom_i, dom_j] where dom_j is among the domains o_s: rows of coeff times a one-hot."""
    m_c = (b_a >= 0)[:, None] & (o_s < S)[None, :]
    b_row = tl.load(p_coeff + b_a[:, None] * S + o_s[None, :], mask=m_c, other=0.0)
    b_pick = tl.where(o_s[:, None] == b_b[None, :], 1.0, 0.0)
    return tl.dot(b_row, b_pick, b_c, input_precision=EXACT)


@triton.jit
def sum_columns(b_k, b_b, b_times, o_s):
    """`[BM, BS]`: each row's sums over the columns of the domains o_s, b_times each."""
    b_right = tl.where(b_b[:, None] == o_s[None, :], b_times[:, None], 0.0)
    return tl.dot(b_k, b_right, input_precision=EXACT)


@triton.jit
def store_sums(p_sums, b_rows, b_a, o_t, o_s, S):
    """Adds up the rows of each of the domains o_t."""
    b_left = tl.where(o_t[:, None] == b_a[None, :], 1.0, 0.0)
    b_sums = tl.dot(b_left, b_rows, input_precision=EXACT)
    tl.store(p_sums + o_t[:, None] * S + o_s[None, :], b_sums, mask=(o_t < S)[:, None] & (o_s < S)[None, :])


@triton.jit
def mmd_tile_kernel(
    p_x, s_x_l, s_x_n, p_x2, s_x2_l, s_x2_n, p_dom, s_dom, p_gammas, p_coeff, p_out, s_out_l, s_out_n, p_sums,
    N, D, S, first, rows, start, own, once, tiles_m, tiles_n,
    POWERS: tl.constexpr, WEIGHTS: tl.constexpr, PREC: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A program: one tile [BM, BN] of one layer, domains by blocks of BS. Neighbours share their columns."""
    pid = tl.program_id(0)
    i_m, i_n, i_l = pid % tiles_m, (pid // tiles_m) % tiles_n, (pid // (tiles_m * tiles_n)).to(tl.int64)
    U: tl.constexpr = len(POWERS)
    # rows and columns within the panel, and the samples they are; row o_m is column o_m + own
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    o_i, o_j = (first + o_m).to(tl.int64), (start + o_n).to(tl.int64)
    m_m, m_n = o_m < rows, o_n < N - start
    o_d, o_s = tl.arange(0, BD), tl.arange(0, BS)
    p_i = p_x + i_l * s_x_l + (o_i * s_x_n)[:, None] + o_d[None, :]
    p_j = p_x + i_l * s_x_l + (o_j * s_x_n)[None, :] + o_d[:, None]
    # [BM, BN]
    b_g = tl.zeros([BM, BN], tl.float32)
    for d in range(0, D, BD):
        m_d = d + o_d < D
        b_i = tl.load(p_i + d, mask=m_m[:, None] & m_d[None, :], other=0.0)
        b_j = tl.load(p_j + d, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_g = tl.dot(b_i, b_j, b_g, input_precision=PREC)
    p_x2 += i_l * s_x2_l
    b_x2 = tl.load(p_x2 + o_i * s_x2_n, mask=m_m, other=0.0)
    b_y2 = tl.load(p_x2 + o_j * s_x2_n, mask=m_n, other=0.0)
    same = (o_m + own)[:, None] == o_n[None, :]
    b_d2 = b_x2[:, None] + b_y2[None, :] - 2 * b_g
    b_d2 = tl.where(same, 0.0, tl.maximum(b_d2, 0.0, propagate_nan=tl.PropagateNan.ALL))
    b_k, b_w = gaussians(b_d2, load_gammas(p_gammas + i_l * U, U), POWERS)
    b_a, b_b = load_domains(p_dom, s_dom, o_i, m_m, S), load_domains(p_dom, s_dom, o_j, m_n, S)
    if WEIGHTS:
        p_coeff += i_l * S * S
        b_c = tl.zeros([BM, BN], tl.float32)
        if BLOCKS == 1:
            b_c = add_coeff(b_c, p_coeff, b_a, b_b, o_s, S)
        else:
            for s in range(0, S, BS):
                b_c = add_coeff(b_c, p_coeff, b_a, b_b, s + o_s, S)
        p_w = p_out + i_l * s_out_l + (o_m.to(tl.int64) * s_out_n)[:, None] + o_n[None, :]
        b_w = tl.where(same, 0.0, b_w * b_c)
        if PREC == "tf32":
            # what a product in TF32 would make of them: their row sums, which it is taken from, are then the same.
            # A GPU's NaN, all ones, would become −0.
            b_bits = (b_w.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
            b_w = tl.where(b_w == b_w, b_bits.to(tl.float32, bitcast=True), b_w)
        tl.store(p_w, b_w, mask=m_m[:, None] & m_n[None, :])
    # beyond these columns a pair stands for both its directions
    b_times = tl.where(o_n < once, 1.0, 2.0)
    p_sums += pid.to(tl.int64) * S * S
    # a loop of one turn would keep its operands in registers
    if BLOCKS == 1:
        store_sums(p_sums, sum_columns(b_k, b_b, b_times, o_s), b_a, o_s, o_s, S)
    else:
        for s in range(0, S, BS):
            b_rows = sum_columns(b_k, b_b, b_times, s + o_s)
            for t in range(0, S, BS):
                store_sums(p_sums, b_rows, b_a, t + o_s, s + o_s, S)


def mmd_tile(
    x: Tensor,
    x2: Tensor,
    dom: Tensor,
    first: int,
    rows: int,
    *,
    num_domains: int,
    gammas: Tensor,
    powers: tuple[int, ...],
    coeff: Tensor | None = None,
    out: Tensor | None = None,
    start: int | None = None,
    own: int | None = None,
) -> Tensor:
    """One panel of the kernel matrix: rows first … first+rows-1 against columns start … N-1, all layers at once.

        d²_ij = max(x2_i + x2_j − 2 x_i·x_j, 0), 0 where i = j        e_u = exp(−γ_u d²)
        out_ij = coeff[dom_i, dom_j] Σ_u γ_u e_u, 0 where i = j, rounded to TF32 where products may be

    Args:
        x: `[L, N, D]` float32, centred by the caller, last dimension contiguous; x2: `[L, N]`, its squared norms.
        dom: `[N]` int64, in any order; ids outside 0 … S-1 are in no domain.
        num_domains: S, at most `MAX_DOMAINS`.
        gammas: `[L, U]` float32, on the device.
        powers: U numbers: 0 for an exponential of its own, 2 or 10 where e_u is that power of e_{u-1}.
        coeff: `[L, S, S]` float32, and out: `[L, rows, N-start]` float32, last dimension contiguous: both or neither.
        start: None is `first`: x with itself, on and above the diagonal. Else the rows are other samples than the
            columns, but that row `first` is column start + `own`, and so on with those after it (None: no row is).

    Returns the panel's part of the kernel sums, `[L, S, S]` float32. Of x with itself they are symmetric: pairs of the
    square block (columns up to first+rows) as they stand, pairs right of it in both directions. Bitwise repeatable.
    """
    L, N, D = x.shape
    S = num_domains
    if S > MAX_DOMAINS:
        raise ValueError(f"num_domains: got {S}; the kernel takes up to {MAX_DOMAINS}")
    if not powers or powers[0] != 0 or any(p not in (0, 2, 10) for p in powers):
        raise ValueError(f"powers: got {powers}; takes 0, then any of 0, 2 and 10")
    rows_of(x=x, out=out)
    precision = product_precision()
    blocks = triton.cdiv(S, BLOCK_DOMAINS)
    many = blocks > 1 or len(powers) > FEW_BANDWIDTHS
    tile = TILE_MANY if many else TILES[precision, 90 if architecture(x) >= 90 else 80]
    BM, BN, BD, warps, stages = tile
    itself = start is None
    if start is None:
        start, own, once = first, 0, rows
    else:
        once = N - start
        own = -rows if own is None else min(max(own, -rows), once)  # out of range is no column, and never overflows
    tiles_m, tiles_n = triton.cdiv(rows, BM), triton.cdiv(N - start, BN)
    tiles = tiles_m * tiles_n
    partial = torch.empty((L, tiles, S, S), dtype=torch.float32, device=x.device)
    launch(
        mmd_tile_kernel,
        (on_grid(L * tiles, "mmd_tile"),),
        x,
        *strides(x, 0, 1),
        x2,
        *strides(x2, 0, 1),
        dom,
        dom.stride(0),
        packed(gammas),
        packed(coeff),
        out,
        *((0, 0) if out is None else strides(out, 0, 1)),
        partial,
        N,
        D,
        S,
        first,
        rows,
        start,
        own,
        once,
        tiles_m,
        tiles_n,
        POWERS=powers,
        WEIGHTS=coeff is not None,
        PREC=precision,
        BLOCKS=blocks,
        BM=BM,
        BN=BN,
        BD=BD,
        BS=BLOCK_DOMAINS,
        num_warps=warps,
        num_stages=stages,
        maxnreg=255,  # sm_80's ptxas would sometimes settle on 128 and spill
    )
    sums = partial.sum(1)
    # the square block is symmetric, the rest was counted twice in one direction
    return torch.lerp(sums, sums.mT, 0.5) if itself else sums
