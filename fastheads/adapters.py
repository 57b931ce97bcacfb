"""save_adapter, load_adapter: what was learned, as safetensors and JSON."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.config import HeadConfig
from fastheads.files import write_whole
from fastheads.hosts import NAMES, find_tower, host_of
from fastheads.hosts.wrappers import plain_names, plain_state, refuse_peft, unwrap
from fastheads.model import (
    adapter_state_dict,
    adapters_of,
    base_state_dict,
    first_few,
    is_patched,
    original_of,
    patched_attentions,
    replace_tensors,
    trained_beside,
)
from fastheads.model.base import attention_hash, base_hash, describe, differences, gathered
from fastheads.nn import Adapter
from fastheads.patching import explain, patch, take_out

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class AnotherBaseError(ValueError):
    """The model is not the adapter's base; `what` says how they differ."""

    def __init__(self, what: str) -> None:
        super().__init__(f"directory: {what}; check_base=False loads it all the same")
        self.what = what


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base: str | None = None,
    modules_to_save: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> Path:
    """Writes a patched model's adapter: `adapter_model.safetensors` and `adapter_config.json`.

    The tensor file carries the config too, and replaces an older one in a single step: killed at any moment, the
    directory holds the old adapter or the new one. Of base tensors that were trained beside the adapters and are not
    in `modules_to_save` a UserWarning says which they are.

    Args:
        model: patched, in any wrapper; under FSDP2 every process calls this.
        directory: made where missing.
        base: the base model's name, for readers ("ViT-B-16 openai").
        modules_to_save: modules or parameters of the base that travel with the adapter, by their name or its last
            components: "ln_post", "ln_1" (that of every block), "logit_scale". `load_adapter` puts them in.
        classes: names of the classes that a linear head saved with it tells apart, in the order of its rows.

    Returns the directory. Raises ValueError for an unpatched model, a name that nothing has, or tensors that are not
    finite; TypeError for a model with PEFT around or inside it, and for `classes` that are no sequence of names.
    """
    from safetensors.torch import save

    inner = unwrap(model)
    _check_classes(classes)
    attentions = patched_attentions(inner)
    config = original_of(inner).config
    _refuse_shares(adapters_of(inner))
    base_tensors = base_state_dict(inner)
    chosen = _chosen(list(base_tensors), modules_to_save)
    beside = [name for name in trained_beside(inner) if name not in chosen]
    tensors = adapter_state_dict(inner) | {name: base_tensors[name] for name in chosen}
    tensors = {name: gathered(tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"model: its adapter is not finite, first at {bad[0]!r}; nothing was saved")
    report = explain(inner)
    about = {
        "format": "fastheads",
        "format_version": 1,
        "base_model": base or type(inner).__name__,
        "base_sha256": base_hash(inner, config.towers, without={*chosen, *beside}),
        "attention_sha256": attention_hash(inner, config.towers),
        "base": describe(inner, config.towers),
        "host": type(attentions[0]).__bases__[0].name,  # type: ignore[attr-defined]
        "config": config.to_dict(),
        "lora_parameters": report.lora_parameters,
        "gate_parameters": report.gate_parameters,
        "modules_to_save": chosen,
        "trained_beside": beside,
    }
    if classes is not None:
        about["classes"] = list(classes)
    text = json.dumps(about, indent=2)
    path = Path(directory).expanduser()
    write_whole(path / TENSORS, save(tensors, metadata={"fastheads": text}))
    write_whole(path / CONFIG, text.encode())
    if beside:
        warnings.warn(
            f"these tensors of the base are trained or changed beside the adapters and not saved: {first_few(beside)}; "
            f"modules_to_save=[{beside[0]!r}, …] takes them along",
            stacklevel=2,
        )
    return path


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _check_classes(classes: Any) -> None:
    if classes is not None and not _are_names(classes):
        raise TypeError(f"classes: got {classes!r}; takes a sequence of names, or None")


def _other_classes(then: Sequence[str], now: Sequence[str]) -> str:
    """How two lists of classes differ, in words; "" where they don't."""
    gone, new = ([name for name in a if name not in b] for a, b in ((then, now), (now, then)))
    found = [
        f"{first_few(map(repr, names), of='classes')} {where}"
        for names, where in ((gone, "not here"), (new, "here only"))
        if names
    ]
    if not found and list(then) != list(now):
        at = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now)))
        there, here = (repr(names[at]) if at < len(names) else "none" for names in (then, now))
        found = [f"in another order, first at class {at}, {there} there and {here} here"]
    return ", ".join(found)


def _chosen(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The tensors, of those named, that lie in `wanted` modules or are `wanted` themselves."""
    if not _are_names(wanted):
        raise TypeError(f"modules_to_save: got {wanted!r}; takes a sequence of names of modules or parameters")
    found: set[str] = set()
    for want in wanted:
        inside = {name for name in names if f".{want}." in f".{name}."}
        if not want or not inside:
            raise ValueError(f"modules_to_save: got {want!r}; the model's base has no module or parameter of that name")
        found |= inside
    return [name for name in names if name in found]


def _refuse_shares(adapters: Sequence[Adapter]) -> None:
    """Raises TypeError where FSDP1 has left a process a share of the adapters only."""
    for own in adapters:
        for name, tensor in own.named_parameters():
            if not tensor.numel() or (tensor.dim() == 1) != (name == "theta"):
                raise TypeError(
                    "model: each process holds a share of its adapters only; "
                    "save inside FullyShardedDataParallel.summon_full_params(model)"
                )


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
    about = {"base": {}, "modules_to_save": [], "trained_beside": []} | about  # an older fastheads wrote none of these
    kinds = {"config": dict, "base_sha256": str, "base_model": str, "base": dict}
    missing = [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]
    missing += [key for key in ("modules_to_save", "trained_beside", "classes") if not _are_names(about.get(key, ()))]
    missing += [f"base.{tower}" for tower, of in dict(about["base"]).items() if not isinstance(of, dict)]
    if missing:
        raise ValueError(f"directory: {path / TENSORS} is corrupt (its description lacks {', '.join(missing)})")
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"directory: {path / TENSORS} is not finite, first at {bad[0]!r}")
    return about, tensors


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    impl: str = "auto",
    check_base: bool = True,
    classes: Sequence[str] | None = None,
) -> nn.Module:
    """Loads an adapter into a model, in place; patches an unpatched one first.

    Another form of its base will do, where the attention's weights are the same: Hugging Face's or OpenCLIP's, or a
    tower alone (an adapter that carries tensors of its base which have other names there is refused).
    Base tensors that were saved with the adapter (`modules_to_save`) take the place of the model's; `unpatch` brings
    those back, and `disabled` does not. Of tensors that were trained beside the adapter and not saved a UserWarning
    says which they are.

    Args:
        model: the adapter's base model, patched with the same config or not at all.
        directory: written by `save_adapter`.
        impl: as in `patch`.
        check_base: refuse another base than the one it was trained on; False (say, for its 16-bit copy): warn.
        classes: names of the classes to be told apart, in order; an adapter that was saved with the names of others,
            or in another order, is refused.

    Returns the model. Raises FileNotFoundError or ValueError for a missing, corrupt, foreign or unfitting adapter, and
    what `patch` raises; the model is then as it was.
    """
    _check_classes(classes)
    about, tensors = read_adapter(directory)
    config = HeadConfig.from_dict(about["config"])
    other = "" if classes is None else _other_classes(about.get("classes", classes), classes)
    if other:
        raise ValueError(f"directory: the adapter's linear head is for other classes: {other}")
    inner = unwrap(model)
    refuse_peft(inner)
    saved, beside = about["modules_to_save"], about["trained_beside"]
    named = _named_as_in(inner, config.towers, tensors)
    other_form = named.keys() != tensors.keys()
    lost = [name for name in saved if name not in plain_state(inner)] if other_form else []
    if lost:
        raise ValueError(
            f"directory: the adapter carries tensors of its base, which have other names in this model: "
            f"{first_few(lost)}; load it into a model of the kind it was saved from ({about['base_model']})"
        )
    same = base_hash(inner, config.towers, without={*saved, *beside}) == about["base_sha256"]
    if not same and not (other_form and attention_hash(inner, config.towers) == about.get("attention_sha256")):
        differing = differences(about["base"], describe(inner, config.towers))
        text = f"the adapter in {directory} was trained on another base ({about['base_model']}): " + (
            "; ".join(differing) or "this model's weights are not the ones it was saved with: load those first"
        )
        if check_base:
            raise AnotherBaseError(text)
        warnings.warn(text, stacklevel=2)
    fresh = not is_patched(inner)
    if fresh and inner is not model:
        raise TypeError(f"model: is wrapped in {type(model).__name__}; patch first (load_adapter does), then wrap")
    if fresh:
        patch(inner, config, impl=impl)
    elif original_of(inner).config != config:
        raise ValueError(
            f"directory: its config {config} is not the patched model's {original_of(inner).config}; unpatch first"
        )
    try:
        _put(inner, named, saved)
    except Exception:
        if fresh:
            take_out(inner)
        raise
    if beside:
        warnings.warn(
            f"the adapter in {directory} was saved without tensors that were trained beside it: {first_few(beside)}",
            stacklevel=2,
        )
    return model


def _named_as_in(model: nn.Module, towers: tuple[str, ...], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors under the names they have in `model`, by tower, layer and what they are of; what has none
    keeps its own."""
    names = {id(module): name for name, module in plain_names(model, model.named_modules()).items()}
    found: dict[tuple[str, str], list[str]] = {}
    for name in towers:
        tower = find_tower(model, name)
        for layer, attention in enumerate(tower.attentions):
            host: Any = host_of(attention)
            output = None if host is None else host.output(attention)
            parts = {"": attention, "o": output, "fc1": tower.mlp(layer, "fc1"), "fc2": tower.mlp(layer, "fc2")}
            for part, module in parts.items():
                found.setdefault((name, part), []).append(names.get(id(module), ""))
    known = {name for of in found.values() for name in of}

    def named(name: str) -> str:
        where, _, tensor = name.rpartition(".heads.")
        path = where.split(".")
        if where in known:
            return name
        part = {"out_proj": "o", "proj": "o", "c_fc": "fc1", "c_proj": "fc2"}.get(path[-1], path[-1])
        tower = ("visual" if path[0] in NAMES["visual"] else "text") if len(towers) > 1 else towers[0]
        own = found[tower, part if part in ("o", "fc1", "fc2") else ""]
        layer = next((int(at) for at in reversed(path) if at.isdigit()), len(own))
        return f"{own[layer]}.heads.{tensor}" if layer < len(own) and own[layer] else name

    return {named(name): tensor for name, tensor in tensors.items()}


def _put(model: nn.Module, tensors: dict[str, Tensor], saved: Sequence[str]) -> None:
    """Writes an adapter's tensors into a model patched alike. Raises ValueError where they don't fit, writing none."""
    own = adapter_state_dict(model)
    expected = own | {name: tensor for name, tensor in base_state_dict(model).items() if name in saved}
    wrong = sorted(set(expected) ^ set(tensors)) or [k for k in expected if expected[k].shape != tensors[k].shape]
    if wrong:
        theirs, ours = (tuple(of[wrong[0]].shape) if wrong[0] in of else "none" for of in (tensors, expected))
        raise ValueError(
            f"directory: its tensors don't fit the model, first at {wrong[0]!r} (the adapter has {theirs}, the model "
            f"{ours}); takes an adapter of a model with as many layers and heads, as many classes, and as wide"
        )
    if any(hasattr(tensor, "full_tensor") for tensor in expected.values()):
        raise TypeError("model: is sharded by FSDP; load the adapter first, then shard")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        replace_tensors(model, {name: tensors[name] for name in saved})
