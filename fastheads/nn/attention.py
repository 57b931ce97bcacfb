"""HeadAttention: what a patched attention module does in place of its own arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastheads import ops, reference
from fastheads.nn.lora import HeadLoRA


class HeadAttention:
    """Mixed in before the host's own class: the module keeps its object, parameters and `isinstance`.

    A host (`fastheads.hosts`) adds `forward`, which turns its caller's arguments into `heads_of(...)`.
    """

    heads: HeadLoRA
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    training: bool

    def heads_of(
        self,
        x: Tensor,
        mask: Tensor | None,
        *,
        need_weights: bool = False,
        norms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        score_scale: Tensor | None = None,
        head_scale: Tensor | None = None,
        attention_dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Gated heads `[B, N, D]` of x `[B, N, D]`, and the probabilities `[B, H, N, N]` where asked for.

        mask: broadcasts to `[B, H, N, N]`, additive or True = masked. `norms` (of q and k), `score_scale`,
        `head_scale` and `attention_dropout` are what only the reference path covers. A profiler sees it by the layer's
        name, `fastheads::visual.3`.
        """
        own = self.heads
        options: Any = (x, mask, need_weights, norms, score_scale, head_scale, attention_dropout)
        if not torch.compiler.is_compiling() and torch.autograd._profiler_enabled():
            with torch.autograd.profiler.record_function(f"fastheads::{own.tower}.{own.layer}"):
                return self._heads_of(own, *options)
        return self._heads_of(own, *options)

    def _heads_of(
        self,
        own: HeadLoRA,
        x: Tensor,
        mask: Tensor | None,
        need_weights: bool,
        norms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        score_scale: Tensor | None,
        head_scale: Tensor | None,
        attention_dropout: float,
    ) -> tuple[Tensor, Tensor | None]:
        if self.training and own.frozen() and torch.is_grad_enabled() and own.watch is not None:
            own.watch.warn()
        dropout_p = own.dropout if self.training else 0.0
        pool = None if own.recorder is None else own.recorder.pool
        lora: dict[str, Any] = {
            "num_heads": own.num_heads,
            "targets": own.targets,
            "scale": own.scale,
            "dropout_p": dropout_p,
        }
        probabilities = None
        if need_weights or norms or score_scale is not None or head_scale is not None or attention_dropout:
            q, k, v = reference.project(x, self.in_proj_weight, self.in_proj_bias, own.lora_A, own.lora_B, **lora)
            if norms:
                q, k = norms(q, k)
            each, _, probabilities = reference.attend(
                q, k, v, mask=mask, score_scale=score_scale, attention_dropout=attention_dropout
            )
            if head_scale is not None:
                each = each * head_scale
            o = reference.gate_heads(each, own.gate(), q.dtype)
            cls = None if pool is None else reference.pool_heads(each.detach(), pool)
        else:
            o, _, cls = ops.head_attention(
                x,
                self.in_proj_weight,
                self.in_proj_bias,
                own.lora_A,
                own.lora_B,
                gate=own.theta,
                gate_form=own.gate_kind or "",
                mask=mask,
                pool=pool,
                recompute=own.recompute,
                impl=own.impl,
                **lora,
            )
        if own.recorder is not None and cls is not None:
            own.recorder.add(own.layer, cls)
        return o, probabilities if need_weights else None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        return _rebuild, (cls.__bases__[0], cls.__bases__[1]), self.__dict__


@functools.cache
def _head_class(host: Any, base: Any) -> type:
    return type(f"Head{base.__name__}", (host, base), {"__module__": __name__, "__doc__": host.__doc__})


def head_class(host: type[HeadAttention], base: type[nn.Module]) -> type:
    """The class of a patched `base` module: one per pair, made on demand (a host's class is not always importable)."""
    return _head_class(host, base)  # type: ignore[arg-type]


def _rebuild(host: type[HeadAttention], base: type[nn.Module]) -> Any:
    cls: Any = head_class(host, base)
    return cls.__new__(cls)
