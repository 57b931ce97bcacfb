"""What several hosts ask of a module alike: its projections, its masks, and parts that may be absent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def present(module: Any, name: str) -> bool:
    """Whether a part of a module is there, and not an identity."""
    part = getattr(module, name, None)
    return part is not None and not isinstance(part, nn.Identity)


def not_linear(module: Any, names: tuple[str, ...] = PROJECTIONS) -> list[str]:
    """A reason against the first of these projections that is not an `nn.Linear`, as an adapter's own layer."""
    kinds = ((name, type(getattr(module, name))) for name in names)
    return [f"has a {kind.__name__} for its {name}; takes nn.Linear" for name, kind in kinds if kind is not nn.Linear][
        :1
    ]


def other_scale(scale: float, head_dim: int) -> float | None:
    """A scale of scores, where it isn't 1/√dh, as the operators have it."""
    return None if scale == head_dim**-0.5 else float(scale)


def three_weights(module: Any, names: tuple[str, ...] = PROJECTIONS) -> tuple[Tensor, ...]:
    """The weights `[D, D]` of its three projections."""
    return tuple(getattr(module, name).weight for name in names)


def three_biases(module: Any, names: tuple[str, ...] = PROJECTIONS) -> Tensor | None:
    """`[3D]` of its three projections, zeros for one without; None where none has a bias."""
    parts = [getattr(module, name) for name in names]
    if all(part.bias is None for part in parts):
        return None
    return torch.cat([part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts])


def mask_of(mask: Tensor | None, causal: bool, x: Tensor, num_heads: int) -> Tensor | None:
    """A mask of `scaled_dot_product_attention`, True = keep where boolean, as `attend` takes it."""
    B, N, _ = x.shape
    if mask is None:
        return torch.ones(N, N, dtype=torch.bool, device=x.device).triu(1) if causal else None
    shape = tuple(mask.shape)
    fits = zip(reversed(shape), (N, N, num_heads, B), strict=False)
    if not 2 <= mask.dim() <= 4 or any(m not in (1, n) for m, n in fits):
        raise ValueError(f"attn_mask: got shape {shape}; takes one that broadcasts to {(B, num_heads, N, N)}")
    return ~mask if mask.dtype == torch.bool else mask
