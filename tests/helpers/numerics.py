"""When is a result right? Against float64, in max and in RMS, it may be off by `factor` times what plain PyTorch in the
same dtype is off by, and 1e-6 of the largest value. Not a test file."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0  # factors of the rule


def plain_heads(
    x, w_in, b_in, lora_A, lora_B, *, num_heads, targets=("q", "v"), scale=1.0, causal=False, mask=None, **unused
):
    """Un-gated heads `[B, H, N, dh]` and log-sum-exp `[B, H, N]` as one would write them in PyTorch, everything in x's
    dtype but the sum of exponentials: linear, LoRA beside it, SDPA."""
    B, N, D = x.shape
    y = F.linear(x, w_in.to(x.dtype), None if b_in is None else b_in.to(x.dtype))
    y = y.view(B, N, 3, num_heads, -1)
    parts = {"q": 0, "k": 1, "v": 2}
    q, k, v = (p.transpose(1, 2) for p in y.unbind(2))
    heads = [q, k, v]
    if lora_A is not None:
        for t, target in enumerate(targets):
            low = torch.einsum("bnd,hrd->bhnr", x, lora_A[t].to(x.dtype))
            delta = low @ lora_B[t].to(x.dtype).mT
            heads[parts[target]] = heads[parts[target]] + scale * delta
    if mask is not None:
        mask = mask.expand(B, num_heads, N, N)
        mask = ~mask if mask.dtype == torch.bool else mask.to(x.dtype)
    if causal:
        keep = torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
        if mask is None:
            mask = keep
        elif mask.dtype == torch.bool:
            mask = mask & keep
        else:
            mask = mask.masked_fill(~keep, -math.inf)
    with torch.no_grad():
        scores = heads[0].float() @ heads[1].float().mT * heads[0].shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        lse = scores.logsumexp(-1)
    return F.scaled_dot_product_attention(*heads, attn_mask=mask), lse


def plain_head_attention(*tensors, gate=None, **options):
    """`[B, N, D]`: `plain_heads`, gated in x's dtype."""
    o, _ = plain_heads(*tensors, **options)
    if gate is not None:
        o = o * gate.to(o.dtype).view(1, -1, 1, 1)
    return o.transpose(1, 2).flatten(2)


def far(t: Tensor) -> Tensor:
    """The numbers of t, its first dimension 2³⁰ elements a step: offsets that 32 bits don't hold. Pages that nobody
    touches take no memory."""
    steps = torch.empty(t.shape[1:], device="meta").stride()
    memory = torch.empty_strided(((t.shape[0] - 1) * 2**30 + t[0].numel(),), (1,), dtype=t.dtype)
    return memory.as_strided(t.shape, (2**30, *steps)).copy_(t)


def assert_right(got: Tensor, plain: Tensor, exact: Tensor, factor: float, what: str = "") -> None:
    """`got` against the rule: `plain` is PyTorch's result in the same dtype, `exact` the float64 one."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert bool(torch.isfinite(got).all()), f"{what}: not finite"
    assert_within(got, plain.detach().double() - exact.detach().double(), exact, factor, what)


def assert_within(got: Tensor, plain_error: Tensor, exact: Tensor, factor: float, what: str = "") -> None:
    """The rule, of errors already taken: `plain_error` may come of more draws of the numbers than `got` does."""
    got, exact = got.detach().double(), exact.detach().double()
    if not exact.numel():
        return
    floor = 1e-6 * float(exact.abs().max())
    for name, size in (("max", lambda e: e.abs().max()), ("RMS", lambda e: e.square().mean().sqrt())):
        error, allowed = float(size(got - exact)), factor * float(size(plain_error)) + floor
        assert error <= allowed, f"{what}: {name} error {error:.3e} is over {allowed:.3e}"
