"""The base an adapter belongs to: its hash, and what tells two bases apart in words."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.hosts import find_tower, host_of
from fastheads.hosts.wrappers import plain_names
from fastheads.model.patched import is_adapters, is_patched, original_of


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 has sharded (each process must ask for it); others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _content(tensor: Tensor) -> memoryview:
    return gathered(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _activations(module: nn.Module) -> list[str]:
    # OpenCLIP gives "ViT-B-16" plain GELU also with weights that were trained with QuickGELU
    kinds = {type(m).__name__ for m in module.modules() if "GELU" in type(m).__name__}
    return sorted(kind.removesuffix("Activation") for kind in kinds)  # as Hugging Face calls them


def _parameters(model: nn.Module, tower: str) -> Iterator[tuple[str, str, Tensor]]:
    """The original parameters of a tower, sorted: name in the tower, name in the model, tensor."""
    where = find_tower(model, tower)
    module, prefix = where.module, f"{where.path}." if where.path else ""
    replaced = original_of(model).tensors if is_patched(model) else {}
    for name, p in sorted(plain_names(module, module.named_parameters()).items()):
        if not is_adapters(name) and not (tower == "text" and name.startswith("visual.")):
            yield name, prefix + name, replaced.get(prefix + name, p.detach()).to(p.dtype)


def base_hash(model: nn.Module, towers: tuple[str, ...], without: Collection[str] = ()) -> str:
    """SHA-256 over the original weights of the adapted towers and their activation, whatever device they are on.

    `without` are parameters of the model to leave out.
    """
    digest = hashlib.sha256()
    for tower in towers:
        digest.update(f"{tower} {_activations(find_tower(model, tower).module)}".encode())
        for name, whole_name, p in _parameters(model, tower):
            if whole_name not in without:
                digest.update(f"{tower} {name} {tuple(p.shape)} {p.dtype}".encode())
                digest.update(_content(p))
    return digest.hexdigest()


def attention_hash(model: nn.Module, towers: tuple[str, ...]) -> str:
    """SHA-256 over the adapted towers' attention weights as they are now, and what they are: the same whatever they are
    called, so for OpenCLIP's and Hugging Face's form of one model."""
    digest = hashlib.sha256()
    for name in towers:
        tower = find_tower(model, name)
        digest.update(f"{name} {_activations(tower.module)}".encode())
        for attention in tower.attentions:
            host: Any = host_of(attention)
            digest.update(f"{host and host.num_heads_of(attention)}".encode())
            for weight in () if host is None else host.weights(attention):
                digest.update(_content(weight.detach()))
    return digest.hexdigest()


def describe(model: nn.Module, towers: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Tower → property → value: what of a base can differ in words."""
    found = {}
    for tower in towers:
        module: Any = find_tower(model, tower).module
        dtypes = {str(p.dtype).removeprefix("torch.") for _, _, p in _parameters(model, tower)}
        about = {"dtype": ", ".join(sorted(dtypes)), "activation": ", ".join(_activations(module))}
        size = getattr(module, "image_size", None) if tower == "visual" else None
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            about["image size"] = f"{height} × {width}"
        positions = getattr(module, "positional_embedding", getattr(module, "pos_embed", None))  # OpenCLIP's, timm's
        if isinstance(positions, Tensor):
            about["position embedding"] = " × ".join(map(str, positions.shape))
        attentions: Any = find_tower(model, tower).attentions
        heads = sorted({host.num_heads_of(a) for a in attentions if (host := host_of(a)) is not None})
        found[tower] = about | {"layers": str(len(attentions)), "heads": ", ".join(map(str, heads))}
    return found


def differences(then: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """What differs of two `describe`s, each in words: "visual dtype float32, here bfloat16"."""
    return [
        f"{tower} {name} {value}, here {now[tower][name]}"
        for tower, about in then.items()
        for name, value in about.items()
        if name in now.get(tower, {}) and now[tower][name] != value
    ]
