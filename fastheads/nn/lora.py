"""HeadLoRA and LinearLoRA: the trainable parts of one layer, of its attention and of its linear layers."""

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


class Adapter(nn.Module):
    """The trainable part of one module of a layer, and the switches that module reads.

    Parameters are float32; float64 under a float64 base. lora_A starts Kaiming-uniform (a = sqrt 5: ± 1/sqrt(its
    width)), all others at zero, so that the layer starts as it was. They are None where the config has none.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, config: HeadConfig, *, rank: int, tower: str, layer: int) -> None:
        super().__init__()
        self.rank, self.tower, self.layer = rank, tower, layer
        self.scale, self.dropout = config.scale(rank), config.dropout
        self.enabled = True
        self.lora_A = self.lora_B = None

    def _start(self, a: Tensor, b: Tensor) -> None:
        """Parameters of the shapes of a and b."""
        bound = a.shape[-1] ** -0.5
        self.lora_A, self.lora_B = nn.Parameter(a.uniform_(-bound, bound)), nn.Parameter(b.zero_())

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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class HeadLoRA(Adapter):
    """Deltas of q, k and v and gates of one attention layer.

    Parameters: `lora_A [T, H, r, D]` (`[T, 1, r, D]` with `per_head=False`), `lora_B [T, H, dh, r]`, `theta [H]`.
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
        recompute: bool | str = False,
    ) -> None:
        super().__init__(config, rank=rank, tower=tower, layer=layer)
        self.num_heads, self.targets, self.gate_kind = num_heads, config.projections, config.gate
        self.impl, self.recompute = impl, recompute
        self.closed: Tensor | None = None  # [H] ones, zeros for heads that `masked` has closed
        self._open: Tensor | None = None  # the others' indices
        self._seen: tuple[object, Tensor | None] = None, None
        self.recorder: Recorder | None = None
        self.joined: Tensor | None = None  # the host's three weights, where they lie together (`HeadAttention.join`)
        self.watch: FrozenWatch | None = None
        self.theta: nn.Parameter | None = None
        like, T = torch.empty(0, device=device, dtype=_wide(dtype)), len(self.targets)
        if rank and T:
            a = like.new_empty(T, num_heads if config.per_head else 1, rank, dim)
            self._start(a, like.new_empty(T, num_heads, dim // num_heads, rank))
        if config.gate is not None:
            self.theta = nn.Parameter(like.new_zeros(num_heads))

    def gate(self) -> Tensor | None:
        """`[H]` gates, differentiable in theta, closed heads' 0; None where nothing gates."""
        gate = None
        if self.theta is not None and self.gate_kind is not None:
            gate = GATES[self.gate_kind](self.theta)
        return self.closed if gate is None else gate if self.closed is None else gate * self.closed

    def close(self, closed: Tensor | None) -> None:
        """Takes `[H]` ones, and zeros for heads to close; None: all are open."""
        self.closed, self._open = closed, None if closed is None else _adding(closed)
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


class LinearLoRA(Adapter):
    """The delta of one linear layer, the `target` "o", "fc1" or "fc2": of an output projection one per head, on the
    columns that belong to it (H = num_heads), else one in all (H = 1).

    Parameters: `lora_A [H, r, D/H]`, `lora_B [H, O, r]`. `shape`: the weight's, `[O, D]`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        config: HeadConfig,
        *,
        target: str,
        shape: tuple[int, ...],
        rank: int,
        num_heads: int,
        tower: str,
        layer: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, rank=rank, tower=tower, layer=layer)
        self.target, H = target, num_heads if target == "o" and config.per_head else 1
        like = torch.empty(0, device=device, dtype=_wide(dtype))
        self._start(like.new_empty(H, rank, shape[1] // H), like.new_empty(H, shape[0], rank))

    def extra_repr(self) -> str:
        return f"target={self.target}, rank={self.rank}"


class FrozenWatch:
    """The adapters of one model, to say once which of them a training step leaves as they are.

    OpenCLIP's `lock_image_tower` and `lock_text_tower` freeze every parameter of a tower, one by one, adapters too.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.warned = False
        self.layers: dict[tuple[str, int], list[Adapter]] = {}
        for own in adapters:
            self.layers.setdefault((own.tower, own.layer), []).append(own)

    def frozen(self, tower: str, layer: int) -> bool:
        """Whether a layer has parameters of adapters, and none of them is trained."""
        tensors = [p for own in self.layers[tower, layer] for p in own._parameters.values() if p is not None]
        return len(tensors) > 0 and not any([p.requires_grad for p in tensors])

    def warn(self) -> None:
        """A UserWarning with the layers that are frozen altogether; the first call's only."""
        if self.warned:
            return
        self.warned = True
        layers = [f"{tower}.{layer}" for tower, layer in self.layers if self.frozen(tower, layer)]
        warnings.warn(
            f"the adapters of {', '.join(layers)} are frozen, LoRA and gates, so training leaves them as they are "
            "(lock_image_tower and lock_text_tower freeze them with the tower); to train them: "
            "for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model): p.requires_grad_(True)",
            stacklevel=2,
        )

    # torch.compiler.assume_constant_result (see ops/dispatch.py): said while a graph is traced, without a break in it
    warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
