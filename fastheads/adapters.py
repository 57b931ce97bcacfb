"""save_adapter, load_adapter: what was learned, as safetensors and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.config import HeadConfig
from fastheads.files import write_whole
from fastheads.hosts import find_tower
from fastheads.patching import (
    adapter_state_dict,
    config_of,
    explain,
    is_patched,
    patch,
    patched_attentions,
    unpatch,
    unwrap,
)

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base_hash(model: nn.Module, towers: tuple[str, ...]) -> str:
    """SHA-256 over the original weights of the adapted towers and their activation, whatever device they are on."""
    digest = hashlib.sha256()
    for tower in towers:
        module = find_tower(model, tower).module
        # OpenCLIP gives "ViT-B-16" plain GELU also with weights that were trained with QuickGELU
        activations = {type(m).__name__ for m in module.modules() if "GELU" in type(m).__name__}
        digest.update(f"{tower} {sorted(activations)}".encode())
        for name, p in sorted(module.named_parameters()):
            if ".heads." in name or (tower == "text" and name.startswith("visual.")):
                continue
            digest.update(f"{tower} {name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Writes a patched model's adapter: `adapter_model.safetensors` and `adapter_config.json`.

    The tensor file carries the config too, and replaces an older one in a single step: killed at any moment, the
    directory holds the old adapter or the new one.

    Args:
        model: patched (or its DDP wrapper).
        directory: made where missing.
        base: the base model's name, for readers ("ViT-B-16 openai").

    Returns the directory. Raises ValueError for an unpatched model or one whose adapter is not finite.
    """
    from safetensors.torch import save

    inner = unwrap(model)
    attentions = patched_attentions(inner)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_state_dict(inner).items()}
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"model: its adapter is not finite, first at {bad[0]!r}; nothing was saved")
    config = config_of(inner)
    report = explain(inner)
    about = {
        "format": "fastheads",
        "format_version": 1,
        "base_model": base or type(inner).__name__,
        "base_sha256": base_hash(inner, config.towers),
        "host": type(attentions[0]).__bases__[0].name,  # type: ignore[attr-defined]
        "config": config.to_dict(),
        "lora_parameters": report.lora_parameters,
        "gate_parameters": report.gate_parameters,
    }
    text = json.dumps(about, indent=2)
    path = Path(directory).expanduser()
    write_whole(path / TENSORS, save(tensors, metadata={"fastheads": text}))
    write_whole(path / CONFIG, text.encode())
    return path


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_adapter` wrote: the description and the tensors.

    Raises FileNotFoundError for a missing directory or file, ValueError for a corrupt or foreign one.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(directory).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"directory: {path} does not exist; takes a folder written by save_adapter")
    if (path / CONFIG).is_file():
        try:
            listed = json.loads((path / CONFIG).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"directory: {path / CONFIG} is corrupt ({e})") from None
        if not isinstance(listed, dict):
            raise ValueError(f"directory: {path / CONFIG} is corrupt (it holds no object)")
        if "peft_type" in listed:
            raise ValueError(f"directory: {path} holds a PEFT adapter ({listed['peft_type']}); load it with PEFT")
    if not (path / TENSORS).is_file():
        raise FileNotFoundError(f"directory: {path} has no {TENSORS}; takes a folder written by save_adapter")
    try:
        with safe_open(path / TENSORS, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        about = json.loads(metadata["fastheads"])
    except (SafetensorError, json.JSONDecodeError) as e:
        raise ValueError(f"directory: {path / TENSORS} is corrupt ({e})") from None
    except KeyError:
        raise ValueError(f"directory: {path / TENSORS} was not written by fastheads") from None
    version = about.get("format_version") if isinstance(about, dict) else None
    if version != 1:
        raise ValueError(f"directory: {path} has format {version}; this fastheads reads 1")
    missing = [key for key in ("config", "base_sha256", "base_model") if key not in about]
    if missing or not isinstance(about["config"], dict):
        raise ValueError(
            f"directory: {path / TENSORS} is corrupt (its description lacks {', '.join(missing) or 'config'})"
        )
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"directory: {path / TENSORS} is not finite, first at {bad[0]!r}")
    return about, tensors


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, impl: str = "auto", check_base: bool = True
) -> nn.Module:
    """Loads an adapter into a model, in place; patches an unpatched one first.

    Args:
        model: the adapter's base model, patched with the same config or not at all.
        directory: written by `save_adapter`.
        impl: as in `patch`.
        check_base: refuse another base than the one it was trained on; False (say, for its 16-bit copy): warn.

    Returns the model. Raises FileNotFoundError or ValueError for a missing, corrupt, foreign or unfitting adapter, and
    what `patch` raises; the model is then as it was.
    """
    about, tensors = read_adapter(directory)
    config = HeadConfig.from_dict(about["config"])
    inner = unwrap(model)
    if base_hash(inner, config.towers) != about["base_sha256"]:
        text = (
            f"the adapter in {directory} was trained on another base ({about['base_model']}): "
            "this model's weights are not the ones it was saved with"
        )
        if check_base:
            raise ValueError(f"directory: {text}; check_base=False loads it all the same")
        warnings.warn(text, stacklevel=2)
    fresh = not is_patched(inner)
    if fresh and inner is not model:
        raise TypeError(f"model: is wrapped in {type(model).__name__}; patch first (load_adapter does), then wrap")
    if fresh:
        patch(inner, config, impl=impl)
    elif config_of(inner) != config:
        raise ValueError(f"directory: its config {config} is not the patched model's {config_of(inner)}; unpatch first")
    own = adapter_state_dict(inner)
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        if fresh:
            unpatch(inner)
        raise ValueError(f"directory: its tensors don't fit the model, first at {wrong[0]!r}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return model
