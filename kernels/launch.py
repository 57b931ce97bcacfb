"""Where every kernel starts: one door, so that a launch can also be compiled for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from fastheads.kernels.direct import start

Run = Callable[..., Any]
_instead: Run | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`; nothing for an empty grid. meta: constexprs, num_warps, num_stages."""
    if _instead is not None:
        _instead(kernel, grid, *args, **meta)
    elif all(grid):
        start(kernel, grid, args, meta)


@contextmanager
def launching(run: Run) -> Iterator[None]:
    """Inside, `run(kernel, grid, *args, **meta)` is called in place of every launch."""
    global _instead
    before, _instead = _instead, run
    try:
        yield
    finally:
        _instead = before


def architecture(x: Tensor) -> int:
    """80 for an A100, 90 for an H100 …, that of the GPU x is on; 0 (the tile tables' safe row) on a CPU.

    For tensors on "meta" it is the one that Triton's active driver compiles for.
    """
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        return 10 * major + minor
    if x.device.type == "meta":
        return int(driver.active.get_current_target().arch)
    return 0


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a `tl.dot` on operands of `dtype`: tf32 only where PyTorch's own products may use it."""
    # Not allow_tf32: it raises where fp32_precision, which follows it, was set.
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def on_grid(programs: int, what: str) -> int:
    """The number of programs, checked against the one grid axis that holds 2³¹ − 1."""
    if programs >= 2**31:
        raise ValueError(
            f"{what}: {programs:,} programs are more than one launch can have (2**31 - 1); split the batch"
        )
    return programs


def strides(x: Tensor, *dims: int) -> tuple[int, ...]:
    """x's strides along `dims`."""
    every = x.stride()
    return tuple([every[d] for d in dims])


def packed(x: Tensor | None) -> Tensor | None:
    """x as the kernels read what is small, gates and bandwidths and the like: contiguous, by a copy where it is not."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor, by name, whose last dimension is not contiguous: what is large is read by rows,
    of any stride, and not copied."""
    for name, x in tensors.items():
        if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: its last dimension has stride {x.stride(-1)}; the kernel takes contiguous rows")
