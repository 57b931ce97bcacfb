"""Wrappers around a model or a part of it: what is inside, under which names, and which ones nobody can look into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

# Under these names torch.compile, FSDP1 and its checkpointing keep what they wrap.
_HIDDEN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _child(module: nn.Module) -> str | None:
    """The name under which a wrapper keeps what it wraps; None for what is no wrapper.

    DDP, DataParallel, AveragedModel and timm's EMAs have one child, `module`.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    found = next((name for name in _HIDDEN if name in module._modules), None)
    return "module" if list(module._modules) == ["module"] else found


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, nested in any order. Raises TypeError for what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; takes a torch.nn.Module")
    while (name := _child(model)) is not None:
        inner = model._modules[name]
        assert inner is not None
        model = inner
    return model


def plain_names(model: nn.Module, items: Iterable[tuple[str, T]]) -> dict[str, T]:
    """`items`, of `model.state_dict()`, `named_parameters()` or `named_modules()`, named as without wrappers."""
    wrapped = ((path, _child(m)) for path, m in model.named_modules(remove_duplicate=False))
    hidden = {f"{path}.{child}".removeprefix(".") for path, child in wrapped if child == "module"}

    def plain(name: str) -> str:
        parts = name.split(".")
        kept = (p for i, p in enumerate(parts) if p not in _HIDDEN and ".".join(parts[: i + 1]) not in hidden)
        return ".".join(kept)

    return {plain(name): item for name, item in items}


def plain_state(state: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, or of a state dict that a wrapper gave, named as without wrappers."""
    if isinstance(state, nn.Module):
        inner = unwrap(state)
        return plain_names(inner, inner.state_dict().items())
    named = {".".join(p for p in name.split(".") if p not in _HIDDEN): tensor for name, tensor in state.items()}
    while "module" in {name.split(".")[0] for name in named}:
        rest = {name: tensor for name, tensor in named.items() if name != "n_averaged"}  # AveragedModel's own
        if not all(name.startswith("module.") for name in rest):
            break
        named = {name.removeprefix("module."): tensor for name, tensor in rest.items()}
    return named


# ------------------------------------------------------------------------------------------------ refusals


def is_peft(module: nn.Module) -> bool:
    """Whether PEFT made or marked this module."""
    return type(module).__module__.startswith("peft.") or "peft_config" in module.__dict__


def refuse_peft(model: nn.Module) -> None:
    """Raises TypeError for a model with PEFT around or inside it: its weights have other names, and PEFT's deltas."""
    for name, module in model.named_modules():
        if is_peft(module):
            where = f" (at {name!r})" if name else ""
            raise TypeError(
                f"model: is wrapped by PEFT{where}, whose deltas fastheads neither saves nor folds; "
                "merge or unload that adapter first (merge_and_unload)"
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Raises TypeError for a model in a wrapper, which would go on with what is taken out of it."""
    if unwrap(model) is not model:
        raise TypeError(f"model: is wrapped in {type(model).__name__}; pass the model inside it")


def refuse_foreign(model: nn.Module) -> None:
    """Raises TypeError for what can't be patched as it is: wrapped, scripted or quantised, or a part of it."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: is scripted; patch the eager model first, then script or compile")
    if unwrap(model) is not model:
        raise TypeError(f"model: is wrapped in {type(model).__name__}; patch first, then wrap")
    refuse_peft(model)
    for name, module in model.named_modules():
        where = f" (at {name!r})" if name else ""
        origin = type(module).__module__
        classes = [cls.__name__ for cls in type(module).__mro__]
        if "FullyShardedDataParallel" in classes or "FSDPModule" in classes:
            raise TypeError(f"model: is wrapped in FSDP{where}; patch first, then wrap")
        if "quantized" in origin or origin.split(".")[0] in ("bitsandbytes", "torchao"):
            raise TypeError(f"model: is quantised{where}: {type(module).__name__}; patch takes float weights")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"model: is scripted{where}; patch the eager model first, then script or compile")
