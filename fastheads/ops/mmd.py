"""The operators `fastheads::kernel_sums` and `fastheads::mmd_fused`: Gaussian kernels summed over pairs of domains.

Nobody holds N × N of anything. Rows go by in panels: inner products by the library, one sweep over them that leaves the
kernel sums and, in their place, the weights `w_ij = c_ab Σ_u γ_u e_u`, and `W Y` by the library again. For C symmetric,

    d Σ (C ∘ K) / dx_i = −4 Σ_j w_ij (x_i − x_j),    K_ab = Σ_{i∈a, j∈b} Σ_u e_u,    e_u = exp(−γ_u ‖x_i − x_j‖²)

Panels of a sample set with itself begin at the diagonal; what is right of a panel's own square serves rows and columns.
The square itself is made whole: up to 2,048 samples, which are one panel, every pair is formed in both directions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastheads import reference
from fastheads.ops import native
from fastheads.ops.dispatch import choose_mmd
from fastheads.reference import autocast_off, widened

WORKSPACE = 2**22  # elements of a panel: 16 MB in float32

_LIBRARY = torch.library.Library("fastheads", "FRAGMENT")
_SAMPLES = "Tensor x, Tensor dom_x, Tensor? y, Tensor? dom_y, int num_domains, Tensor gammas, int[] powers"
_LIBRARY.define(f"kernel_sums({_SAMPLES}, SymInt? row_offset, str impl) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    f"mmd_fused({_SAMPLES}, Tensor coeff, SymInt? row_offset, bool backward, str impl)"
    " -> (Tensor K, Tensor loss, Tensor dx)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "mmd_small(Tensor x, Tensor dom, int num_domains, str preset, Tensor? gammas, int[] powers, str estimator,"
    " Tensor? gate, bool backward) -> (Tensor loss, Tensor K, Tensor gradient)",
    tags=torch.Tag.pt2_compliant_tag,
)


class _Samples(NamedTuple):
    """Columns in order of their domains, so that a row meets each domain as one run of them."""

    rows: Tensor  # [L, R, D], centred, float32 or float64
    columns: Tensor  # [L, C, D]
    rows2: Tensor  # [L, R] squared norms
    columns2: Tensor
    row_domains: Tensor  # [R]
    starts: Tensor  # [S + 1] where each domain's columns begin
    row_order: Tensor  # rows[:, i] is x[:, row_order[i]]; x's rows of no domain are left out
    self: Tensor  # [R] the column that is the row itself, -1 for none
    itself: bool  # rows and columns are one sample set


def _centre_(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """`reference.centred`, in place: x `[L, N, D]` minus its first row, minus the mean of that."""
    if not x.shape[1]:
        return x
    if counted is None:
        x -= x[:, :1].clone()
        x -= x.mean(1, keepdim=True)
        return x
    others = ~counted.unsqueeze(1)
    x -= x.index_select(1, counted.to(torch.uint8).argmax(0, keepdim=True))
    x.masked_fill_(others, 0)
    x -= x.sum(1, keepdim=True) / counted.sum().clamp_min(1)
    return x.masked_fill_(others, 0)


def _by_domain(dom: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    """The samples `[R ≤ N]` in order of their domains, those of none left out; where each domain begins, `[S + 1]`."""
    order = torch.argsort(dom, stable=True)
    starts = torch.searchsorted(dom[order], torch.arange(num_domains + 1, device=dom.device))
    return order[starts[0] : starts[-1]], starts - starts[0]


def _samples(
    x: Tensor, dom_x: Tensor, y: Tensor | None, dom_y: Tensor | None, num_domains: int, row_offset: int | None
) -> _Samples:
    order_x, starts = _by_domain(dom_x, num_domains)
    x, n = widened(x).index_select(1, order_x), len(order_x)
    itself = y is None or dom_y is None
    if y is None or dom_y is None:
        rows = columns = _centre_(x)
        self = torch.arange(n, device=x.device)
    else:
        order_y, starts = _by_domain(dom_y, num_domains)
        both = _centre_(torch.cat((x, widened(y).index_select(1, order_y)), 1))
        rows, columns = both[:, :n], both[:, n:]
        at = torch.full_like(dom_y, -1)
        at[order_y] = torch.arange(len(order_y), device=x.device)
        self = torch.full_like(order_x, -1)
        if row_offset is not None:
            same = order_x + row_offset
            inside = (same >= 0) & (same < len(at))
            self[inside] = at[same[inside]]
    rows2 = rows.square().sum(-1)
    columns2 = rows2 if itself else columns.square().sum(-1)
    return _Samples(rows, columns, rows2, columns2, dom_x[order_x], starts, order_x, self, itself)


def _tile(
    gram: Tensor,
    x2: Tensor,
    y2: Tensor,
    segments: Tensor,
    domains: Tensor,
    gammas: Tensor,
    powers: Tensor,
    coeff: Tensor | None,
    self: Tensor,
) -> Tensor:
    """`native.mmd_tile` in PyTorch, where csrc/ was not built."""
    d2 = gram.mul_(-2).add_(x2.unsqueeze(-1)).add_(y2.unsqueeze(-2)).clamp_min_(0)
    here = ((self >= 0) & (self < gram.shape[2])).nonzero().squeeze(1)
    d2[:, here, self[here]] = 0
    kernel, weight = torch.zeros_like(d2), torch.zeros_like(d2)
    for gamma in gammas.unbind(-1):
        gamma = gamma.view(-1, 1, 1)
        e = torch.exp(-gamma * d2)
        kernel += e
        weight.addcmul_(gamma.expand_as(e), e)
    runs = list(zip(segments[:-1].tolist(), segments[1:].tolist(), strict=True))
    sums = torch.stack([kernel[..., a:b].sum(-1, dtype=torch.float64) for a, b in runs], -1)
    if coeff is not None:
        sizes = segments.diff()
        torch.mul(weight, coeff[:, domains].repeat_interleave(sizes, -1), out=gram)
        gram[:, here, self[here]] = 0
    return sums


def _run_tile(gram: Tensor, *args: Any) -> Tensor:
    there = gram.device.type == "cpu" and native.library() is not None
    return (native.mmd_tile if there else _tile)(gram, *args)


def panel_rows(columns: int, block: int) -> int:
    """How many rows, a multiple of `block`, a panel of so many columns has."""
    return max(block, WORKSPACE // columns // block * block)


def _sweep(
    s: _Samples, num_domains: int, gammas: Tensor, powers: list[int], coeff: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """K `[L, S, S]` float64 and, with coeff, the gradient of the rows, in their order here."""
    L, R, _ = s.rows.shape
    C = s.columns.shape[1]
    K = torch.zeros(L, num_domains, num_domains, dtype=torch.float64, device=s.rows.device)
    dx = None if coeff is None else torch.zeros_like(s.rows)
    if not L or not R or not C:
        return K, dx
    together = L * R * C <= WORKSPACE  # small ones: all layers in one panel
    height = R if together else panel_rows(C, 64)
    buffer = s.rows.new_empty((L if together else 1) * min(height, R) * C)
    pw = torch.tensor(powers, dtype=torch.int32)
    for first in range(0, L, L if together else 1):
        at = slice(first, first + L if together else first + 1)
        x, y, x2, y2 = s.rows[at], s.columns[at], s.rows2[at], s.columns2[at]
        own = None if coeff is None else coeff[at].to(x.dtype)
        for i in range(0, R, height):
            e = min(R, i + height)
            start = i if s.itself else 0
            gram = buffer[: len(x) * (e - i) * (C - start)].view(len(x), e - i, C - start)
            torch.bmm(x[:, i:e], y[:, start:].mT, out=gram)
            for a, b in ((i, e), (e, C)) if s.itself else ((0, C),):
                if a == b:
                    continue
                sums = _run_tile(
                    gram[:, :, a - start : b - start],
                    x2[:, i:e],
                    y2[:, a:b],
                    s.starts.clamp(a, b) - a,
                    s.row_domains[i:e],
                    gammas[at].to(x.dtype),
                    pw,
                    own,
                    s.self[i:e] - a,
                )
                k = torch.zeros_like(K[at]).index_add_(1, s.row_domains[i:e], sums)
                K[at] += k + k.mT if s.itself and a == e else k
            if dx is None:
                continue
            _pull(dx[at, i:e], gram, x[:, i:e], y[:, start:])
            if s.itself and e < C:
                _pull(dx[at, e:], gram[:, :, e - i :].mT, x[:, e:], x[:, i:e])
    return K, None if dx is None else dx.mul_(-4)


def _sweep_triton(
    x: Tensor,
    dom_x: Tensor,
    y: Tensor | None,
    dom_y: Tensor | None,
    num_domains: int,
    gammas: Tensor,
    powers: list[int],
    coeff: Tensor | None,
    row_offset: int | None,
) -> tuple[Tensor, Tensor | None]:
    """K `[L, S, S]` float64 and, with coeff, dx: panels as in `_sweep`, their inner products in the same launch.

    Where products may be in TF32, the centred features are rounded to it once: all that follows is then as exact as in
    float32, of features a little off. Distances of unrounded ones would lose the digits that they cancel.
    """
    from fastheads.kernels.mmd import mmd_tile, product_precision, round_to_tf32_

    R = x.shape[1]
    if y is None or dom_y is None:
        z = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dom, start = dom_x, 0
    else:
        z, dom, start = torch.cat((x.float(), y.float()), 1), torch.cat((dom_x, dom_y)), R
    itself = start == 0
    z = _centre_(z, reference.is_counted(dom, num_domains))
    if product_precision() == "tf32":
        z = round_to_tf32_(z)
    z2, gammas = torch.linalg.vecdot(z, z), gammas.float()
    coeff = None if coeff is None else coeff.float()
    L, N, _ = z.shape
    C = N - start
    K = z.new_zeros(L, num_domains, num_domains, dtype=torch.float64)
    dx = None if coeff is None else torch.zeros_like(z[:, :R])
    height = min(R, panel_rows(C, 128))
    layers = max(1, WORKSPACE // (height * C))
    for first in range(0, L, layers):
        at = slice(first, min(L, first + layers))
        for i in range(0, R, height):
            e, begin = min(R, i + height), i if itself else start
            out = None if coeff is None else z.new_empty(len(z[at]), e - i, N - begin)
            K[at] += mmd_tile(
                z[at],
                z2[at],
                dom,
                i,
                e - i,
                num_domains=num_domains,
                gammas=gammas[at],
                powers=tuple(powers),
                coeff=None if coeff is None else coeff[at],
                out=out,
                start=None if itself else start,
                own=None if row_offset is None else i + row_offset,
            )
            if dx is None or out is None:
                continue
            _pull(dx[at, i:e], out, z[at, i:e], z[at, begin:])
            if itself and e < R:
                _pull(dx[at, e:], out[:, :, e - i :].mT, z[at, e:], z[at, i:e])
    return K, None if dx is None else dx.mul_(-4)


def _pull(dx: Tensor, w: Tensor, x: Tensor, y: Tensor) -> None:
    """dx += rowsum(w) x − w y, both from the same w, so that equal points pull on each other by exactly nothing."""
    dx.addcmul_(w.sum(-1, keepdim=True), x)
    dx.baddbmm_(w, y, alpha=-1)


# ------------------------------------------------------------------------------------------------------ operators


def _empty(x: Tensor, y: Tensor | None) -> bool:
    return not (x.shape[0] and x.shape[1] and (y is None or y.shape[1]))


def _kernel_sums(
    x: Tensor,
    dom_x: Tensor,
    y: Tensor | None,
    dom_y: Tensor | None,
    num_domains: int,
    gammas: Tensor,
    powers: list[int],
    row_offset: int | None,
    impl: str,
) -> Tensor:
    if _empty(x, y):
        return _sums_shape(x, num_domains).zero_()
    with autocast_off(x):
        if impl == "triton":
            with torch.cuda.device_of(x):
                K, _ = _sweep_triton(x, dom_x, y, dom_y, num_domains, gammas, powers, None, row_offset)
            return K.float()
        samples = _samples(x, dom_x, y, dom_y, num_domains, row_offset)
        K, _ = _sweep(samples, num_domains, gammas, powers, None)
        return K.to(samples.rows.dtype)


def _mmd_fused(
    x: Tensor,
    dom_x: Tensor,
    y: Tensor | None,
    dom_y: Tensor | None,
    num_domains: int,
    gammas: Tensor,
    powers: list[int],
    coeff: Tensor,
    row_offset: int | None,
    backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if _empty(x, y):
        K = _sums_shape(x, num_domains).zero_()
        return K, K.sum((-2, -1)), K.new_zeros(x.shape) if backward else x.new_empty(0)
    with autocast_off(x):
        if impl == "triton":
            own = coeff if backward else None
            with torch.cuda.device_of(x):
                K, dx = _sweep_triton(x, dom_x, y, dom_y, num_domains, gammas, powers, own, row_offset)
            return K.float(), (coeff.double() * K).sum((-2, -1)).float(), x.new_empty(0) if dx is None else dx
        samples = _samples(x, dom_x, y, dom_y, num_domains, row_offset)
        K, ordered = _sweep(samples, num_domains, gammas, powers, coeff if backward else None)
        wide = samples.rows.dtype
        loss = (coeff.double() * K).sum((-2, -1)).to(wide)
        if ordered is None:
            return K.to(wide), loss, x.new_empty(0)
        order = samples.row_order
        if len(order) == x.shape[1]:
            return K.to(wide), loss, ordered.index_select(1, order.argsort())
        return K.to(wide), loss, ordered.new_zeros(x.shape).index_copy_(1, order, ordered)


def _sums_shape(x: Tensor, num_domains: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[0], num_domains, num_domains), dtype=wide)


def _kernel_sums_shape(x: Tensor, dom_x: Tensor, y: Any, dom_y: Any, num_domains: int, *_: Any) -> Tensor:
    return _sums_shape(x, num_domains)


def _mmd_fused_shapes(
    x: Tensor,
    dom_x: Tensor,
    y: Any,
    dom_y: Any,
    num_domains: int,
    gammas: Tensor,
    powers: Any,
    coeff: Tensor,
    row_offset: Any,
    backward: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    K = _sums_shape(x, num_domains)
    return K, K.new_empty(x.shape[0]), K.new_empty(x.shape) if backward else x.new_empty(0)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("mmd: create_graph=True needs impl='reference', which alone has a second derivative")


def _sums_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dom_x, y, dom_y, ctx.num_domains, gammas, ctx.powers, ctx.row_offset, ctx.impl = inputs
    ctx.save_for_backward(x, dom_x, y, dom_y, gammas)


def _sums_backward(ctx: Any, dK: Tensor) -> tuple[Any, ...]:
    """`dx_i = −2 Σ_j dK_ab Σ_u γ_u e_u (x_i − y_j)`, dy likewise with the roles exchanged; both where y is x."""
    _refuse_second_derivative()
    x, dom_x, y, dom_y, gammas = ctx.saved_tensors
    fused, dx, dy = torch.ops.fastheads.mmd_fused, None, None
    rest = (ctx.num_domains, gammas, ctx.powers)
    if y is None:
        dx = fused(x, dom_x, None, None, *rest, (dK + dK.mT) / 2, None, True, ctx.impl)[2].to(x.dtype)
    else:
        if ctx.needs_input_grad[0]:
            dx = fused(x, dom_x, y, dom_y, *rest, dK / 2, ctx.row_offset, True, ctx.impl)[2].to(x.dtype)
        if ctx.needs_input_grad[2]:
            back = None if ctx.row_offset is None else -ctx.row_offset
            dy = fused(y, dom_y, x, dom_x, *rest, dK.mT / 2, back, True, ctx.impl)[2].to(y.dtype)
    return (dx, None, dy, *(None,) * 6)


def _fused_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    K, _, dx = output
    ctx.mark_non_differentiable(K, dx)
    ctx.set_materialize_grads(False)
    ctx.backward, ctx.dtype = inputs[9], inputs[0].dtype
    ctx.save_for_backward(dx)


def _fused_backward(ctx: Any, dK: None, dloss: Tensor | None, ddx: None) -> tuple[Any, ...]:
    """The sweep has left the gradient: `dloss · dx`, rounded after that, as a loss scale for 16 bits needs."""
    _refuse_second_derivative()
    if dloss is None:
        return (None,) * 11
    if not ctx.backward:
        raise RuntimeError("mmd_fused: was called with backward=False, so there is no gradient")
    (dx,) = ctx.saved_tensors
    return ((dloss.view(-1, 1, 1) * dx).to(ctx.dtype), *(None,) * 10)


def _mmd_small(
    x: Tensor,
    dom: Tensor,
    num_domains: int,
    preset: str,
    gammas: Tensor | None,
    powers: list[int],
    estimator: str,
    gate: Tensor | None,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastheads.kernels.mmd_small import mmd_small as launch_small

    x = x if x.stride(2) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        loss, K, gradient = launch_small(
            x,
            dom,
            num_domains=num_domains,
            preset=preset or None,
            gammas=gammas,
            powers=tuple(powers),
            estimator=estimator,
            gate=None if gate is None else gate.float(),
            backward=backward,
        )
    return loss, K, x.new_empty(0) if gradient is None else gradient


def _mmd_small_shapes(
    x: Tensor,
    dom: Tensor,
    num_domains: int,
    preset: str,
    gammas: Any,
    powers: Any,
    estimator: str,
    gate: Tensor | None,
    backward: bool,
) -> tuple[Tensor, ...]:
    loss = x.new_empty(x.shape[0], dtype=torch.float32)
    K = loss.new_empty(x.shape[0], num_domains, num_domains)
    if not backward:
        return loss, K, x.new_empty(0)
    return loss, K, loss.new_empty(x.shape if gate is None else gate.shape)


def _small_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, K, gradient = output
    ctx.mark_non_differentiable(K, gradient)
    ctx.set_materialize_grads(False)
    ctx.backward, ctx.gated = inputs[8], inputs[7] is not None
    ctx.dtype = (inputs[7] if ctx.gated else inputs[0]).dtype
    ctx.save_for_backward(gradient)


def _small_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    """`dloss · gradient`, of x or, where there is one, of the gate (x is a constant then)."""
    _refuse_second_derivative()
    if dloss is None or not ctx.backward:
        return (None,) * 9
    (gradient,) = ctx.saved_tensors
    found = (dloss.view(-1, *[1] * (gradient.dim() - 1)) * gradient).to(ctx.dtype)
    return (None if ctx.gated else found, *(None,) * 6, found if ctx.gated else None, None)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("kernel_sums", _kernel_sums, _device)
    _LIBRARY.impl("mmd_fused", _mmd_fused, _device)
    _LIBRARY.impl("mmd_small", _mmd_small, _device)
torch.library.register_fake("fastheads::mmd_small", _mmd_small_shapes, lib=_LIBRARY)
torch.library.register_autograd("fastheads::mmd_small", _small_backward, setup_context=_small_context, lib=_LIBRARY)
torch.library.register_fake("fastheads::kernel_sums", _kernel_sums_shape, lib=_LIBRARY)
torch.library.register_fake("fastheads::mmd_fused", _mmd_fused_shapes, lib=_LIBRARY)
torch.library.register_autograd("fastheads::kernel_sums", _sums_backward, setup_context=_sums_context, lib=_LIBRARY)
torch.library.register_autograd("fastheads::mmd_fused", _fused_backward, setup_context=_fused_context, lib=_LIBRARY)


def kernel_sums(
    x: Tensor,
    dom_x: Tensor,
    y: Tensor | None,
    dom_y: Tensor | None,
    num_domains: int,
    gammas: Tensor,
    row_offset: int | None = None,
    *,
    powers: tuple[int, ...] | None = None,
    impl: str = "auto",
) -> Tensor:
    """`K[l, a, b] = Σ_{i∈a, j∈b} Σ_u exp(−γ_lu ‖x_li − y_lj‖²)`, as `reference.kernel_sums`.

    Args:
        x `[L, N, D]`, dom_x int64 `[N]`; y `[L, M, D]`, dom_y: None for x itself. gammas: `[L, U]`.
        row_offset: x's row i is y's row `i + row_offset`; None: unrelated (without y: x's own rows).
        powers: per kernel, 0 for an exponential of its own, 2 or 10 where its gamma is that multiple of the one before.

    Returns `[L, S, S]`, at least float32; differentiable (once, but for `impl="reference"`) in x and y.
    """
    impl = choose_mmd(impl, x, num_domains)
    if impl == "reference":
        itself = y is None or dom_y is None
        other, dom_other = (x, dom_x) if y is None or dom_y is None else (y, dom_y)
        return reference.kernel_sums(x, dom_x, other, dom_other, num_domains, gammas, 0 if itself else row_offset)
    chain = [0] * gammas.shape[1] if powers is None else list(powers)
    out: Tensor = torch.ops.fastheads.kernel_sums(x, dom_x, y, dom_y, num_domains, gammas, chain, row_offset, impl)
    return out


def mmd_fused(
    x: Tensor,
    dom_x: Tensor,
    gammas: Tensor,
    coeff: Tensor,
    *,
    y: Tensor | None = None,
    dom_y: Tensor | None = None,
    row_offset: int | None = None,
    powers: tuple[int, ...] | None = None,
    impl: str = "auto",
) -> Tensor:
    """`Σ coeff ∘ K`, `[L]`, with its gradient from the same sweep; arguments as for `kernel_sums`.

    coeff: `[S, S]` or `[L, S, S]`, symmetric, constant. With y, whose rows x's are among (`row_offset`), this is x's
    share of the sum, with the gradient of the sum over all of y.
    """
    num_domains, L = coeff.shape[-1], x.shape[0]
    impl = choose_mmd(impl, x, num_domains)
    if impl == "reference":
        K = kernel_sums(x, dom_x, y, dom_y, num_domains, gammas, row_offset, impl=impl)
        loss = (coeff.to(K.dtype) * K).sum((-2, -1))
        # The share's own gradient is half the sum's: a pair of rows of two processes stands in both shares.
        return loss if y is None else 2 * loss - loss.detach()
    chain = [0] * gammas.shape[1] if powers is None else list(powers)
    backward = torch.is_grad_enabled() and x.requires_grad
    weights = coeff.expand(L, -1, -1)
    _, loss, _ = torch.ops.fastheads.mmd_fused(
        x, dom_x, y, dom_y, num_domains, gammas, chain, weights, row_offset, backward, impl
    )
    found: Tensor = loss
    return found


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
) -> Tensor:
    """The MMD of every layer, `[L]`, of up to `SMALL` samples, with its gradient, in one Triton launch.

    x: `[L, N, D]`. gate: `[L, H]`: the MMD is that of x times its heads' gates, and only they get a gradient. preset:
    `"adaptive"` or `"dan"`, bandwidths found in the launch; None: `gammas [L, U]` with their `powers`.
    """
    trained = x if gate is None else gate
    loss, _, _ = torch.ops.fastheads.mmd_small(
        x,
        dom,
        num_domains,
        preset or "",
        gammas,
        list(powers),
        estimator,
        gate,
        torch.is_grad_enabled() and trained.requires_grad,
    )
    found: Tensor = loss
    return found
