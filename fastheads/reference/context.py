"""CAR-FT's context KL. Differentiable by autograd; at least float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastheads.reference.precision import autocast_off, widened


def context_kl(
    features: Tensor, teacher_features: Tensor, context_weights: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """CAR-FT's loss: `KL( p_ctx of the original encoder ‖ p_ctx of the tuned one )`, mean over the batch.

        p_ctx(x) = softmax(logit_scale · f(x) W_ctxᵀ), f L2-normalised

    Args:
        features, teacher_features: `[B, E]` of the tuned and of the original image encoder; no gradient to the latter.
        context_weights: `[C, E]`, normalised.
        logit_scale: the factor itself (100 for CLIP), not its logarithm. Without it the softmax is near uniform and
            the loss near zero.

    Source: CAR-FT (arXiv 2211.16175).
    """
    with autocast_off(features):
        w = widened(context_weights)
        student = F.normalize(widened(features), dim=-1) @ w.to(widened(features).dtype).T
        teacher = F.normalize(widened(teacher_features.detach()), dim=-1) @ w.to(widened(teacher_features).dtype).T
        student, teacher = (logit_scale * student).log_softmax(-1), (logit_scale * teacher).log_softmax(-1)
        return F.kl_div(student, teacher.to(student.dtype), reduction="batchmean", log_target=True)
