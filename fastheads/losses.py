"""Losses: MMD between domains, its form that trains gates only, and CAR-FT's context KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastheads import reference
from fastheads.capture import CapturedHeads
from fastheads.ops.dispatch import check_impl

ESTIMATORS = {"domainbed": "biased", "adaptive": "unbiased", "dan": "biased"}


def _check_kernel(kernel: object) -> None:
    if isinstance(kernel, str):
        if kernel not in ESTIMATORS:
            takes = ", ".join(map(repr, ESTIMATORS))
            raise ValueError(f"kernel: got {kernel!r}; takes {takes}, or a sequence of gammas")
        return
    if isinstance(kernel, Tensor):
        if kernel.dim() != 1 or not kernel.numel() or not kernel.is_floating_point():
            raise ValueError(
                f"kernel: got a {kernel.dtype} tensor of shape {tuple(kernel.shape)}; takes gammas, floats [U]"
            )
        values = kernel.tolist() if kernel.device.type == "cpu" else []
    elif isinstance(kernel, Sequence) and all(isinstance(g, (int, float)) for g in kernel):
        values = list(kernel)
        if not values:
            raise ValueError("kernel: got no gammas; takes at least one")
    else:
        raise TypeError(f"kernel: got {kernel!r}; takes {', '.join(map(repr, ESTIMATORS))}, or a sequence of gammas")
    if any(not math.isfinite(g) or g <= 0 for g in values):
        raise ValueError(f"kernel: got gammas {values}; takes finite bandwidths > 0")


def _check_samples(features: Tensor, domains: Tensor, num_domains: int | None) -> int:
    for name, value in (("features", features), ("domains", domains)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; takes a tensor")
    if features.dim() not in (2, 3):
        raise ValueError(f"features: got shape {tuple(features.shape)}; takes [N, D] or [L, N, D]")
    if not features.is_floating_point():
        raise TypeError(f"features: got dtype {features.dtype}; takes floating point")
    if domains.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"domains: got dtype {domains.dtype}; takes int64 domain ids")
    if domains.shape != features.shape[-2:-1]:
        raise ValueError(
            f"domains: got shape {tuple(domains.shape)}; takes [{features.shape[-2]}], one id per sample of features"
        )
    if domains.device != features.device:
        raise ValueError(f"domains: are on {domains.device}, features on {features.device}; put both on one device")
    if num_domains is None:
        num_domains = int(domains.max()) + 1 if domains.numel() else 1
    elif not isinstance(num_domains, int) or isinstance(num_domains, bool) or num_domains < 1:
        raise ValueError(f"num_domains: got {num_domains!r}; takes an integer ≥ 1")
    if domains.device.type == "cpu" and domains.numel():
        low, high = int(domains.min()), int(domains.max())
        if low < 0 or high >= num_domains:
            raise ValueError(f"domains: got ids from {low} to {high}; takes 0 … {num_domains - 1} (num_domains − 1)")
    return num_domains


def mmd(
    features: Tensor,
    domains: Tensor,
    *,
    num_domains: int | None = None,
    kernel: str | Sequence[float] | Tensor = "adaptive",
    estimator: str | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Multi-kernel MMD² between the domains of a batch, for one feature set or one per layer.

        MMD²(a, b) = mean k(a, a') + mean k(b, b') − 2 mean k(a, b),    k(x, y) = Σ_u exp(−γ_u ‖x − y‖²)

    Args:
        features: `[N, D]` or `[L, N, D]`, floating point; computed in at least float32.
        domains: int64 `[N]`, ids in 0 … S-1; sizes may differ.
        num_domains: S. None reads it from `domains` (which waits for the GPU where they are on one).
        kernel: `"adaptive"` (TLlib's bandwidths), `"domainbed"`, `"dan"`, or gammas of your own; bandwidths carry no
            gradient, and are taken over all samples of all domains, layer by layer.
        estimator: `"biased"` or `"unbiased"`; None: the preset's own (adaptive: unbiased; else biased).
        reduction: `"mean"` over the pairs of present domains and over layers: a scalar, 0 where fewer than two domains
            are present. `"none"`: the pairs, `[L, S, S]`, NaN where a domain is absent.
        impl: `"auto"` or an implementation's name.

    Raises ValueError or TypeError naming the argument. Values of domain ids and one-sample domains (an error for
    `"unbiased"`) are checked on the CPU only. Source: the conventions of DomainBed, TLlib and DAN.
    """
    num_domains = _check_samples(features, domains, num_domains)
    _check_kernel(kernel)
    check_impl(impl)
    if estimator is None:
        estimator = ESTIMATORS[kernel] if isinstance(kernel, str) else "biased"
    elif estimator not in ("biased", "unbiased"):
        raise ValueError(f'estimator: got {estimator!r}; takes "biased", "unbiased", or None for the preset\'s own')
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction: got {reduction!r}; takes "mean" or "none"')
    x = features.unsqueeze(0) if features.dim() == 2 else features
    ids = domains.long()
    counts = torch.nn.functional.one_hot(ids, num_domains).sum(0)
    if estimator == "unbiased" and counts.device.type == "cpu" and bool((counts == 1).any()):
        alone = (counts == 1).nonzero().flatten().tolist()
        raise ValueError(f"domains: {alone} have one sample each; the unbiased estimator needs two, biased takes one")
    if x.shape[1] == 0:
        pairs = x.sum() + x.new_full((x.shape[0], num_domains, num_domains), float("nan"))
    else:
        gammas = reference.kernel_gammas(x, kernel)
        K = reference.kernel_sums(x, ids, x, ids, num_domains, gammas, row_offset=0)
        pairs = reference.mmd_from_sums(K, counts, gammas.shape[1], estimator)
    if reduction == "none":
        return pairs
    present = counts > (1 if estimator == "unbiased" else 0)
    chosen = (present.unsqueeze(1) & present).triu(1)
    total = pairs.masked_fill(~chosen, 0.0).sum((-2, -1)) / chosen.sum().clamp_min(1)
    return total.mean() + 0.0 * x.float().sum() if x.shape[1] == 0 else total.mean()


def head_mmd(
    heads: CapturedHeads,
    domains: Tensor,
    *,
    features: str = "heads",
    embedding: Tensor | None = None,
    **mmd_options: Any,
) -> Tensor:
    """The MMD of attention head purification: its gradient reaches the gates and nothing else.

    Args:
        heads: what `capture_heads` recorded.
        domains: int64 `[B]`.
        features: `"heads"`: the gated, concatenated heads of the pooled token at every layer, `[L, B, D]`, with the
            un-gated heads constant, so each layer's gradient is its own. `"embedding"`: the final embedding; the
            gradient flows back through the whole tower to the gates, and only there.
        embedding: `[B, E]` for `"embedding"`: `model.encode_image(images)`, computed inside the same capture.
        mmd_options: of `mmd`.

    Returns a scalar. For `"embedding"` it is the first-order surrogate `L + Σ ⟨∂L/∂theta, theta − theta.detach()⟩`,
    whose value and gates' gradient are L's: safe under DDP, whose hooks the inner `autograd.grad` does not run.

    Raises ValueError or TypeError naming the argument.
    """
    if not isinstance(heads, CapturedHeads):
        raise TypeError(f"heads: got {type(heads).__name__}; takes what `with capture_heads(model) as heads` yields")
    if mmd_options.get("reduction", "mean") != "mean":
        raise ValueError('reduction: head_mmd is a scalar; use mmd(…, reduction="none") on the features for pairs')
    if features == "heads":
        gated = heads.features * heads.gates[:, None, :, None].to(heads.features.dtype)
        return mmd(gated.flatten(2), domains, **mmd_options)
    if features != "embedding":
        raise ValueError(f'features: got {features!r}; takes "heads" or "embedding"')
    if embedding is None:
        raise ValueError('embedding: is needed with features="embedding": pass model.encode_image(images)')
    thetas = [theta for theta in heads.thetas if theta.requires_grad]
    if not thetas:
        raise ValueError("heads: its gates are all frozen (requires_grad=False), so the MMD could train nothing")
    if not isinstance(embedding, Tensor):
        raise TypeError(f"embedding: got {type(embedding).__name__}; takes a tensor [B, E]")
    if not embedding.requires_grad:
        raise ValueError("embedding: carries no gradient; compute it with gradients on, inside the capture")
    loss = mmd(embedding, domains, **mmd_options)
    gradients = torch.autograd.grad(loss, thetas, retain_graph=True, allow_unused=True)
    if all(g is None for g in gradients):
        raise ValueError(
            "embedding: does not depend on the gates; compute it with the captured model, patched and enabled"
        )
    pairs = [(g, theta) for g, theta in zip(gradients, thetas, strict=True) if g is not None]
    return loss.detach() + torch.stack([(g * (theta - theta.detach())).sum() for g, theta in pairs]).sum()


def context_kl(
    features: Tensor, teacher_features: Tensor, context_weights: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """CAR-FT's KL between the contexts the original encoder sees and the tuned one's: `reference.context_kl`, checked.

    Args:
        features, teacher_features: `[B, E]` from the tuned and the original image encoder.
        context_weights: `[C, E]` of `context_text_weights`.
        logit_scale: the factor, `model.logit_scale.exp()` (100 for CLIP): without it the loss is near zero.

    Returns a scalar. Raises TypeError or ValueError naming the argument.
    """
    named = {"features": features, "teacher_features": teacher_features, "context_weights": context_weights}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; takes a tensor")
        if not value.is_floating_point():
            raise TypeError(f"{name}: got dtype {value.dtype}; takes floating point")
        if value.device != features.device:
            raise ValueError(f"{name}: is on {value.device}, features on {features.device}; put both on one device")
    if not isinstance(logit_scale, (int, float, Tensor)):
        raise TypeError(f"logit_scale: got {logit_scale!r}; takes a number, model.logit_scale.exp()")
    if not isinstance(logit_scale, Tensor) and not (math.isfinite(logit_scale) and logit_scale > 0):
        raise ValueError(f"logit_scale: got {logit_scale}; takes a finite number > 0")
    if features.dim() != 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}; takes [B, E]")
    if teacher_features.shape != features.shape:
        raise ValueError(
            f"teacher_features: got shape {tuple(teacher_features.shape)}; takes {tuple(features.shape)} as features"
        )
    if context_weights.dim() != 2 or context_weights.shape[1] != features.shape[1]:
        raise ValueError(f"context_weights: got shape {tuple(context_weights.shape)}; takes [C, {features.shape[1]}]")
    return reference.context_kl(features, teacher_features, context_weights, logit_scale)
