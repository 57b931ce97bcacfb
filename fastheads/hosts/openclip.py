"""Host: OpenCLIP's own `Attention` module, in both its APIs.

Up to 3.3.0: `attn(x, attn_mask)`, boolean masks True = masked. Development branch: `attn(x, k_x, v_x, attn_mask)`,
boolean masks True = keep. The parameter names are the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastheads.hosts.parts import present
from fastheads.nn import HeadAttention


def _takes_keys(cls: type) -> bool:
    """True for the development branch's API."""
    return "k_x" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]


class OpenClipAttentionHost(HeadAttention):
    """A patched OpenCLIP `Attention`: the same call, the same answer, plus heads' deltas and gates."""

    name = "OpenCLIP Attention"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        names = ("in_proj_weight", "in_proj_bias", "out_proj", "num_heads")
        return type(module).__name__ == "Attention" and all(hasattr(module, n) for n in names)

    @staticmethod
    def refusals(module: Any, gated: bool) -> list[str]:
        """Why this module cannot be patched; empty where it can."""
        reasons = []
        if module.in_proj_weight is None:
            reasons.append("has separate q/k/v_proj_weight, so it is cross-attention")
        if gated and present(module, "ln_inner"):
            reasons.append("has ln_inner between the heads and out_proj, so gates would not fold; use gate=None")
        return reasons

    @staticmethod
    def extras(module: Any) -> tuple[str, ...]:
        """What only the reference path covers."""
        return ("attention dropout",) if module.attn_drop.p else ()

    @staticmethod
    def between(module: Any) -> tuple[str, ...]:
        """What it does between projection and output."""
        return tuple(n for n in ("ln_q", "ln_k", "logit_scale", "head_scale") if present(module, n))

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the host's own forward, for self-attention."""
        base = type(self).__bases__[1]
        if not self.heads.enabled:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        names = ("k_x", "v_x", "attn_mask") if _takes_keys(base) else ("attn_mask",)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in ("k_x", "v_x"):
            if given.get(name) is not None and given[name] is not x:
                raise ValueError(
                    f"{name}: a patched layer does self-attention, so it must be None or x itself; "
                    "unpatch(model) for cross-attention"
                )
        mask = given.get("attn_mask")
        if mask is not None:
            mask = _mask(mask, x, self.num_heads, keep=_takes_keys(base))
        cosine = self.logit_scale is not None
        norms = None
        if cosine:
            norms = lambda q, k, heads: (F.normalize(q, dim=-1), F.normalize(k, dim=-1))  # noqa: E731
        elif present(self, "ln_q") or present(self, "ln_k"):
            norms = lambda q, k, heads: (self.ln_q(q), self.ln_k(k))  # noqa: E731
        inner = present(self, "ln_inner")
        o, _ = self.attend(
            x,
            mask,
            None if inner else self.out_proj,
            norms=norms,
            score_scale=self.logit_scale.clamp(max=self.logit_scale_max).exp() if cosine else None,
            head_scale=self.head_scale,
            attention_dropout=self.attn_drop.p if self.training else 0.0,
        )
        return self.out_drop(self.out_proj(self.ln_inner(o)) if inner else o)


def _mask(mask: Tensor, x: Tensor, num_heads: int, keep: bool) -> Tensor:
    """The host's mask as one that broadcasts to `[B, H, N, N]`, True = masked where boolean."""
    B, N, _ = x.shape
    if mask.shape[-2:] != (N, N) or mask.numel() not in (N * N, B * N * N, B * num_heads * N * N):
        raise ValueError(
            f"attn_mask: got shape {tuple(mask.shape)}; takes {(N, N)}, {(B * num_heads, N, N)} "
            f"or {(B, num_heads, N, N)}"
        )
    if mask.dim() == 2:
        mask = mask.view(1, 1, N, N)
    elif mask.dim() == 3:
        mask = mask.view(B, -1, N, N)
    return ~mask if keep and mask.dtype.is_floating_point is False else mask
