"""The parts of head attention on a CPU: products and flash attention are PyTorch's own (oneDNN, MKL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastheads import reference
from fastheads.reference import TARGETS, pool_heads

# Forming W' reads and writes 3 D² numbers: for fewer than about FEW · D / (columns of T) tokens, 640 at ViT-B's
# published ranks, products beside W cost less. Measured between 400 and 800 on one core.
FEW = 40
_ALIGNED = 16  # as in `fastheads.kernels.fold.padded_rank`


class LowRank(NamedTuple):
    """As `fastheads.kernels.low_rank.LowRank`."""

    low: Tensor
    up: Tensor
    parts: tuple[int, ...]
    scale: float
    shared: bool


def padded_rank(columns: int) -> int:
    """The columns that T has with its padding."""
    return -(-columns // _ALIGNED) * _ALIGNED


def fold(
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    parts: Sequence[int],
    scale: float,
    shared: bool,
    merge: bool,
    dtype: torch.dtype,
    low_too: bool = True,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`[3D + R, D]` in `dtype`: `W (+ s·B A)`, formed in at least float32 and rounded once; below it lora_A, padded.
    And the bias `[3D + R]`, padded.

    low_too: with lora_A's rows, R of them; else R is 0. gate: `[H]`, folded into v's rows.
    """
    D3, D = w_in.shape
    _, H, dh, _ = lora_B.shape
    C = lora_A.numel() // D
    wide = torch.promote_types(lora_B.dtype, w_in.dtype)
    weight = torch.empty(D3 + (padded_rank(C) if low_too else 0), D, dtype=dtype, device=w_in.device)
    for part in range(3):
        rows, own = (w[part * D : (part + 1) * D].view(H, dh, D) for w in (weight, w_in))
        if merge and part in parts:
            t = parts.index(part)
            summed = rows if dtype == wide else torch.empty_like(rows, dtype=wide)
            down = lora_A[t].to(wide).expand(H, -1, -1)
            own = torch.baddbmm(own.to(wide), lora_B[t].to(wide), down, alpha=scale, out=summed)
        if part == 2 and gate is not None:
            own = own * gate.view(H, 1, 1)
        if own is not rows:
            rows.copy_(own)
    if low_too:
        weight[D3 : D3 + C] = lora_A.reshape(C, D)
        weight[D3 + C :] = 0
    return weight, None if b_in is None else F.pad(b_in.to(dtype), (0, len(weight) - D3))


def project_beside(
    x: Tensor,
    dropped: Tensor,
    w_in: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`[B, N, 3D]` q, k, v with their deltas, W untouched, and T `[B, N, R]`, with its padding.

    In 16 bits the delta is formed in the product's accumulators, as columns beside W: see `reference.project`.
    """
    T, H, dh, r = lora_B.shape
    D = lora_A.shape[-1]
    down = lora_A.reshape(-1, D).to(x.dtype)
    C = down.shape[0]
    pad = padded_rank(C) - C
    low = F.linear(dropped, F.pad(down, (0, 0, 0, pad)) if pad else down)
    if x.dtype.itemsize < 4:
        up = reference.up_matrix(lora_B, [TARGETS[p] for p in parts], scale, per_head=lora_A.shape[1] == H)
        up = F.pad(up.to(x.dtype), (0, pad))
        return F.linear(torch.cat((x, low), -1), torch.cat((w_in.to(x.dtype), up), 1), bias), low
    y = F.linear(x, w_in.to(x.dtype), bias)
    _add_deltas(y.view(-1, 3, H, dh).permute(1, 2, 0, 3), low[..., :C], lora_B, parts, scale)
    return y, low


def few_tokens(x: Tensor, lora_A: Tensor | None) -> bool:
    """Whether x `[B, N, D]` has so few that products beside W cost less than folding the deltas into it."""
    return lora_A is not None and x.shape[0] * x.shape[1] * (lora_A.numel() // x.shape[2]) < FEW * x.shape[2]


def project_few(
    x: Tensor,
    w_in: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: Sequence[int],
    scale: float,
) -> Tensor:
    """`[B, N, 3D + R]`, q, k, v with their deltas and T with its padding, as the product with folded weights has it."""
    B, N, D = x.shape
    H, dh = lora_B.shape[1:3]
    down = lora_A.flatten(0, 2).to(x.dtype)
    C, rows, w = len(down), x.reshape(B * N, D), w_in.to(x.dtype)
    whole = x.new_empty(B * N, 3 * D + padded_rank(C))
    y, low, padding = whole.split((3 * D, C, padded_rank(C) - C), 1)
    torch.mm(rows, w.mT, out=y) if bias is None else torch.addmm(bias, rows, w.mT, out=y)
    torch.mm(rows, down.mT, out=low)
    padding.zero_()
    _add_deltas(y.unflatten(1, (3, H, dh)).permute(1, 2, 0, 3), low, lora_B, parts, scale)
    return whole.view(B, N, -1)


def _add_deltas(
    heads: Tensor | Sequence[Tensor], low: Tensor, lora_B: Tensor, parts: Sequence[int], scale: float
) -> None:
    """Adds `s·T Bᵀ` to q, k, v, heads of `[H, B·N, dh]`; low: T, `[B, N, T·(H|1)·r]`."""
    T, H, _, r = lora_B.shape
    each = low.view(-1, T, low.shape[-1] // T // r, r).permute(1, 2, 0, 3)  # [T, H or 1, B·N, r]
    up = lora_B.to(low.dtype).mT
    for t, part in enumerate(parts):
        heads[part].baddbmm_(each[t].expand(H, -1, -1), up[t], alpha=scale)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x with elements dropped with probability p, the others divided by 1 − p; `seed [1]` says which."""
    generator = torch.Generator().manual_seed(int(seed))
    keep = torch.rand(x.shape, generator=generator) >= p
    return x * keep.to(x.dtype).div_(1 - p)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, views `[B, H, N, dh]`."""
    B, N, D3 = qkv.shape
    q, k, v = qkv.view(B, N, 3, num_heads, D3 // 3 // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _additive(mask: Tensor | None, causal: bool, q: Tensor) -> tuple[Tensor | None, bool]:
    """The mask as flash attention takes it: additive, expanded, and causality in it unless it stands alone."""
    if mask is None:
        return None, causal
    B, H, N, _ = q.shape
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    mask = mask.to(q.dtype).expand(B, H, N, N)
    if causal:
        mask = mask.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf"))
    return mask, False


def infer(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    num_heads: int,
    parts: Sequence[int],
    scale: float,
    gate: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All of the operator but dropout where no backward pass will come: o, lse, cls. options: of `attend`."""
    B, N, D = x.shape
    own = [slice(p * D, (p + 1) * D) for p in range(3)]
    bias = None if b_in is None else b_in.to(x.dtype)
    weight, few = w_in, False
    if lora_A is not None and lora_B is not None:
        if w_in.dtype.itemsize < 4:
            y, _ = project_beside(x, x, w_in, bias, lora_A, lora_B, parts, scale)
            o, lse, cls, _ = attend(*_heads(y, num_heads), gate=gate, keep=False, **options)
            return o, lse, cls
        few = x.dtype.itemsize >= 4 and few_tokens(x, lora_A)
        if not few:
            folded = gate if options["pool"] is None else None
            shared = lora_A.shape[1] != num_heads
            weight, bias = fold(
                w_in,
                b_in,
                lora_A,
                lora_B,
                parts=parts,
                scale=scale,
                shared=shared,
                merge=True,
                dtype=x.dtype,
                low_too=False,
                gate=folded,
            )
            if folded is not None:
                gate = None
                if bias is not None:
                    factors = folded.to(x.dtype).repeat_interleave(D // num_heads)
                    bias = torch.cat((bias[: 2 * D], bias[2 * D :] * factors))
    weight = weight.to(x.dtype)
    # Three products: 3 to 7 % faster than one of all their rows on the CPU this was measured on.
    ys = [F.linear(x, weight[rows], None if bias is None else bias[rows]) for rows in own]
    if few and lora_A is not None and lora_B is not None:
        low = F.linear(x, lora_A.reshape(-1, D).to(x.dtype))
        _add_deltas([y.view(B * N, num_heads, -1).transpose(0, 1) for y in ys], low, lora_B, parts, scale)
    heads = (y.view(B, N, num_heads, -1).transpose(1, 2) for y in ys)
    o, lse, cls, _ = attend(*heads, gate=gate, keep=False, **options)
    return o, lse, cls


def attention_fwd(
    qkv: Tensor, *, num_heads: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`attend` to q, k, v in `[B, N, 3D]`, rows of any stride."""
    return attend(*_heads(qkv, num_heads), **options)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    pool: int | str | Tensor | None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o `[B, N, D]` gated, lse `[B, H, N]`, un-gated cls `[B, H, dh]` where asked for, un-gated heads `[B, N, D]` where
    they are not o; not `keep`: they need not live on.

    q, k, v: `[B, H, N, dh]`, any strides.
    """
    mask, causal = _additive(mask, causal, q)
    each, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    lse = lse.contiguous()
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


def attention_bwd(
    do: Tensor,
    qkv: Tensor,
    lse: Tensor,
    heads: Tensor,
    dqkv: Tensor,
    *,
    num_heads: int,
    gate: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Tensor | None:
    """Writes dqkv `[B, N, 3D]`; returns the gradient of the gates `[H]` where there are any."""
    q, k, v = _heads(qkv, num_heads)
    mask, causal = _additive(mask, causal, q)
    per_head = (num_heads, q.shape[-1])
    dgate = None
    if gate is not None:
        wide = (do * heads).unflatten(2, per_head)
        dgate = wide.sum((0, 1, 3), dtype=gate.dtype)
        do = do * gate.to(do.dtype).repeat_interleave(per_head[1])
    each, dheads = (t.unflatten(2, per_head).transpose(1, 2) for t in (heads, do))
    if mask is not None:
        # Rows that see nothing, or only keys masked by a number so huge that lse has no digits left: their P is 0.
        lse = lse.masked_fill(lse < -1 / torch.finfo(lse.dtype).eps, float("inf"))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dheads.contiguous() if 0 in dheads.stride() else dheads, q, k, v, each, lse, 0.0, causal, attn_mask=mask
    )
    for part, gradient in zip(dqkv.unflatten(2, (3, *per_head)).unbind(2), found, strict=True):
        part.copy_(gradient.transpose(1, 2))
    return dgate


def low_rank_bwd(dqkv: Tensor, delta: LowRank, u: Tensor) -> Tensor:
    """Writes `U = s·dY B` into u `[B, N, R]` and returns `dB_h = s·dY_hᵀ T_h`, `[T, H, dh, r]`.

    Each target is one product over all heads, of which the diagonal blocks are kept: r columns per head are too thin
    for a product of their own.
    """
    T, H, dh, r = delta.up.shape
    D, columns = H * dh, r if delta.shared else H * r
    dup = []
    u[..., T * columns :] = 0
    for t, part in enumerate(delta.parts):
        dy, low = dqkv[..., part * D : (part + 1) * D], delta.low[..., t * columns : (t + 1) * columns]
        up = delta.scale * delta.up[t]  # [H, dh, r]
        wide = up.reshape(D, r) if delta.shared else torch.block_diag(*up.unbind(0))
        u[..., t * columns : (t + 1) * columns] = dy @ wide.to(dy.dtype)
        product = delta.scale * (dy.flatten(0, 1).T @ low.flatten(0, 1)).to(up.dtype)
        if not delta.shared:
            product = product.view(H, dh, H, r).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        dup.append(product.reshape(H, dh, r))
    return torch.stack(dup)
