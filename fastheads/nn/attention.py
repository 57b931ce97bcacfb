"""HeadAttention: what a patched attention module does in place of its own arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fastheads import ops, reference
from fastheads.nn.joined import laid_together, lie_in
from fastheads.nn.lora import HeadLoRA

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_PLAIN = (Tensor, nn.Parameter, FakeTensor, type(None))
_PLAIN_WEIGHTS = {Tensor, nn.Parameter, FakeTensor}


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
    def num_heads_of(module: Any) -> int:
        """How many heads the module has."""
        return int(module.num_heads)

    @staticmethod
    def weights(module: Any) -> tuple[Tensor, ...]:
        """The host's own weights of q, k and v: one `[3D, D]`, or three `[D, D]` (see `join`)."""
        return (module.in_proj_weight,)

    @staticmethod
    def bias(module: Any) -> Tensor | None:
        """`[3D]`, or None."""
        return module.in_proj_bias

    @staticmethod
    def output(module: Any) -> nn.Module | None:
        """The host's own output projection; None where it lies outside, and gates fold into the rows of `value`."""
        return module.out_proj

    @staticmethod
    def between(module: Any) -> tuple[str, ...]:
        """What it does between projection and output, in words."""
        return ()

    def attend(
        self,
        x: Tensor,
        mask: Tensor | None,
        out_proj: nn.Module | None,
        *,
        need_weights: bool = False,
        norms: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None,
        score_scale: float | Tensor | None = None,
        head_scale: Tensor | None = None,
        attention_dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Gated heads `[B, N, D]` of x `[B, N, D]`, out_proj of them where one is given, and the probabilities
        `[B, H, N, N]` where asked for.

        mask: broadcasts to `[B, H, N, N]`, additive or True = masked. The keywords are `ops.Between`'s. A profiler sees
        it by the layer's name, `fastheads::visual.3`.
        """
        own = self.heads
        between = ops.Between(norms, score_scale, head_scale, attention_dropout, need_weights)
        options: Any = (x, mask, out_proj, between)
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
        between: ops.Between,
    ) -> tuple[Tensor, Tensor | None]:
        watch = own.watch if self.training and torch.is_grad_enabled() else None
        if watch is not None and watch.frozen(own.tower, own.layer):
            watch.warn()
        dropout_p = own.dropout if self.training else 0.0
        pool = None if own.recorder is None else own.recorder.pool
        options: dict[str, Any] = {
            "num_heads": own.num_heads,
            "targets": own.targets,
            "scale": own.scale,
            "dropout_p": dropout_p,
        }
        probabilities = None
        gate: Tensor | None = own.theta if own.closed is None else own.gate()
        gate_form = own.gate_kind or "" if own.closed is None else ""
        stored, b_in = self.weights(self), self.bias(self)
        w_in = stored[0] if len(stored) == 1 else _as_one(own, stored)
        lora_A, lora_B, w_out, b_out = own.lora_A, own.lora_B, None, None
        if not between.something and out_proj is not None and is_plain_linear(out_proj):
            w_out, b_out, out_proj = out_proj.weight, out_proj.bias, None
        heads = own.adding() if pool is None and not between.probabilities else None
        if heads is not None:
            options["num_heads"], gate, gate_form = len(heads), own.gate(), ""
            w_in, b_in, lora_A, lora_B, gate, mask, w_out = _of_heads(
                heads, own.num_heads, w_in, b_in, lora_A, lora_B, gate, mask, w_out
            )
            between = between.of_heads(heads, own.num_heads)
        tensors = (x, w_in, b_in, lora_A, lora_B)
        options |= {"gate": gate, "gate_form": gate_form, "mask": mask, "pool": pool}
        options |= {"recompute": own.recompute, "impl": own.impl}
        if between.something:
            o, cls, probabilities = ops.head_attention_in_halves(*tensors, between, **options)
        else:
            o, _, cls = ops.head_attention(*tensors, w_out=w_out, b_out=b_out, **options)
        if heads is not None and w_out is None:
            o = _beside_zeros(o, heads, own.num_heads)
        if own.recorder is not None and cls is not None:
            own.recorder.add(own.layer, cls)
        return o if out_proj is None else out_proj(o), probabilities if between.need_weights else None

    def join(self) -> None:
        """Lays three frozen weights together in memory; where that can't be, a call copies them into one."""
        self.heads.joined = laid_together(self.weights(self))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.join()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        return _rebuild, (cls.__bases__[0], cls.__bases__[1]), self.__dict__

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.join()


def _as_one(own: HeadLoRA, weights: tuple[Tensor, ...]) -> Tensor:
    """`[3D, D]`: the memory in which frozen weights lie together, or a copy of them."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or reference.transformed()
    if own.joined is None or traced or any([w.requires_grad for w in weights]):
        return torch.cat(weights)
    if not (_PLAIN_WEIGHTS.issuperset(map(type, weights)) and lie_in(own.joined, weights)):
        own.joined = None  # they lie elsewhere now (sharded, assigned), and it would be held for nobody
        return torch.cat(weights)
    return own.joined


def _of_heads(
    heads: Tensor,
    num_heads: int,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    w_out: Tensor | None,
) -> Any:
    """The same arguments of `head_attention` for these heads alone; copies."""

    of = functools.partial(ops.of_heads, heads, num_heads)
    w_in = w_in.unflatten(0, (3, num_heads, -1)).index_select(1, heads).flatten(0, 2)
    b_in = None if b_in is None else b_in.view(3, num_heads, -1).index_select(1, heads).flatten()
    w_out = None if w_out is None else w_out.unflatten(1, (num_heads, -1)).index_select(1, heads).flatten(1)
    return w_in, b_in, of(lora_A, 1), of(lora_B, 1), of(gate, 0), of(mask, -3), w_out


def _beside_zeros(o: Tensor, heads: Tensor, num_heads: int) -> Tensor:
    """`[B, N, E]` of all heads, from these heads' `[B, N, …]` and zeros."""
    each = o.unflatten(2, (len(heads), -1))
    return o.new_zeros(*o.shape[:2], num_heads, each.shape[3]).index_copy(2, heads, each).flatten(2)


@functools.cache
def _head_class(host: Any, base: Any) -> type:
    return type(f"Head{base.__name__}", (host, base), {"__module__": __name__, "__doc__": host.__doc__})


def head_class(host: type, base: type[nn.Module]) -> type:
    """The class of a patched `base` module: one per pair, made on demand (a host's class is not always importable)."""
    return _head_class(host, base)  # type: ignore[arg-type]


def _rebuild(host: type, base: type[nn.Module]) -> Any:
    cls: Any = head_class(host, base)
    return cls.__new__(cls)
