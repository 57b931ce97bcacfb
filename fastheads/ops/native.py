"""The native CPU kernels of csrc/, by ctypes: optional, since an install without a compiler has none."""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_TILE = (
    *(_POINTER, _INT64, _INT64, _INT64, _INT64, _INT64),  # gram, its strides, layers, rows, columns
    *(_POINTER, _INT64, _POINTER, _INT64),  # x2, y2 and their strides
    *(_POINTER, _POINTER, _INT64),  # segments, domains, their number
    *(_POINTER, _POINTER, _INT64),  # gammas, powers, their number
    *(_POINTER, _POINTER, _POINTER, _INT),  # coeff, self, sums, threads
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """csrc/ as it was built at install; None where it was not, or does not load."""
    folder = Path(__file__).parent.parent
    for suffix in reversed(EXTENSION_SUFFIXES):  # one of every Python's before one of this Python's alone
        path = folder / f"libfastheads{suffix}"
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
            except OSError:
                return None
            found.fastheads_isa.restype = ctypes.c_char_p
            for tile in (found.fastheads_mmd_tile_f32, found.fastheads_mmd_tile_f64):
                tile.argtypes, tile.restype = _TILE, _INT
            return found
    return None


def describe() -> str:
    """What `explain` says of the native kernels: "avx2", or that they were not built."""
    found = library()
    return "not built (no C++ compiler at install)" if found is None else found.fastheads_isa().decode()


def mmd_tile(
    gram: Tensor,
    x2: Tensor,
    y2: Tensor,
    segments: Tensor,
    domains: Tensor,
    gammas: Tensor,
    powers: Tensor,
    coeff: Tensor | None,
    self: Tensor,
) -> Tensor:
    """Kernel sums of a tile of inner products, and in its place its weights: csrc/mmd.h has formula and arguments.

    gram: `[L, R, C]`, float32 or float64, last dimension contiguous, written; x2 `[L, R]`, y2 `[L, C]`, gammas `[L, U]`
    and coeff `[L, S, S]` in its dtype; segments int64 `[S + 1]`, domains and self int64 `[R]`, powers int32
    `[U]`.

    Returns `[L, R, S]` float64.
    """
    found = library()
    if found is None:
        raise RuntimeError("csrc/ was not built: reinstall fastheads with a C++ compiler (g++ or clang) at hand")
    L, R, C = gram.shape
    S = len(segments) - 1
    x2, y2, segments, domains, gammas, powers, self = (
        t.contiguous() for t in (x2, y2, segments, domains, gammas, powers, self)
    )
    coeff = None if coeff is None else coeff.contiguous()
    sums = torch.empty(L, R, S, dtype=torch.float64)
    tile = found.fastheads_mmd_tile_f32 if gram.dtype == torch.float32 else found.fastheads_mmd_tile_f64
    failed = tile(
        *(gram.data_ptr(), gram.stride(0), gram.stride(1), L, R, C),
        *(x2.data_ptr(), x2.stride(0), y2.data_ptr(), y2.stride(0)),
        *(segments.data_ptr(), domains.data_ptr(), S),
        *(gammas.data_ptr(), powers.data_ptr(), len(powers)),
        *(None if coeff is None else coeff.data_ptr(), self.data_ptr(), sums.data_ptr(), torch.get_num_threads()),
    )
    if failed:
        raise ValueError("mmd_tile: an argument is out of range (csrc/mmd.h says which take what)")
    return sums
