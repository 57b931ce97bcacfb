"""One layer's head attention as an operator's inputs: what its forward and its backward pass read alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


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
