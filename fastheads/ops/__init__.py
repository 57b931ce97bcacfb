"""The operators, and who computes them: modules call these, never an implementation.

Both operators are told in the same order:

| | head attention | kernel sums and MMD |
|---|---|---|
| formula | `reference/attention.py` | `reference/mmd.py` |
| schema, fakes, autograd, the function to call | `head_attention.py`; `halves.py` where a host does more | `mmd.py` |
| choice | `dispatch.choose` | `dispatch.choose_mmd` |
| implementations | `fused.py`, of parts: `kernels/`, `cpu.py` | `mmd_triton.py`; `mmd_cpu.py`, `native.py` |
"""

from fastheads.ops.dispatch import NAMES, Choice, Problem, asked_for, choose, surroundings
from fastheads.ops.halves import Between, head_attention_in_halves, of_heads
from fastheads.ops.head_attention import head_attention, unwatched
from fastheads.ops.mmd import kernel_sums, mmd_fused, mmd_small

__all__ = [
    "NAMES",
    "Between",
    "Choice",
    "Problem",
    "asked_for",
    "choose",
    "head_attention",
    "head_attention_in_halves",
    "kernel_sums",
    "mmd_fused",
    "mmd_small",
    "of_heads",
    "surroundings",
    "unwatched",
]
