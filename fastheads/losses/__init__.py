"""Losses: the MMD between domains, its form that trains gates only, CAR-FT's context KL, and the texts it needs."""

from fastheads.losses.context import class_text_weights, context_kl, context_text_weights
from fastheads.losses.mmd_loss import head_mmd, mmd

__all__ = ["class_text_weights", "context_kl", "context_text_weights", "head_mmd", "mmd"]
