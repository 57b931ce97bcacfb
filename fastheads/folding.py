"""merge: what was learned folded into the weights, so that inference costs nothing extra; wise_ft: weight averaging."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.nn import HeadAttention
from fastheads.patching import is_patched, patched_attentions, patched_models, unpatch, unwrap
from fastheads.reference import up_matrix


def folded_weights(attention: HeadAttention) -> dict[str, Tensor]:
    """`in_proj_weight` and `out_proj.weight` with deltas and gates folded in, at least float32, not rounded.

    W_h ← W_h + s·B_h A_h        out_proj.weight[:, head h] ← g_h · out_proj.weight[:, head h]
    """
    own, module = attention.heads, _module(attention)
    new: dict[str, Tensor] = {}
    with torch.no_grad(), torch.autocast(module.in_proj_weight.device.type, enabled=False):
        if own.lora_A is not None and own.lora_B is not None:
            per_head = own.lora_A.shape[1] == own.num_heads
            up = up_matrix(own.lora_B, own.targets, own.scale, per_head)
            new["in_proj_weight"] = module.in_proj_weight.to(up.dtype) + up @ own.lora_A.flatten(0, 2)
        gate = own.gate()
        if gate is not None:
            weight = module.out_proj.weight
            new["out_proj.weight"] = weight.to(gate.dtype) * gate.repeat_interleave(weight.shape[1] // own.num_heads)
    return new


def merge(model: nn.Module) -> nn.Module:
    """Folds deltas and gates into the weights of a patched model, in place: a stock model with stock keys.

    Formed in float32 and rounded once to the weights' dtype. For 16-bit weights a UserWarning says how much of the
    change the rounding took.

    Returns the model. Raises ValueError for an unpatched model or adapters that are not finite, TypeError for a wrapped
    model; the model is then as it was.
    """
    if unwrap(model) is not model:
        raise TypeError(f"model: is wrapped in {type(model).__name__}; pass the model inside it")
    writes: list[tuple[Tensor, Tensor]] = []
    lost, change = 0.0, 0.0
    patched_models(model)  # raises for a part of one, whose flags couldn't be put back
    for attention in patched_attentions(model):
        module, own = _module(attention), attention.heads
        where = f"model: the adapter of layer {own.tower}.{own.layer}"
        if not all(bool(torch.isfinite(p).all()) for p in own.parameters()):
            raise ValueError(f"{where} is not finite; it can't be merged")
        for name, new in folded_weights(attention).items():
            old = module.in_proj_weight if name == "in_proj_weight" else module.out_proj.weight
            rounded = new.to(old.dtype)
            if not bool(torch.isfinite(rounded).all()):
                raise ValueError(f"{where} overflows {old.dtype} in {name}; merge into a float32 copy of the base")
            if rounded.dtype != new.dtype:
                lost += float((rounded.to(new.dtype) - new).square().sum())
                change += float((new - old.to(new.dtype)).square().sum())
            writes.append((old, rounded))
    with torch.no_grad():
        for old, rounded in writes:
            old.copy_(rounded)
    dtype = writes[0][0].dtype if writes else torch.float32
    unpatch(model)
    if change:
        warnings.warn(
            f"merge: rounding to {dtype} changed the weights by {math.sqrt(lost / change):.1%} of what was folded in; "
            "merge into a float32 copy of the base to keep it all",
            stacklevel=2,
        )
    return model


def wise_ft(model: nn.Module, original: nn.Module | Mapping[str, Tensor], alpha: float) -> nn.Module:
    """WiSE-FT: every weight of `model` becomes `(1 − alpha) · original + alpha · tuned`, in place.

    Args:
        model: the tuned model, not patched (merge first).
        original: the model before tuning, or its state dict.
        alpha: 0: the original, 1: the tuned model.

    Returns the model. Raises ValueError for a patched model, an alpha outside [0, 1], or weights that don't match; the
    model is then as it was. Source: WiSE-FT (arXiv 2109.01903).
    """
    if is_patched(model):
        raise ValueError("model: is patched; merge(model) first, then average its weights")
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha!r}; takes a number from 0 (the original) to 1 (the tuned model)")
    if not isinstance(original, (nn.Module, Mapping)):
        raise TypeError(f"original: got {type(original).__name__}; takes the model before tuning, or its state dict")
    before = original.state_dict() if isinstance(original, nn.Module) else original
    after = model.state_dict()
    wrong = sorted(set(before) ^ set(after)) or [k for k in after if before[k].shape != after[k].shape]
    if wrong:
        raise ValueError(f"original: its weights don't match the model's, first at {wrong[0]!r}")
    with torch.no_grad():
        for name, tuned in after.items():
            if tuned.is_floating_point():
                tuned.copy_(torch.lerp(before[name].to(tuned).double(), tuned.double(), alpha))
    return model


def _module(attention: HeadAttention) -> Any:
    return attention
