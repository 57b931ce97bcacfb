"""The parts of head attention on a CPU: products and flash attention are PyTorch's own (oneDNN, MKL)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastheads import reference
from fastheads.reference import TARGETS, pool_heads

# Forming W' reads and writes 3 D² numbers: for fewer than about FEW · D / (columns of T) tokens, 640 at ViT-B's
# published ranks, products beside W cost less. Measured between 400 and 800 on one core.
FEW = 40
_ALIGNED = 8  # columns of T come in eights, so that rows of [q, k, v, T] in 16 bits start at multiples of 16 bytes


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
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    parts: tuple[int, ...],
    scale: float,
    shared: bool,
    merge: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`[3D + R, D]` in `dtype`: `W (+ s·B A)`, formed in at least float32 and rounded once; below it lora_A, padded."""
    D3, D = w_in.shape
    T, H, dh, _ = lora_B.shape
    C = lora_A.numel() // D
    wide = torch.promote_types(lora_B.dtype, w_in.dtype) if merge else dtype
    weight = torch.empty(D3 + padded_rank(C), D, dtype=wide, device=w_in.device)
    weight[:D3] = w_in
    if merge:
        for t, part in enumerate(parts):
            rows = weight[part * D : (part + 1) * D].view(H, dh, D)
            down = lora_A[t].to(wide).expand(H, -1, -1)
            rows.baddbmm_(lora_B[t].to(wide), down, alpha=scale)
    weight[D3 : D3 + C] = lora_A.reshape(C, D)
    weight[D3 + C :] = 0
    return weight.to(dtype)


def project_beside(
    x: Tensor,
    dropped: Tensor,
    w_in: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`[B, N, 3D]` q, k, v with their deltas, W untouched, and T `[B, N, R]`, with its padding.

    In 16 bits the delta is formed in the product's accumulators, as columns beside W: see `reference.project`.
    """
    T, H, dh, r = lora_B.shape
    C = lora_A.numel() // lora_A.shape[-1]
    pad = padded_rank(C) - C
    down = lora_A.reshape(C, -1).to(x.dtype)
    low = F.linear(dropped, F.pad(down, (0, 0, 0, pad)) if pad else down)
    if x.dtype.itemsize < 4:
        up = reference.up_matrix(lora_B, [TARGETS[p] for p in parts], scale, per_head=lora_A.shape[1] == H)
        up = F.pad(up.to(x.dtype), (0, pad))
        return F.linear(torch.cat((x, low), -1), torch.cat((w_in.to(x.dtype), up), 1), bias), low
    y = F.linear(x, w_in.to(x.dtype), bias)
    heads = y.view(-1, 3, H, dh).permute(1, 2, 0, 3)  # [3, H, B·N, dh]
    each = low.flatten(0, 1)[:, :C].unflatten(1, (T, -1, r)).permute(1, 2, 0, 3)  # [T, H or 1, B·N, r]
    for t, part in enumerate(parts):
        heads[part].baddbmm_(each[t].expand(H, -1, -1), lora_B[t].to(x.dtype).mT, alpha=scale)
    return y, low


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x with elements dropped with probability p, the others divided by 1 − p; `seed [1]` says which."""
    generator = torch.Generator().manual_seed(int(seed))
    keep = torch.rand(x.shape, generator=generator) >= p
    return x * keep.to(x.dtype).div_(1 - p)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, views `[B, H, N, dh]`."""
    B, N, _ = qkv.shape
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, (3, num_heads, -1)).unbind(2))
    return q, k, v


def _additive(mask: Tensor | None, causal: bool, qkv: Tensor, num_heads: int) -> tuple[Tensor | None, bool]:
    """The mask as flash attention takes it: additive, expanded, and causality in it unless it stands alone."""
    if mask is None:
        return None, causal
    B, N, _ = qkv.shape
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=qkv.dtype).masked_fill_(mask, float("-inf"))
    mask = mask.to(qkv.dtype).expand(B, num_heads, N, N)
    if causal:
        mask = mask.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf"))
    return mask, False


def attention_fwd(
    qkv: Tensor,
    *,
    num_heads: int,
    gate: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    pool: int | str | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o `[B, N, D]` gated, lse `[B, H, N]`, un-gated cls `[B, H, dh]` where asked for, un-gated heads `[B, N, D]` where
    they are not o.

    qkv: `[B, N, 3D]`, rows of any stride.
    """
    q, k, v = _heads(qkv, num_heads)
    mask, causal = _additive(mask, causal, qkv, num_heads)
    each, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    lse = lse.contiguous()
    if mask is not None:
        once = mask[tuple(slice(0, 1) if s == 0 else slice(None) for s in mask.stride())]
        # Flash attention says 0 of a row that sees no key.
        lse.masked_fill_((once == float("-inf")).all(-1), float("-inf"))
    cls = (
        None if pool is None else pool_heads(each, pool).to(lse.dtype, memory_format=torch.contiguous_format, copy=True)
    )
    heads = each.transpose(1, 2).flatten(2)
    if gate is None:
        return heads, lse, cls, None
    gated = heads.unflatten(2, (num_heads, -1)) * gate.to(heads.dtype).unsqueeze(1)
    return gated.flatten(2), lse, cls, heads


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
    mask, causal = _additive(mask, causal, qkv, num_heads)
    per_head = (num_heads, q.shape[-1])
    dgate = None
    if gate is not None:
        wide = (do * heads).unflatten(2, per_head)
        dgate = wide.sum((0, 1, 3), dtype=gate.dtype)
        do = do * gate.to(do.dtype).repeat_interleave(per_head[1])
    each, dheads = (t.unflatten(2, per_head).transpose(1, 2) for t in (heads, do))
    if mask is not None:
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # of no keys, which keep their zeros
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
