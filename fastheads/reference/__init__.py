"""The maths of fastheads in plain PyTorch, for any dtype: the oracle of every test, and the fallback.

Every formula is differentiable by autograd. Softmax, log-sum-exp, gates, distances and sums are computed in at
least float32; float64 in gives float64 throughout.
"""

from fastheads.reference.attention import (
    GATES,
    TARGETS,
    HeadAttentionOutput,
    attend,
    gate_heads,
    head_attention,
    head_linear,
    linear_factors,
    pool_heads,
    project,
    sigmoid_gate,
    softmax_gate,
    up_matrix,
)
from fastheads.reference.bandwidths import PRESETS, Preset, constants, kernel_gammas
from fastheads.reference.context import context_kl
from fastheads.reference.mmd import (
    in_domain,
    is_counted,
    kernel_sums,
    mmd_from_sums,
    mmd_weights,
    squared_distances,
)
from fastheads.reference.precision import autocast_off, centre, centred, compute_dtype, transformed, widened

__all__ = [
    "PRESETS",
    "Preset",
    "GATES",
    "HeadAttentionOutput",
    "TARGETS",
    "attend",
    "autocast_off",
    "centre",
    "centred",
    "compute_dtype",
    "constants",
    "context_kl",
    "gate_heads",
    "head_attention",
    "head_linear",
    "in_domain",
    "is_counted",
    "kernel_gammas",
    "kernel_sums",
    "linear_factors",
    "mmd_from_sums",
    "mmd_weights",
    "pool_heads",
    "project",
    "sigmoid_gate",
    "softmax_gate",
    "squared_distances",
    "transformed",
    "up_matrix",
    "widened",
]
