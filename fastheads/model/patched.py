"""Inside a patched model: its adapted modules, their parameters, and what it remembers of the original."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastheads.config import HeadConfig
from fastheads.hosts.wrappers import is_peft, plain_names, plain_state, refuse_peft, unwrap
from fastheads.nn import AdaptedLinear, Adapter, HeadAttention, HeadLoRA

_ADAPTER = re.compile(r"\.heads\.(lora_A|lora_B|theta)$")
_STATE = "_fastheads"

Fingerprint = tuple[torch.dtype, torch.Size, int]


# -------------------------------------------------------------------------------------------- looking inside


def is_adapters(name: str) -> bool:
    """Whether a tensor of this name is an adapter's."""
    return _ADAPTER.search(name) is not None


def adapted_modules(model: nn.Module) -> list[HeadAttention | AdaptedLinear]:
    """The patched modules of `model`, visual tower first, layers in order, in each the attention first.

    Raises ValueError for an unpatched model, TypeError for one with PEFT around or inside it.
    """
    found = []
    for module in unwrap(model).modules():
        if is_peft(module):
            refuse_peft(model)
        if isinstance(module, (HeadAttention, AdaptedLinear)):
            found.append(module)
    if not any(isinstance(module, HeadAttention) for module in found):
        raise ValueError("model: is not patched; call fastheads.patch(model) first")
    return sorted(found, key=lambda m: (m.heads.tower != "visual", m.heads.layer))


def patched_attentions(model: nn.Module) -> list[HeadAttention]:
    """The attention modules among them. Raises as `adapted_modules`."""
    return [module for module in adapted_modules(model) if isinstance(module, HeadAttention)]


def adapters_of(model: nn.Module) -> list[Adapter]:
    """Every adapter, in the order of `adapted_modules`."""
    return [module.heads for module in adapted_modules(model)]


def head_modules(model: nn.Module) -> list[HeadLoRA]:
    """The `attn.heads` of every patched layer, visual tower first, layers in order."""
    return [attention.heads for attention in patched_attentions(model)]


def is_patched(model: nn.Module) -> bool:
    """Whether `model` (or the model inside its wrappers) carries adapters."""
    return any(isinstance(m, HeadAttention) for m in unwrap(model).modules())


def patched_models(model: nn.Module) -> list[nn.Module]:
    """The modules that `patch` was called with, inside `model` or `model` itself.

    Raises ValueError where `model` is not patched, or is only a part of a patched model.
    """
    patched_attentions(model)
    owners = [m for m in unwrap(model).modules() if _STATE in m.__dict__]
    if not owners:
        raise ValueError("model: is a part of a patched model; pass the whole model that was patched")
    return owners


# ------------------------------------------------------------------------------------- what patch remembers


def fingerprint(tensor: Tensor) -> Fingerprint | None:
    """A tensor's dtype, shape and the sum of its bits, the same on every device; None where they can't be read."""
    if type(tensor) not in (Tensor, nn.Parameter):  # a subclass may hold a share only, as DTensor does
        return None
    if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
        return None
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()
    words = content[: len(content) // 8 * 8].view(torch.int64).sum()
    return tensor.dtype, tensor.shape, int(words + content[len(content) // 8 * 8 :].sum())


@dataclass
class Original:
    """What a patched model remembers of itself before: flags, fingerprints, and tensors that a loaded adapter replaced.

    `handle` is the hook by which what `load_state_dict` puts into the model counts as the original from then on.
    """

    config: HeadConfig
    required_grad: dict[str, bool]
    prints: dict[str, Fingerprint | None]
    handle: RemovableHandle
    tensors: dict[str, Tensor] = field(default_factory=dict)


def remember(model: nn.Module, config: HeadConfig) -> None:
    """Notes on a model about to be patched what `unpatch` and `save_adapter` must know of it."""
    flags = plain_names(model, ((name, p.requires_grad) for name, p in model.named_parameters()))
    handle = model.register_load_state_dict_post_hook(_loaded)
    model.__dict__[_STATE] = Original(config, flags, _prints(model), handle)


def _prints(model: nn.Module) -> dict[str, Fingerprint | None]:
    return {name: fingerprint(tensor) for name, tensor in plain_state(model).items() if not is_adapters(name)}


def _loaded(model: nn.Module, keys: Any) -> None:
    model.__dict__[_STATE].prints = _prints(model)


def forget(model: nn.Module) -> Original:
    """Takes the note off again; returns it."""
    original: Original = model.__dict__.pop(_STATE)
    original.handle.remove()
    return original


def original_of(model: nn.Module) -> Original:
    """The note on a patched model. Raises ValueError as `patched_models`, and where it holds several."""
    owners = patched_models(model)
    if len(owners) > 1:
        raise ValueError(f"model: holds {len(owners)} patched models; pass one of them")
    original: Original = owners[0].__dict__[_STATE]
    return original


def written(model: nn.Module) -> list[str]:
    """Tensors of a patched model's base with other values than `patch` found, or `load_state_dict` put there since.

    What was cast since isn't told apart.
    """
    found, before = [], original_of(model).prints
    for name, now in _prints(unwrap(model)).items():
        then = before.get(name)
        if now is not None and then is not None and now[:2] == then[:2] and now != then:
            found.append(name)
    return found


def trained_beside(model: nn.Module) -> list[str]:
    """Tensors of the base that were written since `patch`, or can be trained: what an adapter alone doesn't hold."""
    free = {name for name, p in plain_names(unwrap(model), unwrap(model).named_parameters()).items() if p.requires_grad}
    beside = free.union(written(model), original_of(model).tensors)
    return [name for name in base_state_dict(model) if name in beside]


def replace_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts a loaded adapter's own copies of base tensors in, those of an earlier one out; keeps the originals."""
    restore(model)
    original, base = original_of(model), base_state_dict(model)
    lost = written(model) if tensors else []
    original.tensors = {name: base[name].clone() for name in tensors if name not in lost}
    for name, tensor in tensors.items():
        base[name].copy_(tensor)


def restore(model: nn.Module) -> None:
    """Puts back the base's tensors that a loaded adapter replaced."""
    original, base = original_of(model), base_state_dict(model)
    for name, tensor in original.tensors.items():
        base[name].copy_(tensor)
        original.prints[name] = fingerprint(base[name])  # load_state_dict may have taken the copy for the original
    original.tensors = {}


def first_few(names: Iterable[str], count: int = 3, of: str = "tensors") -> str:
    """Names for a message: the first ones, and how many there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" … ({len(names)} {of})" if len(names) > count else "")


# -------------------------------------------------------------------------------------- parameters and states


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every lora_A and lora_B of a patched model."""
    return [p for own in adapters_of(model) for p in (own.lora_A, own.lora_B) if p is not None]


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every theta of a patched model. Give them no weight decay: it pulls the gates to uniform."""
    return [own.theta for own in head_modules(model) if own.theta is not None]


def gates(model: nn.Module) -> Tensor | dict[str, Tensor]:
    """The gates' values `[L, H]`, detached, one row per adapted layer; with two towers a dict of them per tower.

    A layer without gates has ones.
    """
    rows: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for own in head_modules(model):
            gate = own.gate()
            rows.setdefault(own.tower, []).append(torch.ones(own.num_heads) if gate is None else gate)
    towers = {tower: torch.stack(values) for tower, values in rows.items()}
    return towers if len(towers) > 1 else next(iter(towers.values()))


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, under the unwrapped model's names (`….attn.heads.lora_A` …,
    `….out_proj.heads.lora_A` … of the linear layers)."""
    patched_attentions(model)
    return {name: tensor for name, tensor in plain_state(model).items() if is_adapters(name)}


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All other tensors under exactly the stock names, adapters not folded in.

    They are the original model's, but for those that were trained beside the adapters or came with a loaded one: these
    are as they are now.
    """
    patched_attentions(model)
    return {name: tensor for name, tensor in plain_state(model).items() if not is_adapters(name)}
