"""CAR-FT: the classifier and the contexts as the text tower says them, and the KL that keeps contexts in mind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from string import Formatter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastheads import reference
from fastheads.hosts.vision import text_encoder

Template = str | Callable[[str], str]


def fill(template: Template, name: str) -> str:
    """The prompt of a class. Raises ValueError for a template without a place for it, or with one for anything else."""
    if callable(template):
        return template(name)
    try:
        places = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError:
        places = []
    if not places or not set(places) <= {"", "0", "class"}:
        raise ValueError(f"templates: {template!r} has no place for the class; write it as {{}}")
    return template.format(*[name] * len(places), **{"class": name})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient inside; each module's own mode back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def prompt_embeddings(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template],
    *,
    batch_size: int = 256,
) -> Tensor:
    """`[T, C, E]`, at least float32: every class in every template through the text tower, L2-normalised.

    The text tower runs without gradient and in evaluation mode. Raises ValueError for no class or no template, or a
    template without a place for the class.
    """
    if isinstance(classnames, str) or not classnames:
        raise ValueError(f"classnames: got {classnames!r}; takes a sequence of at least one class name")
    if isinstance(templates, str) or not templates:
        raise ValueError(
            f"templates: got {templates!r}; takes a sequence of at least one template, as 'a photo of a {{}}.'"
        )
    prompts = [fill(template, name) for template in templates for name in classnames]
    encode = text_encoder(model)
    if encode is None:
        raise TypeError(
            f"model: {type(model).__name__} has no encode_text; takes an OpenCLIP model, Hugging Face's CLIP or SigLIP"
        )
    device = next(model.parameters()).device
    with evaluating(model):
        parts = [encode(tokenizer(prompts[i : i + batch_size]).to(device)) for i in range(0, len(prompts), batch_size)]
    e = torch.cat(parts)
    e = F.normalize(e.to(torch.promote_types(e.dtype, torch.float32)), dim=-1)
    return e.view(len(templates), len(classnames), -1)


def class_text_weights(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template] = ("a photo of a {}.",),
) -> Tensor:
    """`W_cls[c] = normalise(mean over templates)`, `[C, E]`: the zero-shot classifier.

    Args:
        model: an OpenCLIP model (its `encode_text` is used), or Hugging Face's CLIP or SigLIP (`get_text_features`).
        tokenizer: `open_clip.get_tokenizer(name)`, or another that makes ids `[n, N]` of n texts.
        classnames: C names.
        templates: as `"a photo of a {}."`, or functions of the name, as OpenCLIP's OPENAI_IMAGENET_TEMPLATES.
    """
    return F.normalize(prompt_embeddings(model, tokenizer, classnames, templates).mean(0), dim=-1)


def context_text_weights(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template] | None = None,
) -> Tensor:
    """`W_ctx[t] = normalise(mean over classes)`, `[T, E]`: CAR-FT's contexts. Arguments as `class_text_weights`.

    templates: None: OpenCLIP's 80 ImageNet templates. Source: CAR-FT (arXiv 2211.16175).
    """
    if templates is None:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        templates = OPENAI_IMAGENET_TEMPLATES
    return F.normalize(prompt_embeddings(model, tokenizer, classnames, templates).mean(1), dim=-1)


def context_kl(
    features: Tensor, teacher_features: Tensor, context_weights: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """CAR-FT's KL between the contexts the original encoder sees and the tuned one's: `reference.context_kl`, checked.

    Args:
        features: `[B, E]` from the tuned image encoder.
        teacher_features: `[B, E]` from the original one.
        context_weights: `[C, E]` of `context_text_weights`.
        logit_scale: the factor, `model.logit_scale.exp()` (100 for CLIP): without it the loss is near zero.

    Returns a scalar. Raises TypeError or ValueError naming the argument.
    """
    named = {"features": features, "teacher_features": teacher_features, "context_weights": context_weights}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; takes a tensor")
        if not value.is_floating_point():
            raise TypeError(f"{name}: got dtype {value.dtype}; takes floating point")
        if value.device != features.device:
            raise ValueError(f"{name}: is on {value.device}, features on {features.device}; put both on one device")
    if not isinstance(logit_scale, (int, float, Tensor)):
        raise TypeError(f"logit_scale: got {logit_scale!r}; takes a number, model.logit_scale.exp()")
    if not isinstance(logit_scale, Tensor) and not (math.isfinite(logit_scale) and logit_scale > 0):
        raise ValueError(f"logit_scale: got {logit_scale}; takes a finite number > 0")
    if features.dim() != 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}; takes [B, E]")
    if teacher_features.shape != features.shape:
        raise ValueError(
            f"teacher_features: got shape {tuple(teacher_features.shape)}; takes {tuple(features.shape)} as features"
        )
    if context_weights.dim() != 2 or context_weights.shape[1] != features.shape[1]:
        raise ValueError(f"context_weights: got shape {tuple(context_weights.shape)}; takes [C, {features.shape[1]}]")
    return reference.context_kl(features, teacher_features, context_weights, logit_scale)
