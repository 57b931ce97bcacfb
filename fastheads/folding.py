"""merge: what was learned folded into the weights, so that inference costs nothing extra; wise_ft: weight averaging."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.hosts.wrappers import plain_names, plain_state, refuse_peft, refuse_wrapped, unwrap
from fastheads.model import adapted_modules, is_patched, original_of, patched_models, written
from fastheads.nn import AdaptedLinear, HeadAttention
from fastheads.patching import take_out
from fastheads.reference import linear_factors, up_matrix

_ADAPTED = "_fastheads_adapted"  # on a merged model: the names of the tensors that adapting it changed


def folded_weights(module: HeadAttention | AdaptedLinear) -> list[tuple[Tensor, Tensor]]:
    """The host's weights that deltas and gates change, each with what it becomes, at least float32, not rounded.

    W_h ← W_h + s·B_h A_h        W_out[:, head h] ← g_h · (W_out[:, head h] + s·B_h A_h)

    An output projection is its attention's. Where it isn't the host's, the gates scale the values' own rows and bias.
    """
    found: list[tuple[Tensor, Any]] = []
    device = (module.weight if isinstance(module, AdaptedLinear) else module.weights(module)[0]).device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        if isinstance(module, AdaptedLinear):
            return [] if module.heads.target == "o" else [(module.weight, _with_delta(module))]
        own, stored = module.heads, module.weights(module)
        output: Any = module.output(module)
        if own.lora_A is not None and own.lora_B is not None:
            per_head = own.lora_A.shape[1] == own.num_heads
            up = up_matrix(own.lora_B, own.targets, own.scale, per_head)
            parts = (up @ own.lora_A.flatten(0, 2)).split([len(w) for w in stored])
            found += [(w, w.to(up.dtype) + part) for w, part in zip(stored, parts, strict=True)]
        gate, w_out = own.gate(), None if output is None else output.weight
        new: Any = _with_delta(output) if isinstance(output, AdaptedLinear) else w_out
        if gate is not None:
            each = gate.repeat_interleave(stored[0].shape[1] // own.num_heads)
            if output is not None:
                new = new.to(gate.dtype) * each
            else:
                value: Any = module.value  # type: ignore[attr-defined]
                wide = found.pop()[1] if found else value.weight.to(gate.dtype)
                found.append((value.weight, wide * each[:, None]))
                found += [(bias, bias.to(gate.dtype) * each) for bias in (value.bias,) if bias is not None]
        if w_out is not None and new is not w_out:
            found.append((w_out, new))
    return found


def _with_delta(linear: AdaptedLinear) -> Tensor:
    own = linear.heads
    down, up = linear_factors(own.lora_A, own.lora_B, own.scale)
    return linear.weight.to(up.dtype) + up @ down


def merge(model: nn.Module) -> nn.Module:
    """Folds deltas and gates into the weights of a patched model, in place: a stock model with stock keys.

    Formed in float32 and rounded once to the weights' dtype. For 16-bit weights a UserWarning says how much of the
    change the rounding took. Base tensors that were trained beside the adapters, or came with a loaded one, stay.

    Returns the model. Raises ValueError for an unpatched model or adapters that are not finite, TypeError for a wrapped
    model; the model is then as it was.
    """
    refuse_wrapped(model)
    writes: list[tuple[Tensor, Tensor]] = []
    lost, change = 0.0, 0.0
    owners = patched_models(model)  # raises for a part of one, whose flags couldn't be put back
    for module in adapted_modules(model):
        own = module.heads
        where = f"model: the adapter of layer {own.tower}.{own.layer}"
        if not all(bool(torch.isfinite(p).all()) for p in own.parameters()):
            raise ValueError(f"{where} is not finite; it can't be merged")
        for old, new in folded_weights(module):
            rounded = new.to(old.dtype)
            if not bool(torch.isfinite(rounded).all()):
                raise ValueError(f"{where} overflows {old.dtype}; merge into a float32 copy of the base")
            if rounded.dtype != new.dtype:
                lost += float((rounded.to(new.dtype) - new).square().sum())
                change += float((new - old.to(new.dtype)).square().sum())
            writes.append((old, rounded))
    with torch.no_grad():
        for old, rounded in writes:
            old.copy_(rounded)
    dtype = writes[0][0].dtype if writes else torch.float32
    folded = {id(old) for old, _ in writes}
    for owner in owners:
        names = {n for n, p in plain_names(owner, owner.named_parameters()).items() if id(p) in folded}
        owner.__dict__[_ADAPTED] = frozenset(names.union(written(owner), original_of(owner).tensors))
        take_out(owner)
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
        original: the model before tuning, or a copy of its state dict. What the two share in memory (a frozen text
            tower) stays as it is.
        alpha: 0: the original, 1: the tuned model.

    Either may be in a wrapper. Returns the model. Raises ValueError for a patched model, an alpha outside [0, 1],
    weights that don't match, or an original that lies in the tuned weights' memory and so followed them; TypeError for
    a model with PEFT around or inside it. The model is then as it was. Source: WiSE-FT (arXiv 2109.01903).
    """
    if is_patched(model):
        raise ValueError("model: is patched; merge(model) first, then average its weights")
    refuse_peft(model)
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha!r}; takes a number from 0 (the original) to 1 (the tuned model)")
    if not isinstance(original, (nn.Module, Mapping)):
        raise TypeError(f"original: got {type(original).__name__}; takes the model before tuning, or its state dict")
    before, after = plain_state(original), plain_state(model)
    wrong = sorted(set(before) ^ set(after)) or [k for k in after if before[k].shape != after[k].shape]
    if wrong:
        raise ValueError(f"original: its weights don't match the model's, first at {wrong[0]!r}")
    shared = {name for name, tuned in after.items() if _overlap(before[name], tuned)}
    adapted = unwrap(model).__dict__.get(_ADAPTED)
    everything = {name for name, tuned in after.items() if tuned.numel()}
    followed = sorted(shared & adapted if adapted else shared if shared == everything else ())
    if followed:
        raise ValueError(
            f"original: lies in the model's own memory and followed its training, first at {followed[0]!r}; "
            "before patching or training take {k: v.clone() for k, v in model.state_dict().items()}, or "
            "copy.deepcopy(model)"
        )
    with torch.no_grad():
        for name, tuned in after.items():
            if tuned.is_floating_point():
                tuned.copy_(torch.lerp(before[name].to(tuned).double(), tuned.double(), alpha))
    return model


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie, in part or whole, in the same memory."""
    if a.device != b.device or a.is_meta or not a.numel() or not b.numel():
        return False
    (first, last), (start, end) = _span(a), _span(b)
    return first < end and start < last


def _span(tensor: Tensor) -> tuple[int, int]:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # FSDP2's
    reach = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    return local.data_ptr(), local.data_ptr() + (reach + 1) * local.element_size()
