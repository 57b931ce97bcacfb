"""Modules over the operators: parameters and state, no maths."""

from fastheads.nn.attention import HeadAttention, head_class
from fastheads.nn.lora import FrozenWatch, HeadLoRA

__all__ = ["FrozenWatch", "HeadAttention", "HeadLoRA", "head_class"]
