"""patch, unpatch, explain: putting adapters into a model's attention layers, and taking them out again; disabled and
masked: without all of them, and without some heads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastheads import ops
from fastheads.config import HeadConfig
from fastheads.hosts import Host, Tower, find_tower, host_of
from fastheads.hosts.towers import MLP
from fastheads.hosts.wrappers import plain_names, refuse_foreign, refuse_wrapped, unwrap
from fastheads.model import (
    adapted_modules,
    adapters_of,
    first_few,
    forget,
    is_adapters,
    is_patched,
    patched_attentions,
    patched_models,
    remember,
    restore,
    written,
)
from fastheads.nn import AdaptedLinear, Adapter, FrozenWatch, HeadAttention, HeadLoRA, LinearLoRA, head_class
from fastheads.nn.attention import LINEAR
from fastheads.ops import native
from fastheads.reference import widened


@dataclass(frozen=True)
class LayerReport:
    """One selected layer: where it is, its shape, who computes it, and why the others do not. `linears`: the targets
    whose deltas plain PyTorch adds, each in its own linear layer."""

    name: str
    host: str
    num_heads: int
    head_dim: int
    rank: int
    choice: ops.Choice
    linears: tuple[str, ...] = ()

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
            if layer.linears:
                text = f"  deltas of {', '.join(layer.linears)}: plain PyTorch, each in its own linear layer"
                reasons.setdefault(text, []).append(layer.name)
        lines += [f"{text} ({_span(names, len(self.layers))})" for text, names in reasons.items()]
        lines.append(f"  native CPU kernels: {native.describe()}")
        return "\n".join(lines)


def _span(names: list[str], total: int) -> str:
    return "all layers" if len(names) == total else ", ".join(names)


@dataclass(frozen=True)
class _Plan:
    """One layer about to be patched: its attention, and by target the linear layers beside it."""

    report: LayerReport
    module: nn.Module
    host: Host
    options: dict[str, Any]
    linears: dict[str, nn.Linear]

    def adapters(self, config: HeadConfig, **place: torch.device) -> list[Adapter]:
        """The attention's and the linear layers', on another device where one is given."""
        options = self.options | place
        own = {name: options[name] for name in ("rank", "num_heads", "tower", "layer", "device", "dtype")}
        linears = [LinearLoRA(config, target=t, shape=m.weight.shape, **own) for t, m in self.linears.items()]
        return [HeadLoRA(config, **options), *linears]


# ------------------------------------------------------------------------------------------------ planning

POLICIES = {"none": 0, "norms": 0, "projections": 1}  # of `recompute`: every which layer projects again


def _plan(
    model: nn.Module, config: HeadConfig | None, impl: str, recompute: int | str = False
) -> tuple[HeadConfig, list[_Plan]]:
    """What patching would do. Raises, naming the argument, where it cannot; changes nothing."""
    if config is not None and not isinstance(config, HeadConfig):
        raise TypeError(f"config: got {type(config).__name__}; takes a fastheads.HeadConfig, or None for the default")
    if config is None:
        config = HeadConfig.hap(len(find_tower(model, "visual").attentions))
    ops.dispatch.check_impl(impl)
    every = POLICIES.get(recompute, -1) if isinstance(recompute, str) else recompute
    if not isinstance(every, int) or every < 0:
        raise ValueError(
            f"recompute: got {recompute!r}; takes True, False, k ≥ 1 for every k-th layer, or "
            f"{', '.join(map(repr, POLICIES))} (whole blocks: model.set_grad_checkpointing())"
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
            choice = _choice(impl, module, host, tower, num_heads, rank if config.projections else 0, config.dropout)
            linears = {t: _linear(host, tower, module, index, t) for t in config.linears} if rank else {}
            report = LayerReport(name, host.name, num_heads, dim // num_heads, rank, choice, tuple(linears))
            options = {
                "rank": rank,
                "dim": dim,
                "num_heads": num_heads,
                "tower": tower_name,
                "layer": index,
                "device": weight.device,
                "dtype": weight.dtype,
                "impl": impl,
                "recompute": "norms" if recompute == "norms" else every > 0 and place % every == 0,
            }
            plans.append(_Plan(report, module, host, options, linears))
    return config, plans


def _linear(host: Host, tower: Tower, module: Any, layer: int, target: str) -> nn.Linear:
    """The linear layer of a target "o", "fc1" or "fc2". Raises TypeError, naming targets, where there is none."""
    found = host.output(module) if target == "o" else tower.mlp(layer, target)
    if not isinstance(found, nn.Linear) or type(found) not in LINEAR or "forward" in found.__dict__:
        looked = "" if target == "o" else f" at {' or '.join(MLP[target])}"
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise TypeError(
            f"targets: got {target!r}, and layer {tower.name}.{layer} has {kind}{looked}; takes an nn.Linear there"
        )
    return found


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


def _report(model: nn.Module, layers: list[LayerReport], adapters: list[Adapter]) -> PatchReport:
    gate = sum(own.theta.numel() for own in adapters if isinstance(own, HeadLoRA) and own.theta is not None)
    own_total = sum(p.numel() for own in adapters for p in own.parameters())
    base = sum(p.numel() for name, p in model.named_parameters() if not is_adapters(name))
    return PatchReport(tuple(layers), own_total - gate, gate, base)


# ---------------------------------------------------------------------------------------------- in and out


def patch(
    model: nn.Module,
    config: HeadConfig | None = None,
    *,
    impl: str = "auto",
    strict: bool = False,
    recompute: bool | int | str = False,
) -> PatchReport:
    """Puts per-head LoRA and gates into the attention layers of an OpenCLIP model, in place.

    The model computes what it computed before until its adapters are trained. Everything but the adapters is frozen;
    `unpatch` brings the flags back. No base parameter is replaced or written, and only this instance changes.

    Args:
        model: an OpenCLIP model (`open_clip.create_model …`), not wrapped or compiled yet.
        config: what to adapt; None: `HeadConfig.hap(depth)`, the published ranks on the image tower.
        impl: `"auto"` or the name of the implementation of every layer.
        strict: raise where a selected layer runs on the plain reference path.
        recompute: what a layer computes again in the backward pass. False or `"none"`: nothing. `"norms"`: its input,
            from what LayerNorm keeps, and the low-rank projection. True or `"projections"`: queries, keys and values
            too, or, k, those of every k-th of a tower's adapted layers, from the first. Whole blocks, MLPs among them,
            are OpenCLIP's to compute again: `model.set_grad_checkpointing()`, with this or without.

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
    adapters = [plan.adapters(config) for plan in plans]
    flat = [own for each in adapters for own in each]
    report = _report(model, [plan.report for plan in plans], flat)
    remember(model, config)

    model.requires_grad_(False)
    watch = FrozenWatch(flat)
    for plan, own in zip(plans, adapters, strict=True):
        modules = [(plan.module, plan.host), *((linear, AdaptedLinear) for linear in plan.linears.values())]
        for (module, host), adapter in zip(modules, own, strict=True):
            module.heads = adapter.train(module.training)
            module.__class__ = head_class(host, type(module))
            if isinstance(adapter, HeadLoRA):
                adapter.watch = watch
                _as_any(plan.module).join()
    return report


def _refuse(model: nn.Module) -> None:
    """Raises for a model that is patched already, wrapped, scripted or quantised."""
    refuse_foreign(model)
    for name, module in model.named_modules():
        if isinstance(module, (HeadAttention, AdaptedLinear)):
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
    modules: list[Any] = adapted_modules(owner)
    for module in modules:
        module.__class__ = type(module).__bases__[1]
        del module.heads
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
        adapters = [own for plan in plans for own in plan.adapters(config, device=torch.device("meta"))]
        return _report(inner, [plan.report for plan in plans], adapters)
    layers, adapters = [], adapters_of(inner)
    linears = [own for own in adapters if isinstance(own, LinearLoRA)]
    for attention in patched_attentions(inner):
        own, module, host = attention.heads, _as_any(attention), _as_any(type(attention).__bases__[0])
        head_dim = host.weights(module)[0].shape[1] // own.num_heads
        tower = find_tower(inner, own.tower)
        choice = _choice(own.impl, module, host, tower, own.num_heads, own.rank if own.targets else 0, own.dropout)
        beside = tuple(o.target for o in linears if (o.tower, o.layer) == (own.tower, own.layer))
        name = f"{own.tower}.{own.layer}"
        layers.append(LayerReport(name, host.name, own.num_heads, head_dim, own.rank, choice, beside))
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
    adapters = adapters_of(model)
    before = [own.enabled for own in adapters]
    for own in adapters:
        own.enabled = False
    try:
        yield model
    finally:
        for own, enabled in zip(adapters, before, strict=True):
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
    layers = patched_attentions(model)
    patched = sorted({module.heads.tower for module in layers}, reverse=True)
    name = tower or patched[0]
    of_layer = {module.heads.layer: module for module in layers if module.heads.tower == name}
    if not of_layer:
        raise ValueError(f"tower: got {tower!r}; this model's patched towers: {', '.join(patched)}")
    closed: dict[int, list[int]] = {}
    for layer, head in heads:
        if layer not in of_layer:
            raise ValueError(
                f"heads: got layer {layer}; the {name} tower's patched layers: {', '.join(map(str, of_layer))}"
            )
        num_heads = of_layer[layer].heads.num_heads
        if not 0 <= head < num_heads:
            raise ValueError(f"heads: got head {head}; layer {layer} has heads 0 … {num_heads - 1}")
        closed.setdefault(layer, []).append(head)
    before = [(of_layer[layer].heads, of_layer[layer].heads.closed) for layer in closed]
    for layer, own_heads in closed.items():
        own, (weight, *_) = of_layer[layer].heads, of_layer[layer].weights(of_layer[layer])
        mask = widened(weight.new_ones(own.num_heads)) if own.closed is None else own.closed.clone()
        mask[own_heads] = 0
        own.close(mask)
    try:
        yield model
    finally:
        for own, earlier in before:  # the modules themselves may be stock again
            own.close(earlier)
