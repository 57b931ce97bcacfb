"""The operators, and who computes them: modules call these, never an implementation."""

from fastheads.ops.dispatch import NAMES, Choice, Problem, asked_for, choose, surroundings
from fastheads.ops.head_attention import head_attention
from fastheads.ops.mmd import kernel_sums, mmd_fused, mmd_small

__all__ = [
    "NAMES",
    "Choice",
    "Problem",
    "asked_for",
    "choose",
    "head_attention",
    "kernel_sums",
    "mmd_fused",
    "mmd_small",
    "surroundings",
]
