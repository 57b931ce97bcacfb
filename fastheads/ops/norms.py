"""LayerNorm's output from what LayerNorm keeps for its own backward pass, so that nobody else need keep it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Normed(NamedTuple):
    """What LayerNorm keeps: its input, each row's mean and 1/σ `[…, 1]`, weight and bias `[D]` where it has them."""

    input: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def output(self, *dtypes: torch.dtype) -> Tensor:
        """`(input − mean) / σ · weight + bias`, in float32 at least, rounded to its own dtype and each of
        `dtypes` in turn: with a weight and a bias a CPU's LayerNorm bit for bit, whose last two operations are one
        multiply-add, as addcmul's are."""
        y = (self.input - self.mean).mul_(self.rstd)
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))
        elif self.weight is not None:
            y = y.mul_(self.weight)
        elif self.bias is not None:
            y = y.add_(self.bias)
        for dtype in (self.input.dtype, *dtypes):
            y = y.to(dtype)
        return y


def normed(x: Tensor) -> Normed | None:
    """What `x` is the output of, where that is LayerNorm over the last dimension, maybe cast; else None.

    None too where x was written since, or LayerNorm's tensors were, or they are freed; where its statistics have 16
    bits (a CPU's LayerNorm that is wholly bfloat16); under hooks on saved tensors, LayerNorm's or ours, which may hand
    out each only once (torch's checkpoint); where its weights' memory is freed between the passes (FSDP's); and in a
    compiled graph, whose compiler chooses. Nobody sees what is written through `.data`, or before a cast.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return None
    if x._version or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    node: Any = x.grad_fn
    if node is not None and node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    if node is None or node.name() != "NativeLayerNormBackward0":
        return None
    try:
        if getattr(node._raw_saved_input, "unpack_hook", None) is not None:
            return None
        found = Normed(
            node._saved_input, node._saved_result1, node._saved_result2, node._saved_weight, node._saved_bias
        )
    except RuntimeError:  # freed, or written
        return None
    affine = [t for t in (found.weight, found.bias) if t is not None]
    if any([t.numel() != x.shape[-1] or t.untyped_storage().nbytes() < t.nbytes for t in affine]):
        return None
    if found.mean.dtype.itemsize < 4 or found.mean.shape != (*x.shape[:-1], 1) or found.input.device != x.device:
        return None
    return found
