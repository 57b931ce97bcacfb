"""One layer's head attention as an operator's inputs: what its forward and its backward pass read alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_SECOND = "head attention has no second derivative in this implementation; use impl='reference'"


class Layer(NamedTuple):
    """The operator's inputs that forward and backward read alike, in the order of its schema."""

    x: Tensor
    w_in: Tensor
    b_in: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    gate: Tensor | None
    w_out: Tensor | None
    b_out: Tensor | None
    mask: Tensor | None
    seed: Tensor | None
    num_heads: int
    parts: Sequence[int]
    scale: float
    causal: bool
    dropout_p: float
    gate_form: str
    impl: str

    @property
    def width(self) -> int:
        """E, of all heads together, which need not be x's."""
        return self.w_in.shape[0] // 3

    @property
    def attend(self) -> dict[str, Any]:
        """What every attention kernel takes beside q, k and v."""
        return {
            "num_heads": self.num_heads,
            "gate": self.gate,
            "gate_form": self.gate_form,
            "mask": self.mask,
            "causal": self.causal,
        }

    @property
    def low_rank(self) -> dict[str, Any]:
        """Which of q, k and v have a delta, and its scale."""
        return {"parts": tuple(self.parts), "scale": self.scale}

    @property
    def merged(self) -> bool:
        """True where the deltas are folded into the weights."""
        return self.impl == "stacked"

    @property
    def shared(self) -> bool:
        """True where all heads share the down-projection."""
        return self.lora_A is not None and self.lora_B is not None and self.lora_A.shape[1] != self.lora_B.shape[1]

    def deltas(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, where there are any."""
        assert self.lora_A is not None and self.lora_B is not None
        return self.lora_A, self.lora_B

    def in_one_product(self, low: Tensor, w_in: Tensor, b_in: Tensor | None) -> Tensor:
        """`[x, T] [W, s·B]ᵀ + b`, rounded once; b_in in x's dtype."""
        beside = self._beside(w_in)
        return F.linear(torch.cat((self.x, low[..., : beside.shape[1] - w_in.shape[1]]), -1), beside, b_in)

    def _beside(self, w_in: Tensor) -> Tensor:
        """`[W, s·B]` in x's dtype, B as `up_matrix` lays it out, written in place."""
        _, lora_B = self.deltas()
        T, H, dh, r = lora_B.shape
        rows, D = w_in.shape
        groups = 1 if self.shared else H
        out = w_in.new_empty((rows, D + T * groups * r), dtype=self.x.dtype)
        out[:, :D].copy_(w_in)
        columns = out[:, D:].zero_().view(3, H, dh, T, groups, r)
        for t, part in enumerate(self.parts):
            heads = columns[part, :, :, t]  # [H, dh, groups, r]
            own = heads.squeeze(2) if self.shared else heads.diagonal(0, 0, 2).permute(2, 0, 1)
            own.copy_(self.scale * lora_B[t])
        return out


def needed_of(grads: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are needed, None for the others."""
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


Pool = int | Tensor | str | slice | None


def pool_arguments(pool: Pool) -> tuple[str, int, Tensor | None]:
    """Which token is pooled, as an operator's pool, pool_token and pool_tokens."""
    if isinstance(pool, Tensor):
        return "tokens", 0, pool
    if isinstance(pool, str):
        return "mean", 1, None
    if isinstance(pool, slice):
        return "mean", pool.start, None
    return ("", 0, None) if pool is None else ("token", pool, None)


def pooled(kind: str, token: int, tokens: Tensor | None) -> Pool:
    """What `pool_arguments` told."""
    return {"": None, "token": token, "tokens": tokens, "mean": slice(token, None)}[kind]


def cast_together(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """b's rows below a's, in `dtype`: cast on the way, without a copy of a between."""
    out = a.new_empty((len(a) + len(b), *a.shape[1:]), dtype=dtype)
    out[: len(a)].copy_(a)
    out[len(a) :].copy_(b)
    return out
