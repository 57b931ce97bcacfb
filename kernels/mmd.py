"""Kernel sums and gradient weights of the multi-kernel MMD: a panel of rows against the columns from its start on.

Kernels take what is large as (pointer, strides): x (p, layer, row, …), dom (p, row).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.heads import LOG2E
from fastheads.kernels.launch import architecture, check_contiguous, dot_precision, launch, on_grid, packed, strides
from fastheads.kernels.tiles import MMD_DOMAINS, cdiv, mmd_tiles

MAX_DOMAINS = 64
# The products of sums by domain: three TF32 products add up to float32, and a one-hot side is exact.
EXACT = tl.constexpr("tf32x3")

# ------------------------------------------------------------------------------------- parts of both MMD kernels


@triton.jit
def to_tf32(b_x):
    """Rounded to the eleven bits of TF32."""
    return ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def gaussians(b_x2, b_y2, b_cross, same, p_gammas, lowest, POWERS: tl.constexpr):
    """`Σ_u e_u` and `Σ_u γ_u e_u`, with `e_u = exp(−γ_u d²)`, or that power of `e_{u−1}` which POWERS[u] names.

    `d²_ij = ‖x_i‖² + ‖x_j‖² − 2 x_i·x_j`, of which the last is given, never negative, and 0 where `same`. Without
    p_gammas, `γ_u = 2^u lowest`.
    """
    b_d2 = tl.maximum(b_x2[:, None] + b_y2[None, :] + b_cross, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_d2 = tl.where(same, 0.0, b_d2)
    b_k = tl.zeros_like(b_d2)
    b_w = tl.zeros_like(b_d2)
    b_e = tl.zeros_like(b_d2)
    for u in tl.static_range(len(POWERS)):
        gamma = lowest * 2**u if p_gammas is None else tl.load(p_gammas + u)
        if POWERS[u] == 0:
            b_e = tl.exp2(b_d2 * (-gamma * LOG2E))
        else:
            b_e2 = b_e * b_e
            b_e = b_e2 if POWERS[u] == 2 else (b_e2 * b_e2) * (b_e2 * b_e2) * b_e2
        b_k += b_e
        b_w += gamma * b_e
    return b_k, b_w


@triton.jit
def load_domains(dom, o_n, m_n, S):
    """`[BN]` int32 ids; -1, which is no domain, for one outside 0 … S-1 and where no sample is."""
    b_dom = tl.load(dom[0] + o_n * dom[1], mask=m_n, other=-1)
    return tl.where((b_dom >= 0) & (b_dom < S), b_dom, -1).to(tl.int32)


def check_powers(powers: tuple[int, ...]) -> None:
    """Raises ValueError for what `gaussians` cannot read."""
    if not powers or powers[0] != 0 or any(p not in (0, 2, 10) for p in powers):
        raise ValueError(f"powers: got {powers}; takes 0, then any of 0, 2 and 10")


# ---------------------------------------------------------------------------------------------------------- panel


@triton.jit
def coeff_of_pairs(p_coeff, b_a, b_b, S, last, BS: tl.constexpr):
    """`[BM, BN]` C[dom_i, dom_j]: rows of C times a one-hot."""
    b_c = tl.zeros([b_a.shape[0], b_b.shape[0]], tl.float32)
    for s in range(0, last, BS):
        o_s = s + tl.arange(0, BS)
        m_c = (b_a >= 0)[:, None] & (o_s < S)[None, :]
        b_row = tl.load(p_coeff + b_a[:, None] * S + o_s[None, :], mask=m_c, other=0.0)
        b_pick = tl.where(o_s[:, None] == b_b[None, :], 1.0, 0.0)
        b_c = tl.dot(b_row, b_pick, b_c, input_precision=EXACT)
    return b_c


@triton.jit
def store_sums(p_sums, b_k, b_times, b_a, b_b, S, last, BS: tl.constexpr):
    """`Σ_{i∈a, j∈b} t_j k_ij`, `[S, S]`: columns summed by domain, then rows."""
    for s in range(0, last, BS):
        o_s = s + tl.arange(0, BS)
        b_right = tl.where(b_b[:, None] == o_s[None, :], b_times[:, None], 0.0)
        b_rows = tl.dot(b_k, b_right, input_precision=EXACT)
        for t in range(0, last, BS):
            o_t = t + tl.arange(0, BS)
            b_left = tl.where(o_t[:, None] == b_a[None, :], 1.0, 0.0)
            b_sums = tl.dot(b_left, b_rows, input_precision=EXACT)
            tl.store(p_sums + o_t[:, None] * S + o_s[None, :], b_sums, mask=(o_t < S)[:, None] & (o_s < S)[None, :])


@triton.jit
def mmd_tile_kernel(
    x, x2, dom, p_gammas, p_coeff, out, p_sums, panel, N, D, S, tiles_m, tiles_n,
    POWERS: tl.constexpr, PREC: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A program: one tile [BM, BN] of one layer's panel.

        e_u = exp(−γ_u ‖x_i − x_j‖²)        K[a, b] = Σ_{i∈a, j∈b} t_j Σ_u e_u,  t_j = 1 for j < once, else 2
        out_ij = C[a, b] Σ_u γ_u e_u for i ∈ a, j ∈ b, 0 where i = j, rounded to TF32 where products may be

    panel: first, rows, start, own, once of `mmd_tile`. Neighbours share their columns.
    """
    pid = tl.program_id(0)
    i_m, i_n, i_l = pid % tiles_m, (pid // tiles_m) % tiles_n, (pid // (tiles_m * tiles_n)).to(tl.int64)
    first, rows, start, own, once = panel
    # rows and columns within the panel, and the samples they are; row o_m is column o_m + own
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    o_i, o_j = (first + o_m).to(tl.int64), (start + o_n).to(tl.int64)
    m_m, m_n = o_m < rows, o_n < N - start
    o_d = tl.arange(0, BD)
    p_i = x[0] + i_l * x[1] + (o_i * x[2])[:, None] + o_d[None, :]
    p_j = x[0] + i_l * x[1] + (o_j * x[2])[None, :] + o_d[:, None]
    # [BM, BN]
    b_g = tl.zeros([BM, BN], tl.float32)
    for d in range(0, D, BD):
        m_d = d + o_d < D
        b_i = tl.load(p_i + d, mask=m_m[:, None] & m_d[None, :], other=0.0)
        b_j = tl.load(p_j + d, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_g = tl.dot(b_i, b_j, b_g, input_precision=PREC)
    p_x2 = x2[0] + i_l * x2[1]
    b_x2 = tl.load(p_x2 + o_i * x2[2], mask=m_m, other=0.0)
    b_y2 = tl.load(p_x2 + o_j * x2[2], mask=m_n, other=0.0)
    same = (o_m + own)[:, None] == o_n[None, :]
    b_k, b_w = gaussians(b_x2, b_y2, -2 * b_g, same, p_gammas + i_l * len(POWERS), 0, POWERS)
    b_a, b_b = load_domains(dom, o_i, m_m, S), load_domains(dom, o_j, m_n, S)
    # Of a loop with one turn at compile time no loop is made: it would keep its operands in registers.
    last = BS if BLOCKS == 1 else S
    if p_coeff is not None:
        b_w = tl.where(same, 0.0, b_w * coeff_of_pairs(p_coeff + i_l * S * S, b_a, b_b, S, last, BS))
        if PREC == "tf32":
            # What a product in TF32 would make of them: their row sums, which it is taken from, are then the same.
            # A GPU's NaN, all ones, would become −0.
            b_w = tl.where(b_w == b_w, to_tf32(b_w), b_w)
        p_w = out[0] + i_l * out[1] + (o_m.to(tl.int64) * out[2])[:, None] + o_n[None, :]
        tl.store(p_w, b_w, mask=m_m[:, None] & m_n[None, :])
    b_times = tl.where(o_n < once, 1.0, 2.0)
    store_sums(p_sums + pid.to(tl.int64) * S * S, b_k, b_times, b_a, b_b, S, last, BS)


def product_precision() -> str:
    """`input_precision` of inner products in float32: TF32 only where PyTorch's own products may use it.

    Else three TF32 products, each partial sum added in float32: as exact as float32, and on tensor cores.
    """
    return "tf32" if dot_precision(torch.float32) == "tf32" else "tf32x3"


def round_to_tf32_(x: Tensor) -> Tensor:
    """x, float32, rounded in place to the eleven bits of TF32, which a product in TF32 then takes as they are."""
    large = x * 8193  # 2^13 + 1: the sum below keeps 24 − 13 bits (Veltkamp); a NaN stays one
    return x.sub_(large).add_(large)


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

    Args:
        x: `[L, N, D]` float32, centred by the caller, last dimension contiguous; x2: `[L, N]`, its squared norms.
        dom: `[N]` int64, in any order; ids outside 0 … S-1 are in no domain.
        num_domains: S, at most `MAX_DOMAINS`.
        gammas: `[L, U]` float32, on the device.
        powers: U numbers: 0 for an exponential of its own, 2 or 10 where e_u is that power of e_{u-1}.
        coeff: C `[L, S, S]` float32, and out: `[L, rows, N-start]` float32, last dimension contiguous: both or neither.
        start: None is `first`: x with itself, on and above the diagonal. Else the rows are other samples than the
            columns, but that row `first` is column start + `own`, and so on with those after it (None: no row is).

    Returns the panel's part of the kernel sums, `[L, S, S]` float32. Of x with itself they are symmetric: pairs of the
    square block (columns up to first+rows) as they stand, pairs right of it in both directions. Bitwise repeatable.
    """
    L, N, D = x.shape
    S = num_domains
    if S > MAX_DOMAINS:
        raise ValueError(f"num_domains: got {S}; the kernel takes up to {MAX_DOMAINS}")
    check_powers(powers)
    check_contiguous(x=x, out=out)
    itself = start is None
    if start is None:
        start, own, once = first, 0, rows
    else:
        once = N - start
        own = -rows if own is None else min(max(own, -rows), once)  # out of range is no column, and never overflows
    precision, blocks = product_precision(), cdiv(S, MMD_DOMAINS)
    tile = mmd_tiles(architecture(x), precision, len(powers), blocks)
    tiles_m, tiles_n = cdiv(rows, tile["BM"]), cdiv(N - start, tile["BN"])
    partial = torch.empty((L, tiles_m * tiles_n, S, S), dtype=torch.float32, device=x.device)
    samples = ((x, *strides(x, 0, 1)), (x2, *strides(x2, 0, 1)), (dom, dom.stride(0)), packed(gammas), packed(coeff))
    results = (None if out is None else (out, *strides(out, 0, 1)), partial)
    sizes = ((first, rows, start, own, once), N, D, S, tiles_m, tiles_n)
    form: dict[str, Any] = {"POWERS": powers, "PREC": precision, "BLOCKS": blocks}
    # sm_80's ptxas would sometimes settle on 128 registers and spill
    form |= {"BS": MMD_DOMAINS, "maxnreg": 255, **tile}
    launch(mmd_tile_kernel, (on_grid(L * tiles_m * tiles_n, "mmd_tile"),), *samples, *results, *sizes, **form)
    sums = partial.sum(1)
    # the square block is symmetric, the rest was counted twice in one direction
    return torch.lerp(sums, sums.mT, 0.5) if itself else sums
