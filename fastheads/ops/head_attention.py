"""The operator `head_attention`: one signature, whichever implementation computes it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastheads import reference
from fastheads.ops.dispatch import check_impl
from fastheads.reference import HeadAttentionOutput

__all__ = ["HeadAttentionOutput", "head_attention"]


def head_attention(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    num_heads: int,
    targets: Sequence[str] = ("q", "v"),
    scale: float = 1.0,
    gate: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    pool: int | Tensor | str | None = None,
    impl: str = "auto",
) -> HeadAttentionOutput:
    """Self-attention with per-head low-rank deltas and gates: `reference.head_attention` has arguments and formula.

    impl: `"auto"` or the name of an implementation (`dispatch.IMPLEMENTATIONS`); ValueError for another.
    """
    check_impl(impl)
    return reference.head_attention(
        x,
        w_in,
        b_in,
        lora_A,
        lora_B,
        num_heads=num_heads,
        targets=targets,
        scale=scale,
        gate=gate,
        causal=causal,
        mask=mask,
        dropout_p=dropout_p,
        pool=pool,
    )
