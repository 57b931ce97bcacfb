"""Head attention in two halves, for hosts that do something of their own in between: norms of q and k, rotary
positions, another scale; and where probabilities are asked for, or dropped.

Both halves have gradients of their own, `fused.backward`'s before and after dY; what is in between is autograd's. As
`head_attention` they are called without the dispatcher where nobody looks, and compiled or traced they are operators,
`fastheads::project` and `fastheads::attend`. Inside a transform of torch.func plain PyTorch computes both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastheads import reference
from fastheads.ops import cpu, fused
from fastheads.ops.dispatch import choose, problem_of
from fastheads.ops.flops import tell_counters
from fastheads.ops.head_attention import KEEP, plain, unwatched
from fastheads.ops.layer import NO_SECOND, Layer, Pool, needed_of, pool_arguments, pooled
from fastheads.reference import GATES, TARGETS


def of_heads(heads: Tensor, num_heads: int, t: Tensor | None, dim: int) -> Tensor | None:
    """A copy of t for these heads alone, where its dimension `dim` (from the end, or 0 …) is the heads'."""
    own = t is not None and t.dim() >= -dim and t.shape[dim] == num_heads
    return t.index_select(dim, heads) if t is not None and own else t


class Between(NamedTuple):
    """What a host does between projection and output.

    norms: of q and k `[B, H, N, dh]`, which it answers in the same shape; of some heads alone where it is given their
    indices, and None for all. score_scale: of the scores; None: 1/√dh.
    head_scale: a factor of the heads, broadcasting to `[B, H, N, dh]`. dropout: of the probabilities. need_weights:
    whether these are asked for.
    """

    norms: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None
    score_scale: float | Tensor | None = None
    head_scale: Tensor | None = None
    dropout: float = 0.0
    need_weights: bool = False

    def of_heads(self, heads: Tensor, num_heads: int) -> Between:
        """The same for these of `num_heads` heads alone."""
        norms = self.norms
        of = functools.partial(of_heads, heads, num_heads)
        scale = of(self.score_scale, -3) if isinstance(self.score_scale, Tensor) else self.score_scale
        return self._replace(
            norms=None if norms is None else lambda q, k, _: norms(q, k, heads),
            score_scale=scale,
            head_scale=of(self.head_scale, -3),
        )

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
    """Of x, w_in, b_in, lora_A, lora_B and seed; settings: num_heads, parts, scale, dropout_p and impl."""
    x, w_in, b_in, lora_A, lora_B, seed = tensors
    num_heads, parts, scale, dropout_p, impl = settings
    rest = (None, None, None, None, seed, num_heads, parts, scale, False, dropout_p, "", impl)
    return Layer._make((x, w_in, b_in, lora_A, lora_B, *rest))


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
        dqkv, dgate = fused.attend_backward(impl, do, kept, {**options, "gate": gate, "mask": mask})
        each = cpu.heads_of(dqkv, options["num_heads"]) if isinstance(dqkv, Tensor) else dqkv
        return None, None, None, *each, dgate, None


# ----------------------------------------------------------------------------------------------------- operators

_WEIGHTS = "Tensor x, Tensor w_in, Tensor? b_in, Tensor? lora_A, Tensor? lora_B, Tensor? seed"
_SETTINGS = "int num_heads, int[] parts, float scale, float dropout_p, str impl"
_QKV = "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? mask"
_LIBRARY = torch.library.Library("fastheads", "FRAGMENT")


def _project(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`[B, N, 3E]` with the deltas, and T, or an empty tensor."""
    projected, low = fused.project(_layer(arguments[:6], arguments[6:]))
    return projected, projected.new_empty(0) if low is None else low


def _project_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    layer = _layer(arguments[:6], arguments[6:])
    B, N, _ = layer.x.shape
    return layer.x.new_empty(B, N, 3 * layer.width), layer.x.new_empty(fused.low_shape(layer))


def _project_backward(dprojected: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, low, needed = arguments[:8]
    layer = _layer(tensors, arguments[8:])
    dy = cpu.heads_of(dprojected, layer.num_heads)
    grads = fused.project_backward(dy, layer, low if low.numel() else None, needed)
    return tuple(dprojected.new_empty(0) if grad is None else grad for grad in grads)


def _project_backward_shapes(dprojected: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    needed = arguments[7]
    return tuple(
        t.new_empty(t.shape) if t is not None and need else dprojected.new_empty(0)
        for t, need in zip(arguments[:5], needed, strict=True)
    )


def _attend(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, log-sum-exp, the pooled token, and what else the gradients are of: on a GPU q, k and v `[B, N, 3E]`, on a CPU
    un-gated heads."""
    q, k, v, gate, mask, tokens, kind, token, gate_form, impl = arguments
    options = _attending(q, gate, mask, gate_form)
    o, cls, (lse, *kept) = cast(Any, fused.attend(impl, (q, k, v), pooled(kind, token, tokens), options))
    last = o.new_empty(0) if kept[-1] is o else kept[-1]
    return o, lse, lse.new_empty(0) if cls is None else cls, last


def _attend_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, _, v, gate, _, _, kind, _, _, impl = arguments
    B, H, N, dh = v.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    kept = (B, N, 3 * H * dh) if impl != "cpu" else (0,) if gate is None else (B, N, H * dh)
    lse = v.new_empty(B, H, N, dtype=wide)
    return v.new_empty(B, N, H * dh), lse, lse.new_empty((B, H, dh) if kind else (0,)), v.new_empty(kept)


def _attend_backward(do: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The gradients of q, k and v, `[B, N, 3E]`, and of gate."""
    q, k, v, gate, mask, lse, kept, gate_form, impl = arguments
    saved = (lse, q, k, v, kept) if impl == "cpu" else (lse, kept)
    dqkv, dgate = fused.attend_backward(impl, do, saved, _attending(q, gate, mask, gate_form))
    if not isinstance(dqkv, Tensor):
        dqkv = torch.stack([d.transpose(1, 2) for d in dqkv], 2).flatten(2)
    return dqkv, do.new_empty(0) if dgate is None else dgate.to(gate.dtype)


def _attend_backward_shapes(do: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, v, gate, *_ = arguments
    B, H, N, dh = v.shape
    return v.new_empty(B, N, 3 * H * dh), do.new_empty(0) if gate is None else gate.new_empty(H)


def _attending(q: Tensor, gate: Tensor | None, mask: Tensor | None, gate_form: str) -> dict[str, Any]:
    return {"num_heads": q.shape[1], "gate": gate, "gate_form": gate_form, "mask": mask, "causal": False}


def _of_project(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.settings = inputs[6:]


def _project_gradients(ctx: Any, dprojected: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    tell_counters()
    needed = list(ctx.needs_input_grad[:5])
    grads = _PROJECT_BACKWARD(dprojected, *ctx.saved_tensors, needed, *ctx.settings)
    return (*needed_of(grads, needed), *(None,) * (1 + len(ctx.settings)))


def _of_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    o, lse, _, kept = output
    qkv = inputs[:3] if inputs[-1] == "cpu" else cpu.heads_of(kept, inputs[0].shape[1])  # views of what is kept
    ctx.save_for_backward(*qkv, *inputs[3:5], lse, kept if kept.numel() else o)
    ctx.settings, ctx.num_heads = inputs[8:], inputs[0].shape[1]


def _attend_gradients(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    tell_counters()
    dqkv, dgate = _ATTEND_BACKWARD(do, *ctx.saved_tensors, *ctx.settings)
    grads = (*cpu.heads_of(dqkv, ctx.num_heads), dgate)
    return (*needed_of(grads, ctx.needs_input_grad[:4]), *(None,) * 6)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(NO_SECOND)


def _operator(name: str, schema: str, run: Any, shapes: Any, gradients: Any, setup: Any = None) -> Any:
    """Registers an operator: what runs, its fake, and its gradients."""
    _LIBRARY.define(f"{name}({schema}", tags=torch.Tag.pt2_compliant_tag)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fastheads::{name}", shapes, lib=_LIBRARY)
    torch.library.register_autograd(f"fastheads::{name}", gradients, setup_context=setup, lib=_LIBRARY)
    return getattr(torch.ops.fastheads, name).default


_PROJECT = _operator(
    "project",
    f"{_WEIGHTS}, {_SETTINGS}) -> (Tensor projected, Tensor low)",
    _project,
    _project_shapes,
    _project_gradients,
    _of_project,
)
_PROJECT_BACKWARD = _operator(
    "project_backward",
    f"Tensor dprojected, {_WEIGHTS}, Tensor low, bool[] needed, {_SETTINGS})"
    " -> (Tensor dx, Tensor dw_in, Tensor db_in, Tensor dlora_A, Tensor dlora_B)",
    _project_backward,
    _project_backward_shapes,
    _no_second_derivative,
)
_ATTEND = _operator(
    "attend",
    f"{_QKV}, Tensor? pool_tokens, str pool, int pool_token, str gate_form, str impl)"
    " -> (Tensor o, Tensor lse, Tensor cls, Tensor kept)",
    _attend,
    _attend_shapes,
    _attend_gradients,
    _of_attend,
)
_ATTEND_BACKWARD = _operator(
    "attend_backward",
    f"Tensor do, {_QKV}, Tensor lse, Tensor kept, str gate_form, str impl) -> (Tensor dqkv, Tensor dgate)",
    _attend_backward,
    _attend_backward_shapes,
    _no_second_derivative,
)


OPERATORS: dict[Any, Any] = {
    _PROJECT: _project,
    _PROJECT_BACKWARD: _project_backward,
    _ATTEND: _attend,
    _ATTEND_BACKWARD: _attend_backward,
}


def workspace(operator: Any, arguments: Any) -> int:
    """Bytes that an operator holds at most inside by Triton's forms, beside what it returns; partial sums are left out.

    The weights as they are multiplied; forward, where the deltas are columns beside them, x beside T and both weights;
    backward the gradients of q, k and v beside U. Of attention nothing large.
    """
    if operator not in (_PROJECT, _PROJECT_BACKWARD):
        return 0
    backward = operator is _PROJECT_BACKWARD
    x, w_in, _, lora_A, *_ = arguments[backward:]
    (B, N, D), E3 = x.shape, w_in.shape[0]
    low = 0 if lora_A is None else lora_A.numel() // D
    numbers = (E3 + low) * D if low or w_in.dtype != x.dtype else 0
    numbers += B * N * (E3 + low) if backward else 0
    if not backward and low and arguments[-1] == "delta":
        numbers += (B * N + E3) * (D + low) + 2 * E3 * low
    return int(numbers * x.dtype.itemsize)


# ------------------------------------------------------------------------------------------------- what is called


def head_attention_in_halves(
    *tensors: Any, recompute: bool | str = False, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gated heads `[B, N, E]`, the pooled token's un-gated `[B, H, dh]` where asked for, and the probabilities
    `[B, H, N, N]` where they are in memory. The arguments are those of `head_attention`, and `Between` after lora_B.

    recompute: True keeps x alone for the backward pass, and computes both halves, and what is between, again there;
    "norms" keeps all, as False does.
    """
    if recompute not in KEEP:
        raise ValueError(f"recompute: got {recompute!r}; takes {', '.join(map(repr, KEEP))}")
    if KEEP[recompute] == "inputs" and torch.is_grad_enabled():
        dropped = options["dropout_p"] > 0 or tensors[5].dropout > 0
        again: Any = checkpoint(_in_halves, *tensors, use_reentrant=False, preserve_rng_state=dropped, **options)
        return cast(tuple[Tensor, Tensor | None, Tensor | None], again)
    return _in_halves(*tensors, **options)


def _in_halves(
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
    tensors = w_in, b_in, lora_A, lora_B, gate, mask
    dropout = dropout_p > 0 and lora_A is not None
    asked: Any = {"extras": ("probabilities",) * between.probabilities, "between": ("norms, positions or a scale",)}
    problem = problem_of(x, w_in, lora_B, num_heads, dropout=dropout, mask=mask, **asked)
    dtype = problem.dtype
    name = choose(impl, problem).name if x.numel() else "reference"
    unseen = _unseen(name, x, *tensors)
    wide = torch.promote_types(dtype, torch.float32)
    x = x.to(dtype)
    options: dict[str, Any] = {"num_heads": num_heads, "targets": targets, "scale": scale, "dropout_p": dropout_p}
    if name == "reference":
        q, k, v = reference.project(x, w_in, b_in, lora_A, lora_B, **options)
    else:
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout else None
        settings = (num_heads, [TARGETS.index(t) for t in targets], scale, dropout_p, name)
        lora = (None if t is None else t.to(wide) for t in (lora_A, lora_B))
        given = (x, w_in, b_in, *lora, seed)
        if unseen:
            q, k, v = _Project.apply(settings, *given)
        else:
            q, k, v = cpu.heads_of(_PROJECT(*given, *settings)[0], num_heads)
    if between.norms is not None:
        q, k = between.norms(q, k, None)
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
    if unseen:
        options = {"num_heads": num_heads, "gate_form": gate_form, "causal": False}
        o, cls = _Attend.apply(options, pool, name, *inputs)
    else:
        kind, token, tokens = pool_arguments(pool)
        o, _, cls, _ = _ATTEND(*inputs, tokens, kind, token, gate_form, name)
        cls = cls.detach() if kind else None
    return o, cls if cls is None or factor is None else cls * factor.detach().unsqueeze(-1), None


def _unseen(name: str, *tensors: Tensor | None) -> bool:
    """Whether it goes without the operators. On a CPU what the functions do is PyTorch's: a mode may see it."""
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
