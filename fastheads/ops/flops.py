"""Floating-point operations of `fastheads::head_attention`, of its halves `project` and `attend`, and of their
gradients, for `torch.utils.flop_counter`.

Counted is what the formulas ask for, as PyTorch counts its own attention on a GPU: two operations per multiplication in
a product, softmax and gates free, scores computed again in the backward pass. With E the width of all heads, T targets,
C rows of lora_A, rank r:

    forward   x W  2·BN·3E·D      T = x Aᵀ  2·BN·D·C      T Bᵀ  2·BN·T·D·r      attention  4·B·N²·E
              o W_out  2·BN·E·D, where that is the operator's
    backward  for each gradient asked for as many as its products in `fused.backward`; attention 10·B·N²·E

`register_flop_formula` is not used: its module imports Triton, and who imports fastheads has not asked for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def _products(x: Tensor, w_in: Tensor, lora_A: Tensor | None, lora_B: Tensor | None) -> tuple[int, int, int]:
    """Operations of x W, of T = x Aᵀ, and of T Bᵀ head by head."""
    B, N, _ = x.shape
    projection = 2 * B * N * w_in.numel()
    if lora_A is None or lora_B is None:
        return projection, 0, 0
    return projection, 2 * B * N * lora_A.numel(), 2 * B * N * lora_B.numel()


def _projection_out(x: Tensor, w_out: Tensor | None) -> int:
    """Operations of the heads' product with w_out, and of its gradient."""
    return 0 if w_out is None else 2 * x.shape[0] * x.shape[1] * w_out.numel()


def _score_product(x: Tensor, w_in: Tensor) -> int:
    """Operations of q kᵀ, and of every other product of attention."""
    B, N, _ = x.shape
    return 2 * B * N * N * (w_in.shape[0] // 3)


def forward_flops(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    gate: Tensor | None,
    w_out: Tensor | None,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    return sum(_products(x, w_in, lora_A, lora_B)) + 2 * _score_product(x, w_in) + _projection_out(x, w_out)


def backward_flops(
    do: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    gate: Tensor | None,
    w_out: Tensor | None,
    b_out: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    projected: Tensor,
    low: Tensor,
    heads: Tensor,
    needed: Sequence[bool],
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    products = 5 * _score_product(x, w_in) + _projection_out(x, w_out)
    products += project_backward_flops(projected, x, w_in, b_in, lora_A, lora_B, seed, low, needed)
    if not projected.numel():  # nothing was kept
        products += sum(_products(x, w_in, lora_A, lora_B))
    return products


def project_flops(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, *_: Any, **__: Any
) -> int:
    return sum(_products(x, w_in, lora_A, lora_B))


def project_backward_flops(
    dprojected: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    seed: Tensor | None,
    low: Tensor,
    needed: Sequence[bool],
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    projection, down, up = _products(x, w_in, lora_A, lora_B)
    dx, dw, _, dA, dB, *_ = needed
    products = projection * (dx + dw)  # dY W, dYᵀ x
    products += up * ((dx or dA) + dB)  # U = dY B, dYᵀ T
    return products + down * (dA + dx)  # Uᵀ x, U A


def attend_flops(q: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * 2 * q.numel() * q.shape[2]


def attend_backward_flops(do: Tensor, q: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 5 * 2 * q.numel() * q.shape[2]


def tell_counters() -> None:
    """Gives the formulas to every `FlopCounterMode` that is on."""
    for mode in _get_current_dispatch_mode_stack():
        formulas = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if formulas is not None:
            own = torch.ops.fastheads
            formulas.setdefault(own.head_attention, forward_flops)
            formulas.setdefault(own.head_attention_backward, backward_flops)
            formulas.setdefault(own.project, project_flops)
            formulas.setdefault(own.project_backward, project_backward_flops)
            formulas.setdefault(own.attend, attend_flops)
            formulas.setdefault(own.attend_backward, attend_backward_flops)
