"""patch, unpatch, explain: putting adapters into a model's attention layers, and taking them out again; disabled and
masked: without all of them, and without some heads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastheads import ops
from fastheads.config import HeadConfig
from fastheads.hosts import Host, Tower, find_tower, host_of
from fastheads.hosts.wrappers import plain_names, refuse_foreign, refuse_wrapped, unwrap
from fastheads.model import (
    ADAPTER,
    first_few,
    forget,
    head_modules,
    is_patched,
    patched_attentions,
    patched_models,
    remember,
    restore,
    written,
)
from fastheads.nn import FrozenWatch, HeadAttention, HeadLoRA, head_class
from fastheads.ops import native


@dataclass(frozen=True)
class LayerReport:
    """One selected layer: where it is, its shape, who computes it, and why the others do not."""

    name: str
    host: str
    num_heads: int
    head_dim: int
    rank: int
    choice: ops.Choice

    def __str__(self) -> str:
        shape = f"{self.num_heads} heads × {self.head_dim}, rank {self.rank}"
        return f"{self.name:<12} {self.host:<22} {shape:<28} → {self.choice.name}"


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did, or `explain` found. Printing it shows a line per layer, and why it runs where it runs."""

    layers: tuple[LayerReport, ...]
    lora_parameters: int
    gate_parameters: int
    model_parameters: int

    def __str__(self) -> str:
        total = self.lora_parameters + self.gate_parameters
        lines = [
            f"{len(self.layers)} attention layers adapted: {self.lora_parameters:,} LoRA and {self.gate_parameters:,} "
            f"gate parameters, {total / self.model_parameters:.2%} of {self.model_parameters:,}"
        ]
        lines += [f"  {layer}" for layer in self.layers]
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            for name, why in layer.choice.refused.items():
                text = f"  {name}: {'; '.join(why) or 'not asked for'}"
                reasons.setdefault(text, []).append(layer.name)
        lines += [f"{text} ({_span(names, len(self.layers))})" for text, names in reasons.items()]
        lines.append(f"  native CPU kernels: {native.describe()}")
        return "\n".join(lines)


def _span(names: list[str], total: int) -> str:
    return "all layers" if len(names) == total else ", ".join(names)


@dataclass(frozen=True)
class _Plan:
    """One layer about to be patched."""

    report: LayerReport
    module: nn.Module
    host: Host
    tower: str
    index: int
    options: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ planning


def _plan(
    model: nn.Module, config: HeadConfig | None, impl: str, recompute: int = False
) -> tuple[HeadConfig, list[_Plan]]:
    """What patching would do. Raises, naming the argument, where it cannot; changes nothing."""
    if config is not None and not isinstance(config, HeadConfig):
        raise TypeError(f"config: got {type(config).__name__}; takes a fastheads.HeadConfig, or None for the default")
    if config is None:
        config = HeadConfig.hap(len(find_tower(model, "visual").attentions))
    ops.dispatch.check_impl(impl)
    if not isinstance(recompute, int) or recompute < 0:
        raise ValueError(
            f"recompute: got {recompute!r}; takes True, False, or k ≥ 1 for every k-th layer "
            "(whole blocks: model.set_grad_checkpointing())"
        )
    plans = []
    for tower_name in config.towers:
        tower = find_tower(model, tower_name)
        ranks = config.layer_ranks(len(tower.attentions), tower_name)
        for place, (index, rank) in enumerate(ranks.items()):
            module = tower.attentions[index]
            name = f"{tower_name}.{index}"
            host = host_of(module)
            if host is None:
                raise TypeError(
                    f"model: layer {name} is a {type(module).__name__}; "
                    "takes nn.MultiheadAttention, and the attention of OpenCLIP, timm, CLIP, SigLIP, BERT and T5"
                )
            reasons = host.refusals(module, gated=config.gate is not None)
            weights: tuple[Any, ...] = ()
            if not reasons:
                output = host.output(module)
                weights = (*host.weights(module), *(() if output is None else (getattr(output, "weight", None),)))
            for part in weights:
                if not isinstance(part, Tensor) or not part.is_floating_point() or part.dtype.itemsize < 2:
                    reasons.append("is quantised; patch takes float weights")
                    break
            if reasons:
                raise TypeError(f"model: layer {name} ({host.name}) {'; '.join(reasons)}")
            weight: Tensor = weights[0]
            dim = weight.shape[1]
            num_heads = host.num_heads_of(module)
            choice = _choice(impl, module, host, tower, num_heads, rank, config.dropout)
            report = LayerReport(name, host.name, num_heads, dim // num_heads, rank, choice)
            options = {
                "rank": rank,
                "dim": dim,
                "num_heads": num_heads,
                "tower": tower_name,
                "layer": index,
                "device": weight.device,
                "dtype": weight.dtype,
                "impl": impl,
                "recompute": recompute > 0 and place % recompute == 0,
            }
            plans.append(_Plan(report, module, host, tower_name, index, options))
    return config, plans


def _choice(impl: str, module: Any, host: Host, tower: Tower, num_heads: int, rank: int, dropout: float) -> ops.Choice:
    """Who computes a layer as it stands: its weight's device and dtype, any length."""
    weight = host.weights(module)[0]
    problem = ops.Problem(
        device=weight.device.type,
        index=weight.device.index,
        dtype=weight.dtype,
        stored=weight.dtype,
        num_heads=num_heads,
        head_dim=weight.shape[1] // num_heads,
        rank=rank,
        dropout=bool(rank and dropout),
        extras=host.extras(module) + ops.surroundings(),
        between=host.between(module) + ("rotary positions",) * tower.rotary,
    )
    return ops.choose(impl, problem)


def _report(model: nn.Module, layers: list[LayerReport], adapters: list[HeadLoRA]) -> PatchReport:
    gate = sum(own.theta.numel() for own in adapters if own.theta is not None)
    own_total = sum(p.numel() for own in adapters for p in own.parameters())
    base = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(ADAPTER))
    return PatchReport(tuple(layers), own_total - gate, gate, base)


# ---------------------------------------------------------------------------------------------- in and out


def patch(
    model: nn.Module,
    config: HeadConfig | None = None,
    *,
    impl: str = "auto",
    strict: bool = False,
    recompute: bool | int = False,
) -> PatchReport:
    """Puts per-head LoRA and gates into the attention layers of an OpenCLIP model, in place.

    The model computes what it computed before until its adapters are trained. Everything but the adapters is frozen;
    `unpatch` brings the flags back. No base parameter is replaced or written, and only this instance changes.

    Args:
        model: an OpenCLIP model (`open_clip.create_model …`), not wrapped or compiled yet.
        config: what to adapt; None: `HeadConfig.hap(depth)`, the published ranks on the image tower.
        impl: `"auto"` or the name of the implementation of every layer.
        strict: raise where a selected layer runs on the plain reference path.
        recompute: keep a layer's input alone for the backward pass, and compute its heads again there: True, or k for
            every k-th of a tower's adapted layers, from the first. Whole blocks, MLPs among them, are OpenCLIP's to
            compute again: `model.set_grad_checkpointing()`, with this or without.

    Returns a report; printing it shows each layer's path, and why.

    Raises:
        TypeError: a model, tower or layer that cannot be patched, and why; nothing is changed.
        ValueError: a config or `recompute` that does not fit; an already patched model; `strict` and a fallback.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; takes an OpenCLIP model (a torch.nn.Module)")
    _refuse(model)
    config, plans = _plan(model, config, impl, recompute)
    fallen = [plan.report for plan in plans if plan.report.choice.falls_back]
    if strict and fallen:
        refused = "; ".join(f"{k}: {', '.join(v)}" for k, v in fallen[0].choice.refused.items())
        raise ValueError(
            f"strict: {len(fallen)} layers fall back to the reference path, first {fallen[0].name} ({refused})"
        )
    adapters = [HeadLoRA(config, **plan.options) for plan in plans]
    report = _report(model, [plan.report for plan in plans], adapters)
    remember(model, config)

    model.requires_grad_(False)
    watch = FrozenWatch(adapters)
    for plan, adapter in zip(plans, adapters, strict=True):
        adapter.watch = watch
        plan.module.heads = adapter.train(plan.module.training)
        plan.module.__class__ = head_class(plan.host, type(plan.module))
        _as_any(plan.module).join()
    return report


def _refuse(model: nn.Module) -> None:
    """Raises for a model that is patched already, wrapped, scripted or quantised."""
    refuse_foreign(model)
    for name, module in model.named_modules():
        if isinstance(module, HeadAttention):
            raise ValueError(f"model: is patched already (at {name!r}); unpatch(model) or merge(model) first")


def unpatch(model: nn.Module) -> nn.Module:
    """Takes the adapters out of a patched model, in place: the original, bit for bit and flag for flag.

    What was learned is lost (`save_adapter` keeps it, `merge` folds it in). Base tensors that a loaded adapter replaced
    are put back; of others that were written since `patch` (trained beside the adapters) a UserWarning says which they
    are. Returns the model. Raises ValueError for an unpatched model, TypeError for a wrapped one.
    """
    refuse_wrapped(model)
    lost = []
    for owner in patched_models(model):
        restore(owner)
        lost += written(owner)
        take_out(owner)
    if lost:
        warnings.warn(
            f"unpatch: these tensors were written since patch, and are not put back: {first_few(lost)}", stacklevel=2
        )
    return model


def take_out(owner: nn.Module) -> None:
    """Takes the adapters out of a model that was patched, and puts its flags back."""
    attentions: list[Any] = patched_attentions(owner)
    for attention in attentions:
        attention.__class__ = type(attention).__bases__[1]
        del attention.heads
    flags = forget(owner).required_grad
    for name, p in plain_names(owner, owner.named_parameters()).items():
        p.requires_grad_(flags.get(name, p.requires_grad))


def explain(model: nn.Module, config: HeadConfig | None = None, *, impl: str = "auto") -> PatchReport:
    """Per layer: host, shape, the implementation chosen and why each other was refused. Changes nothing.

    For an unpatched model: what `patch(model, config, impl=impl)` would do, with the same errors.
    """
    inner = unwrap(model)
    if not is_patched(inner):
        _refuse(inner)
        config, plans = _plan(inner, config, impl)
        with torch.device("meta"):
            adapters = [HeadLoRA(config, **{**plan.options, "device": torch.device("meta")}) for plan in plans]
        return _report(inner, [plan.report for plan in plans], adapters)
    layers, adapters = [], head_modules(inner)
    for attention in patched_attentions(inner):
        own, module, host = attention.heads, _as_any(attention), _as_any(type(attention).__bases__[0])
        head_dim = host.weights(module)[0].shape[1] // own.num_heads
        tower = find_tower(inner, own.tower)
        choice = _choice(own.impl, module, host, tower, own.num_heads, own.rank, own.dropout)
        layers.append(LayerReport(f"{own.tower}.{own.layer}", host.name, own.num_heads, head_dim, own.rank, choice))
    return _report(inner, layers, adapters)


def _as_any(x: Any) -> Any:
    return x


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the patched `model` is the original: its stock forward, no delta, gates 1. For CAR-FT's teacher.

    Bit for bit the original with its weights frozen (torch itself takes other code paths where weights require grad).
    Only adapters are switched off: base tensors that were trained beside them, or came with a loaded adapter, stay.
    Nests; other contexts are left as they were. Raises ValueError for an unpatched model.
    """
    layers = head_modules(model)
    before = [own.enabled for own in layers]
    for own in layers:
        own.enabled = False
    try:
        yield model
    finally:
        for own, enabled in zip(layers, before, strict=True):
            own.enabled = enabled


@contextmanager
def masked(model: nn.Module, heads: Iterable[tuple[int, int]], tower: str | None = None) -> Iterator[nn.Module]:
    """Inside, these heads of the patched `model` are closed: they add exactly nothing, all others what they did.

    Whatever the gates' form: nothing is renormalised, and a model without gates takes it too. They are not computed,
    but where heads are captured: what is captured of a closed head is still its own, un-gated output. `merge` inside
    folds the zeros in, `gates` shows them.

    Args:
        heads: (layer, head) pairs, layers as `explain` numbers them; none: nothing changes.
        tower: "visual" or "text"; None: the patched one, "visual" where both are.

    Nests: heads closed outside stay closed. Raises ValueError for an unpatched model, a tower that is not patched, and
    a layer or head that is not there, changing nothing.
    """
    layers = head_modules(model)
    patched = sorted({own.tower for own in layers}, reverse=True)
    name = tower or patched[0]
    of_layer = {own.layer: own for own in layers if own.tower == name}
    if not of_layer:
        raise ValueError(f"tower: got {tower!r}; this model's patched towers: {', '.join(patched)}")
    closed: dict[int, list[int]] = {}
    for layer, head in heads:
        if layer not in of_layer:
            raise ValueError(
                f"heads: got layer {layer}; the {name} tower's patched layers: {', '.join(map(str, of_layer))}"
            )
        if not 0 <= head < of_layer[layer].num_heads:
            raise ValueError(f"heads: got head {head}; layer {layer} has heads 0 … {of_layer[layer].num_heads - 1}")
        closed.setdefault(layer, []).append(head)
    before = {layer: of_layer[layer].closed for layer in closed}
    for layer, own_heads in closed.items():
        of_layer[layer].close(own_heads)
    try:
        yield model
    finally:
        for layer, earlier in before.items():
            of_layer[layer].close((), earlier)
