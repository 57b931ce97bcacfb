"""Head attention in two halves, for hosts that do something of their own in between: norms of q and k, rotary
positions, another scale; and where probabilities are asked for, or dropped.

Both halves have gradients of their own, `fused.backward`'s before and after dY; what is in between is autograd's. They
are no registered operators: compiled, traced or transformed, plain PyTorch computes both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastheads import reference
from fastheads.ops import cpu, fused
from fastheads.ops.dispatch import choose, problem_of
from fastheads.ops.head_attention import plain, unwatched
from fastheads.ops.layer import Layer
from fastheads.reference import GATES, TARGETS

Pool = int | Tensor | str | slice | None


class Between(NamedTuple):
    """What a host does between projection and output.

    norms: of q and k `[B, H, N, dh]`, which it answers in the same shape. score_scale: of the scores; None: 1/√dh.
    head_scale: a factor of the heads, broadcasting to `[B, H, N, dh]`. dropout: of the probabilities. need_weights:
    whether these are asked for.
    """

    norms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    score_scale: float | Tensor | None = None
    head_scale: Tensor | None = None
    dropout: float = 0.0
    need_weights: bool = False

    @property
    def something(self) -> bool:
        """Whether there is any of it."""
        return self.probabilities or any(part is not None for part in self[:3])

    @property
    def probabilities(self) -> bool:
        """Whether they are needed in memory."""
        return self.need_weights or self.dropout > 0


class _Project(torch.autograd.Function):
    """q, k and v `[B, H, N, dh]`, with their deltas; the gradients of x, w_in, b_in, lora_A and lora_B."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], *tensors: Tensor | None) -> cpu.Heads:
        layer = _layer(tensors, settings)
        with torch._C._AutoDispatchBelowAutograd():
            projected, low = fused.project(layer)
        ctx.save_for_backward(*tensors, low)
        ctx.settings = settings
        return cpu.heads_of(projected, layer.num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, low = ctx.saved_tensors
        return None, *fused.project_backward(dy, _layer(tensors, ctx.settings), low, ctx.needs_input_grad[1:6]), None


def _layer(tensors: Sequence[Tensor | None], settings: tuple[Any, ...]) -> Layer:
    x, w_in, b_in, lora_A, lora_B, seed = tensors
    return Layer._make((x, w_in, b_in, lora_A, lora_B, None, None, None, None, seed, *settings))


class _Attend(torch.autograd.Function):
    """Gated heads `[B, N, E]` of q, k and v, and the pooled token's; the gradients of q, k, v and gate."""

    @staticmethod
    def forward(
        ctx: Any, options: dict[str, Any], pool: Pool, impl: str, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        with torch._C._AutoDispatchBelowAutograd():
            o, cls, kept = fused.attend(impl, tensors[:3], pool, {**options, "gate": tensors[3], "mask": tensors[4]})
        ctx.save_for_backward(*tensors[3:], *kept)
        ctx.settings = impl, options
        if cls is not None:
            ctx.mark_non_differentiable(cls)
        return o, cls

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dcls: Any) -> tuple[Tensor | None, ...]:
        gate, mask, *kept = ctx.saved_tensors
        impl, options = ctx.settings
        return None, None, None, *fused.attend_backward(impl, do, kept, {**options, "gate": gate, "mask": mask}), None


def head_attention_in_halves(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    between: Between,
    *,
    num_heads: int,
    targets: Sequence[str],
    scale: float,
    gate: Tensor | None,
    gate_form: str,
    mask: Tensor | None,
    dropout_p: float,
    pool: Pool,
    impl: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gated heads `[B, N, E]`, the pooled token's un-gated `[B, H, dh]` where asked for, and the probabilities
    `[B, H, N, N]` where they are in memory. The arguments are those of `head_attention`."""
    tensors = w_in, b_in, lora_A, lora_B, gate, mask
    dropout = dropout_p > 0 and lora_A is not None
    asked: Any = {"extras": ("probabilities",) * between.probabilities, "between": ("norms, positions or a scale",)}
    problem = problem_of(x, w_in, lora_B, num_heads, dropout=dropout, mask=mask, **asked)
    dtype = problem.dtype
    name = choose(impl, problem).name
    if not x.numel() or not _ours(name, x, *tensors):
        name = "reference"
    wide = torch.promote_types(dtype, torch.float32)
    x = x.to(dtype)
    options: dict[str, Any] = {"num_heads": num_heads, "targets": targets, "scale": scale, "dropout_p": dropout_p}
    if name == "reference":
        q, k, v = reference.project(x, w_in, b_in, lora_A, lora_B, **options)
    else:
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout else None
        settings = (num_heads, [TARGETS.index(t) for t in targets], scale, False, dropout_p, "", name)
        lora = (None if t is None else t.to(wide) for t in (lora_A, lora_B))
        q, k, v = _Project.apply(settings, x, w_in, b_in, *lora, seed)
    if between.norms is not None:
        q, k = between.norms(q, k)
    if name == "reference" or name == "cpu" or between.head_scale is not None:
        gate, gate_form = GATES[gate_form](gate) if gate is not None and gate_form else gate, ""
    if name == "reference":
        return _plainly((q, k, v), between, gate, mask, pool)
    if between.score_scale is not None:
        q = q * (between.score_scale * q.shape[-1] ** 0.5)
    factor = None if between.head_scale is None else between.head_scale.flatten()
    if factor is not None:
        gate = factor if gate is None else gate * factor
    inputs = (q.to(dtype), k.to(dtype), v, None if gate is None else gate.to(wide), mask)
    o, cls = _Attend.apply({"num_heads": num_heads, "gate_form": gate_form, "causal": False}, pool, name, *inputs)
    return o, cls if cls is None or factor is None else cls * factor.detach().unsqueeze(-1), None


def _ours(name: str, *tensors: Tensor | None) -> bool:
    """Whether functions that are no operators can compute it. On a CPU what they do is PyTorch's: a mode may see it."""
    if name != "cpu":
        return unwatched(*tensors)
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and plain(*tensors)


def _plainly(
    qkv: cpu.Heads, between: Between, gate: Tensor | None, mask: Tensor | None, pool: Pool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    (q, k, v), probabilities = qkv, None
    if mask is None and not between.probabilities:  # by PyTorch's own attention, which keeps none
        scale = None
        if between.score_scale is not None:
            q, scale = q * between.score_scale, 1.0
        each = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=scale)
    else:
        each, _, probabilities = reference.attend(
            q, k, v, mask=mask, score_scale=between.score_scale, attention_dropout=between.dropout
        )
    if between.head_scale is not None:
        each = each * between.head_scale
    cls = None if pool is None else reference.pool_heads(reference.widened(each.detach()), pool)
    return reference.gate_heads(each, gate, v.dtype), cls, probabilities
