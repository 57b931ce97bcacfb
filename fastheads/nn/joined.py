"""Three weights of a host that lie one after another in memory, so that the operator reads them as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastheads.ops import unwatched

_ALIGNED = 512  # bytes, as an allocation of its own is


def laid_together(weights: Sequence[Tensor]) -> Tensor | None:
    """Frozen weights `[D, D]` moved into one tensor `[3D, D]`, which is returned; None, and nothing moved, where they
    are one, trained, not alike, no plain tensors, or in memory that processes share.

    Each stays the object it was, and by DLPack its storage is its own and no larger than itself: what saves a model
    and looks for tensors in one storage (accelerate drops all but one of them) finds none. Fake ones share it.
    """
    first = weights[0]
    if len(weights) == 1 or torch.is_inference_mode_enabled() or not (_fake(first) or unwatched(*weights)):
        return None
    if first.device.type not in ("cpu", "cuda") or not first.numel() or first.nbytes % _ALIGNED:
        return None
    for weight in weights:
        alike = (weight.shape, weight.dtype, weight.device) == (first.shape, first.dtype, first.device)
        if not alike or weight.requires_grad or weight.is_inference() or not weight.is_contiguous():
            return None
        if weight.device.type == "cpu" and weight.is_shared():
            return None
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.chunk(len(weights)), strict=True):
        weight.data = part if _fake(first) else torch.from_dlpack(part)
    return whole


def _fake(weight: Tensor) -> bool:
    """Whether it has a shape and no values, as those that a step's memory is counted on."""
    return isinstance(weight, FakeTensor)


def lie_in(whole: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether these are the parts of `whole`, in its memory; a tensor that is alive shares it with nobody else."""
    if _fake(whole):
        return all(weight.untyped_storage()._cdata == whole.untyped_storage()._cdata for weight in weights)
    place, size = whole.data_ptr(), whole.nbytes // len(weights)
    return all(
        weight.data_ptr() == place + i * size
        and (weight.nbytes, weight.dtype) == (size, whole.dtype)
        and weight.is_contiguous()
        for i, weight in enumerate(weights)
    )
