"""The operator `head_attention`: one signature, whichever implementation computes it."""

from __future__ import annotations

from fastheads import reference
from fastheads.ops.dispatch import check_impl
from fastheads.reference import HeadAttentionOutput

__all__ = ["HeadAttentionOutput", "head_attention"]


def head_attention(*args: object, impl: str = "auto", **options: object) -> HeadAttentionOutput:
    """Self-attention with per-head low-rank deltas and gates: `reference.head_attention` has arguments and formula.

    impl: `"auto"` or the name of an implementation (`dispatch.IMPLEMENTATIONS`).
    """
    check_impl(impl)
    return reference.head_attention(*args, **options)  # type: ignore[arg-type]
