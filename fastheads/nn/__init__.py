"""Modules over the operators: parameters and state, no maths."""

from fastheads.nn.attention import HeadAttention, head_class
from fastheads.nn.lora import HeadLoRA

__all__ = ["HeadAttention", "HeadLoRA", "head_class"]
