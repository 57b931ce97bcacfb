"""The whole multi-kernel MMD of a small batch in one launch: bandwidths, kernel sums, loss and gradient, all layers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.launch import architecture, launch, on_grid, packed, strides
from fastheads.kernels.mmd import EXACT, MAX_DOMAINS, check_powers, gaussians, load_domains, to_tf32
from fastheads.kernels.tiles import cdiv, dot_width, mmd_small_tiles

MAX_ROWS = 128
# Bandwidths of a preset are each half the next: γ_u = γ_0 2^u. Two exponentials and their squares: four squares of one
# would make its error sixteenfold.
PRESETS = {"adaptive": (0, 2, 2, 0, 2), "dan": (0, 2, 2, 0, 2)}
# What bounds the bandwidth below: eps² of float32 times the mean square of a feature, and 1e6 times the smallest float.
EPS2, TINY = tl.constexpr(2.0**-46), tl.constexpr(1.1754943508222875e-32)
# dx = M x: features and rows of x at a time.
COLUMNS, INNER = 64, 16
# Programs that share a layer's gradient, each with the layer's kernel matrix of its own.
SLICES = 4


@triton.jit
def less_first(x, first, o_n, m_n, o_d, m_d):
    """`[BN, BD]` x, and x less its first row that counts: exactly zero where rows are alike. Float32."""
    p_x = x[0] + o_d.to(tl.int64) * x[2]
    b_first = tl.load(p_x + first.to(tl.int64) * x[1], mask=m_d, other=0.0).to(tl.float32)
    p_rows = p_x[None, :] + (o_n.to(tl.int64) * x[1])[:, None]
    b_x = tl.load(p_rows, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    return b_x, tl.where(m_n[:, None], b_x - b_first[None, :], 0.0)


@triton.jit
def minus_gram(x, dom, p_gate, first, n, c_first, c_last, N, DH, chunks, S, BN: tl.constexpr, BD: tl.constexpr):
    """`[BN, BN]` −A with `(A + Aᵀ) / 2 = x xᵀ`, x centred, of some chunks; `[BD]` sums of squares of x as it is.

    For x = high + low, `A = (high + 2 low) highᵀ`, by two TF32 products, is as exact as float32. It is subtracted
    because an addition would move into the tensor cores' accumulators, which truncate.
    """
    o_n = tl.arange(0, BN)
    b_g = tl.zeros([BN, BN], tl.float32)
    b_raw = tl.zeros([BD], tl.float32)
    for c in range(c_first, c_last):
        o_d = (c % chunks) * BD + tl.arange(0, BD)
        # Loaded each time: what lives through all of a row's loops has no registers.
        m_n = load_domains(dom, o_n, o_n < N, S) >= 0
        b_x, b_y = less_first(x, first, o_n, m_n, c // chunks * DH + o_d, o_d < DH)
        if p_gate is not None:
            gate = tl.load(p_gate + c // chunks)
            b_x *= gate
            b_y *= gate
        b_raw += tl.sum(b_x * b_x, 0)
        b_mean = tl.sum(b_y, 0) / n
        b_y = tl.where(m_n[:, None], b_y - b_mean[None, :], 0.0)
        b_high = to_tf32(b_y)
        b_a = tl.dot(2 * (b_y - b_high), tl.trans(b_high), input_precision="tf32")
        b_g -= tl.dot(b_high, tl.trans(b_high), b_a, input_precision="tf32")
    return b_g, b_raw


@triton.jit
def sweep(
    p_g, dom, b_y2, p_gammas, lowest, N, S, POWERS: tl.constexpr, UNBIASED: tl.constexpr, BACKWARD: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Loss `[BR]` and K `[BS, BS]` by blocks of rows of the kernel matrix; M is left in −A's place."""
    o_n, o_s = tl.arange(0, BN), tl.arange(0, BS)
    # [BN, BS] one-hot; [BS] samples per domain
    b_b = load_domains(dom, o_n, o_n < N, S)
    b_right = tl.where(b_b[:, None] == o_s[None, :], 1.0, 0.0)
    b_counts = tl.sum(b_right, 0)
    b_counts = tl.where(b_counts > (1 if UNBIASED else 0), b_counts, 0.0)
    present = tl.sum(tl.where(b_counts > 0, 1.0, 0.0))
    per_domain = tl.where(present > 1, 2 / tl.maximum(present, 1.0), 0.0)
    b_size2 = tl.sum(b_right * b_counts[None, :], 1)
    b_across = tl.where(b_size2 > 0, 1 / tl.maximum(b_size2, 1.0), 0.0) / tl.maximum(present - 1, 1.0)
    b_loss = tl.zeros([BR], tl.float32)
    b_sums = tl.zeros([BS, BS], tl.float32)
    for i in range(0, N, BR):
        o_i = i + tl.arange(0, BR)
        b_a = load_domains(dom, o_i, o_i < N, S)
        m_i = b_a >= 0
        same = o_i[:, None] == o_n[None, :]
        # [BR, BN]
        # Left of these rows' own square lies −(A + Aᵀ) already, for the rows above have M by now.
        p_below = p_g + o_n[None, :] * BN + o_i[:, None]
        tl.debug_barrier()
        b_gi = tl.load(p_g + o_i[:, None] * BN + o_n[None, :], mask=m_i[:, None], other=0.0)
        b_gi += tl.load(p_below, mask=m_i[:, None] & (o_n >= i)[None, :], other=0.0)
        b_x2 = -tl.load(p_g + o_i * (BN + 1), mask=m_i, other=0.0)
        tl.debug_barrier()
        tl.store(p_below, b_gi, mask=(o_n >= i + BR)[None, :])
        b_k, b_w = gaussians(b_x2, b_y2, b_gi, same, p_gammas, lowest, POWERS)
        b_in = tl.where(b_a[:, None] == o_s[None, :], 1.0, 0.0)
        b_size = tl.sum(b_in * b_counts[None, :], 1)
        b_inverse = tl.where(b_size > 0, 1 / tl.maximum(b_size, 1.0), 0.0)
        b_within = b_inverse / tl.maximum(b_size - 1, 1.0) if UNBIASED else b_inverse * b_inverse
        b_c = tl.where(b_a[:, None] == b_b[None, :], b_within[:, None], -b_inverse[:, None] * b_across[None, :])
        b_c *= per_domain
        if UNBIASED:
            b_c = tl.where(same, 0.0, b_c)
        b_loss += tl.sum(b_c * b_k, 1)
        for s in range(S):
            b_rows = tl.sum(tl.where(b_b[None, :] == s, b_k, 0.0), 1)
            b_column = tl.sum(b_in * b_rows[:, None], 0)
            b_sums += tl.where(o_s[None, :] == s, b_column[:, None], 0.0)
        if BACKWARD:
            b_m = tl.where(same, 0.0, 4 * b_w * b_c)
            b_m = tl.where(same, -tl.sum(b_m, 1)[:, None], b_m)
            tl.store(p_g + o_i[:, None] * BN + o_n[None, :], b_m)
    return b_loss, b_sums


@triton.jit
def store_dx(dx, x, dom, p_m, first, f_first, f_last, N, DH, S, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    """`dx = M x` of some features; the rows of M sum to zero, so what is subtracted from x is free."""
    o_n = tl.arange(0, BN)
    for f in range(f_first, f_last, BC):
        o_f = f + tl.arange(0, BC)
        # [BN, BC]
        b_dx = tl.zeros([BN, BC], tl.float32)
        for k in range(0, N, BK):
            o_k = k + tl.arange(0, BK)
            b_mk = tl.load(p_m + o_n[:, None] * BN + o_k[None, :], mask=(o_n < N)[:, None], other=0.0)
            m_k = load_domains(dom, o_k, o_k < N, S) >= 0
            _, b_y = less_first(x, first, o_k, m_k, o_f, o_f < DH)
            b_dx = tl.dot(b_mk, b_y, b_dx, input_precision=EXACT)
        p_d = dx[0] + (o_n.to(tl.int64) * dx[1])[:, None] + o_f[None, :]
        tl.store(p_d, b_dx.to(dx[0].dtype.element_ty), mask=(o_n < N)[:, None] & (o_f < DH)[None, :])


@triton.jit
def mmd_small_kernel(
    x, dom, p_gammas, p_gate, p_loss, p_sums, dx, p_work, N, heads, slices,
    S: tl.constexpr, POWERS: tl.constexpr, PRESET: tl.constexpr, UNBIASED: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program: one layer's kernel matrix, and of its gradient the part of some heads. For p domains, x gated:

        e_u = exp(−γ_u ‖x_i − x_j‖²)        K[a, b] = Σ_{i∈a, j∈b} Σ_u e_u        loss = Σ_ij c_ij Σ_u e_u
        c_ij = 2/p / n_a² in domain a (unbiased: / n_a (n_a − 1), i ≠ j), −2/(p (p − 1)) / (n_a n_b) across
        dx_i = −4 Σ_j c_ij Σ_u γ_u e_u (x_i − x_j) = Σ_j m_ij x_j    dgate_h = gate_h Σ_ij m_ij x_ih·x_jh, x un-gated
        presets: γ_u = 2^u / (4 m),  m = (2/n) Σ_i ‖x_i − x̄‖², "dan" of n² − n pairs: n / (n − 1) times that

    heads: how many, features of each, chunks of BD in each, heads per program (without gates, of BC features).
    The first of a layer's programs stores loss and sums. A `[BN, BN]` goes through memory, and M in its place, to be
    worked on by blocks of rows: with all that hangs on their columns there are too few registers.
    """
    pid = tl.program_id(0)
    i_l, i_s = (pid // slices).to(tl.int64), pid % slices
    H, DH, chunks, share = heads
    x_l = (x[0] + i_l * x[1], x[2], x[3])
    p_gates = p_gate
    if p_gate is not None:
        p_gates = p_gate + i_l * H
    o_n, o_s = tl.arange(0, BN), tl.arange(0, BS)
    m_n = load_domains(dom, o_n, o_n < N, S) >= 0
    first = tl.minimum(tl.min(tl.where(m_n, o_n, BN), 0), N - 1)
    n = tl.maximum(tl.sum(tl.where(m_n, 1.0, 0.0), 0), 1.0)
    b_g, b_raw = minus_gram(x_l, dom, p_gates, first, n, 0, H * chunks, N, DH, chunks, S, BN, BD)
    p_g = p_work + pid.to(tl.int64) * (BN * BN)
    tl.store(p_g + o_n[:, None] * BN + o_n[None, :], b_g)
    tl.debug_barrier()
    # squared norms as the product rounds them: where points nearly meet, its errors cancel
    b_y2 = -tl.load(p_g + o_n * (BN + 1))
    floor = EPS2 * (tl.sum(b_raw) / n) + TINY
    mean4 = 4 * tl.maximum(2 * tl.sum(b_y2) / n, floor, propagate_nan=tl.PropagateNan.ALL)
    if PRESET == "dan":
        mean4 *= n / tl.maximum(n - 1, 1.0)
    p_u = p_gammas + i_l * len(POWERS) if PRESET == "" else p_gammas
    b_loss, b_sums = sweep(p_g, dom, b_y2, p_u, 1 / mean4, N, S, POWERS, UNBIASED, dx is not None, BN, BS, BR)
    if i_s == 0:
        tl.store(p_loss + i_l, tl.sum(b_loss))
        p_s = p_sums + i_l * (S * S) + o_s[:, None] * S + o_s[None, :]
        tl.store(p_s, b_sums, mask=(o_s < S)[:, None] & (o_s < S)[None, :])
    if dx is not None:
        tl.debug_barrier()
        dx_l = (dx[0] + i_l * dx[1], dx[2])
        if p_gate is not None:
            for h in range(i_s * share, tl.minimum(i_s * share + share, H)):
                c = h * chunks
                b_gh, _ = minus_gram(x_l, dom, None, first, n, c, c + chunks, N, DH, chunks, S, BN, BD)
                b_m = tl.load(p_g + o_n[:, None] * BN + o_n[None, :], mask=(o_n < N)[:, None], other=0.0)
                tl.store(dx_l[0] + h, -tl.load(p_gates + h) * tl.sum(tl.sum(b_m * b_gh, 1), 0))
        else:
            f = i_s * share * BC
            store_dx(dx_l, x_l, dom, p_g, first, f, tl.minimum(f + share * BC, DH), N, DH, S, BN, BC, BK)


def mmd_small(
    x: Tensor,
    dom: Tensor,
    *,
    num_domains: int,
    preset: str | None,
    gammas: Tensor | None = None,
    powers: tuple[int, ...] = (),
    estimator: str,
    gate: Tensor | None = None,
    backward: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """MMD² of every layer, its kernel sums and its gradient, in one launch.

    Args:
        x: `[L, N, D]` of at most 32 bits, N from 1 to `MAX_ROWS`. Computed in float32.
        dom: `[N]` int64, in any order; rows with an id outside 0 … S-1 count nowhere, whatever they hold.
        num_domains: S, at most `MAX_DOMAINS`.
        preset: `"adaptive"` or `"dan"`, bandwidths taken from the features; None: gammas `[L, U]`, float32, with U
            powers (see `mmd_tile`).
        estimator: `"biased"` or `"unbiased"`.
        gate: `[L, H]` float32: the MMD is that of x times its head's gate.

    Returns loss `[L]` float32, the mean over pairs of present domains, 0 with fewer than two; kernel sums `[L, S, S]`
    float32; and of each layer's own loss the gradient in x, `[L, N, D]`, bfloat16 where x is, else float32, or in the
    gate, `[L, H]` float32, where there is one; None without `backward`. Bitwise repeatable.
    """
    L, N, D = x.shape
    S = num_domains
    if not 1 <= N <= MAX_ROWS or S > MAX_DOMAINS:
        raise ValueError(f"mmd_small: got {N} samples, {S} domains; takes 1 to {MAX_ROWS}, and up to {MAX_DOMAINS}")
    if preset is not None:
        powers = PRESETS[preset]
    elif gammas is None:
        raise ValueError("gammas: got None; are needed where there is no preset")
    check_powers(powers)
    if estimator not in ("biased", "unbiased"):
        raise ValueError(f'estimator: got {estimator!r}; takes "biased" or "unbiased"')
    tile = mmd_small_tiles(architecture(x), N)
    H = 1 if gate is None else gate.shape[1]
    parts = cdiv(D, COLUMNS) if gate is None else H
    share = cdiv(parts, SLICES)
    slices = cdiv(parts, share) if backward else 1
    options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    loss, sums = torch.empty((L,), **options), torch.empty((L, S, S), **options)
    work = torch.empty((L, slices, tile["BN"], tile["BN"]), **options)
    if gate is None and x.dtype == torch.bfloat16:  # float32's range: no loss scale is lost on it
        options["dtype"] = x.dtype
    grad = torch.empty((L, N, D) if gate is None else (L, H), **options) if backward else None
    samples = ((x, *strides(x, 0, 1, 2)), (dom, dom.stride(0)), packed(gammas), packed(gate))
    results = (loss, sums, None if grad is None else (grad, *strides(grad, 0, 1)), work)
    heads = (H, D // H, cdiv(D // H, tile["BD"]), share)
    form: dict[str, Any] = {"S": S, "POWERS": powers, "PRESET": preset or "", "UNBIASED": estimator == "unbiased"}
    # ptxas would sometimes settle on fewer registers and spill
    form |= {"BS": dot_width(S), "BC": COLUMNS, "BK": INNER, "maxnreg": 255, **tile}
    launch(mmd_small_kernel, (on_grid(L * slices, "mmd_small"),), *samples, *results, N, heads, slices, **form)
    return loss, sums, grad
