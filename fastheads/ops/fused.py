"""Head attention and its gradients without autograd: what all but the reference run. On a CPU that is `ops.cpu`.

On a GPU it is PyTorch's products between Triton kernels; `impl` says how the deltas enter:

- `stacked`: `W' = W + s·B A`, rounded once, and one product with `[W'; A]`.
- `delta`: one product with `[W; A]`; the attention kernel adds `s·T Bᵀ` to its own q, k and v.
- `one_pass`: the projection too happens in the attention kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastheads.ops import cpu
from fastheads.ops.layer import Layer, Pool, pooled


@functools.cache
def _kernels() -> Any:
    """Triton is imported where it is first needed."""
    from fastheads.kernels import attention_bwd, attention_fwd, dropout, fold, low_rank, one_pass, sums

    return SimpleNamespace(
        LowRank=low_rank.LowRank,
        attention_fwd=attention_fwd.attention_fwd,
        attention_bwd=attention_bwd.attention_bwd,
        low_rank_bwd=low_rank.low_rank_bwd,
        one_pass_fwd=one_pass.one_pass_fwd,
        fold=fold.fold,
        padded_rank=fold.padded_rank,
        dropout=dropout.dropout,
        sums=sums.sums,
    )


def _rows(t: Tensor) -> Tensor:
    """t as one_pass reads what is large: rows of any stride, each contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


class Weights(NamedTuple):
    """The weights of a layer's products. own: `[3E (+ R), D]`, W with the deltas where merged, and lora_A's rows below;
    bias: `[3E (+ R)]`, zeros after b_in; out, out_bias: w_out and b_out."""

    own: Tensor
    bias: Tensor | None
    out: Tensor | None = None
    out_bias: Tensor | None = None


def _weights(layer: Layer, bias: bool = True) -> Weights:
    """The weights of its products in x's dtype: as they are, or from one launch that casts them all.

    bias: whether the biases are read.
    """
    x, b_in, b_out = layer.x, layer.b_in if bias else None, layer.b_out if bias else None
    stored_out = any(t is not None and t.dtype != x.dtype for t in (layer.w_out, b_out))
    stored = stored_out or any(t is not None and t.dtype != x.dtype for t in (layer.w_in, b_in))
    if not stored and (layer.lora_A is None or layer.impl == "one_pass"):
        return Weights(layer.w_in, b_in, layer.w_out, b_out)
    options = {**layer.low_rank, "shared": layer.shared, "merge": layer.merged, "dtype": x.dtype}
    below = stored_out and layer.width == x.shape[2]
    tensors = (layer.w_in, b_in, layer.lora_A, layer.lora_B, *((layer.w_out, b_out) if below else (None, None)))
    found = Weights(*_kernels().fold(*tensors, num_heads=layer.num_heads, **options))
    if below:
        return found
    w_out, b_out = (t if t is None else t.to(x.dtype) for t in (layer.w_out, b_out))
    return found._replace(out=w_out, out_bias=b_out)


def _dropped(layer: Layer, x: Tensor) -> Tensor:
    """What the low-rank path sees of x; the same at every call."""
    if layer.seed is None:
        return x
    dropped: Tensor = _kernels().dropout(_rows(x), layer.dropout_p, layer.seed)
    return dropped


class _Product(NamedTuple):
    """What the projection yields. whole: `[B, N, 3E (+ R)]`, q, k and v in its first `width` columns, and T in the
    others where it was no product of its own, `apart`."""

    whole: Tensor
    apart: Tensor | None
    width: int

    @property
    def qkv(self) -> Tensor:
        return self.whole if self.whole.shape[-1] == self.width else self.whole.narrow(-1, 0, self.width)

    @property
    def low(self) -> Tensor | None:
        """T `[B, N, R]`, None where there is none."""
        rest = self.whole.shape[-1] - self.width
        return self.whole.narrow(-1, self.width, rest) if rest else self.apart


def _project(layer: Layer, weights: Weights, low_too: bool) -> _Product:
    """q, k, v, and `T = x Aᵀ` where there is a delta and somebody reads it (`low_too`, or the attention kernel)."""
    x, E3, weight, bias = layer.x, layer.w_in.shape[0], weights.own, weights.bias
    if layer.lora_A is None or (layer.seed is None and (low_too or not layer.merged)):
        return _Product(F.linear(x, weight, bias), None, E3)
    y = F.linear(x, weight[:E3], None if bias is None else bias[:E3])
    return _Product(y, None if layer.seed is None else F.linear(_dropped(layer, x), weight[E3:]), E3)


def _low_rank(layer: Layer, low: Tensor, up: Tensor) -> Any:
    return _kernels().LowRank(low, up, **layer.low_rank, shared=layer.shared)


def _delta(layer: Layer, product: _Product) -> Any:
    """What the attention kernels add on chip; None where the deltas are in q, k and v already."""
    if layer.merged or layer.lora_B is None or (low := product.low) is None:
        return None
    return _low_rank(layer, low, layer.lora_B)


_KEYS = torch._C.DispatchKeySet
_AUTOCAST: Any = _KEYS(torch._C.DispatchKey.AutocastCPU) | _KEYS(torch._C.DispatchKey.AutocastCUDA)


def _plainly(x: Tensor) -> AbstractContextManager[None]:
    """Without autocast (every dtype here is meant), and on x's GPU, where Triton would take the current one."""
    here = x.get_device()  # -1: a CPU
    if here < 0 or here == torch.cuda.current_device():
        return _without_autocast()
    return _on_its_gpu(x)


def _without_autocast() -> AbstractContextManager[None]:
    """Past its dispatch key; `torch.autocast(…, enabled=False)` does all it does in Python."""
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)
    return guard


@contextmanager
def _on_its_gpu(x: Tensor) -> Iterator[None]:
    with _without_autocast(), torch.cuda.device_of(x):
        yield


# The operator's arguments in the order of its schema: a Layer's tensors (TENSORS of them) first and its settings last;
# between them forward pool_tokens, pool, pool_token, keep and dtype, backward lse, projected, low, heads, needed and
# dtype.
TENSORS, BETWEEN = 10, 5  # forward
KEPT = ("projections", "qkv")  # values of keep that keep q, k and v
GRADIENTS = ("x", "w_in", "b_in", "lora_A", "lora_B", "gate")


def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """The operator on real tensors: o, lse, cls, and what its backward pass reads; None where nothing is kept.

    o is the gated heads, or with w_out their projection.
    projected `[B, N, 3E (+ R)]`: q, k and v, and beside them `T = x Aᵀ` where one product makes both.
    low `[B, N, R]`: T, where it has a product of its own.
    heads: of a CPU alone, where these three are as `cpu.forward` has them.
    x_cast `[B, N, D]`: x in `dtype`, where it has another.
    """
    pool_tokens, pool, pool_token, keep, dtype = arguments[TENSORS : TENSORS + BETWEEN]
    given = arguments[0]
    if not given.numel():
        return tuple(t.zero_() for t in forward_shapes(*arguments))
    x = given.to(dtype)
    layer = Layer(x, *arguments[1:TENSORS], *arguments[TENSORS + BETWEEN :])
    impl = layer.impl
    which = pooled(pool, pool_token, pool_tokens)
    kept: Sequence[Tensor | None] = (None, None, None)
    with _plainly(x):
        if impl == "cpu" and keep == "nothing" and layer.seed is None:
            o, lse, cls = cpu.infer(layer, which)
        elif impl == "cpu":
            o, lse, cls, *kept = cpu.forward(layer, which)
        else:
            weights = _weights(layer)
            if impl == "one_pass":
                o, lse, cls = _one_pass(layer, weights, which)
            else:
                product = _project(layer, weights, low_too=keep == "projections")
                delta = _delta(layer, product)
                o, lse, cls = _kernels().attention_fwd(product.qkv, delta=delta, **layer.attend, pool=which)
                kept = product.whole, product.apart, None
            if weights.out is not None:
                o = F.linear(o, weights.out, weights.out_bias)
    if keep == "qkv":
        kept = kept[0], kept[1] if impl == "delta" else None, kept[2]
    elif keep != "projections":
        kept = (None, None, None)
    x_cast = None if given.dtype == dtype or keep == "nothing" else x
    return o, lse, cls, *kept, x_cast


def forward_filled(*arguments: Any) -> tuple[Tensor, ...]:
    """`forward` as the operator answers: with an empty tensor for every None."""
    o, lse, cls, *kept = cast(Any, forward(*arguments))
    return o, lse, lse.new_empty(0) if cls is None else cls, *(o.new_empty(0) if t is None else t for t in kept)


def infer(layer: Layer, pool: Pool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`forward` of `impl="cpu"` where nothing is kept and nothing dropped, without the operator around it."""
    with _plainly(layer.x):
        return cpu.infer(layer, pool)


def _one_pass(layer: Layer, weights: Weights, pool: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    x, A, E3 = layer.x, layer.lora_A, layer.w_in.shape[0]
    w_in, bias, low = weights.own[:E3], weights.bias, weights.own[E3:]
    if A is not None:
        A = low[: A.numel() // A.shape[-1]].view(A.shape) if len(low) else _rows(A.to(x.dtype))
    inputs = (_rows(x), _rows(w_in), None if bias is None else bias[:E3], A, layer.lora_B)
    out: tuple[Tensor, Tensor, Tensor | None]
    out = _kernels().one_pass_fwd(*inputs, **layer.low_rank, **layer.attend, pool=pool)
    return out


def forward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    """What `forward` returns, without values."""
    _, pool, _, keep, dtype = arguments[TENSORS : TENSORS + BETWEEN]
    given = arguments[0]
    x = given.new_empty(given.shape, dtype=dtype)
    layer = Layer(x, *arguments[1:TENSORS], *arguments[TENSORS + BETWEEN :])
    impl = layer.impl
    B, N, D = x.shape
    wide = torch.promote_types(dtype, torch.float32)
    kept: tuple[tuple[int, ...], ...] = ((0,), (0,), (0,))
    if keep in KEPT and impl == "cpu":
        qkv, low, heads = cpu.kept_shapes(layer)
        kept = qkv, low if keep == "projections" else (0,), heads
    elif keep in KEPT and impl != "one_pass":
        without = layer.lora_A is None or (keep == "qkv" and layer.merged)
        R = 0 if without or layer.lora_A is None else _kernels().padded_rank(layer.lora_A.numel() // D)
        apart = layer.seed is not None and R > 0
        kept = (B, N, 3 * layer.width + (0 if apart else R)), (B, N, R) if apart else (0,), (0,)
    return (
        x.new_empty(B, N, layer.width if layer.w_out is None else layer.w_out.shape[0]),
        x.new_empty(B, layer.num_heads, N, dtype=wide),
        x.new_empty((B, layer.num_heads, layer.width // layer.num_heads) if pool else (0,), dtype=wide),
        *map(x.new_empty, kept),
        x.new_empty((B, N, D) if given.dtype != dtype and keep != "nothing" else (0,)),
    )


def backward(do: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """The gradients of x, w_in, b_in, lora_A, lora_B and gate; None for each one not `needed`.

    With P the probabilities, `g` a head's gate (of theta, where there is a gate_form) and dO the gradient of the gated
    output:

        dP = dO Vᵀ          δ = rowsum(P ∘ dP)         dg = Σ δ         (dθ of it: `kernels.heads.theta_gradient`)
        dS = g·P ∘ (dP − δ) / sqrt(dh)
        dQ = dS K           dK = dSᵀ Q                 dV = g·Pᵀ dO          dY = [dQ, dK, dV]
        U_h = s·dY_h B_h    dB_h = s·dY_hᵀ T_h         dA_h = U_hᵀ x         (never s·dYᵀ x, the dense gradient)
        dx = dY W + U A     = dY W' where the deltas are merged
        dO = do W_out       with w_out, whose own gradient, and b_out's, are not asked for here
        dW = dYᵀ x          db = Σ dY                  (a trainable base only)

    x is in the dtype of the forward pass's products, dx in `dtype`.
    """
    lse, *kept, needed, dtype = arguments[TENSORS : TENSORS + 6]
    layer = Layer(*arguments[:TENSORS], *arguments[TENSORS + 6 :])
    x, *_ = inputs = arguments[: len(GRADIENTS)]
    if not x.numel():
        shapes = backward_shapes(do, *arguments)
        return tuple(t.zero_() if need else None for t, need in zip(shapes, needed, strict=True))
    projected, low, heads = (t if t is not None and t.numel() else None for t in kept)
    need = dict(zip(GRADIENTS, needed, strict=True))
    grads: dict[str, Any]
    with _plainly(x):
        if layer.impl == "cpu":
            grads = cpu.backward(do, layer, lse, projected, low, heads, need)
        else:
            grads = _gradients(do, layer, lse, projected, low, need, dtype)
    return _answers(grads, inputs, need, dtype)


def _answers(
    grads: dict[str, Any], inputs: Sequence[Tensor | None], need: dict[str, bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """The gradients of GRADIENTS' first inputs, each in its input's dtype, that of x, the first, in `dtype`."""
    return tuple(
        None if like is None or not need[name] else _as(grads[name], dtype if like is inputs[0] else like.dtype)
        for name, like in zip(GRADIENTS, inputs, strict=False)
    )


def backward_filled(do: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`backward` as its operator answers: with an empty tensor for every None."""
    return tuple(arguments[0].new_empty(0) if t is None else t for t in backward(do, *arguments))


def _as(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad if grad.dtype == dtype else grad.to(dtype)


def _gradients(
    do: Tensor,
    layer: Layer,
    lse: Tensor,
    projected: Tensor | None,
    low: Tensor | None,
    need: dict[str, bool],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """`backward` by Triton's kernels; projected: None where nothing was kept."""
    if layer.impl == "one_pass":
        layer = layer._replace(impl="delta")
    x, E3 = layer.x, layer.w_in.shape[0]
    weights = Weights(layer.w_in, None)  # as it is, where nothing reads it
    product = None if projected is None else _Product(projected, low, E3)
    again = product is not None and product.low is None and (need["lora_A"] or need["lora_B"])
    if product is None or again or need["x"] or layer.w_out is not None:
        weights = _weights(layer, bias=product is None)
    if weights.out is not None:
        do = (do.flatten(0, 1) @ weights.out).view(*x.shape[:2], layer.width)
    if product is None:
        product = _project(layer, weights, low_too=True)
    elif again:
        product = product._replace(apart=F.linear(_dropped(layer, x), weights.own[E3:]))
    qkv, low = product.qkv, product.low
    dqkv, dboth = _room_for_gradients(layer, low, need)
    _, dgate = _kernels().attention_bwd(do, qkv, lse, delta=_delta(layer, product), out=dqkv, **layer.attend)
    return _from_dy(layer, weights, dqkv, dboth, low, dgate if need["gate"] else None, need, dtype)


def _room_for_gradients(layer: Layer, low: Tensor | None, need: dict[str, bool]) -> tuple[Tensor, Tensor]:
    """dY `[B, N, 3E]`, not written yet, and beside it U's columns, where it will be needed: `[B, N, 3E (+ R)]`."""
    E3, R = layer.w_in.shape[0], 0
    if low is not None and (need["lora_A"] or need["lora_B"] or (need["x"] and not layer.merged)):
        R = low.shape[-1]
    dboth = layer.x.new_empty(*layer.x.shape[:2], E3 + R)
    return dboth.narrow(-1, 0, E3) if R else dboth, dboth


def _from_dy(
    layer: Layer,
    weights: Weights,
    dqkv: Tensor,
    dboth: Tensor,
    low: Tensor | None,
    dgate: Tensor | None,
    need: dict[str, bool],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The gradients from dY on; those of the gates are partial sums, and None where nobody needs them."""
    x, lora_A, lora_B, E3 = layer.x, layer.lora_A, layer.lora_B, dqkv.shape[-1]
    u = None if dboth is dqkv else dboth.narrow(-1, E3, dboth.shape[-1] - E3)
    dup = None
    if u is not None and low is not None and lora_B is not None:
        dup = _kernels().low_rank_bwd(dqkv, _low_rank(layer, low, lora_B), u)
    grads: dict[str, Any] = {}
    parts = dgate, dup if need["lora_B"] else None
    grads["gate"], grads["lora_B"] = _kernels().sums(*parts, gate=layer.gate, gate_form=layer.gate_form)
    if u is not None and lora_A is not None and need["lora_A"]:
        u_rows = u.flatten(0, 1).narrow(1, 0, lora_A.numel() // lora_A.shape[-1])
        grads["lora_A"] = _mm(u_rows.T, _dropped(layer, x).flatten(0, 1), lora_A.dtype).view(lora_A.shape)
    if need["x"]:
        grads["x"] = _dx(layer, dboth, dqkv, u, weights.own, dtype)
    if need["w_in"] or need["b_in"]:
        rows = dqkv.reshape(-1, E3)
        grads["w_in"] = rows.T @ x.flatten(0, 1) if need["w_in"] else None
        grads["b_in"] = rows.sum(0, dtype=torch.float32) if need["b_in"] else None
    return grads


def _wide(x: Tensor) -> bool:
    """Whether a product of tensors like x can leave its float32 accumulators unrounded."""
    return x.is_cuda and x.dtype.itemsize == 2


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, for `dtype`: already in it where that is float32 and the product can leave its accumulators unrounded."""
    return torch.mm(a, b, out_dtype=dtype) if dtype == torch.float32 and _wide(a) else torch.mm(a, b)


def _dx(layer: Layer, dboth: Tensor, dqkv: Tensor, u: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """dx, for `dtype`, from dY and U, in one product with the weights of the forward pass where that has both."""
    E3 = dqkv.shape[-1]

    def times(dy: Tensor, w: Tensor) -> Tensor:
        # As matrices: of a batch of rows that are strided `@` makes a product each.
        return _mm(dy.flatten(0, 1), w, dtype).view(layer.x.shape)

    if layer.lora_A is None or layer.merged:
        return times(dqkv, weight.narrow(0, 0, E3))
    if u is None or layer.seed is None:
        return times(dboth, weight)
    return times(dqkv, weight[:E3]) + _dropped(layer, u @ weight[E3:])


def backward_shapes(do: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What `backward` returns, without values."""
    x, needed, dtype = arguments[0], arguments[TENSORS + 4], arguments[TENSORS + 5]
    return tuple(
        x.new_empty(0) if like is None or not need else like.new_empty(like.shape, dtype=dtype if like is x else None)
        for like, need in zip(arguments[: len(GRADIENTS)], needed, strict=True)
    )


# ------------------------------------------------------------------------------------------------------ in halves


def project(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """q, k and v `[B, N, 3E]` with their deltas in them, and T, where something comes between them and attention."""
    with _plainly(layer.x):
        if layer.impl == "cpu":
            return cpu.project(layer)
        weights = _weights(layer)
        if layer.lora_A is None:
            return F.linear(layer.x, weights.own, weights.bias), None
        E3, bias = layer.w_in.shape[0], None if weights.bias is None else weights.bias[: layer.w_in.shape[0]]
        low = F.linear(_dropped(layer, layer.x), weights.own[E3:])
        if layer.merged:
            return F.linear(layer.x, weights.own[:E3], bias), low
        return layer.in_one_product(low, weights.own[:E3], bias), low


def low_shape(layer: Layer) -> tuple[int, ...]:
    """Of T where `project` makes it; of an empty tensor where there is none."""
    if layer.lora_A is None:
        return (0,)
    B, N, D = layer.x.shape
    columns = layer.lora_A.numel() // D
    return B, N, columns if layer.impl == "cpu" else _kernels().padded_rank(columns)


def project_backward(
    dy: Sequence[Tensor], layer: Layer, low: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, w_in, b_in, lora_A and lora_B from those of q, k and v `[B, H, N, dh]`; see `backward`."""
    x, need = layer.x, dict(zip(GRADIENTS, (*needed, False), strict=True))
    with _plainly(x):
        if layer.impl == "cpu":
            rows = [d.transpose(1, 2).reshape(-1, layer.width) for d in dy]
            grads = cpu.project_bwd(rows, layer, low, need)
        else:
            dqkv, dboth = _room_for_gradients(layer, low, need)
            for part, d in zip(cpu.heads_of(dqkv, layer.num_heads), dy, strict=True):
                part.copy_(d)
            weights = _weights(layer, bias=False) if need["x"] else Weights(layer.w_in, None)
            grads = _from_dy(layer, weights, dqkv, dboth, low, None, need, x.dtype)
    inputs = (x, layer.w_in, layer.b_in, layer.lora_A, layer.lora_B)
    return _answers(grads, inputs, need, x.dtype)


def attend(
    impl: str, qkv: Sequence[Tensor], pool: Pool, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Sequence[Tensor | None]]:
    """Gated heads `[B, N, E]` of q, k and v `[B, H, N, dh]`, the pooled token's, and what `attend_backward` reads.

    options: of the attention kernels, as `Layer.attend` has them; on a CPU gate has the gates' values.
    """
    q, k, v = qkv
    with _plainly(q):
        if impl == "cpu":
            own = {name: options[name] for name in ("gate", "mask", "causal")}
            o, lse, cls, heads = cpu.attend(q, k, v, **own, pool=pool)
            return o, cls, (lse, q, k, v, o if heads is None else heads)
        joined = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2).flatten(2)
        o, lse, cls = _kernels().attention_fwd(joined, **options, pool=pool)
        return o, cls, (lse, joined)


def attend_backward(
    impl: str, do: Tensor, kept: Sequence[Any], options: dict[str, Any]
) -> tuple[Tensor | cpu.Heads, Tensor | None]:
    """The gradients of q, k and v, a CPU's `[B, H, N, dh]`, else together `[B, N, 3E]`, and of gate; see `backward`."""
    lse, *qkv = kept
    with _plainly(do):
        if impl == "cpu":
            q, k, v, heads = qkv
            own = {name: options[name] for name in ("gate", "mask", "causal")}
            *dy, dgate = cpu.attend_bwd(do, q, k, v, lse, heads, **own)
            B, H, N, dh = q.shape
            dq, dk, dv = (d.view(B, N, H, dh).transpose(1, 2) for d in dy)
            return (dq, dk, dv), dgate
        dqkv, dgates = _kernels().attention_bwd(do, *qkv, lse, **options)
        dgate, _ = _kernels().sums(dgates, None, gate=options["gate"], gate_form=options["gate_form"])
        return dqkv, dgate
