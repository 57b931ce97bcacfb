"""The operators `fastheads::kernel_sums`, `mmd_fused` and `mmd_small`: Gaussian kernels summed over pairs of domains.

Schema, fakes, gradients, and the functions to call. `dispatch.choose_mmd` chooses; `mmd_cpu.py` and `mmd_triton.py`
compute; what they share, and the formulas, are in `mmd_panels.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastheads import reference
from fastheads.ops import mmd_cpu
from fastheads.ops.dispatch import choose_mmd
from fastheads.ops.mmd_panels import Samples
from fastheads.reference import autocast_off

_SAMPLES = "Tensor x, Tensor dom_x, Tensor? y, Tensor? dom_y, int num_domains, Tensor gammas, int[] powers"
_SCHEMAS = (
    f"kernel_sums({_SAMPLES}, SymInt? row_offset, str impl) -> Tensor",
    f"mmd_fused({_SAMPLES}, Tensor coeff, SymInt? row_offset, bool backward, str impl)"
    " -> (Tensor K, Tensor loss, Tensor dx, Tensor unit)",
    "mmd_small(Tensor x, Tensor dom, int num_domains, str preset, Tensor? gammas, int[] powers, str estimator,"
    " Tensor? gate, bool backward) -> (Tensor loss, Tensor K, Tensor gradient)",
)


# --------------------------------------------------------------------------------------------- what they compute


def _swept(samples: Samples, coeff: Tensor | None, impl: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """K `[L, S, S]` float64 and, with coeff, the gradient of `Σ coeff ∘ K` in x, in x's dtype, and its `unit`."""
    x, y = samples.x, samples.y
    if not (x.shape[0] and x.shape[1] and (y is None or y.shape[1])):
        K = _sums_shape(x, samples.num_domains).zero_()
        return (
            K.double(),
            None if coeff is None else x.new_zeros(x.shape),
            None if coeff is None else K.new_ones(len(K)),
        )
    with autocast_off(x):
        if impl != "triton":
            return mmd_cpu.sweep(samples, coeff)
        from fastheads.ops import mmd_triton

        with torch.cuda.device_of(x):
            return mmd_triton.sweep(samples, coeff)


def _kernel_sums(*inputs: Any) -> Tensor:
    *samples, impl = inputs
    K, _, _ = _swept(Samples._make(samples), None, impl)
    return K.to(_wide(inputs[0]))


def _mmd_fused(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *samples, coeff, row_offset, backward, impl = inputs
    K, dx, unit = _swept(Samples._make([*samples, row_offset]), coeff if backward else None, impl)
    loss, wide, none = (coeff.double() * K).sum((-2, -1)), _wide(inputs[0]), inputs[0].new_empty(0)
    return K.to(wide), loss.to(wide), none if dx is None else dx, none.to(wide) if unit is None else unit.to(wide)


def _mmd_small(x: Tensor, dom: Tensor, num_domains: int, preset: str, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastheads.kernels.mmd_small import mmd_small

    gammas, powers, estimator, gate, backward = rest
    options = {"num_domains": num_domains, "gammas": gammas, "powers": tuple(powers), "estimator": estimator}
    options |= {"preset": preset or None, "gate": None if gate is None else gate.float(), "backward": backward}
    with torch.cuda.device_of(x):
        loss, K, gradient = mmd_small(x if x.stride(2) == 1 else x.contiguous(), dom, **options)
    return loss, K, x.new_empty(0) if gradient is None else gradient


# --------------------------------------------------------------------------------------------------------- fakes


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sums_shape(x: Tensor, num_domains: int) -> Tensor:
    return x.new_empty((x.shape[0], num_domains, num_domains), dtype=_wide(x))


def _kernel_sums_shape(*inputs: Any) -> Tensor:
    return _sums_shape(inputs[0], inputs[4])


def _mmd_fused_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    x, backward = inputs[0], inputs[9]
    K = _sums_shape(x, inputs[4])
    return (
        K,
        K.new_empty(x.shape[0]),
        x.new_empty(x.shape if backward else 0),
        K.new_empty(x.shape[0] if backward else 0),
    )


def _mmd_small_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    x, num_domains, gate, backward = inputs[0], inputs[2], inputs[7], inputs[8]
    K = x.new_empty((x.shape[0], num_domains, num_domains), dtype=torch.float32)
    kept = x if x.dtype == torch.bfloat16 and gate is None else K
    gradient = kept.new_empty(x.shape if gate is None else gate.shape) if backward else x.new_empty(0)
    return K.new_empty(x.shape[0]), K, gradient


# ----------------------------------------------------------------------------------------------------- gradients


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
    rest, dx, dy = (ctx.num_domains, gammas, ctx.powers), None, None

    def gradient(*samples: Tensor | None, coeff: Tensor, offset: int | None) -> Tensor:
        _, _, d, unit = torch.ops.fastheads.mmd_fused(*samples, *rest, coeff, offset, True, ctx.impl)
        return _times(unit, d, d.dtype) if d.dtype == torch.float16 else d

    if y is None:
        dx = gradient(x, dom_x, None, None, coeff=(dK + dK.mT) / 2, offset=None)
    else:
        if ctx.needs_input_grad[0]:
            dx = gradient(x, dom_x, y, dom_y, coeff=dK / 2, offset=ctx.row_offset)
        if ctx.needs_input_grad[2]:
            back = None if ctx.row_offset is None else -ctx.row_offset
            dy = gradient(y, dom_y, x, dom_x, coeff=dK.mT / 2, offset=back)
    return (dx, None, dy, *(None,) * 6)


def _times(factor: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor [L] · gradient [L, …]` in `dtype`, multiplied in float32 at least and rounded once."""
    factor = factor.view(-1, *[1] * (gradient.dim() - 1))
    if gradient.dtype != dtype or dtype.itemsize > 2:
        return (factor * gradient).to(dtype)
    # In place, of a copy that vmap has batched where it has factor. A CPU widens what it multiplies: a part at a time.
    found = gradient * torch.ones_like(factor).to(dtype)
    parts = 1 if found.is_cuda else 64
    for part in found.split(-(-found.shape[1] // parts) or 1, 1):
        part.mul_(factor)
    return found


def _keep(ctx: Any, K: Tensor, gradient: Tensor, unit: Tensor | None, backward: bool, dtype: torch.dtype) -> None:
    """For operators that leave the loss's gradient beside it."""
    ctx.mark_non_differentiable(K, gradient, *(() if unit is None else (unit,)))
    ctx.set_materialize_grads(False)
    ctx.backward, ctx.dtype = backward, dtype
    ctx.save_for_backward(gradient, unit)


def _scaled(ctx: Any, dloss: Tensor) -> Tensor:
    """`dloss · gradient`. A float16 one, which a loss scale is to save, comes in multiples of a unit of its own."""
    gradient, unit = ctx.saved_tensors
    return _times(dloss if unit is None else dloss * unit, gradient, ctx.dtype)


def _fused_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    K, _, dx, unit = output
    _keep(ctx, K, dx, unit, inputs[9], inputs[0].dtype)


def _fused_backward(ctx: Any, dK: None, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    _refuse_second_derivative()
    if dloss is None:
        return (None,) * 11
    if not ctx.backward:
        raise RuntimeError("mmd_fused: was called with backward=False, so there is no gradient")
    return (_scaled(ctx, dloss), *(None,) * 10)


def _small_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, K, gradient = output
    x, gate = inputs[0], inputs[7]
    ctx.gated = gate is not None
    _keep(ctx, K, gradient, None, inputs[8], gate.dtype if ctx.gated else x.dtype)


def _small_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    """Of x or, where there is one, of the gate (x is a constant then)."""
    _refuse_second_derivative()
    if dloss is None or not ctx.backward:
        return (None,) * 9
    found = _scaled(ctx, dloss)
    return (None if ctx.gated else found, *(None,) * 6, found if ctx.gated else None, None)


# ------------------------------------------------------------------------------------------------- registration

_LIBRARY = torch.library.Library("fastheads", "FRAGMENT")
_PARTS: tuple[tuple[Any, ...], ...] = (
    (_kernel_sums, _kernel_sums_shape, _sums_context, _sums_backward),
    (_mmd_fused, _mmd_fused_shapes, _fused_context, _fused_backward),
    (_mmd_small, _mmd_small_shapes, _small_context, _small_backward),
)
for _schema, (_run, _shapes, _context, _backward) in zip(_SCHEMAS, _PARTS, strict=True):
    _name = _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"fastheads::{_name}", _shapes, lib=_LIBRARY)
    torch.library.register_autograd(f"fastheads::{_name}", _backward, setup_context=_context, lib=_LIBRARY)


# ------------------------------------------------------------------------------------------------------- to call


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
    _, loss, _, _ = torch.ops.fastheads.mmd_fused(
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
