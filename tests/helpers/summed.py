"""The backward launchers with the sums of what they leave in parts. Not a test file."""

from fastheads.kernels import attention_bwd as attention
from fastheads.kernels import low_rank
from fastheads.kernels.sums import sums


def attention_bwd(*args, **options):
    """dqkv and dgate `[H]`."""
    dqkv, parts = attention.attention_bwd(*args, **options)
    return dqkv, None if parts is None else sums(parts, None)[0]


def low_rank_bwd(*args):
    """dB `[T, H, dh, r]`."""
    return sums(None, low_rank.low_rank_bwd(*args))[1]
