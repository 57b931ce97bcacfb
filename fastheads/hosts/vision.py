"""What a model says of images, whoever built it: features, and the logits of a linear head where it has no text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastheads.hosts.wrappers import unwrap


def head_of(model: nn.Module) -> nn.Linear | None:
    """The linear head of timm's or Hugging Face's model for classifying images; None for a model with a text tower."""
    inner: Any = unwrap(model)
    if hasattr(inner, "encode_text"):
        return None
    head = inner.get_classifier() if hasattr(inner, "get_classifier") else getattr(inner, "classifier", None)
    return head if isinstance(head, nn.Linear) else None


def head_names(model: nn.Module) -> list[str]:
    """The names of the head's weight and bias in the model; none where it has no head."""
    head = head_of(model)
    own = set() if head is None else set(map(id, head.parameters()))
    return [name for name, p in unwrap(model).named_parameters() if id(p) in own]


def image_tower(model: nn.Module) -> nn.Module:
    """What full fine-tuning trains: an OpenCLIP model's image tower; a vision model whole."""
    return getattr(model, "visual", model)


def answer(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features `[B, E]` of images `[B, 3, h, w]`, not normalised, and the logits `[B, C]` that its head makes of
    them; None where it classifies by text."""
    head, call = head_of(model), getattr(model, "encode_image", model)
    if head is None:
        return call(images), None
    seen: list[Tensor] = []
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        out = call(images)
    return seen[0], getattr(out, "logits", out)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images a model takes."""
    tower: Any = image_tower(model)
    size = getattr(tower, "image_size", None) or getattr(getattr(tower, "patch_embed", None), "img_size", None)
    if size is None and hasattr(tower, "pretrained_cfg"):
        size = tower.pretrained_cfg["input_size"][1:]
    if size is None:
        size = tower.config.vision_config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def checkpoint_blocks(model: nn.Module, wanted: bool = True) -> None:
    """Has a model, or a tower, compute whole blocks again in the backward pass, or not."""
    inner: Any = model
    if hasattr(inner, "set_grad_checkpointing"):
        inner.set_grad_checkpointing(wanted)
    elif wanted:
        newer = getattr(inner, "activation_checkpointing_enable", None)
        (newer or inner.gradient_checkpointing_enable)({"use_reentrant": False})
