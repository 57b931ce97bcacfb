"""What a model says of images and texts, whoever built it: features, and the logits of a linear head where it has no
text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastheads.hosts.wrappers import unwrap


def text_encoder(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What makes features `[n, E]`, not normalised, of token ids `[n, N]`: OpenCLIP's, or Hugging Face's CLIP's or
    SigLIP's, which are given no mask, as they were trained; None for a model without text."""
    inner: Any = unwrap(model)
    if hasattr(inner, "get_text_features"):
        return lambda ids: inner.get_text_features(ids).pooler_output
    return getattr(inner, "encode_text", None)


def context_length(model: nn.Module) -> int:
    """How many tokens its texts have; 0 for a model without text."""
    inner: Any = unwrap(model)
    if hasattr(inner, "get_text_features"):
        return int(inner.config.text_config.max_position_embeddings)
    return getattr(inner, "context_length", 0)


def head_of(model: nn.Module) -> nn.Linear | None:
    """The linear head of timm's or Hugging Face's model for classifying images; None for a model with a text tower."""
    inner: Any = unwrap(model)
    if text_encoder(inner) is not None:
        return None
    head = inner.get_classifier() if hasattr(inner, "get_classifier") else getattr(inner, "classifier", None)
    return head if isinstance(head, nn.Linear) else None


def head_names(model: nn.Module) -> list[str]:
    """The names of the head's weight and bias in the model; none where it has no head."""
    head = head_of(model)
    own = set() if head is None else set(map(id, head.parameters()))
    return [name for name, p in unwrap(model).named_parameters() if id(p) in own]


def image_tower(model: nn.Module) -> nn.Module:
    """What full fine-tuning trains: a model's image tower, which makes features of images; a vision model whole."""
    if hasattr(model, "get_image_features"):
        return _ImageTower(model)
    return getattr(model, "visual", model)


class _ImageTower(nn.Module):
    """The image side of Hugging Face's CLIP or SigLIP, with the model's own modules, as OpenCLIP's `visual` is one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = getattr(model, "visual_projection", nn.Identity())
        self.image_size = model.config.vision_config.image_size
        self.gradient_checkpointing_enable = self.vision_model.gradient_checkpointing_enable

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual_projection(self.vision_model(pixel_values=images).pooler_output)
        return features


def answer(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features `[B, E]` of images `[B, 3, h, w]`, not normalised, and the logits `[B, C]` that its head makes of
    them; None where it classifies by text."""
    head, call = head_of(model), getattr(model, "encode_image", None) or image_tower(model)
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
