"""HeadLoRA: the trainable part of one attention layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol, cast

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
        self._open: Tensor | None = None  # the others' indices
        self._seen: tuple[object, Tensor | None] = None, None
        self.recorder: Recorder | None = None
        self.joined: Tensor | None = None  # the host's three weights, where they lie together (`HeadAttention.join`)
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

    def close(self, heads: Sequence[int], then: Tensor | None = None) -> None:
        """Closes these heads beside those that are; none: what is closed is `then`."""
        if heads:
            like = next(self.parameters())
            ones = torch.ones(self.num_heads, dtype=like.dtype, device=like.device)
            then = ones if self.closed is None else self.closed.clone()
            then[list(heads)] = 0
        self.closed, self._open = then, None if then is None else _adding(then)
        self._seen = None, None

    def adding(self) -> Tensor | None:
        """Indices of the heads that add something, int64; None where all may.

        Out are those that `masked` closes and, where theta is frozen, those whose gate is exactly 0: looked up when
        theta's storage or version changes (not what is written through `.data`), and never in a compiled graph.
        """
        theta = self.theta
        if theta is None or theta.requires_grad or torch.compiler.is_compiling() or not _readable(theta):
            return self._open
        state = theta.data_ptr(), theta._version
        if self._seen[0] != state:
            with torch.no_grad():
                self._seen = state, _adding(cast(Tensor, self.gate()))
        return self._seen[1]

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
        return {**self.__dict__, "recorder": None, "joined": None, "_seen": (None, None)}


def _readable(theta: Tensor) -> bool:
    """Whether it has values and a version; a shard has its own values only."""
    return type(theta) is nn.Parameter and not theta.is_meta and not theta.is_inference()


def _adding(gate: Tensor) -> Tensor | None:
    """Of gates `[H]`, as `HeadLoRA.adding`; of gates that all are 0 the first head stays."""
    found = [h for h, g in enumerate(gate.tolist()) if g] or [0]
    return gate.new_tensor(found, dtype=torch.int64) if len(found) < len(gate) else None


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
