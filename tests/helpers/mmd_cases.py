"""What the tests of the MMD operators share: features, comparisons. Not a test file."""

import pytest
import torch

from fastheads.ops import native

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
GAMMAS = (0.02, 0.3, 1.5)
PANELS = (2**22, 64)  # WORKSPACE: all in one panel, and panels of 64 rows, the fewest there are
needs_library = pytest.mark.skipif(native.library() is None, reason="csrc/ was not built: no C++ compiler at install")


def gammas_of(L, values=GAMMAS, dtype=F64):
    """`[L, U]`, another row for every layer."""
    return torch.tensor(values, dtype=dtype) * (1 + torch.arange(L, dtype=dtype).unsqueeze(1))


def close(got, want, tolerance=1e-12, what=""):
    """Within `tolerance` of the largest."""
    assert got.shape == want.shape and torch.isfinite(got).all(), what
    if got.numel():
        got, want = got.detach().double(), want.detach().double()
        error, size = float((got - want).abs().max()), float(want.abs().max())
        assert error <= tolerance * size, f"{what}: off by {error:.1e}, of {size:.1e}"


def leaf(x):
    return x.detach().clone().requires_grad_()
