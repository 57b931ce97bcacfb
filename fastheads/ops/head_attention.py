"""The operator `fastheads::head_attention`: schema, fakes, gradients, and the function that modules call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastheads import reference
from fastheads.ops import fused
from fastheads.ops.dispatch import choose, looked_at, problem_of
from fastheads.ops.flops import tell_counters
from fastheads.ops.layer import NO_SECOND, Pool, needed_of, pool_arguments
from fastheads.ops.norms import Normed, normed
from fastheads.reference import GATES, TARGETS, HeadAttentionOutput

__all__ = ["HeadAttentionOutput", "head_attention", "unwatched"]

# gate_form: "" where gate holds the gates' values, else it is theta, and the form what makes gates of it.
# pool: "" for none, "token" (pool_token), "tokens" (pool_tokens [B]) or "mean" (over pool_token and those after it).
# keep: for a backward pass "projections"; "qkv": without T, where the attention kernel does not read it; "inputs": it
# computes all again; "nothing" where none will come.
# dtype: what is computed in; of the backward pass, whose x has it, that of dx.
_PROBLEM = "int num_heads, int[] parts, float scale, bool causal, float dropout_p, str gate_form, str impl"
_TENSORS = (
    "Tensor x, Tensor w_in, Tensor? b_in, Tensor? lora_A, Tensor? lora_B, Tensor? gate,"
    " Tensor? w_out, Tensor? b_out, Tensor? mask"
)
_LIBRARY = torch.library.Library("fastheads", "DEF")
_LIBRARY.define(
    f"head_attention({_TENSORS}, Tensor? seed, Tensor? pool_tokens, str pool, int pool_token, str keep,"
    f" ScalarType dtype, {_PROBLEM})"
    " -> (Tensor o, Tensor lse, Tensor cls, Tensor projected, Tensor low, Tensor heads, Tensor x_cast)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    f"head_attention_backward(Tensor do, {_TENSORS}, Tensor? seed, Tensor lse, Tensor? projected, Tensor? low,"
    f" Tensor? heads, bool[] needed, ScalarType dtype, {_PROBLEM})"
    " -> (Tensor dx, Tensor dw_in, Tensor db_in, Tensor dlora_A, Tensor dlora_B, Tensor dgate)",
    tags=torch.Tag.pt2_compliant_tag,
)
_OP = "fastheads::head_attention"

for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("head_attention", fused.forward_filled, _device)
    _LIBRARY.impl("head_attention_backward", fused.backward_filled, _device)
torch.library.register_fake(_OP, fused.forward_shapes, lib=_LIBRARY)
torch.library.register_fake(f"{_OP}_backward", fused.backward_shapes, lib=_LIBRARY)

_FORWARD = torch.ops.fastheads.head_attention.default
_BACKWARD = torch.ops.fastheads.head_attention_backward.default
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
_INPUTS = 11  # of the operator that are tensors, or None; they come first
KEEP: dict[bool | str, str] = {False: "projections", "norms": "qkv", True: "inputs"}  # by recompute


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nobody asks what runs here: a compiler, a tracer, a transform, a mode, a tensor's own class.

    Then the functions behind the operators are called without them: a trip through the dispatcher and back takes as
    long as what it is for. The first of the tensors is x, or a gradient, which may be a batch of them (torch's
    `is_grads_batched`).
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or reference.transformed():
        return False
    if torch._C._len_torch_dispatch_stack():
        tell_counters()
        return False
    return plain(*tensors)


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors, the first of them no batch, and nothing but them."""
    batched = torch._C._dispatch_keys(cast(Tensor, tensors[0])).has(_BATCHED)
    return not batched and _PLAIN.issuperset(map(type, tensors))


class _HeadAttention(torch.autograd.Function):
    """The gradients of x, w_in, b_in, lora_A, lora_B and gate, from the gradient of o; see `fused.backward`.

    w_out and b_out have none here.

    `torch.library.register_autograd` would do, but for the 100 µs in which it looks for defaults of 19 arguments.
    keyset: what the operator goes on with; None: without the operator.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, others: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                output: Any = fused.forward(*tensors, *others)
            else:
                output = _FORWARD.redispatch(keyset, *tensors, *others)
        o, lse, cls, projected, low, heads, x_cast = output
        problem, x = others[4:], cast(Tensor, tensors[0])
        if tensors[5] is None and problem[-1] == "cpu" and projected is not None and projected.numel():
            heads = o  # un-gated as they are
        norm = None if others[2] == "projections" else normed(x)
        kept_x = None if norm is not None else x if x_cast is None or not x_cast.numel() else x_cast
        ctx.save_for_backward(kept_x, *tensors[1:10], lse, projected, low, heads, *(norm or ()))
        ctx.settings, ctx.dtype = (x.dtype, *problem), others[3]
        # What only the backward pass reads need not be an output where no operator is.
        output = output[:3] if keyset is None else output
        ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])
        ctx.set_materialize_grads(False)
        return cast(tuple[Tensor | None, ...], output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        do = grad_outputs[0]
        if do is None:
            return (None,) * (2 + _INPUTS)
        needed, (x, *saved) = ctx.needs_input_grad[2:8], ctx.saved_tensors
        if x is None:
            kept = len(saved) - len(Normed._fields)
            x, saved = Normed(*saved[kept:]).output(ctx.settings[0], ctx.dtype), saved[:kept]
        saved = [x, *saved]
        if torch.is_grad_enabled() or not unwatched(do, *saved):
            grads = needed_of(_BACKWARD(do, *saved, list(needed), *ctx.settings), needed)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = list(fused.backward(do, *saved, needed, *ctx.settings))
        return None, None, *grads, *(None,) * (_INPUTS - len(grads))


def _differentiable(keyset: Any, *args: Any) -> Any:
    keyset = keyset & torch._C._after_autograd_keyset
    tensors, others = args[:_INPUTS], args[_INPUTS:]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors[:6]):
        return _HeadAttention.apply(keyset, others, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return _FORWARD.redispatch(keyset, *args)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, others: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, ...] = _BACKWARD.redispatch(keyset, *tensors, *others)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(NO_SECOND)


def _differentiated(keyset: Any, *args: Any) -> Any:
    keyset = keyset & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _NoSecondDerivative.apply(keyset, args[15:], *args[:15])
    with torch._C._AutoDispatchBelowAutograd():
        return _BACKWARD.redispatch(keyset, *args)


_LIBRARY.impl("head_attention", _differentiable, "Autograd", with_keyset=True)
_LIBRARY.impl("head_attention_backward", _differentiated, "Autograd", with_keyset=True)


def head_attention(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    num_heads: int,
    targets: Sequence[str] = ("q", "v"),
    scale: float = 1.0,
    gate: Tensor | None = None,
    gate_form: str = "",
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    pool: Pool = None,
    recompute: bool | str = False,
    impl: str = "auto",
) -> HeadAttentionOutput:
    """Self-attention with per-head low-rank deltas and gates: `reference.head_attention` has arguments and formula.

    o is differentiable (once) in all its weights and x; lse and cls are not. A mask that requires grad
    is the reference path's, as is what runs inside a transform of torch.func. Under autocast it computes in autocast's
    dtype, elsewhere in x's.

    Args, beside the reference's:
        gate_form: `""`: gate is the gates' values. `"softmax"` or `"sigmoid"`: it is theta `[H]`, of which
            `reference.GATES` says how gates are made; the kernels make them, and give theta's gradient.
        w_out, b_out: `[D, E]`, `[D]` or None: the output projection; with it o is `o w_outᵀ + b_out`, the layer's
            answer. The kernels cast it in the launch that casts w_in; a trained one is a linear layer of its own.
        recompute: for the backward pass keep x and lse alone, and compute the projections again there. `"norms"`: keep
            q, k and v too. Neither keeps an x that LayerNorm put out, which is made again from what LayerNorm keeps
            (`norms.normed` says where).
        impl: `"auto"` or the name of an implementation (`dispatch.NAMES`).

    Raises ValueError for a tensor that does not fit the others, naming it, and for an `impl` that cannot compute this.
    """
    _check(x, w_in, b_in, lora_A, lora_B, num_heads, targets, gate, w_out, b_out, mask, dropout_p, pool)
    if recompute not in KEEP:
        raise ValueError(f"recompute: got {recompute!r}; takes {', '.join(map(repr, KEEP))}")
    if gate_form and gate_form not in GATES:
        raise ValueError(f"gate_form: got {gate_form!r}; takes {', '.join(map(repr, ('', *GATES)))}")
    dropout = dropout_p > 0 and lora_A is not None
    problem = problem_of(x, w_in, lora_B, num_heads, dropout=dropout, mask=mask)
    name = choose(impl, problem).name
    if gate_form and name == "reference":
        gate, gate_form = None if gate is None else GATES[gate_form](gate), ""
    inputs = (x, w_in, b_in, lora_A, lora_B, gate)
    apart = w_out is not None and (name in ("cpu", "reference") or _trained(w_out, b_out))
    if name == "reference":
        options = {"num_heads": num_heads, "targets": targets, "scale": scale, "causal": causal}
        out = _by_formula(inputs, recompute, {**options, "mask": mask, "dropout_p": dropout_p, "pool": pool})
    else:
        settings = (num_heads, [TARGETS.index(t) for t in targets], scale, causal, dropout_p, gate_form, name)
        projection = (None, None) if apart else (w_out, b_out)
        out = _by_operator((*inputs, *projection, mask), problem.dtype, dropout, pool, recompute, settings)
    return out._replace(o=F.linear(out.o, w_out, b_out)) if apart and w_out is not None else out


def _trained(*tensors: Tensor | None) -> bool:
    """Whether a gradient of any of them will be asked for."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def _by_formula(
    inputs: tuple[Tensor | None, ...], recompute: bool | str, options: dict[str, Any]
) -> HeadAttentionOutput:
    """The reference, as differentiable as the operator."""

    def plain(*tensors: Any) -> HeadAttentionOutput:
        out = reference.head_attention(*tensors[:5], gate=tensors[5], **options)
        return HeadAttentionOutput(out.o, out.lse.detach(), out.cls)

    if KEEP[recompute] == "inputs" and torch.is_grad_enabled():
        return cast(HeadAttentionOutput, checkpoint(plain, *inputs, use_reentrant=False))
    return plain(*inputs)


def _by_operator(
    tensors: tuple[Any, ...],
    dtype: torch.dtype,
    dropout: bool,
    pool: Pool,
    recompute: bool | str,
    settings: tuple[Any, ...],
) -> HeadAttentionOutput:
    """The operator on x, w_in … mask, with its settings num_heads … impl; without the dispatcher where nobody looks."""
    x, w_in, b_in, *adapters = tensors
    wide = dtype if dtype == torch.float64 else torch.float32
    tensors = (x, w_in, b_in, *[t if t is None or t.dtype == wide else t.to(wide) for t in adapters[:3]], *adapters[3:])
    backward = _trained(*tensors[:6])
    if settings[-1] == "cpu" and not (backward or dropout) and x.numel() and unwatched(*tensors):
        # The way through the dispatcher costs as much as a short sequence's attention.
        layer = fused.Layer._make((x.to(dtype), *tensors[1:], None, *settings))
        return HeadAttentionOutput(*fused.infer(layer, pool))
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout else None
    kind, token, pool_tokens = pool_arguments(pool)
    given: Any = (*tensors, seed, pool_tokens)
    keep = KEEP[recompute] if backward else "nothing"
    others: Any = (kind, token, keep, dtype, *settings)
    if not unwatched(*given):
        o, lse, cls, *_ = _FORWARD(*given, *others)
    elif backward:
        o, lse, cls = _HeadAttention.apply(None, others, *given)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            o, lse, cls, *_ = cast(Any, fused.forward(*given, *others))
    return HeadAttentionOutput(o, lse, cls if kind else None)


def _check(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    num_heads: int,
    targets: Sequence[str],
    gate: Tensor | None,
    w_out: Tensor | None,
    b_out: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    pool: Pool,
) -> None:
    """Raises ValueError, naming the argument, for what doesn't fit the others, and a mask of integers."""

    def refuse(name: str, tensor: Tensor, *takes: tuple[int, ...]) -> None:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; takes {' or '.join(map(str, takes))}")

    if x.dim() != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}; takes [batch, tokens, width]")
    B, N, D = x.shape
    E = w_in.shape[0] // 3
    if w_in.shape != (3 * E, D):
        refuse("w_in", w_in, (3 * D, D))
    if num_heads < 1 or E % num_heads or not E:
        raise ValueError(f"num_heads: got {num_heads}; takes a divisor of the width {E}")
    if b_in is not None and b_in.shape != (3 * E,):
        refuse("b_in", b_in, (3 * E,))
    wrong = [t for t in targets if t not in TARGETS]
    if wrong or len(set(targets)) != len(targets):
        raise ValueError(f"targets: got {tuple(targets)}; takes different ones of {', '.join(TARGETS)}")
    if (lora_A is None) != (lora_B is None):
        raise ValueError(f"lora_{'B' if lora_B is None else 'A'}: got None beside the other; takes both or neither")
    if lora_A is not None and lora_B is not None:
        T, r = len(targets), lora_B.shape[-1]
        if lora_B.shape != (T, num_heads, E // num_heads, r):
            refuse("lora_B", lora_B, (T, num_heads, E // num_heads, r))
        if lora_A.shape != (T, num_heads, r, D) and lora_A.shape != (T, 1, r, D):
            refuse("lora_A", lora_A, (T, num_heads, r, D), (T, 1, r, D))
    if gate is not None and gate.shape != (num_heads,):
        refuse("gate", gate, (num_heads,))
    if w_out is not None and w_out.shape != (D, E):
        refuse("w_out", w_out, (D, E))
    if b_out is not None and (w_out is None or b_out.shape != (D,)):
        if w_out is None:
            raise ValueError("b_out: got one beside no w_out; takes both, or w_out alone")
        refuse("b_out", b_out, (D,))
    if mask is not None and (
        mask.dim() > 4
        or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed((B, num_heads, N, N)), strict=False))
    ):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}; takes one that broadcasts to {(B, num_heads, N, N)}")
    if mask is not None and not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(f"mask: got {mask.dtype}; takes booleans, True = masked, or floats, which are added")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}; takes a probability in [0, 1)")
    if isinstance(pool, str) and pool != "mean":
        raise ValueError(f'pool: got {pool!r}; takes a token index, a tensor [B] of indices, a slice, or "mean"')
    if isinstance(pool, slice):
        first = pool.start
        if not (isinstance(first, int) and 0 <= first < N and (pool.stop, pool.step) == (None, None)):
            raise ValueError(f"pool: got {pool}; takes a slice(first, None) with a first token of 0 to {N - 1}")
    if isinstance(pool, int) and not -N <= pool < N:
        raise ValueError(f"pool: got token {pool}; takes {f'{-N} to {N - 1}' if N else 'none, for x has no tokens'}")
    tokens = pool if isinstance(pool, Tensor) else None
    names = ("w_in", "b_in", "lora_A", "lora_B", "gate", "w_out", "b_out", "mask", "pool")
    device = x.device
    for name, tensor in zip(names, (w_in, b_in, lora_A, lora_B, gate, w_out, b_out, mask, tokens), strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: is on {tensor.device}; takes one on x's device, {x.device}")
    if tokens is not None:
        if tokens.shape != (B,):
            refuse("pool", tokens, (B,))
        if tokens.dtype != torch.int64:
            raise ValueError(f"pool: got {tokens.dtype}; takes int64 indices of tokens")
        if looked_at(tokens) and not bool(((tokens >= 0) & (tokens < N)).all()):
            raise ValueError(f"pool: got tokens from {int(tokens.min())} to {int(tokens.max())}; takes 0 to {N - 1}")
