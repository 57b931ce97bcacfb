"""capture_heads: what each head says of the pooled token, for losses over heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastheads.hosts import Tower, find_tower
from fastheads.hosts.wrappers import unwrap
from fastheads.model import head_modules
from fastheads.nn import HeadLoRA
from fastheads.reference import GATES


class CapturedHeads:
    """What the forward passes inside `capture_heads` said, filled as they run.

    Attributes:
        features: `[L, B, H, dh]` detached un-gated head outputs of the pooled token, at least float32, one row per
            adapted layer; several forward passes follow each other along B.
        thetas: the L gate parameters.
        gates: `[L, H]`, differentiable in them.
    """

    def __init__(self, layers: list[HeadLoRA], tower: Tower) -> None:
        self._layers = layers
        self._outputs: dict[int, list[Tensor]] = {own.layer: [] for own in layers}
        self.pool: int | slice | Tensor = -1 if tower.pool == "last" else 0
        if tower.pool == "mean":
            self.pool = slice(tower.prefix, None)

    def add(self, layer: int, heads: Tensor) -> None:
        """Keeps the heads `[B, H, dh]` of one layer; a recomputation inside a backward pass is not a new forward."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._outputs[layer].append(heads.detach())

    @property
    def features(self) -> Tensor:
        """`[L, B, H, dh]`. Raises RuntimeError where no forward pass ran inside `capture_heads`."""
        if not all(self._outputs.values()):
            raise RuntimeError("heads: nothing was captured; run the patched model inside `with capture_heads(model)`")
        alone = all(len(outputs) == 1 for outputs in self._outputs.values())
        return torch.stack([outputs[0] if alone else torch.cat(outputs) for outputs in self._outputs.values()])

    @property
    def thetas(self) -> list[nn.Parameter]:
        """The gate parameters, layer by layer. Raises ValueError for a model without gates."""
        found = [own.theta for own in self._layers if own.theta is not None]
        if len(found) != len(self._layers):
            raise ValueError('heads: the model has no gates (gate=None); patch it with gate="softmax" or "sigmoid"')
        return found

    @property
    def gates(self) -> Tensor:
        """`[L, H]`, differentiable in `thetas`."""
        thetas: list[Tensor] = [*self.thetas]
        gates = GATES[str(self._layers[0].gate_kind)](torch.stack(thetas))
        if all(own.closed is None for own in self._layers):
            return gates
        return gates * torch.stack(
            [gates.new_ones(gates.shape[1]) if own.closed is None else own.closed for own in self._layers]
        )


@contextmanager
def capture_heads(model: nn.Module, tower: str | None = None) -> Iterator[CapturedHeads]:
    """Records the un-gated head outputs of the pooled token while the patched `model` runs.

    The pooled token is the model's: the class token, the mean over patch tokens for average or attentional pooling, the
    end token of a text. Layers inside `disabled(model)` record nothing; neither does recomputation under checkpointing.

    Args:
        model: patched (or its DDP wrapper).
        tower: "visual" or "text"; None: the patched one, "visual" where both are.

    Yields a `CapturedHeads`. Raises ValueError for an unpatched model, a tower that is not patched, a second capture
    inside the first, or a tower that pools no token.
    """
    inner = unwrap(model)
    layers = head_modules(inner)
    patched = sorted({own.tower for own in layers}, reverse=True)
    name = tower or patched[0]
    layers = [own for own in layers if own.tower == name]
    if not layers:
        raise ValueError(f"tower: got {tower!r}; this model's patched towers: {', '.join(patched)}")
    if any(own.recorder is not None for own in layers):
        raise ValueError("model: its heads are being captured already; leave the first capture_heads first")
    where = find_tower(inner, name)
    if where.pool == "none":
        raise ValueError(f"model: its {name} tower pools no token (pool_type='none'), so there is nothing to capture")
    heads = CapturedHeads(layers, where)
    hook = None
    if where.pool in ("argmax", "eos") and where.embedding is not None:

        def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            heads.pool = where.token_index(args[0])

        hook = where.embedding.register_forward_pre_hook(remember)
    for own in layers:
        own.recorder = heads
    try:
        yield heads
    finally:
        for own in layers:
            own.recorder = None
        if hook is not None:
            hook.remove()
