"""Head attention: per-head low-rank deltas, softmax attention, gates. Differentiable by autograd, in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastheads.reference.precision import autocast_off, compute_dtype, transformed, widened

TARGETS = ("q", "k", "v")


class HeadAttentionOutput(NamedTuple):
    """What `head_attention` returns.

    o: `[B, N, E]` gated head outputs, concatenated, before the output projection, in the dtype of the computation.
    lse: `[B, H, N]` log-sum-exp of the scaled, masked scores, at least float32.
    cls: `[B, H, dh]` un-gated head outputs of the pooled token, detached, at least float32; None where `pool` is None.
    """

    o: Tensor
    lse: Tensor
    cls: Tensor | None


def up_matrix(lora_B: Tensor, targets: Sequence[str], scale: float, per_head: bool) -> Tensor:
    """`[3E, T·(H|1)·r]`: every `s·B_h` at the rows of its target and head and the columns of its `A_h`.

    So that the delta of all targets and heads is one product, `Δ = up_matrix @ A` with A `[T·(H|1)·r, D]`.
    """
    T, H, dh, r = lora_B.shape
    eye = torch.eye(H, dtype=lora_B.dtype, device=lora_B.device) if per_head else lora_B.new_ones(H, 1)
    blocks = (scale * lora_B).unsqueeze(3) * eye.view(1, H, 1, -1, 1)  # [T, H, dh, H|1, r]
    blocks = blocks.reshape(T, H * dh, -1)
    rows = []
    for part in TARGETS:
        row = blocks.new_zeros(H * dh, T, blocks.shape[-1])
        if part in targets:
            t = targets.index(part)
            row = torch.cat((row[:, :t], blocks[t].unsqueeze(1), row[:, t + 1 :]), dim=1)
        rows.append(row.reshape(H * dh, -1))
    return torch.cat(rows)


def _joined(x: Tensor, low: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """`W x + up low + b` in one product."""
    return F.linear(torch.cat((x, low), -1), torch.cat((weight, up), 1), bias)


class _JoinedFrozen(torch.autograd.Function):
    """`_joined` beside a frozen W, whose gradient autograd would form with up's, the largest product of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(low, weight, up)
        return _joined(x, low, weight, up, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        low, weight, up = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, dy @ up, None, dy.flatten(0, -2).mT @ low.flatten(0, -2), None


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    """`(W + up down) x + b` `[..., O]`, with W `[O, D]`, down `[R, D]` and up `[O, R]`, or without these two.

    In 16 bits the delta is added inside the product's accumulators, as columns beside W: added to an output that was
    rounded already, anything under half a unit in the last place would vanish.
    """
    dtype = compute_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if down is None or up is None:
        return F.linear(x, weight, bias)
    low, up = F.linear(F.dropout(x, dropout_p), down.to(dtype)), up.to(dtype)
    if dtype in (torch.bfloat16, torch.float16):
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        return (_joined if trained or transformed() else _JoinedFrozen.apply)(x, low, weight, up, bias)
    return F.linear(x, weight, bias) + F.linear(low, up)


def linear_factors(lora_A: Tensor, lora_B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[H·r, D]` and `[O, H·r]`, whose product is a linear layer's delta: every A_h at the columns of its head, and
    every `s·B_h` at the columns of its A_h."""
    return torch.block_diag(*lora_A), scale * lora_B.transpose(0, 1).flatten(1)


def head_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """A linear layer with one low-rank delta per head, on the columns that belong to it: `[..., O]`, in x's dtype or
    autocast's.

        y = W x + b + s · Σ_h B_h A_h x_h

    Args:
        x: `[..., D]`; x_h is the h-th of H equal slices, as heads are concatenated before an output projection.
        weight, bias: `[O, D]`, `[O]` or None.
        lora_A, lora_B: `[H, r, D/H]`, `[H, O, r]`; with H = 1 plain LoRA.
        scale: s.
        dropout_p: probability of dropping an element of the low-rank path's input.
    """
    return low_rank_linear(x, weight, bias, *linear_factors(lora_A, lora_B, scale), dropout_p)


def project(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    num_heads: int,
    targets: Sequence[str] = ("q", "v"),
    scale: float = 1.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each `[B, H, N, dh]`: `q_h = (W_h + s·B_h A_h) x + b_h`, for the targets likewise."""
    down = up = None
    if lora_A is not None and lora_B is not None:
        down = lora_A.flatten(0, 2)  # [T·(H|1)·r, D]
        up = up_matrix(lora_B, targets, scale, per_head=lora_A.shape[1] == num_heads)
    y = low_rank_linear(x, w_in, b_in, down, up, dropout_p)
    B, N, _ = x.shape
    q, k, v = y.view(B, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    score_scale: float | Tensor | None = None,
    attention_dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention: heads `[B, H, N, dh]`, log-sum-exp `[B, H, N]`, probabilities `[B, H, N, N]`; ≥ float32.

    `mask` broadcasts to `[B, H, N, N]`: additive, or boolean with True = masked. `score_scale` is `1/sqrt(dh)` unless
    given.
    """
    with autocast_off(q):
        q, k, v = widened(q), widened(k), widened(v)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if score_scale is None else score_scale)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(mask, float("-inf"))
        elif mask is not None:
            scores = scores + mask
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        lse = scores.logsumexp(-1)
        probabilities = scores.softmax(-1)
        heads = F.dropout(probabilities, attention_dropout) @ v
    return heads, lse, probabilities


def gate_heads(heads: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[B, H, N, dh]` heads, each times its gate, concatenated to `[B, N, E]` and rounded once to `dtype`."""
    if gate is not None:
        heads = heads * gate.to(heads.dtype).view(1, -1, 1, 1)
    return heads.transpose(1, 2).flatten(2).to(dtype)


def pool_heads(heads: Tensor, pool: int | Tensor | str | slice) -> Tensor:
    """`[B, H, dh]`: the heads of one token (an index, or one per sample `[B]`), or the mean over tokens 1 … N-1
    (`"mean"`) or over first … N-1 (`slice(first, None)`).

    An index per sample that is not in 0 … N-1 gives NaN.
    """
    if isinstance(pool, str):
        if pool != "mean":
            raise ValueError(f'pool: got {pool!r}; takes a token index, a tensor [B] of indices, a slice, or "mean"')
        pool = slice(1, None)
    if isinstance(pool, slice):
        return heads[:, :, pool].mean(2)
    if isinstance(pool, int):
        return heads[:, :, pool]
    inside = pool.clamp(0, heads.shape[2] - 1).view(-1, 1, 1, 1)
    found = heads.gather(2, inside.expand(-1, heads.shape[1], 1, heads.shape[3])).squeeze(2)
    return found.masked_fill((inside.flatten() != pool).view(-1, 1, 1), float("nan"))


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
    causal: bool = False,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    pool: int | Tensor | str | slice | None = None,
) -> HeadAttentionOutput:
    """Self-attention with per-head low-rank deltas and per-head gates, before the output projection.

        q_h = (W_q,h + s·B_q,h A_q,h) x + b_q,h        (the other targets likewise)
        o_h = gate_h · softmax(q_h k_hᵀ / sqrt(dh) + mask) v_h

    Args:
        x: `[B, N, D]`.
        w_in, b_in: `[3E, D]`, `[3E]` or None: query, key and value projection stacked, heads in order; E = H·dh is D in
            a whole layer.
        lora_A: `[T, H, r, D]`, or `[T, 1, r, D]` where all heads share the down-projection (plain LoRA).
        lora_B: `[T, H, dh, r]`, one slice per target, in the order of `targets`.
        num_heads: H.
        targets: which of "q", "k", "v" have a delta.
        scale: s.
        gate: `[H]` or None for no gating.
        causal: token i sees tokens 0 … i.
        mask: broadcasts to `[B, H, N, N]`; additive, or boolean with True = masked.
        dropout_p: probability of dropping an element of the low-rank path's input.
        pool: which token's un-gated heads to return as `cls` (see `pool_heads`).

    Source: the published descriptions of attention head purification (arXiv 2412.07226).
    """
    q, k, v = project(
        x, w_in, b_in, lora_A, lora_B, num_heads=num_heads, targets=targets, scale=scale, dropout_p=dropout_p
    )
    heads, lse, _ = attend(q, k, v, mask=mask, causal=causal)
    return HeadAttentionOutput(
        o=gate_heads(heads, gate, q.dtype), lse=lse, cls=None if pool is None else pool_heads(heads.detach(), pool)
    )


def softmax_gate(theta: Tensor) -> Tensor:
    """`g = H · softmax(theta)`, `[..., H]`, written so that theta = 0 gives exactly 1 for every H."""
    e = (theta - theta.detach().amax(-1, keepdim=True)).exp()
    return theta.shape[-1] * e / e.sum(-1, keepdim=True)


def sigmoid_gate(theta: Tensor) -> Tensor:
    """`g = 2 · sigmoid(theta)`, `[..., H]`: starts at 1, each head for itself (ours, not the paper's)."""
    return 2 * theta.sigmoid()


GATES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax_gate, "sigmoid": sigmoid_gate}
