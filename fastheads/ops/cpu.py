"""Head attention and its gradients on a CPU, without autograd: products and flash attention are PyTorch's own.

A training step never forms `W + s·B A`: with `T = x Aᵀ` the deltas are added head by head, `q_h += s·T_h B_hᵀ`. In 16
bits that sum would round small ones away, so there they are columns beside W in one product, `[x, T] [W, s·B]ᵀ`.
Inference of many tokens folds deltas and gates into the weights (`infer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastheads.ops.layer import Layer, Pool, cast_together
from fastheads.reference import GATES, pool_heads

# Forming W' reads and writes 2 D² numbers: for fewer than about FEW · D / (columns of T) tokens, 640 at ViT-B's
# published ranks, inference is faster without. Measured between 400 and 800 on one core.
FEW = 40

Heads = tuple[Tensor, Tensor, Tensor]  # of q, k and v


def forward(layer: Layer, pool: Pool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """o, lse, cls, and what `backward` reads: q, k and v `[B, N, 3E]`, T `[B, N, C]`, the heads where o is gated."""
    projected, low = project(layer)
    each = heads_of(projected, layer.num_heads)
    o, lse, cls, heads = attend(*each, gate=_gate(layer), mask=layer.mask, causal=layer.causal, pool=pool)
    return o, lse, cls, projected, low, heads


def kept_shapes(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of what `forward` returns for `backward`."""
    B, N, D = layer.x.shape
    low = (0,) if layer.lora_A is None else (B, N, layer.lora_A.numel() // D)
    return (B, N, 3 * layer.width), low, (0,) if layer.gate is None else (B, N, layer.width)


def backward(
    do: Tensor,
    layer: Layer,
    lse: Tensor,
    projected: Tensor | None,
    low: Tensor | None,
    heads: Tensor | None,
    need: dict[str, bool],
) -> dict[str, Any]:
    """The gradients that are needed, in the notation of `fused.backward`. projected and heads: None where not kept."""
    if projected is None:
        projected, low = project(layer)
    elif low is None and layer.lora_A is not None:
        low = _low(layer)
    each, gate = heads_of(projected, layer.num_heads), _gate(layer)
    options: dict[str, Any] = {"mask": layer.mask, "causal": layer.causal}
    if heads is None:
        heads = attend(*each, gate=None, pool=None, **options)[0]
    *dy, dgate = attend_bwd(do, *each, lse, heads, gate=gate, **options)
    grads: dict[str, Any] = {}
    if gate is not None and dgate is not None and need["gate"]:
        grads["gate"] = _theta_gradient(gate, dgate, layer.gate_form)
    return grads | project_bwd(dy, layer, low, need)


def project_bwd(dy: Sequence[Tensor], layer: Layer, low: Tensor | None, need: dict[str, bool]) -> dict[str, Any]:
    """`backward` from the gradients of q, k and v on, each `[B·N, E]`."""
    x, D = layer.x, layer.x.shape[2]
    grads: dict[str, Any] = {}
    rows, u = x.reshape(-1, D), None
    if low is not None and (need["x"] or need["lora_A"] or need["lora_B"]):
        u, grads["lora_B"] = _low_rank_bwd(dy, low, layer)
    if u is not None and need["lora_A"]:
        lora_A, _ = layer.deltas()
        grads["lora_A"] = _scaled(u, _dropped(layer, x).reshape(-1, D), layer.scale).view_as(lora_A)
    if need["x"]:
        grads["x"] = _dx(dy, u, layer).view_as(x)
    if need["w_in"]:
        grads["w_in"] = torch.cat([d.T @ rows for d in dy])
    if need["b_in"]:
        grads["b_in"] = torch.cat([d.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)) for d in dy])
    return grads


def _gate(layer: Layer) -> Tensor | None:
    """The gates' values."""
    return layer.gate if layer.gate is None or not layer.gate_form else GATES[layer.gate_form](layer.gate)


def _theta_gradient(gate: Tensor, dgate: Tensor, form: str) -> Tensor:
    """The gates' gradient, or theta's where they are of a form: see `kernels.heads.theta_gradient`."""
    if form == "sigmoid":
        return dgate * gate * (1 - gate / 2)
    return gate * (dgate - (gate @ dgate) / len(gate)) if form == "softmax" else dgate


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale · a b`, matrices."""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def infer(layer: Layer, pool: Pool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`forward` where no backward pass will come and nothing is dropped: o, lse, cls."""
    gate, x, H = _gate(layer), layer.x, layer.num_heads
    if layer.lora_A is None or layer.w_in.dtype.itemsize < 4 or _few_tokens(x, layer.lora_A):
        q, k, v = heads_of(project(layer)[0], H)
    else:
        folded = gate if pool is None else None
        each = (F.linear(x, weight, bias) for weight, bias in _folded(layer, folded))
        q, k, v = (y.view(*x.shape[:2], H, -1).transpose(1, 2) for y in each)
        gate = gate if folded is None else None
    o, lse, cls, _ = attend(q, k, v, gate=gate, mask=layer.mask, causal=layer.causal, pool=pool, keep=False)
    return o, lse, cls


def _few_tokens(x: Tensor, lora_A: Tensor) -> bool:
    """Whether x `[B, N, D]` has so few that products beside W cost less than folding the deltas into it."""
    return x.shape[0] * x.shape[1] * (lora_A.numel() // x.shape[2]) < FEW * x.shape[2]


def _folded(layer: Layer, gate: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`W + s·B A` of q, k and v, formed in at least float32 and rounded once, and their biases; v's times the gates."""
    E, D = layer.width, layer.w_in.shape[1]
    lora_A, lora_B = layer.deltas()
    _, H, dh, _ = lora_B.shape
    wide = torch.promote_types(lora_B.dtype, layer.w_in.dtype)
    for part in range(3):
        own = slice(part * E, (part + 1) * E)
        weight, bias = layer.w_in[own], None if layer.b_in is None else layer.b_in[own]
        if part in layer.parts:
            t = layer.parts.index(part)
            down = lora_A[t].to(wide).expand(H, -1, -1)
            summed = torch.baddbmm(weight.to(wide).view(H, dh, D), lora_B[t].to(wide), down, alpha=layer.scale)
            weight = summed.view(E, D)
        if part == 2 and gate is not None:
            factors = gate.repeat_interleave(dh)
            weight, bias = weight * factors[:, None], None if bias is None else bias * factors
        yield weight.to(layer.x.dtype), None if bias is None else bias.to(layer.x.dtype)


def project(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """q, k and v with their deltas, `[B, N, 3E]`, and `T = x Aᵀ`, `[B, N, C]`, of the dropped-out x."""
    x, bias = layer.x, None if layer.b_in is None else layer.b_in.to(layer.x.dtype)
    if layer.lora_A is None:
        return F.linear(x, layer.w_in.to(x.dtype), bias), None
    _, lora_B = layer.deltas()
    T, H, dh, r = lora_B.shape
    low = _low(layer)
    if x.dtype.itemsize < 4:
        return layer.in_one_product(low, layer.w_in, bias), low
    y, up = F.linear(x, layer.w_in.to(x.dtype), bias), lora_B.to(x.dtype).mT
    heads = y.view(-1, 3, H, dh).permute(1, 2, 0, 3)  # [3, H, M, dh]
    each = low.view(-1, T, low.shape[2] // T // r, r).permute(1, 2, 0, 3)  # [T, H or 1, M, r]
    for t, part in enumerate(layer.parts):
        heads[part].baddbmm_(each[t].expand(H, -1, -1), up[t], alpha=layer.scale)
    return y, low


def _low(layer: Layer) -> Tensor:
    """`T = x Aᵀ`, `[B, N, C]`, of the dropped-out x."""
    x, (lora_A, _) = layer.x, layer.deltas()
    return F.linear(_dropped(layer, x), lora_A.reshape(-1, x.shape[2]).to(x.dtype))


def _low_rank_bwd(dy: Sequence[Tensor], low: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """`Uᵀ`, `U_h = dY_h B_h` not scaled, `[C, B·N]`, and `dB_h = s·dY_hᵀ T_h`. dy: of q, k and v, `[B·N, E]`.

    Both transposed: products with r rows take a quarter of the time of those with r columns.
    """
    _, lora_B = layer.deltas()
    T, H, dh, r = lora_B.shape
    M, E = dy[0].shape
    up, each = lora_B.to(low.dtype).mT, low.view(M, T, -1, r).permute(1, 2, 3, 0)  # [T, H or 1, r, M]
    u, dup = low.new_empty(each.shape), low.new_empty(T, H, r, dh)
    for part, own, b, out, db in zip(layer.parts, each, up, u, dup, strict=True):
        heads = dy[part].view(M, H, dh).transpose(0, 1)
        torch.baddbmm(db, own.expand(H, -1, -1), heads, beta=0, alpha=layer.scale, out=db)
        if layer.shared:
            torch.mm(b.transpose(0, 1).reshape(r, E), dy[part].T, out=out[0])
        else:
            torch.bmm(b, heads.mT, out=out)
    return u.view(-1, M), dup.mT.contiguous()


def _dx(dy: Sequence[Tensor], u: Tensor | None, layer: Layer) -> Tensor:
    """`dY W + s·U A`, `[B·N, D]`, of `Uᵀ`; in 16 bits as one product, so that it is rounded once."""
    x, D, E, scale = layer.x, layer.x.shape[2], layer.width, layer.scale
    down = None if u is None or layer.lora_A is None else layer.lora_A.reshape(-1, D)
    if x.dtype.itemsize < 4 and u is not None and down is not None and layer.seed is None:
        return torch.cat((*dy, u.T), 1) @ cast_together(layer.w_in, scale * down, x.dtype)
    weight = layer.w_in.to(x.dtype)
    if x.dtype.itemsize < 4:
        dx = torch.cat(tuple(dy), 1) @ weight
    else:
        dx = dy[0] @ weight[:E]
        for part in (1, 2):
            dx.addmm_(dy[part], weight[part * E : (part + 1) * E])
    if u is None or down is None:
        return dx
    if layer.seed is None:
        return dx.addmm_(u.T, down.to(x.dtype), alpha=scale)
    return dx.add_(_dropped(layer, _scaled(u.T, down.to(x.dtype), scale).view_as(x)).view(-1, D))


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x with elements dropped with probability p, the others divided by 1 − p; `seed [1]` says which."""
    generator = torch.Generator().manual_seed(int(seed))
    keep = torch.rand(x.shape, generator=generator) >= p
    return x * keep.to(x.dtype).div_(1 - p)


def _dropped(layer: Layer, x: Tensor) -> Tensor:
    """What the low-rank path sees of x; the same at every call."""
    return x if layer.seed is None else dropout(x, layer.dropout_p, layer.seed)


def heads_of(qkv: Tensor, num_heads: int) -> Heads:
    """q, k, v of `[B, N, 3E]`, views `[B, H, N, dh]`."""
    B, N, E3 = qkv.shape
    q, k, v = qkv.view(B, N, 3, num_heads, E3 // 3 // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


# A row of a mask whose largest value is below −FAR is shifted to 0: beside −1e6 a score has a digit, and a log-sum-exp
# so rounded would have its P sum to 0.8 or 1.3. Below −BLIND, 1/ε of lse's dtype, such a row passes nothing back.
FAR = 1e3


def _blind(t: Tensor) -> float:
    return 1 / torch.finfo(torch.promote_types(t.dtype, torch.float32)).eps


def _additive(mask: Tensor | None, causal: bool, q: Tensor) -> tuple[Tensor | None, Tensor | None, bool]:
    """The mask as flash attention takes it: additive, expanded, and causality in it unless it stands alone; and what
    its rows were shifted by, `[…, N]`, where any were."""
    if mask is None:
        return None, None, causal
    B, H, N, _ = q.shape
    given = mask.dtype
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    mask = mask.to(q.dtype)
    if causal:
        mask = mask.expand(*mask.shape[:-2], N, N).masked_fill(
            torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf")
        )
    shift = None
    if given != torch.bool:
        top = mask.amax(-1, keepdim=True)
        far = (top < -FAR) & (top > -_blind(top))
        if bool(far.any()):
            top = top.where(far, 0)
            mask, shift = mask - top, top.squeeze(-1)
    return mask.expand(B, H, N, N), shift, False


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    pool: Pool,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o `[B, N, E]` gated, lse `[B, H, N]`, un-gated cls `[B, H, dh]` where asked for, un-gated heads `[B, N, E]` where
    they are not o; not `keep`: they need not live on.

    q, k, v: `[B, H, N, dh]`, any strides.
    """
    mask, shift, causal = _additive(mask, causal, q)
    each, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    lse = lse.contiguous() if shift is None else lse + shift
    if mask is not None:
        once = mask[tuple(slice(0, 1) if s == 0 else slice(None) for s in mask.stride())]
        # Flash attention says 0 of a row that sees no key.
        lse.masked_fill_((once == float("-inf")).all(-1), float("-inf"))
    cls = (
        None if pool is None else pool_heads(each, pool).to(lse.dtype, memory_format=torch.contiguous_format, copy=True)
    )
    if gate is None:
        return each.transpose(1, 2).flatten(2), lse, cls, None
    factors = gate.to(each.dtype).view(-1, 1, 1)
    gated = each * factors if keep else each.mul_(factors)
    return gated.transpose(1, 2).flatten(2), lse, cls, each.transpose(1, 2).flatten(2) if keep else None


def attend_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    heads: Tensor,
    *,
    gate: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k and v as `[B·N, E]`, and of the gates `[H]` where there are any. heads: un-gated."""
    B, H, N, dh = q.shape
    mask, shift, causal = _additive(mask, causal, q)
    do, each = do.reshape(B, N, H, dh), heads.view(B, N, H, dh)
    dgate = None
    if gate is not None:
        dgate = (do * each).sum((0, 1, 3), dtype=gate.dtype)
        do = do * gate.to(do.dtype).view(H, 1)
    if mask is not None:
        # Rows that see nothing, or only keys masked by a number so huge that lse has no digits left: their P is 0.
        none = lse < -_blind(lse)
        if shift is not None:  # which is rounded away in lse
            lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)[1]
        lse = lse.masked_fill(none, float("inf"))
    do = do.contiguous() if 0 in do.stride() else do
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do.transpose(1, 2), q, k, v, each.transpose(1, 2), lse, 0.0, causal, attn_mask=mask
    )
    dq, dk, dv = (gradient.transpose(1, 2).reshape(B * N, H * dh) for gradient in found)
    return dq, dk, dv, dgate
