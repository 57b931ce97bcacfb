"""HeadAttention: what a patched attention module does in place of its own arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fastheads import ops, reference
from fastheads.nn.lora import HeadLoRA

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_PLAIN = (Tensor, nn.Parameter, FakeTensor, type(None))


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether to call it is `F.linear` with its weight and bias and nothing else: no hooks, no class or forward of its
    own, no other kinds of tensors, as LoRA, quantisation, parametrizations, sharding and offloading bring along."""
    return (
        type(module) in LINEAR
        and type(module.weight) in _PLAIN
        and type(module.bias) in _PLAIN
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and not _has_any_global_hook()
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
    )


class HeadAttention:
    """Mixed in before the host's own class: the module keeps its object, parameters and `isinstance`.

    A host (`fastheads.hosts`) adds `forward`, which turns its caller's arguments into `attend(...)`.
    """

    heads: HeadLoRA
    training: bool

    @staticmethod
    def weights(module: Any) -> tuple[Tensor, ...]:
        """The host's own weights of q, k and v: one `[3D, D]`, or three `[D, D]`."""
        return (module.in_proj_weight,)

    @staticmethod
    def bias(module: Any) -> Tensor | None:
        """`[3D]`, or None."""
        return module.in_proj_bias

    @staticmethod
    def output(module: Any) -> nn.Module:
        """The host's own output projection."""
        return module.out_proj

    def attend(
        self,
        x: Tensor,
        mask: Tensor | None,
        out_proj: nn.Module | None,
        *,
        need_weights: bool = False,
        norms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        score_scale: Tensor | None = None,
        head_scale: Tensor | None = None,
        attention_dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Gated heads `[B, N, D]` of x `[B, N, D]`, out_proj of them where one is given, and the probabilities
        `[B, H, N, N]` where asked for.

        mask: broadcasts to `[B, H, N, N]`, additive or True = masked. `norms` (of q and k), `score_scale`,
        `head_scale` and `attention_dropout` are what only the reference path covers. A profiler sees it by the layer's
        name, `fastheads::visual.3`.
        """
        own = self.heads
        options: Any = (x, mask, out_proj, need_weights, norms, score_scale, head_scale, attention_dropout)
        if not torch.compiler.is_compiling() and torch.autograd._profiler_enabled():
            with torch.autograd.profiler.record_function(f"fastheads::{own.tower}.{own.layer}"):
                return self._attend(own, *options)
        return self._attend(own, *options)

    def _attend(
        self,
        own: HeadLoRA,
        x: Tensor,
        mask: Tensor | None,
        out_proj: nn.Module | None,
        need_weights: bool,
        norms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        score_scale: Tensor | None,
        head_scale: Tensor | None,
        attention_dropout: float,
    ) -> tuple[Tensor, Tensor | None]:
        watch = own.watch if self.training and torch.is_grad_enabled() else None
        if watch is not None and watch.frozen(own.tower, own.layer):
            watch.warn()
        dropout_p = own.dropout if self.training else 0.0
        pool = None if own.recorder is None else own.recorder.pool
        lora: dict[str, Any] = {
            "num_heads": own.num_heads,
            "targets": own.targets,
            "scale": own.scale,
            "dropout_p": dropout_p,
        }
        probabilities = None
        stored, b_in = self.weights(self), self.bias(self)
        w_in = stored[0] if len(stored) == 1 else torch.cat(stored)
        if need_weights or norms or score_scale is not None or head_scale is not None or attention_dropout:
            q, k, v = reference.project(x, w_in, b_in, own.lora_A, own.lora_B, **lora)
            if norms:
                q, k = norms(q, k)
            if mask is None and not (need_weights or attention_dropout):
                each = _flash(q, k, v, score_scale)
            else:
                each, _, probabilities = reference.attend(
                    q, k, v, mask=mask, score_scale=score_scale, attention_dropout=attention_dropout
                )
            if head_scale is not None:
                each = each * head_scale
            o = reference.gate_heads(each, own.gate(), v.dtype)
            cls = None if pool is None else reference.pool_heads(reference.widened(each.detach()), pool)
        else:
            gate: Tensor | None = own.theta if own.closed is None else own.gate()
            gate_form = own.gate_kind or "" if own.closed is None else ""
            w_out = b_out = None
            if out_proj is not None and is_plain_linear(out_proj):
                w_out, b_out, out_proj = out_proj.weight, out_proj.bias, None
            o, _, cls = ops.head_attention(
                x,
                w_in,
                b_in,
                own.lora_A,
                own.lora_B,
                gate=gate,
                gate_form=gate_form,
                w_out=w_out,
                b_out=b_out,
                mask=mask,
                pool=pool,
                recompute=own.recompute,
                impl=own.impl,
                **lora,
            )
        if own.recorder is not None and cls is not None:
            own.recorder.add(own.layer, cls)
        return o if out_proj is None else out_proj(o), probabilities if need_weights else None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        return _rebuild, (cls.__bases__[0], cls.__bases__[1]), self.__dict__


def _flash(q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor | None) -> Tensor:
    """Heads `[B, H, N, dh]` by PyTorch's own attention, which keeps no probabilities; in v's dtype, q's and k's norms
    may have another."""
    scale = None
    if score_scale is not None:
        q, scale = q * score_scale, 1.0
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=scale)


@functools.cache
def _head_class(host: Any, base: Any) -> type:
    return type(f"Head{base.__name__}", (host, base), {"__module__": __name__, "__doc__": host.__doc__})


def head_class(host: type, base: type[nn.Module]) -> type:
    """The class of a patched `base` module: one per pair, made on demand (a host's class is not always importable)."""
    return _head_class(host, base)  # type: ignore[arg-type]


def _rebuild(host: type, base: type[nn.Module]) -> Any:
    cls: Any = head_class(host, base)
    return cls.__new__(cls)
