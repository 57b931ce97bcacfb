"""The multi-kernel MMD by panels: a panel's kernel sums and weights, and how its weights pull on the samples.

Kernels take what is large as (pointer, strides): x (p, layer, row, …), dom (p, row). Features are read in their own
dtype; each tile of them is centred where it is loaded, in float32, so that no copy of them is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.heads import LOG2E
from fastheads.kernels.launch import architecture, check_contiguous, dot_precision, launch, on_grid, packed, strides
from fastheads.kernels.tiles import MMD_DOMAINS, MMD_NORMS, cdiv, mmd_pull_tiles, mmd_tiles

MAX_DOMAINS = 64
# The products of sums by domain: three TF32 products add up to float32, and a one-hot side is exact.
EXACT = tl.constexpr("tf32x3")
# Of `mmd_pull`: programs that fill a chip, two on each SM of the largest; the fewest columns that one goes through.
PROGRAMS, SPAN = 264, 512

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
def load_centred(p_x, p_c, mask, m_d, PREC: tl.constexpr):
    """x − c in float32, rounded to TF32 where products may be: they round nothing then. x is 0 where masked.

    p_x, mask: a tile's; p_c, m_d: of its features, of the same rank. A GPU's NaN, all ones, would become −0.
    """
    b_z = tl.load(p_x, mask=mask & m_d, other=0.0).to(tl.float32) - tl.load(p_c, mask=m_d, other=0.0)
    return tl.where(b_z == b_z, to_tf32(b_z), b_z) if PREC == "tf32" else b_z


@triton.jit
def finite(b_x):
    """0 in place of what is not."""
    return tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)


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
def mmd_norms_kernel(
    x, dom, p_centre, p_norms, N, D, S, tiles, PREC: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: `‖x_i − c‖²` of BN samples of one layer."""
    pid = tl.program_id(0)
    i_n, i_l = pid % tiles, (pid // tiles).to(tl.int64)
    o_n, o_d = i_n * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = load_domains(dom, o_n, o_n < N, S) >= 0
    p_x = x[0] + i_l * x[1] + (o_n.to(tl.int64) * x[2])[:, None] + o_d[None, :]
    p_c = (p_centre + i_l * D + o_d)[None, :]
    b_squares = tl.zeros([BN, BD], tl.float32)
    for d in range(0, D, BD):
        b_z = load_centred(p_x + d, p_c + d, m_n[:, None], (d + o_d < D)[None, :], PREC)
        b_squares += b_z * b_z
    tl.store(p_norms + i_l * N + o_n, tl.sum(b_squares, 1), mask=o_n < N)


@triton.jit
def mmd_tile_kernel(
    x, x2, dom_x, y, y2, dom_y, p_centre, p_gammas, p_coeff, out, p_sums, panel, D, S, tiles_m, tiles_n,
    POWERS: tl.constexpr, PREC: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A program: one tile [BM, BN] of one layer's panel.

        e_u = exp(−γ_u ‖x_i − y_j‖²)        K[a, b] = Σ_{i∈a, j∈b} t_j Σ_u e_u,  t_j = 1 for j < once, else 2
        out_ij = C[a, b] Σ_u γ_u e_u for i ∈ a, j ∈ b, 0 where i is j, rounded to TF32 where products may be

    panel: rows, columns, own, once: row i is column i + own. Neighbours share their columns.
    """
    pid = tl.program_id(0)
    i_m, i_n, i_l = pid % tiles_m, (pid // tiles_m) % tiles_n, (pid // (tiles_m * tiles_n)).to(tl.int64)
    rows, columns, own, once = panel
    o_m, o_n, o_d = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BD)
    b_a, b_b = load_domains(dom_x, o_m, o_m < rows, S), load_domains(dom_y, o_n, o_n < columns, S)
    # whatever samples of no domain hold is not read
    m_m, m_n = b_a >= 0, b_b >= 0
    p_i = x[0] + i_l * x[1] + (o_m.to(tl.int64) * x[2])[:, None] + o_d[None, :]
    p_j = y[0] + i_l * y[1] + (o_n.to(tl.int64) * y[2])[None, :] + o_d[:, None]
    p_c = p_centre + i_l * D + o_d
    # [BM, BN]
    b_g = tl.zeros([BM, BN], tl.float32)
    for d in range(0, D, BD):
        m_d = d + o_d < D
        b_i = load_centred(p_i + d, p_c[None, :] + d, m_m[:, None], m_d[None, :], PREC)
        b_j = load_centred(p_j + d, p_c[:, None] + d, m_n[None, :], m_d[:, None], PREC)
        b_g = tl.dot(b_i, b_j, b_g, input_precision=PREC)
    b_x2 = tl.load(x2[0] + i_l * x2[1] + o_m.to(tl.int64) * x2[2], mask=m_m, other=0.0)
    b_y2 = tl.load(y2[0] + i_l * y2[1] + o_n.to(tl.int64) * y2[2], mask=m_n, other=0.0)
    same = (o_m + own)[:, None] == o_n[None, :]
    b_k, b_w = gaussians(b_x2, b_y2, -2 * b_g, same, p_gammas + i_l * len(POWERS), 0, POWERS)
    # Of a loop with one turn at compile time no loop is made: it would keep its operands in registers.
    last = BS if BLOCKS == 1 else S
    if p_coeff is not None:
        b_w = tl.where(same, 0.0, b_w * coeff_of_pairs(p_coeff + i_l * S * S, b_a, b_b, S, last, BS))
        if PREC == "tf32":
            # What a product in TF32 would make of them: their row sums, which it is taken from, are then the same.
            # A GPU's NaN, all ones, would become −0.
            b_w = tl.where(b_w == b_w, to_tf32(b_w), b_w)
        p_w = out[0] + i_l * out[1] + (o_m.to(tl.int64) * out[2])[:, None] + o_n[None, :]
        tl.store(p_w, b_w, mask=(o_m < rows)[:, None] & (o_n < columns)[None, :])
    b_times = tl.where(o_n < once, 1.0, 2.0)
    store_sums(p_sums + pid.to(tl.int64) * S * S, b_k, b_times, b_a, b_b, S, last, BS)


@triton.jit
def mmd_pull_kernel(
    w, x, y, p_centre, out, sizes, D, tiles_m, tiles_d, span,
    ADD: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BM rows and BD features of one layer, over `span` of the columns.

        out_i = Σ_j w_ij (x_i − y_j) = Σ_j w_ij (x_i − c) − Σ_j w_ij (y_j − c)              (+ out_i where ADD)

    The row sums are those of the tiles that the product takes: equal points pull on each other by nothing but its
    rounding, and by exactly nothing where they are c. What is not finite counts as c: either its weights are 0, since
    it is of no domain, or all weights are NaN. w (p, layer, row, column), out (p, span, layer, row); sizes: rows,
    columns. Neighbours share their weights.
    """
    pid = tl.program_id(0)
    i_d, i_m = pid % tiles_d, (pid // tiles_d) % tiles_m
    i_s, i_l = tl.program_id(1).to(tl.int64), (pid // (tiles_d * tiles_m)).to(tl.int64)
    rows, columns = sizes
    o_m, o_n, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BN), i_d * BD + tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    p_c = (p_centre + i_l * D + o_d)[None, :]
    p_w = w[0] + i_l * w[1] + (o_m.to(tl.int64) * w[2])[:, None]
    p_y = y[0] + i_l * y[1] + o_d[None, :]
    b_o = tl.zeros([BM, BD], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    first = i_s * span
    for n in range(first, tl.minimum(first + span, columns), BN):
        o_j = (n + o_n).to(tl.int64)
        m_j = o_j < columns
        b_w = tl.load(p_w + (o_j * w[3])[None, :], mask=(o_m < rows)[:, None] & m_j[None, :], other=0.0)
        b_y = finite(load_centred(p_y + (o_j * y[2])[:, None], p_c, m_j[:, None], m_d, PREC))
        b_sum += tl.sum(b_w, 1)
        b_o = tl.dot(b_w, b_y, b_o, input_precision=PREC)
    m_m, o_i = (o_m < rows)[:, None], o_m.to(tl.int64)
    b_x = load_centred(x[0] + i_l * x[1] + (o_i * x[2])[:, None] + o_d[None, :], p_c, m_m, m_d, PREC)
    b_o = b_sum[:, None] * finite(b_x) - b_o
    p_o = out[0] + i_s * out[1] + i_l * out[2] + (o_i * out[3])[:, None] + o_d[None, :]
    if ADD:
        b_o += tl.load(p_o, mask=m_m & m_d, other=0.0)
    tl.store(p_o, b_o.to(out[0].dtype.element_ty), mask=m_m & m_d)


# -------------------------------------------------------------------------------------------------------- launchers


def product_precision() -> str:
    """`input_precision` of inner products in float32: TF32 only where PyTorch's own products may use it.

    Else three TF32 products, each partial sum added in float32: as exact as float32, and on tensor cores.
    """
    return "tf32" if dot_precision(torch.float32) == "tf32" else "tf32x3"


class Points(NamedTuple):
    """Samples as the kernels take them."""

    x: Tensor  # [L, N, D], at most 32 bits, last dimension contiguous
    norms: Tensor  # [L, N] float32, of `mmd_norms`
    dom: Tensor  # [N] int64, in any order; samples with an id outside 0 … S-1 count nowhere, whatever they hold

    def part(self, layers: slice, rows: slice) -> Points:
        return Points(self.x[layers, rows], self.norms[layers, rows], self.dom[rows])


def check_domains(num_domains: int) -> None:
    """Raises ValueError for more than the kernels take."""
    if num_domains > MAX_DOMAINS:
        raise ValueError(f"num_domains: got {num_domains}; the kernel takes up to {MAX_DOMAINS}")


def mmd_norms(x: Tensor, dom: Tensor, centre: Tensor, num_domains: int) -> Tensor:
    """`‖x_i − c‖²`, `[L, N]` float32, rounded as the other kernels round; centre c: `[L, D]` float32, contiguous."""
    check_contiguous(x=x)
    L, N, D = x.shape
    out = torch.empty((L, N), dtype=torch.float32, device=x.device)
    tiles = cdiv(N, MMD_NORMS["BN"])
    given = (x, *strides(x, 0, 1)), (dom, dom.stride(0)), centre, out, N, D, num_domains, tiles
    launch(mmd_norms_kernel, (on_grid(L * tiles, "mmd_norms"),), *given, PREC=product_precision(), **MMD_NORMS)
    return out


def mmd_tile(
    rows: Points,
    columns: Points,
    centre: Tensor,
    *,
    num_domains: int,
    gammas: Tensor,
    powers: tuple[int, ...],
    coeff: Tensor | None = None,
    out: Tensor | None = None,
    itself: bool = False,
    own: int | None = None,
) -> Tensor:
    """One panel of the kernel matrix, all layers at once.

    Args:
        rows, columns: samples of L layers; centre: `[L, D]` float32, contiguous, a constant near their mean.
        num_domains: S, at most `MAX_DOMAINS`.
        gammas: `[L, U]` float32, on the device.
        powers: U numbers: 0 for an exponential of its own, 2 or 10 where e_u is that power of e_{u-1}.
        coeff: C `[L, S, S]` float32, and out: `[L, rows, columns]` float32, last dimension contiguous: both or neither.
        itself: of a sample set with itself, on and above the diagonal: row i is column i, and columns beyond the rows
            stand for both directions. Else row i is column i + `own`; None: no row is a column.

    Returns the panel's part of the kernel sums, `[L, S, S]` float32. With `itself` they are symmetric: pairs of the
    square block as they stand, pairs right of it in both directions. Bitwise repeatable.
    """
    (L, R, D), C, S = rows.x.shape, columns.x.shape[1], num_domains
    check_domains(S)
    check_powers(powers)
    check_contiguous(rows=rows.x, columns=columns.x, out=out)
    once = R if itself else C
    own = 0 if itself else -R if own is None else min(max(own, -R), C)  # out of range is no column, never overflows
    precision, blocks = product_precision(), cdiv(S, MMD_DOMAINS)
    tile = mmd_tiles(architecture(rows.x), precision, len(powers), blocks)
    tiles_m, tiles_n = cdiv(R, tile["BM"]), cdiv(C, tile["BN"])
    partial = torch.empty((L, tiles_m * tiles_n, S, S), dtype=torch.float32, device=rows.x.device)
    samples = [
        part
        for x, norms, dom in (rows, columns)
        for part in ((x, *strides(x, 0, 1)), (norms, *strides(norms, 0, 1)), (dom, dom.stride(0)))
    ]
    weights = packed(gammas), packed(coeff), None if out is None else (out, *strides(out, 0, 1))
    sizes = (R, C, own, once), D, S, tiles_m, tiles_n
    form: dict[str, Any] = {"POWERS": powers, "PREC": precision, "BLOCKS": blocks}
    # sm_80's ptxas would sometimes settle on 128 registers and spill
    form |= {"BS": MMD_DOMAINS, "maxnreg": 255, **tile}
    grid = (on_grid(L * tiles_m * tiles_n, "mmd_tile"),)
    launch(mmd_tile_kernel, grid, *samples, centre, *weights, partial, *sizes, **form)
    sums = partial.sum(1)
    # the square block is symmetric, the rest was counted twice in one direction
    return torch.lerp(sums, sums.mT, 0.5) if itself else sums


def mmd_pull(w: Tensor, x: Tensor, y: Tensor, centre: Tensor, out: Tensor, *, add: bool = False) -> None:
    """`out_i = Σ_j w_ij (x_i − y_j)`, added to what is there with `add`; bitwise repeatable.

    Args:
        w: `[L, rows, columns]` float32, of any strides: a panel's weights, or their transpose.
        x: the rows `[L, rows, D]`, y: the columns, centre: as `mmd_tile` took them, which made w.
        out: `[L, rows, D]`, last dimension contiguous; rounded to its dtype once.

    Where so few rows would leave a chip idle, the columns are cut into spans, whose sums are added in their order.
    """
    check_contiguous(x=x, y=y, out=out)
    (L, R, D), C = x.shape, y.shape[1]
    tile = mmd_pull_tiles()
    tiles_m, tiles_d = cdiv(R, tile["BM"]), cdiv(D, tile["BD"])
    span = pull_span(C, L * tiles_m * tiles_d, tile["BN"])
    spans = cdiv(C, span)
    into = out.unsqueeze(0)
    if spans > 1:
        into = torch.empty((spans, L, R, D), dtype=torch.float32, device=w.device)
    given = (w, *strides(w, 0, 1, 2)), (x, *strides(x, 0, 1)), (y, *strides(y, 0, 1)), centre
    sizes = (R, C), D, tiles_m, tiles_d, span
    form: dict[str, Any] = {"ADD": add and spans == 1, "PREC": product_precision(), **tile}
    grid = (on_grid(L * tiles_m * tiles_d, "mmd_pull"), spans)
    launch(mmd_pull_kernel, grid, *given, (into, *strides(into, 0, 1, 2)), *sizes, **form)
    if spans > 1:
        total = into.sum(0)
        out.add_(total) if add else out.copy_(total)


def pull_span(columns: int, programs: int, block: int) -> int:
    """Columns of each span, a multiple of `block`: as many spans as fill a chip, none of fewer than `SPAN` columns."""
    spans = max(1, min(PROGRAMS // programs, columns // SPAN))
    return cdiv(cdiv(columns, spans), block) * block
