"""Hosts: Hugging Face's attention: `CLIPAttention`, `SiglipAttention`, `Siglip2Attention`; and of the text encoders in
OpenCLIP's `HFTextEncoder`: `M2M100Attention`, the self-attention of BERT, RoBERTa and XLM-R, and of (m)T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastheads.hosts.parts import PROJECTIONS, mask_of, not_linear, other_scale, three_biases, three_weights
from fastheads.nn import HeadAttention


class HuggingFaceAttentionHost(HeadAttention):
    """A patched attention of `transformers`: the same call, the same answer, plus heads' deltas and gates."""

    name = "Hugging Face attention"
    classes: tuple[str, ...] = ("CLIPAttention", "SiglipAttention", "Siglip2Attention", "M2M100Attention")
    parts: tuple[str, ...] = PROJECTIONS

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        kind = type(module)
        return kind.__name__ in cls.classes and kind.__module__.startswith("transformers.models.")

    @classmethod
    def weights(cls, module: Any) -> tuple[Tensor, ...]:
        return three_weights(module, cls.parts)

    @classmethod
    def bias(cls, module: Any) -> Tensor | None:
        return three_biases(module, cls.parts)

    @classmethod
    def refusals(cls, module: Any, gated: bool) -> list[str]:
        """Why this module cannot be patched; empty where it can."""
        strange = not_linear(module, cls.parts)
        if strange:
            return strange
        reasons, how = cls.too_wide(module), module.config._attn_implementation
        if how not in ("eager", "sdpa"):
            reasons.append(f"has attn_implementation={how!r}, whose masks are others; load the model with 'sdpa'")
        if getattr(module, "is_decoder", False):
            reasons.append("is a decoder's, which keeps keys and values; takes encoders")
        return reasons

    @staticmethod
    def too_wide(module: Any) -> list[str]:
        """A reason against heads of another width than the model's."""
        return []

    @classmethod
    def extras(cls, module: Any) -> tuple[str, ...]:
        """What only the reference path covers."""
        return ("attention dropout",) if cls.dropout_of(module) else ()

    @staticmethod
    def dropout_of(module: Any) -> float:
        return float(module.dropout)

    @classmethod
    def scale_of(cls, module: Any) -> float | None:
        """What its scores are scaled by, where it isn't 1/√dh."""
        head_dim = len(cls.weights(module)[0]) // cls.num_heads_of(module)
        return other_scale(getattr(module, "scale", None) or module.scaling, head_dim)

    @classmethod
    def between(cls, module: Any) -> tuple[str, ...]:
        """What it does between projection and output."""
        return () if cls.scale_of(module) is None else ("scale",)

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the host's own forward; with `attn_implementation="eager"` it returns the probabilities too."""
        if not self.heads.enabled:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        answer: tuple[Tensor, Tensor | None] = self.answer(hidden_states, attention_mask, kwargs)
        return answer

    def answer(
        self: Any,
        x: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the layer says of x `[B, N, D]`, and the probabilities. bias: added to the scores, beside the mask."""
        for name in ("cache", "past_key_values", "key_value_states"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: a patched layer does self-attention over what it is given; takes None")
        mask = mask_of(mask, bool(kwargs.get("is_causal", self.is_causal)), x, self.heads.num_heads)
        if bias is not None:
            hidden = mask is not None and mask.dtype == torch.bool
            mask = bias if mask is None else bias.masked_fill(mask, float("-inf")) if hidden else bias + mask
        out, weights = self.attend(
            x,
            mask,
            self.output(self),
            need_weights=self.config._attn_implementation == "eager",
            score_scale=self.scale_of(self),
            attention_dropout=self.dropout_of(self) if self.training else 0.0,
        )
        return out, None if weights is None else weights.to(out.dtype)


class BertSelfAttentionHost(HuggingFaceAttentionHost):
    """A patched self-attention of BERT, RoBERTa or XLM-R: the same call, the same answer, plus deltas and gates."""

    name = "Hugging Face BERT"
    classes = ("BertSelfAttention", "RobertaSelfAttention", "XLMRobertaSelfAttention")
    parts = ("query", "key", "value")

    @staticmethod
    def num_heads_of(module: Any) -> int:
        return int(module.num_attention_heads)

    @staticmethod
    def output(module: Any) -> None:
        """Lies in the module beside it: gates fold into `value`."""

    @staticmethod
    def too_wide(module: Any) -> list[str]:
        wide = module.all_head_size != module.query.in_features
        return ["has heads that together are wider or narrower than the model"] if wide else []

    @staticmethod
    def dropout_of(module: Any) -> float:
        return float(module.dropout.p)


class T5SelfAttentionHost(HuggingFaceAttentionHost):
    """A patched self-attention of T5 or mT5, whose scores are not scaled and have a bias by relative position."""

    name = "Hugging Face T5"
    classes = ("T5Attention", "MT5Attention")
    parts = ("q", "k", "v")

    @staticmethod
    def num_heads_of(module: Any) -> int:
        return int(module.n_heads)

    @staticmethod
    def output(module: Any) -> nn.Module:
        return module.o

    @staticmethod
    def too_wide(module: Any) -> list[str]:
        wide = module.inner_dim != module.d_model
        return ["has heads that together are wider or narrower than the model"] if wide else []

    @classmethod
    def scale_of(cls, module: Any) -> float:
        return 1.0

    def forward(  # type: ignore[override]
        self: Any, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As the host's own forward: the first layer of a stack makes the bias, the others are given it."""
        if not self.heads.enabled:
            stock = super(HuggingFaceAttentionHost, self).forward  # type: ignore[misc]
            return stock(hidden_states, mask=mask, position_bias=position_bias, **kwargs)
        N = hidden_states.shape[1]
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.compute_bias(N, N, device=hidden_states.device)
        elif position_bias is None:
            position_bias = hidden_states.new_zeros(1, self.n_heads, N, N)
        out, weights = self.answer(hidden_states, mask, kwargs, position_bias)
        return out, position_bias, weights
