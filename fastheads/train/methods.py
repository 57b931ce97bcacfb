"""The methods that can be trained and compared, and the loss each of them minimises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastheads.capture import CapturedHeads, capture_heads
from fastheads.config import HeadConfig
from fastheads.hosts import find_tower
from fastheads.hosts.vision import answer, head_of
from fastheads.losses import context_kl, head_mmd, mmd
from fastheads.losses.context import evaluating
from fastheads.model import gate_parameters, is_patched, lora_parameters
from fastheads.patching import disabled


@dataclass(frozen=True)
class Method:
    """One way of adapting CLIP, or a vision model with a linear head where it needs no `text`.

    `trains`: "nothing", "probe" (a linear classifier), "encoder" or "adapter".
    """

    id: str
    label: str
    trains: str
    description: str
    lora: bool = False
    per_head: bool = True
    gate: str | None = None
    mmd: bool = False
    context: bool = False

    @property
    def text(self) -> bool:
        """Whether it needs a text tower."""
        return self.trains == "nothing" or self.context

    def config(
        self,
        depth: int,
        num_heads: int,
        targets: tuple[str, ...] | None = None,
        rank: tuple[int, ...] | None = None,
        gate: str | None = None,
        shared: bool = False,
    ) -> HeadConfig | None:
        """The adapter's config for a tower of `depth` layers and `num_heads` heads; None where it has none.

        targets: of the deltas; None: query and value. rank: of HA-LoRA, one, or one a layer; None: the published ones.
        gate: the form of gates, where the method has some; None: the method's. shared: plain LoRA's down-projections in
        place of HA-LoRA's. Plain LoRA has as many parameters in the attention as HA-LoRA: rank · (H + 1) / 2, rounded;
        in the MLP it has that rank too, HA-LoRA its own.
        """
        if self.trains != "adapter":
            return None
        gate = gate or self.gate if self.gate else None
        if not self.lora:
            return HeadConfig(rank=0, gate=gate)
        per_head = self.per_head and not shared
        config = HeadConfig.hap(depth, gate=gate, per_head=per_head)
        config = replace(config, targets=targets) if targets else config
        ranks = config.rank if rank is None else rank * depth if len(rank) == 1 else rank
        assert isinstance(ranks, tuple)
        return replace(config, rank=ranks if per_head else tuple(max(1, round(r * (num_heads + 1) / 2)) for r in ranks))

    def config_for(self, model: nn.Module, **changes: Any) -> HeadConfig | None:
        """The adapter's config for a model's image tower, with `config`'s other arguments; None where it has none.

        Raises TypeError for a method with an adapter and a tower that has no attention layers to adapt.
        """
        if self.trains != "adapter":
            return None
        attentions: Any = find_tower(model, "visual").attentions
        return self.config(len(attentions), getattr(attentions[0], "num_heads", 1), **changes)


METHODS = {
    method.id: method
    for method in (
        Method(
            "zero-shot",
            "Zero-shot CLIP",
            "nothing",
            "The pretrained model as it is, classifying by the text embeddings of the class names.",
        ),
        Method(
            "linear-probe",
            "Linear probe",
            "probe",
            "A logistic regression on the frozen image features of the source domains.",
        ),
        Method(
            "fine-tune", "Full fine-tuning", "encoder", "Every weight of the image encoder is trained by cross-entropy."
        ),
        Method(
            "car-ft",
            "CAR-FT",
            "encoder",
            "Full fine-tuning, plus a KL term that keeps the original model's sense of an image's context.",
            context=True,
        ),
        Method(
            "lora",
            "Plain LoRA",
            "adapter",
            "A low-rank delta on query and value, one down-projection shared by all heads, "
            "at as many parameters as HA-LoRA.",
            lora=True,
            per_head=False,
        ),
        Method(
            "ha-lora", "HA-LoRA", "adapter", "A low-rank delta on query and value for each head on its own.", lora=True
        ),
        Method(
            "dig",
            "DIG",
            "adapter",
            "Only the gates of the heads are trained: by cross-entropy, and by the MMD between source domains.",
            gate="softmax",
            mmd=True,
        ),
        Method(
            "hap",
            "HAP (HA-LoRA + DIG + MMD)",
            "adapter",
            "Per-head deltas, and gates which the MMD between source domains pushes to heads that look the same in "
            "every domain.",
            lora=True,
            gate="softmax",
            mmd=True,
        ),
    )
}


def check_text(model: nn.Module, method: Method, context_weight: float = 0.0) -> None:
    """That a model has the text tower that a method or its context loss needs. Raises ValueError."""
    if head_of(model) is None:
        return
    what = f"needs a text tower, and {type(model).__name__} has a linear head instead"
    if method.text:
        others = ", ".join(other.id for other in METHODS.values() if not other.text)
        raise ValueError(f"method: {method.id!r} {what}; takes {others}")
    if context_weight:
        raise ValueError(f"context_weight: got {context_weight}, but CAR-FT's KL {what}; takes 0")


class ImageEncoder(nn.Module):
    """A model's image side as a module whose forward DDP can wrap: `hosts.vision.answer`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features `[B, E]`, not normalised, and the logits `[B, C]` of the model's own head, if it has one."""
        return answer(self.model, images)


def class_logits(features: Tensor, classifier: Tensor, logit_scale: float) -> Tensor:
    """`logit_scale · cos(features, classifier)`, `[B, C]`, in float32 under autocast too."""
    with torch.autocast(features.device.type, enabled=False):
        return logit_scale * F.normalize(features.float(), dim=-1) @ classifier.float().T


@dataclass
class Objective:
    """`CE + mmd_weight · MMD(gates) + context_weight · KL(original ‖ tuned)`, as far as the weights are above 0.

    Args:
        classifier: `[C, E]` class text weights, normalised; None: the model's own head. contexts: `[T, E]`, for the KL.
        logit_scale: the factor of both softmaxes.
        num_domains: S, domain ids are below it.
        teacher: the frozen original image tower under full fine-tuning; None: the patched model under `disabled`.
        mmd_features: "heads" or "embedding". mmd_to: what the MMD's gradient reaches, "gates", "lora" or "both".
        mmd_options: of `fastheads.mmd`. layer_weights: of `fastheads.head_mmd`.
    """

    classifier: Tensor | None
    logit_scale: float
    num_domains: int
    contexts: Tensor | None = None
    mmd_weight: float = 0.0
    context_weight: float = 0.0
    teacher: nn.Module | None = None
    mmd_features: str = "heads"
    mmd_to: str = "gates"
    mmd_options: dict[str, Any] | None = None
    layer_weights: Sequence[float] | None = None

    def __call__(
        self, encoder: nn.Module, model: nn.Module, images: Tensor, labels: Tensor, domains: Tensor
    ) -> dict[str, Tensor]:
        """The loss and its parts: `encoder` is the (wrapped) ImageEncoder around `model`."""
        with capture_heads(model) if self.mmd_weight else nullcontext() as heads:
            features, parts = self.means(encoder, model, images, labels)
        loss = self.weighted(parts)
        if heads is not None:
            parts["mmd"] = self.mmd(heads, domains, features, reached=self.reached(model))
            loss = loss + self.mmd_weight * parts["mmd"]
        return {"loss": loss, **parts}

    def means(
        self, encoder: nn.Module, model: nn.Module, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The features, and the parts of the loss that are means over images."""
        features, logits = encoder(images)
        if self.classifier is not None:
            logits = class_logits(features, self.classifier, self.logit_scale)
        parts = {"cross_entropy": F.cross_entropy(logits, labels)}
        if self.context_weight:
            if self.contexts is None:
                raise ValueError("contexts: are needed with a context_weight; pass context_text_weights(…)")
            original = original_features(model, images, self.teacher)
            parts["context_kl"] = context_kl(features, original, self.contexts, self.logit_scale)
        return features, parts

    def weighted(self, parts: Mapping[str, Any]) -> Any:
        """The weighted sum of `parts`, as far as they are there."""
        weights = {"cross_entropy": 1.0, "context_kl": self.context_weight, "mmd": self.mmd_weight}
        return sum(weights[name] * part for name, part in parts.items())

    def mmd(
        self,
        heads: CapturedHeads,
        domains: Tensor,
        features: Tensor,
        group: Any = None,
        reached: list[nn.Parameter] | None = None,
    ) -> Tensor:
        """The MMD of `heads`, or of the `features` they came with; over all processes of `group`. reached: what its
        gradient trains, None for the gates."""
        options = self._options(group) | {"features": self.mmd_features, "parameters": reached}
        options |= {"embedding": features if self.mmd_features == "embedding" else None}
        return head_mmd(heads, domains, layer_weights=self.layer_weights, **options)

    def _options(self, group: Any) -> dict[str, Any]:
        return {"num_domains": self.num_domains, "group": group, **(self.mmd_options or {})}

    def embedding_mmd(self, embedding: Tensor, domains: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        """The MMD of an embedding `[N, E]` and its gradient in it."""
        embedding = embedding.detach().requires_grad_()
        loss = mmd(embedding, domains, **self._options(group))
        return loss.detach(), torch.autograd.grad(loss, embedding)[0]

    def reached(self, model: nn.Module) -> list[nn.Parameter] | None:
        """What the MMD trains, where that is not the gates alone."""
        if self.mmd_to == "gates":
            return None
        return lora_parameters(model) + (gate_parameters(model) if self.mmd_to == "both" else [])


def original_features(model: nn.Module, images: Tensor, teacher: nn.Module | None = None) -> Tensor:
    """Features of the original image encoder, without gradient and in evaluation mode.

    The frozen copy `teacher` where there is one; else the patched `model` itself with its adapters disabled, which is
    the same as long as its base is frozen. Raises ValueError where there is neither.
    """
    if teacher is not None:
        with evaluating(teacher):
            return teacher(images)
    if not is_patched(model):
        raise ValueError("teacher: is needed where the model is not patched; pass a frozen copy of the image tower")
    with disabled(model), evaluating(model):
        return answer(model, images)[0]
