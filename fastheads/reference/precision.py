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


def centred(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """x `[..., N, D]` minus a constant near its mean: distances stay, rounding does not grow with the offset.

    The first row goes first, so that identical rows become exactly zero. counted: `[N]`; rows that are not have no part
    in the mean, and become zero, whatever they held.
    """
    if not x.shape[-2]:
        return x
    with torch.no_grad():
        if counted is None:
            first = x[..., :1, :]
            shift = (x - first).mean(-2, keepdim=True)
        else:
            first = x.index_select(-2, counted.to(torch.uint8).argmax(-1, keepdim=True))
            inside = (x - first).masked_fill(~counted.unsqueeze(-1), 0)
            shift = inside.sum(-2, keepdim=True) / counted.sum().clamp_min(1)
    centred = (x - first) - shift
    return centred if counted is None else centred.masked_fill(~counted.unsqueeze(-1), 0)
