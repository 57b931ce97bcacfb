"""In which dtype the formulas compute: at least float32 where digits count, autocast's for products."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def transformed() -> bool:
    """Whether this runs inside a transform of torch.func (grad, vmap, jvp …), for which only plain operations are."""
    return torch._C._are_functorch_transforms_active()


def autocast_off(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer would compute in: autocast's where it is on, x's own elsewhere."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def less(x: Tensor, constant: Tensor) -> Tensor:
    """x − constant in the constant's dtype; no other copy of a 16-bit x is made, as a mixed subtraction would."""
    return x.to(constant.dtype, copy=True).sub_(constant)


def centre(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """`[..., 1, D]`: a constant near the mean of x `[..., N, D]`, at least float32, N > 0.

    The first row goes first, so that of identical rows it is that row itself. counted: `[N]`; rows that are not have no
    part in it, whatever they hold.
    """
    with torch.no_grad():
        if counted is None:
            first = widened(x[..., :1, :])
            return first + less(x, first).mean(-2, keepdim=True)
        first = widened(x.index_select(-2, counted.to(torch.uint8).argmax(-1, keepdim=True)))
        first = first.masked_fill(~counted.any(), 0)
        inside = less(x, first).masked_fill_(~counted.unsqueeze(-1), 0)
        return first + inside.sum(-2, keepdim=True) / counted.sum().clamp_min(1)


def centred(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """x `[..., N, D]` minus its `centre`: distances stay, rounding does not grow with the offset, and identical rows
    become exactly zero. Rows that are not `counted` become zero, whatever they held.
    """
    if not x.shape[-2]:
        return x
    found = x - centre(x, counted)
    return found if counted is None else found.masked_fill(~counted.unsqueeze(-1), 0)
