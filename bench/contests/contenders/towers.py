"""The contenders on an image tower: each turns a stock OpenCLIP model, in place, into what is measured.

A `Dress` does the turning: it takes the model and the ranks of its layers, and returns the model.
"""

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch

import fastheads
from bench.contests import attentions
from bench.contests.attentions import adapters, modules, trained
from bench.contests.contest import Contender, NotRunError, first_line, refusals
from bench.contests.models import blocks_of
from bench.contests.vision import Dress, trial

IMPLEMENTATIONS = ("stacked", "delta", "one_pass", "cpu", "reference")


def tower(name: str, words: str, maths: str, dress: Dress, **options: Any) -> Contender:
    """options: those of `Contender`."""
    return Contender(name, words, functools.partial(trial, dress=dress, maths=maths), maths, **options)


def _stock(model: Any, ranks: Sequence[int], full: bool = False) -> Any:
    model.visual.requires_grad_(full)
    return model


def _patched(model: Any, ranks: Sequence[int], impl: str = "auto", recompute: bool = False) -> Any:
    with refusals():
        fastheads.patch(model, fastheads.HeadConfig(rank=tuple(ranks)), impl=impl, recompute=recompute)
    _fill(model, ranks, "ha-lora")
    return model


def _fill(model: Any, ranks: Sequence[int], maths: str) -> None:
    """Every contender of a mathematics gets the same trained numbers."""
    for layer, (block, rank) in enumerate(zip(blocks_of(model), ranks, strict=True)):
        values = adapters(maths, block.attn.embed_dim, block.attn.num_heads, rank, layer)
        for name, parameter in trained(block.attn, maths).items():
            parameter.data.copy_(values[name])


def _merged(model: Any, ranks: Sequence[int]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what rounding to 16 bits loses: the check says it
        return fastheads.merge(_patched(model, ranks))


def ours(impl: str, recompute: bool = False) -> Contender:
    name = f"{impl}, recompute" if recompute else impl
    dress = functools.partial(_patched, impl=impl, recompute=recompute)
    return tower(name, f"fastheads, {name}", "ha-lora", dress, ours=True)


def _with_peft(model: Any, ranks: Sequence[int]) -> Any:
    import peft

    pattern = {f"visual.transformer.resblocks.{i}.attn": rank for i, rank in enumerate(ranks)}
    own = {"target_modules": list(pattern), "rank_pattern": pattern, "alpha_pattern": pattern}
    config = peft.LoraConfig(r=min(ranks), lora_alpha=min(ranks), **own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = peft.get_peft_model(model, config)
        except Exception as error:
            raise NotRunError(f"PEFT refused it: {first_line(error)}") from error
    _fill(model, ranks, "lora qkvo")
    return wrapped.base_model.model


def _peft_merged(model: Any, ranks: Sequence[int]) -> Any:
    _with_peft(model, ranks)
    for block in blocks_of(model):
        block.attn = block.attn.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    return model


def missing(package: str) -> str:
    """Why what needs this package cannot run; empty where it can."""
    return "" if importlib.util.find_spec(package) is not None else f"{package} is not installed"


def xformers_why_not(case: Any) -> str:
    """Why xformers' attention cannot run here; empty where it can. It imports, with a warning, where it can't."""
    if why := missing("xformers"):
        return why
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import memory_efficient_attention

            dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
            q = torch.zeros(1, 16, 1, 64, device=case.device, dtype=dtype)
            memory_efficient_attention(q, q, q)
    except Exception as error:
        return f"xformers has no attention for this device: {first_line(error)}"
    return ""


CLIP_LORA = "the backward pass reads a weight from which the delta was taken again"
PEFT: dict[str, Any] = {"fault": "PEFT adds out_proj's delta twice", "why_not": lambda case: missing("peft")}
PLAIN = tower("plain", "plain-PyTorch HA-LoRA", "ha-lora", modules(attentions.Plain))
WITH_XFORMERS = modules(attentions.XFormers)
XFORMERS = tower("xformers", "plain, with xformers' attention", "ha-lora", WITH_XFORMERS, why_not=xformers_why_not)
COMPILED = tower("compiled", "torch.compile of the reference", "ha-lora", modules(attentions.Compiled), slow_start=True)
TRAINING = (
    tower("stock", "stock OpenCLIP, frozen", "frozen", _stock),
    *(ours(impl) for impl in IMPLEMENTATIONS),
    *(ours(impl, recompute=True) for impl in ("stacked", "delta", "cpu")),
    tower("full", "full fine-tuning", "full", functools.partial(_stock, full=True)),
    PLAIN,
    tower("peft", "PEFT LoRA (q, k, v, out)", "lora qkvo", _with_peft, **PEFT),
    tower("factored", "factored through cuBLAS, unsloth's way", "ha-lora", modules(attentions.Factored)),
    tower("clip-lora", "CLIP-LoRA's way (q, v), no dropout", "lora qv", modules(attentions.ClipLora), fault=CLIP_LORA),
    tower("merged", "merged weights through autograd", "ha-lora", modules(attentions.Merged)),
    XFORMERS,
    COMPILED,
)
INFERENCE = (
    tower("stock", "stock OpenCLIP", "frozen", _stock),
    tower("patched", "fastheads, patched (auto)", "ha-lora", _patched, ours=True),
    tower("merged", "fastheads, merged", "ha-lora", _merged, ours=True),
    PLAIN,
    tower("peft", "PEFT LoRA, not merged", "lora qkvo", _with_peft, **PEFT),
    tower("peft, merged", "PEFT LoRA, merged", "lora qkvo", _peft_merged, **PEFT),
    XFORMERS,
    COMPILED,
)
AUTO, AUTO_RECOMPUTE = ours("auto"), ours("auto", recompute=True)


def training(name: str) -> Contender:
    return next(c for c in (*TRAINING, AUTO) if c.name == name)
