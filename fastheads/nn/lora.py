"""HeadLoRA: the trainable part of one attention layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastheads.config import HeadConfig
from fastheads.reference import GATES


class Recorder(Protocol):
    """Who is told of the pooled token's heads (`capture.CapturedHeads`). pool: which token, as in `head_attention`."""

    pool: int | slice | Tensor

    def add(self, layer: int, heads: Tensor) -> None:
        """Keeps the heads `[B, H, dh]` of one layer."""


class HeadLoRA(nn.Module):
    """Deltas and gates of one layer, and the switches its attention reads.

    Parameters (float32; float64 under a float64 base): `lora_A [T, H, r, D]` (`[T, 1, r, D]` with
    `per_head=False`), `lora_B [T, H, dh, r]`, `theta [H]`; None where the config has none. lora_A starts
    Kaiming-uniform (a = sqrt 5: ± 1/sqrt(D)), lora_B and theta at zero, so that the layer starts as it was.
    """

    def __init__(
        self,
        config: HeadConfig,
        *,
        rank: int,
        dim: int,
        num_heads: int,
        tower: str,
        layer: int,
        device: torch.device,
        dtype: torch.dtype,
        impl: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.rank, self.tower, self.layer = num_heads, rank, tower, layer
        self.targets, self.scale, self.dropout = config.targets, config.scale(rank), config.dropout
        self.gate_kind, self.impl, self.recompute = config.gate, impl, recompute
        self.enabled = True
        self.closed: Tensor | None = None  # [H] ones, zeros for heads that `masked` has closed
        self.recorder: Recorder | None = None
        self.watch: FrozenWatch | None = None
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        T = len(config.targets)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.theta: nn.Parameter | None = None
        if rank:
            a = torch.empty(T, num_heads if config.per_head else 1, rank, dim, device=device, dtype=dtype)
            self.lora_A = nn.Parameter(a.uniform_(-(dim**-0.5), dim**-0.5))
            b = torch.zeros(T, num_heads, dim // num_heads, rank, device=device, dtype=dtype)
            self.lora_B = nn.Parameter(b)
        if config.gate is not None:
            self.theta = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))

    def gate(self) -> Tensor | None:
        """`[H]` gates, differentiable in theta, closed heads' 0; None where nothing gates."""
        gate = None
        if self.theta is not None and self.gate_kind is not None:
            gate = GATES[self.gate_kind](self.theta)
        return self.closed if gate is None else gate if self.closed is None else gate * self.closed

    def frozen(self) -> bool:
        """Whether it has parameters, and none of them is trained."""
        own = [p.requires_grad for p in self._parameters.values() if p is not None]
        return bool(own) and not any(own)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Follows `.to(device)`, `.double()` and `.float()`, but stays float32 when the model is cast to 16 bits."""
        before = {name: (p.data, p.grad) for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters(recurse=False):
            if p.dtype.itemsize < 4:
                data, grad = before[name]
                p.data, p.grad = data.to(p.device, torch.float32), None
                p.grad = None if grad is None else grad.to(p.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, rank={self.rank}, targets={self.targets}, gate={self.gate_kind}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "recorder": None}


class FrozenWatch:
    """The adapters of one model, to say once which of them a training step leaves as they are.

    OpenCLIP's `lock_image_tower` and `lock_text_tower` freeze every parameter of a tower, one by one, adapters too.
    """

    def __init__(self, adapters: Sequence[HeadLoRA]) -> None:
        self.adapters, self.warned = adapters, False

    def warn(self) -> None:
        """A UserWarning with the layers that are frozen altogether; the first call's only."""
        if self.warned:
            return
        self.warned = True
        layers = [f"{own.tower}.{own.layer}" for own in self.adapters if own.frozen()]
        warnings.warn(
            f"the adapters of {', '.join(layers)} are frozen, LoRA and gates, so training leaves them as they are "
            "(lock_image_tower and lock_text_tower freeze them with the tower); to train them: "
            "for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model): p.requires_grad_(True)",
            stacklevel=2,
        )

    # torch.compiler.assume_constant_result (see ops/dispatch.py): said while a graph is traced, without a break in it
    warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
