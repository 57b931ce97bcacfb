"""The operators, and who computes them: modules call these, never an implementation."""

from fastheads.ops.dispatch import Choice, Problem, choose
from fastheads.ops.head_attention import head_attention

__all__ = ["Choice", "Problem", "choose", "head_attention"]
