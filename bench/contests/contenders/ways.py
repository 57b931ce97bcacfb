"""The ways to run a tower: each turns a stock OpenCLIP model, in place, into what is measured."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bench.base.checkout  # noqa: F401
import fastheads
from bench.contests.contenders import attentions
from bench.contests.contenders.attentions import Attention, adapters
from bench.contests.contest import NotRunError, first_line
from bench.contests.models import blocks_of

Dress = Callable[[Any, Sequence[int]], Any]
IMPLEMENTATIONS = ("stacked", "delta", "one_pass", "cpu", "reference")


@dataclass(frozen=True)
class Way:
    """words: what stands in tables. maths, fault, ours, slow_start: as of `bench.contests.contest.Contender`.

    dress: takes a stock model and the ranks of its layers, returns the model. why_not: for a device.
    """

    name: str
    words: str
    maths: str
    dress: Dress
    fault: str = ""
    ours: bool = False
    slow_start: bool = False
    why_not: Callable[[str], str] = lambda device: ""

    def of(self, model: Any, ranks: Sequence[int]) -> Any:
        """The model run this way; raises NotRunError."""
        where = next(model.visual.parameters()).device.type
        reason = self.why_not(where)
        if reason:
            raise NotRunError(reason)
        return self.dress(model, ranks)


def modules(kind: type[Attention]) -> Dress:
    """Every attention of the image tower replaced by a `kind`."""

    def dress(model: Any, ranks: Sequence[int]) -> Any:
        for layer, (block, rank) in enumerate(zip(blocks_of(model), ranks, strict=True)):
            block.attn = kind(block.attn, rank, layer)
        return model

    return dress


def _unfrozen(model: Any, ranks: Sequence[int]) -> Any:
    model.visual.requires_grad_(True)
    return model


def _patched(impl: str, recompute: bool = False) -> Dress:
    def dress(model: Any, ranks: Sequence[int]) -> Any:
        try:
            fastheads.patch(model, fastheads.HeadConfig(rank=tuple(ranks)), impl=impl, recompute=recompute)
        except (ValueError, ImportError) as error:
            why = str(error).rpartition("cannot compute this layer: it ")[2].removesuffix("; takes 'auto'")
            raise NotRunError(why) from error
        with torch.no_grad():
            for layer, (block, rank) in enumerate(zip(blocks_of(model), ranks, strict=True)):
                own = block.attn.heads
                for name, value in adapters("ha-lora", block.attn.embed_dim, own.num_heads, rank, layer).items():
                    getattr(own, name).copy_(value)
        return model

    return dress


def merged(model: Any, ranks: Sequence[int]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what rounding to 16 bits loses: the check says it
        return fastheads.merge(_patched("auto")(model, ranks))


def _with_peft(model: Any, ranks: Sequence[int]) -> Any:
    import peft

    pattern = {f"visual.transformer.resblocks.{i}.attn": rank for i, rank in enumerate(ranks)}
    config = peft.LoraConfig(
        r=min(ranks), lora_alpha=min(ranks), target_modules=list(pattern), rank_pattern=pattern, alpha_pattern=pattern
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = peft.get_peft_model(model, config)
        except Exception as error:
            raise NotRunError(f"PEFT refused it: {first_line(error)}") from error
    with torch.no_grad():
        for layer, rank in enumerate(ranks):
            attn = blocks_of(model)[layer].attn
            values = adapters("lora qkvo", attn.embed_dim, attn.num_heads, rank, layer)
            for name, parameter in _peft_parameters(attn).items():
                parameter.copy_(values[name])
    return wrapped.base_model.model


def peft_merged(model: Any, ranks: Sequence[int]) -> Any:
    """PEFT's own merge_and_unload."""
    _with_peft(model, ranks)
    for block in blocks_of(model):
        block.attn = block.attn.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    return model


def _peft_parameters(attn: Any) -> dict[str, Tensor]:
    outer, inner = attn, attn.base_layer.out_proj
    return {
        "in_A": outer.lora_A["default"].weight,
        "in_B": outer.lora_B["default"].weight,
        "out_A": inner.lora_A["default"].weight,
        "out_B": inner.lora_B["default"].weight,
    }


def trained(way: Way, block: Any) -> dict[str, Tensor]:
    """What of a block's attention is trained, by the names that `attentions.adapters` gives it."""
    attn = block.attn
    if way.maths == "full":
        return {"w_in": attn.in_proj_weight, "w_out": attn.out_proj.weight}
    if hasattr(attn, "base_layer"):
        return _peft_parameters(attn)
    owner = getattr(attn, "heads", None) if not isinstance(attn, Attention) else attn
    return {} if owner is None else {n: p for n, p in owner.named_parameters(recurse=False) if p.requires_grad}


def _installed(package: str) -> Callable[[str], str]:
    def why_not(device: str) -> str:
        return "" if importlib.util.find_spec(package) is not None else f"{package} is not installed"

    return why_not


def xformers_why_not(device: str) -> str:
    """Why xformers' attention cannot run here; empty where it can. It imports, with a warning, where it can't."""
    missing = _installed("xformers")(device)
    if missing:
        return missing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import memory_efficient_attention

            q = torch.zeros(1, 16, 1, 64, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
            memory_efficient_attention(q, q, q)
    except Exception as error:
        return f"xformers has no attention for this device: {first_line(error)}"
    return ""


DOUBLED = "PEFT adds out_proj's delta twice"
PEFT = {"maths": "lora qkvo", "fault": DOUBLED, "why_not": _installed("peft")}

XFORMERS = Way(
    "xformers", "plain, with xformers' attention", "ha-lora", modules(attentions.XFormers), why_not=xformers_why_not
)
COMPILED = Way("compiled", "torch.compile of the reference", "ha-lora", modules(attentions.Compiled), slow_start=True)
TRAINING = (
    Way("stock", "stock OpenCLIP, frozen", "frozen", lambda model, ranks: model),
    *(Way(n, f"fastheads, {n}", "ha-lora", _patched(n), ours=True) for n in IMPLEMENTATIONS),
    Way("stacked, recompute", "fastheads, stacked, recompute", "ha-lora", _patched("stacked", True), ours=True),
    Way("delta, recompute", "fastheads, delta, recompute", "ha-lora", _patched("delta", True), ours=True),
    Way("cpu, recompute", "fastheads, cpu, recompute", "ha-lora", _patched("cpu", True), ours=True),
    Way("full", "full fine-tuning", "full", _unfrozen),
    Way("plain", "plain-PyTorch HA-LoRA", "ha-lora", modules(attentions.Plain)),
    Way("peft", "PEFT LoRA (q, k, v, out)", dress=_with_peft, **PEFT),
    Way("factored", "factored through cuBLAS, unsloth's way", "ha-lora", modules(attentions.Factored)),
    Way(
        "clip-lora",
        "CLIP-LoRA's way (q, v), no dropout",
        "lora qv",
        modules(attentions.ClipLora),
        fault="the backward pass reads a weight from which the delta was taken again",
    ),
    Way("merged", "merged weights through autograd", "ha-lora", modules(attentions.Merged)),
    XFORMERS,
    COMPILED,
)
INFERENCE = (
    Way("stock", "stock OpenCLIP", "frozen", lambda model, ranks: model),
    Way("patched", "fastheads, patched (auto)", "ha-lora", _patched("auto"), ours=True),
    Way("merged", "fastheads, merged", "ha-lora", merged, ours=True),
    Way("plain", "plain-PyTorch HA-LoRA", "ha-lora", modules(attentions.Plain)),
    Way("peft", "PEFT LoRA, not merged", dress=_with_peft, **PEFT),
    Way("peft, merged", "PEFT LoRA, merged", dress=peft_merged, **PEFT),
    XFORMERS,
    COMPILED,
)
AUTO = Way("auto", "fastheads, auto", "ha-lora", _patched("auto"), ours=True)
AUTO_RECOMPUTE = Way("auto, recompute", "fastheads, auto, recompute", "ha-lora", _patched("auto", True), ours=True)


def way(name: str, ways: Sequence[Way] = (*TRAINING, AUTO)) -> Way:
    return next(w for w in ways if w.name == name)
