"""Host: Hugging Face's `CLIPAttention`, `SiglipAttention` and `Siglip2Attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastheads.hosts.parts import mask_of, not_linear, other_scale, three_biases, three_weights
from fastheads.nn import HeadAttention


class HuggingFaceAttentionHost(HeadAttention):
    """A patched attention of `transformers`: the same call, the same answer, plus heads' deltas and gates."""

    name = "Hugging Face attention"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        cls = type(module)
        known = cls.__name__ in ("CLIPAttention", "SiglipAttention", "Siglip2Attention")
        return known and cls.__module__.startswith("transformers.models.")

    weights = staticmethod(three_weights)
    bias = staticmethod(three_biases)

    @staticmethod
    def refusals(module: Any, gated: bool) -> list[str]:
        """Why this module cannot be patched; empty where it can."""
        strange = not_linear(module)
        if strange:
            return strange
        reasons, how = other_scale(module), module.config._attn_implementation
        if how not in ("eager", "sdpa"):
            reasons.append(f"has attn_implementation={how!r}, whose masks are others; load the model with 'sdpa'")
        return reasons

    @staticmethod
    def extras(module: Any) -> tuple[str, ...]:
        """What only the reference path covers."""
        return ("attention dropout",) if module.dropout else ()

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the host's own forward; with `attn_implementation="eager"` it returns the probabilities too."""
        if not self.heads.enabled:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        causal = bool(kwargs.get("is_causal", self.is_causal))
        mask = mask_of(attention_mask, causal, hidden_states, self.num_heads)
        out, weights = self.attend(
            hidden_states,
            mask,
            self.out_proj,
            need_weights=self.config._attn_implementation == "eager",
            attention_dropout=self.dropout if self.training else 0.0,
        )
        return out, None if weights is None else weights.to(out.dtype)
