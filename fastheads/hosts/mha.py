"""Host: `torch.nn.MultiheadAttention`, OpenCLIP's attention up to 3.3.0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastheads.nn import HeadAttention


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = masked) as 0 / −inf of `dtype`; an additive one as it is."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask


class MultiheadAttentionHost(HeadAttention):
    """A patched `nn.MultiheadAttention`: the same call, the same answer, plus heads' deltas and gates."""

    name = "nn.MultiheadAttention"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @staticmethod
    def refusals(module: Any, gated: bool) -> list[str]:
        """Why this module cannot be patched; empty where it can."""
        reasons = []
        if not module._qkv_same_embed_dim:
            reasons.append("has separate query, key and value weights (kdim/vdim), so it is cross-attention")
        if module.bias_k is not None or module.bias_v is not None:
            reasons.append("has add_bias_kv")
        if module.add_zero_attn:
            reasons.append("has add_zero_attn")
        return reasons

    @staticmethod
    def extras(module: Any) -> tuple[str, ...]:
        """What only the reference path covers."""
        return ("attention dropout",) if module.dropout else ()

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, for self-attention. Masks: boolean (True = masked) or additive."""
        if not self.heads.enabled:
            return super().forward(  # type: ignore[misc]
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if key is not query or value is not query:
            raise ValueError(
                "key, value: a patched layer does self-attention, so query, key and value must be the same tensor; "
                "unpatch(model) for cross-attention"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: is a hint about attn_mask (as in torch), so it needs attn_mask")
        batched = query.dim() == 3
        x = query if batched else query.unsqueeze(0)
        if batched and not self.batch_first:
            x = x.transpose(0, 1)
        B, N, _ = x.shape
        for name, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if given is not None and not (given.dtype == torch.bool or given.is_floating_point()):
                raise ValueError(
                    f"{name}: got {given.dtype}; takes booleans, True = masked, or floats, which are added"
                )
        mask = attn_mask
        if mask is not None:
            shapes = ((N, N), (B * self.num_heads, N, N))
            if tuple(mask.shape) not in shapes:
                raise ValueError(f"attn_mask: got shape {tuple(mask.shape)}; takes {shapes[0]} or {shapes[1]}")
            mask = mask.view(1, 1, N, N) if mask.dim() == 2 else mask.view(B, self.num_heads, N, N)
        if key_padding_mask is not None:
            if key_padding_mask.shape != ((B, N) if batched else (N,)):
                raise ValueError(f"key_padding_mask: got shape {tuple(key_padding_mask.shape)}; takes {(B, N)}")
            padding = additive(key_padding_mask.view(B, 1, 1, N), torch.float32)
            mask = padding if mask is None else additive(mask, torch.float32) + padding
        out, weights = self.attend(
            x, mask, self.out_proj, need_weights=need_weights, attention_dropout=self.dropout if self.training else 0.0
        )
        if weights is not None:
            weights = weights.to(out.dtype)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights
