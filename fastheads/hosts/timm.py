"""Hosts: timm's attention: `Attention` of its plain vision transformers (ViT, DeiT, DINOv2, SigLIP's image tower), and
those with rotary positions, `EvaAttention` and `AttentionRope` (EVA, DINOv3, Perception Encoder); those with a bias by
relative position, BEiT's `Attention` and `RelPosAttention`; and FastViT's, of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastheads.hosts.parts import PROJECTIONS, mask_of, not_linear, other_scale, present, three_biases, three_weights
from fastheads.nn import HeadAttention

# Where older and newer timm keep them. Classes of the same names elsewhere compute something else.
_HOMES = {
    "Attention": ("timm.layers.attention", "timm.models.vision_transformer"),
    "AttentionRope": ("timm.layers.attention",),
    "EvaAttention": ("timm.models.eva",),
}


class TimmAttentionHost(HeadAttention):
    """A patched attention of timm's: the same call, the same answer, plus heads' deltas and gates."""

    name = "timm Attention"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return type(module).__module__ in _HOMES.get(type(module).__name__, ())

    @staticmethod
    def weights(module: Any) -> tuple[Tensor, ...]:
        if module.qkv is not None:
            return (module.qkv.weight,)
        return three_weights(module)

    @staticmethod
    def bias(module: Any) -> Tensor | None:
        if getattr(module, "q_bias", None) is not None:
            return torch.cat((module.q_bias, module.k_bias, module.v_bias))
        if module.qkv is not None:
            return module.qkv.bias
        return three_biases(module)

    @staticmethod
    def output(module: Any) -> nn.Module:
        return module.proj

    @staticmethod
    def refusals(module: Any, gated: bool) -> list[str]:
        """Why this module cannot be patched; empty where it can."""
        strange = not_linear(module, PROJECTIONS if module.qkv is None else ("qkv",))
        if strange:
            return strange
        reasons, D = [], module.proj.weight.shape[0]
        if getattr(module, "num_kv_groups", 1) != 1:
            reasons.append("has fewer heads of keys than of queries")
        elif module.proj.weight.shape[1] != D:
            reasons.append("has heads that together are wider or narrower than the model")
        if gated and present(module, "norm"):
            reasons.append("has a norm between the heads and proj, so gates would not fold; use gate=None")
        return reasons

    @staticmethod
    def extras(module: Any) -> tuple[str, ...]:
        """What only the reference path covers."""
        return ("attention dropout",) if module.attn_drop.p else ()

    @staticmethod
    def between(module: Any) -> tuple[str, ...]:
        """What it does between projection and output."""
        found = [name for name in ("q_norm", "k_norm") if present(module, name)]
        return (*found, "scale") if _scale(module) is not None else tuple(found)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As timm's own forward; boolean masks True = keep, as in `scaled_dot_product_attention`."""
        if not self.heads.enabled:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        names = ("attn_mask", "is_causal") if type(self).__bases__[1].__name__ == "Attention" else _WITH_ROPE
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = mask_of(given.get("attn_mask"), bool(given.get("is_causal")), x, self.num_heads)
        rope, norms = given.get("rope"), None
        if rope is not None or present(self, "q_norm") or present(self, "k_norm"):
            norms = lambda q, k, heads: _placed(self, self.q_norm(q), self.k_norm(k), rope, heads)  # noqa: E731
        gate = getattr(self, "gate", None)
        inner = gate is not None or present(self, "norm")
        options = {"score_scale": _scale(self), "attention_dropout": self.attn_drop.p if self.training else 0.0}
        o, _ = self.attend(x, mask, None if inner else self.proj, norms=norms, **options)
        if inner:
            o = self.norm(o) if present(self, "norm") else o
            o = self.proj(o if gate is None else o * gate(x).sigmoid())
        return self.proj_drop(o)


class TimmRelativeAttentionHost(TimmAttentionHost):
    """A patched attention of timm's whose scores have a bias by relative position: a mask per head, added."""

    name = "timm relative"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        homes = {"Attention": "timm.models.beit", "RelPosAttention": "timm.models.vision_transformer_relpos"}
        return type(module).__module__ == homes.get(type(module).__name__)

    @staticmethod
    def refusals(module: Any, gated: bool) -> list[str]:
        """Why this module cannot be patched; empty where it can."""
        strange = not_linear(module, ("qkv",))
        if not strange and module.qkv.out_features != 3 * module.qkv.in_features:
            return ["has heads that together are wider or narrower than the model"]
        return strange

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As timm's own forward, with or without a bias that all layers share."""
        if not self.heads.enabled:
            return super().forward(x, *args, **kwargs)
        (bias,) = (*args, *kwargs.values()) or (None,)
        if getattr(self, "rel_pos", None) is not None:
            bias = self.rel_pos.get_bias()
        elif getattr(self, "relative_position_bias_table", None) is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return super().forward(x, attn_mask=bias)


class FastVitAttentionHost(TimmAttentionHost):
    """A patched attention of timm's FastViT (MobileCLIP's last stage), over images `[B, D, height, width]`."""

    name = "timm FastViT"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return type(module).__name__ == "Attention" and type(module).__module__ == "timm.models.fastvit"

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As timm's own forward."""
        if not self.heads.enabled:
            return super().forward(x, *args, **kwargs)
        return super().forward(x.flatten(2).mT).mT.reshape(x.shape)


def _scale(module: Any) -> float | None:
    return other_scale(module.scale, module.proj.weight.shape[1] // module.num_heads)


_WITH_ROPE = ("rope", "attn_mask", "is_causal")


def _placed(module: Any, q: Tensor, k: Tensor, rope: Tensor | None, heads: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k `[B, H, N, dh]`, all but the first tokens' turned by their positions; each head may have its own."""
    if rope is None:
        return q, k
    if heads is not None and rope.dim() >= 3 and rope.shape[-3] == module.num_heads:
        rope = rope.index_select(-3, heads)
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    first, half = module.num_prefix_tokens, {"half": True} if getattr(module, "rotate_half", False) else {}

    def turned(t: Tensor) -> Tensor:
        rest = apply_rot_embed_cat(t[:, :, first:], rope, **half)
        return torch.cat((t[:, :, :first], rest), 2).to(t.dtype)

    return turned(q), turned(k)
