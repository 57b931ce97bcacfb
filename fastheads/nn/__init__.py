"""Modules over the operators: parameters and state, no maths."""

from fastheads.nn.attention import HeadAttention, head_class
from fastheads.nn.linear import AdaptedLinear
from fastheads.nn.lora import Adapter, FrozenWatch, HeadLoRA, LinearLoRA

__all__ = ["AdaptedLinear", "Adapter", "FrozenWatch", "HeadAttention", "HeadLoRA", "LinearLoRA", "head_class"]
