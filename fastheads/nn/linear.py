"""AdaptedLinear: a linear layer that adds its own delta, as an output projection's or an MLP's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastheads import reference
from fastheads.nn.attention import HeadAttention
from fastheads.nn.lora import LinearLoRA


class AdaptedLinear:
    """Mixed in before the class of an `nn.Linear`, as `HeadAttention` is: `reference.head_linear` with the adapter's
    tensors, in plain PyTorch."""

    heads: LinearLoRA
    weight: nn.Parameter

    def forward(self: Any, x: Tensor) -> Tensor:
        """`[..., O]` of x `[..., D]`."""
        own: LinearLoRA = self.heads
        if not own.enabled:
            return super().forward(x)  # type: ignore[misc]
        dropout_p = own.dropout if self.training else 0.0
        return reference.head_linear(
            x, self.weight, self.bias, own.lora_A, own.lora_B, scale=own.scale, dropout_p=dropout_p
        )

    __reduce_ex__ = HeadAttention.__reduce_ex__
