"""The whole multi-kernel MMD of a small batch in one launch: bandwidths, kernel sums, loss and gradient, all layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels.launch import architecture, launch, on_grid, packed, strides
from fastheads.kernels.mmd import EXACT, MAX_DOMAINS, gaussians, load_domains, load_gammas

MAX_ROWS = 128
# Bandwidths of a preset are each half the next: γ_u = γ_0 2^u. Two exponentials and their squares: four squares of one
# would make its error sixteenfold.
PRESETS = {"adaptive": (0, 2, 2, 0, 2), "dan": (0, 2, 2, 0, 2)}
# What bounds the bandwidth below: eps² of float32 times the mean square of a feature, and 1e6 times the smallest float.
EPS2, TINY = tl.constexpr(2.0**-46), tl.constexpr(1.1754943508222875e-32)

# Rows, padded -> (features at a time, rows of the kernel matrix at a time, warps, stages). No row spills.
TILES = {16: (64, 16, 4, 2), 32: (64, 32, 4, 2), 64: (32, 32, 8, 2), 128: (16, 16, 8, 1)}
TILES_80 = TILES | {128: (16, 32, 8, 1)}
# dx = M x: features and rows of x at a time.
COLUMNS, INNER = 64, 16
# Programs that share a layer's gradient, each with the layer's kernel matrix of its own.
SLICES = 4


@triton.jit
def less_first(p_x, s_x_n, s_x_d, first, o_n, m_n, o_d, m_d):
    """`[BN, BD]` x, and x less its first row that counts: exactly zero where rows are alike. Float32."""
    p_x += o_d.to(tl.int64) * s_x_d
    b_first = tl.load(p_x + first.to(tl.int64) * s_x_n, mask=m_d, other=0.0).to(tl.float32)
    p_rows = p_x[None, :] + (o_n.to(tl.int64) * s_x_n)[:, None]
    b_x = tl.load(p_rows, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    return b_x, tl.where(m_n[:, None], b_x - b_first[None, :], 0.0)


@triton.jit
def centred(b_x, m_n, N):
    """`[BN, BD]` less its column mean."""
    b_mean = tl.sum(b_x, 0) / N
    return tl.where(m_n[:, None], b_x - b_mean[None, :], 0.0)


@triton.jit
def minus_gram(b_g, b_x):
    """`b_g − A` with `(A + Aᵀ) / 2 = x xᵀ` to float32's precision, by two TF32 products.

    For x = high + low, `A = (high + 2 low) highᵀ`. It is subtracted because an addition would move into the tensor
    cores' accumulators, which truncate.
    """
    # x rounded to the eleven bits of TF32
    b_high = ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    b_low2 = 2 * (b_x - b_high)
    b_a = tl.dot(b_low2, tl.trans(b_high), input_precision="tf32")
    return b_g - tl.dot(b_high, tl.trans(b_high), b_a, input_precision="tf32")


@triton.jit
def preset_gammas(base, U: tl.constexpr):
    gammas = ()
    for u in tl.static_range(U):
        gammas = gammas + (base * 2**u,)
    return gammas


@triton.jit
def inverse_sizes(b_in, b_counts):
    """1 / samples in the domain of each row of a one-hot `[N, S]`; 0 where that counts none."""
    b_size = tl.sum(b_in * b_counts[None, :], 1)
    return tl.where(b_size > 0, 1 / tl.maximum(b_size, 1.0), 0.0)


@triton.jit
def mmd_small_kernel(
    p_x, s_x_l, s_x_n, s_x_d, p_dom, s_dom, p_gammas, p_gate, p_loss, p_sums, p_dx, s_dx_l, s_dx_n, p_work,
    N, H, DH, chunks, share, slices,
    S: tl.constexpr, POWERS: tl.constexpr, PRESET: tl.constexpr, UNBIASED: tl.constexpr, GATE: tl.constexpr,
    BACKWARD: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program: one layer's kernel matrix, and of its gradient the part of `share` heads out of H.

    A head is DH features, in `chunks` chunks of BD; where there are no gates, the gradient's heads are BC features. The
    first of a layer's programs stores loss and sums. Inner products and the gradient's matrix, `[BN, BN]` each, go
    through memory, to be worked on by blocks of rows: with all that hangs on their columns there are too few registers.
    """
    pid = tl.program_id(0)
    i_l, i_s = (pid // slices).to(tl.int64), pid % slices
    U: tl.constexpr = len(POWERS)
    p_x += i_l * s_x_l
    o_n, o_c, o_s = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BS)
    m_first = load_domains(p_dom, s_dom, o_n, o_n < N, S) >= 0
    first = tl.minimum(tl.min(tl.where(m_first, o_n, BN), 0), N - 1)
    n = tl.maximum(tl.sum(tl.where(m_first, 1.0, 0.0), 0), 1.0)
    # [BN, BN] inner products of the centred features, negative; [BD] squares of the features as they are
    b_g = tl.zeros([BN, BN], tl.float32)
    b_raw = tl.zeros([BD], tl.float32)
    for c in range(H * chunks):
        i_h = c // chunks
        o_d = (c % chunks) * BD + o_c
        m_d = o_d < DH
        # Loaded each time: what lives through all of a row's loops has no registers.
        m_n = load_domains(p_dom, s_dom, o_n, o_n < N, S) >= 0
        b_x, b_y = less_first(p_x, s_x_n, s_x_d, first, o_n, m_n, i_h * DH + o_d, m_d)
        if GATE:
            gate = tl.load(p_gate + i_l * H + i_h)
            b_x *= gate
            b_y *= gate
        b_raw += tl.sum(b_x * b_x, 0)
        b_g = minus_gram(b_g, centred(b_y, m_n, n))
    p_g = p_work + pid.to(tl.int64) * (2 * BN * BN)
    p_m = p_g + BN * BN
    tl.store(p_g + o_n[:, None] * BN + o_n[None, :], b_g)
    tl.debug_barrier()
    # squared norms as the product rounds them: where points nearly meet, its errors cancel
    b_y2 = -tl.load(p_g + o_n * (BN + 1))
    if PRESET == "":
        gammas = load_gammas(p_gammas + i_l * U, U)
    else:
        floor = EPS2 * (tl.sum(b_raw) / n) + TINY
        mean = tl.maximum(2 * tl.sum(b_y2) / n, floor, propagate_nan=tl.PropagateNan.ALL)
        if PRESET == "adaptive":
            gammas = preset_gammas(1 / (4 * mean), U)
        else:
            gammas = preset_gammas(1 / (4 * mean * (n / tl.maximum(n - 1, 1.0))), U)

    # [BN, BS] one-hot; [BS] samples per domain
    b_b = load_domains(p_dom, s_dom, o_n, o_n < N, S)
    b_right = tl.where(b_b[:, None] == o_s[None, :], 1.0, 0.0)
    b_counts = tl.sum(b_right, 0)
    b_counts = tl.where(b_counts > (1 if UNBIASED else 0), b_counts, 0.0)
    present = tl.sum(tl.where(b_counts > 0, 1.0, 0.0))
    # The loss is a weighted sum of the kernel matrix, for p present domains: c_ij = 2/p / pairs(a) within domain a,
    # −2/(p (p − 1)) / (n_a n_b) across.
    per_domain = tl.where(present > 1, 2 / tl.maximum(present, 1.0), 0.0)
    b_across = inverse_sizes(b_right, b_counts) / tl.maximum(present - 1, 1.0)
    b_loss = tl.zeros([BR], tl.float32)
    b_sums = tl.zeros([BS, BS], tl.float32)
    for i in range(0, N, BR):
        o_i = i + tl.arange(0, BR)
        b_a = load_domains(p_dom, s_dom, o_i, o_i < N, S)
        m_i = b_a >= 0
        same = o_i[:, None] == o_n[None, :]
        # [BR, BN]
        b_gi = tl.load(p_g + o_i[:, None] * BN + o_n[None, :], mask=m_i[:, None], other=0.0)
        b_gi += tl.load(p_g + o_n[None, :] * BN + o_i[:, None], mask=m_i[:, None], other=0.0)
        b_x2 = -tl.load(p_g + o_i * (BN + 1), mask=m_i, other=0.0)
        b_d2 = b_x2[:, None] + b_y2[None, :] + b_gi
        b_d2 = tl.where(same, 0.0, tl.maximum(b_d2, 0.0, propagate_nan=tl.PropagateNan.ALL))
        b_k, b_w = gaussians(b_d2, gammas, POWERS)
        b_in = tl.where(b_a[:, None] == o_s[None, :], 1.0, 0.0)
        b_inverse = inverse_sizes(b_in, b_counts)
        if UNBIASED:
            b_within = b_inverse / tl.maximum(tl.sum(b_in * b_counts[None, :], 1) - 1, 1.0)
        else:
            b_within = b_inverse * b_inverse
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
            # dx_i = −4 Σ_j w_ij (x_i − x_j) = Σ_j m_ij x_j
            b_m = tl.where(same, 0.0, 4 * b_w * b_c)
            b_m = tl.where(same, -tl.sum(b_m, 1)[:, None], b_m)
            tl.store(p_m + o_i[:, None] * BN + o_n[None, :], b_m)
    if i_s == 0:
        tl.store(p_loss + i_l, tl.sum(b_loss))
        p_s = p_sums + i_l * (S * S) + o_s[:, None] * S + o_s[None, :]
        tl.store(p_s, b_sums, mask=(o_s < S)[:, None] & (o_s < S)[None, :])

    if BACKWARD:
        tl.debug_barrier()
        if GATE:
            # dgate_h = Σ_nd dx x = gate_h Σ_ij m_ij (x xᵀ)_ij over the head's features. Σ_n dx_n = 0: centring is free.
            for i_h in range(i_s * share, tl.minimum(i_s * share + share, H)):
                b_gh = tl.zeros([BN, BN], tl.float32)
                for c in range(chunks):
                    o_d = c * BD + o_c
                    m_h = load_domains(p_dom, s_dom, o_n, o_n < N, S) >= 0
                    _, b_y = less_first(p_x, s_x_n, s_x_d, first, o_n, m_h, i_h * DH + o_d, o_d < DH)
                    b_gh = minus_gram(b_gh, centred(b_y, m_h, n))
                gate = tl.load(p_gate + i_l * H + i_h)
                b_m = tl.load(p_m + o_n[:, None] * BN + o_n[None, :], mask=(o_n < N)[:, None], other=0.0)
                tl.store(p_dx + i_l * s_dx_l + i_h, -gate * tl.sum(tl.sum(b_m * b_gh, 1), 0))
        else:
            o_f, o_k = tl.arange(0, BC), tl.arange(0, BK)
            for f in range(i_s * share * BC, tl.minimum((i_s + 1) * share * BC, DH), BC):
                # [BN, BC]
                b_dx = tl.zeros([BN, BC], tl.float32)
                m_f = f + o_f < DH
                for k in range(0, N, BK):
                    b_mk = tl.load(p_m + o_n[:, None] * BN + (k + o_k)[None, :], mask=(o_n < N)[:, None], other=0.0)
                    m_k = load_domains(p_dom, s_dom, k + o_k, k + o_k < N, S) >= 0
                    _, b_y = less_first(p_x, s_x_n, s_x_d, first, k + o_k, m_k, f + o_f, m_f)
                    b_dx = tl.dot(b_mk, b_y, b_dx, input_precision=EXACT)
                p_d = p_dx + i_l * s_dx_l + (o_n.to(tl.int64) * s_dx_n)[:, None] + (f + o_f)[None, :]
                tl.store(p_d, b_dx.to(p_dx.dtype.element_ty), mask=(o_n < N)[:, None] & m_f[None, :])


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
    float32; and of each layer's own loss the gradient in x, `[L, N, D]`, or in the gate, `[L, H]` float32,
    where there is one; None without `backward`. Bitwise repeatable.
    """
    L, N, D = x.shape
    S = num_domains
    if not 1 <= N <= MAX_ROWS or S > MAX_DOMAINS:
        raise ValueError(f"mmd_small: got {N} samples, {S} domains; takes 1 to {MAX_ROWS}, and up to {MAX_DOMAINS}")
    if preset is not None:
        powers = PRESETS[preset]
    elif gammas is None or not powers or powers[0] != 0 or any(p not in (0, 2, 10) for p in powers):
        raise ValueError(f"powers: got {powers}; takes 0, then any of 0, 2 and 10, and gammas")
    if estimator not in ("biased", "unbiased"):
        raise ValueError(f'estimator: got {estimator!r}; takes "biased" or "unbiased"')
    BN = max(16, triton.next_power_of_2(N))
    BD, BR, warps, stages = (TILES if architecture(x) >= 90 else TILES_80)[BN]
    H = 1 if gate is None else gate.shape[1]
    parts = triton.cdiv(D, COLUMNS) if gate is None else H
    share = triton.cdiv(parts, SLICES)
    slices = triton.cdiv(parts, share) if backward else 1
    loss = torch.empty((L,), dtype=torch.float32, device=x.device)
    sums = torch.empty((L, S, S), dtype=torch.float32, device=x.device)
    work = torch.empty((L, slices, 2, BN, BN), dtype=torch.float32, device=x.device)
    grad: Tensor | None = None
    if backward and gate is None:
        grad = torch.empty((L, N, D), dtype=torch.float32, device=x.device)
    elif backward and gate is not None:
        grad = torch.empty((L, H), dtype=torch.float32, device=x.device)
    launch(
        mmd_small_kernel,
        (on_grid(L * slices, "mmd_small"),),
        x,
        *strides(x, 0, 1, 2),
        dom,
        dom.stride(0),
        packed(gammas),
        packed(gate),
        loss,
        sums,
        grad,
        *((0, 0) if grad is None else strides(grad, 0, 1)),
        work,
        N,
        H,
        D // H,
        triton.cdiv(D // H, BD),
        share,
        slices,
        S=S,
        POWERS=powers,
        PRESET=preset or "",
        UNBIASED=estimator == "unbiased",
        GATE=gate is not None,
        BACKWARD=backward,
        BN=BN,
        BD=BD,
        BS=max(16, triton.next_power_of_2(S)),
        BR=BR,
        BC=COLUMNS,
        BK=INNER,
        num_warps=warps,
        num_stages=stages,
        maxnreg=255,  # ptxas would sometimes settle on fewer and spill
    )
    return loss, sums, grad
