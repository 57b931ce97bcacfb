"""The maximum mean discrepancy between domains, and its form that trains gates only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastheads import ops, reference
from fastheads.capture import CapturedHeads
from fastheads.losses.samples import Rows, bandwidths, gather_rows
from fastheads.ops.dispatch import MAX_DOMAINS, MMD_NAMES, SMALL, SMALL_PRESETS, check_impl, choose_mmd, looked_at
from fastheads.reference import PRESETS


def _check_kernel(kernel: object, features: Tensor) -> None:
    if isinstance(kernel, str):
        if kernel not in PRESETS:
            takes = ", ".join(map(repr, PRESETS))
            raise ValueError(f"kernel: got {kernel!r}; takes {takes}, or a sequence of gammas")
        return
    if isinstance(kernel, Tensor):
        if kernel.dim() != 1 or not kernel.numel() or not kernel.is_floating_point():
            raise ValueError(
                f"kernel: got a {kernel.dtype} tensor of shape {tuple(kernel.shape)}; takes gammas, floats [U]"
            )
        if kernel.device != features.device:
            raise ValueError(f"kernel: is on {kernel.device}, features on {features.device}; put both on one device")
        values = kernel.tolist() if looked_at(kernel) else []
    elif isinstance(kernel, Sequence) and all(isinstance(g, (int, float)) for g in kernel):
        values = list(kernel)
        if not values:
            raise ValueError("kernel: got no gammas; takes at least one")
    else:
        raise TypeError(f"kernel: got {kernel!r}; takes {', '.join(map(repr, PRESETS))}, or a sequence of gammas")
    if not all(0 < g < math.inf for g in values):
        raise ValueError(f"kernel: got gammas {values}; takes finite bandwidths > 0")


def _check_samples(features: Tensor, domains: Tensor, num_domains: int | None) -> None:
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
    if num_domains is not None and (
        not isinstance(num_domains, int) or isinstance(num_domains, bool) or num_domains < 1
    ):
        raise ValueError(f"num_domains: got {num_domains!r}; takes an integer ≥ 1")


def _number_of_domains(domains: Tensor, num_domains: int | None) -> int:
    """S, and that the ids are in 0 … S-1 (where `looked_at`)."""
    if num_domains is None:
        if domains.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "num_domains: got None while a CUDA graph is captured, when ids cannot be read; takes their number"
            )
        num_domains = max(1, int(domains.max()) + 1) if domains.numel() else 1
    if looked_at(domains) and domains.numel():
        low, high = int(domains.min()), int(domains.max())
        if low < 0 or high >= num_domains:
            raise ValueError(f"domains: got ids from {low} to {high}; takes 0 … {num_domains - 1} (num_domains − 1)")
    return num_domains


def _check_no_lone_sample(domains: Tensor) -> None:
    """That no domain has one sample, which the unbiased estimator cannot take (where `looked_at`)."""
    if looked_at(domains):
        ids, counts = domains.unique(return_counts=True)
        if bool((counts == 1).any()):
            alone = ids[counts == 1].tolist()
            raise ValueError(
                f"domains: {alone} have one sample each; the unbiased estimator needs two, biased takes one"
            )


def _check_pair_weights(pair_weights: Tensor | None, reduction: str, num_domains: int, device: torch.device) -> None:
    if pair_weights is None:
        return
    if not isinstance(pair_weights, Tensor) or not pair_weights.is_floating_point():
        raise TypeError(f"pair_weights: got {type(pair_weights).__name__}; takes a floating-point tensor [S, S]")
    if pair_weights.device != device:
        raise ValueError(f"pair_weights: are on {pair_weights.device}, features on {device}; put both on one device")
    if tuple(pair_weights.shape) != (num_domains, num_domains):
        raise ValueError(f"pair_weights: got shape {tuple(pair_weights.shape)}; takes {(num_domains, num_domains)}")
    if pair_weights.requires_grad or reduction != "mean":
        raise ValueError(
            'pair_weights: are constants of reduction="mean"; weight the pairs of reduction="none" yourself'
        )
    if looked_at(pair_weights):
        fit = (pair_weights >= 0) & (pair_weights < math.inf) & (pair_weights == pair_weights.mT)
        if not bool(fit.all()):
            raise ValueError("pair_weights: takes symmetric, finite weights ≥ 0")


def mmd(
    features: Tensor,
    domains: Tensor,
    *,
    num_domains: int | None = None,
    kernel: str | Sequence[float] | Tensor = "adaptive",
    estimator: str | None = None,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Multi-kernel MMD² between the domains of a batch, for one feature set or one per layer.

        MMD²(a, b) = mean k(a, a') + mean k(b, b') − 2 mean k(a, b),    k(x, y) = Σ_u exp(−γ_u ‖x − y‖²)

    Args:
        features: `[N, D]` or `[L, N, D]`, floating point; computed in at least float32.
        domains: int64 `[N]`, ids in 0 … S-1; sizes may differ. On a CPU another id is an error; on a GPU, where looking
            would wait for it, such samples count nowhere: not in the loss, the bandwidths or the gradient.
        num_domains: S. None reads it from `domains`, which waits for the GPU where they are on one; given, nothing
            does, and a step with the loss in it can be captured as a CUDA graph (docs/cuda-graphs.md).
        kernel: `"adaptive"` (TLlib's bandwidths), `"domainbed"`, `"dan"`, or gammas of your own; bandwidths carry no
            gradient, and are taken over all samples of all domains, layer by layer.
        estimator: `"biased"` or `"unbiased"`; None: the preset's own (adaptive: unbiased; else biased).
        reduction: `"mean"` over the pairs of present domains and over layers: a scalar, 0 where fewer than two domains
            are present. `"none"`: the pairs, `[L, S, S]`, NaN where a domain is absent; S is at most N.
        pair_weights: `[S, S]`, symmetric, ≥ 0: how much each pair counts in the mean; None: all alike.
        group: a process group (`torch.distributed.group.WORLD`) whose batches are one: each process keeps its rows, all
            columns are gathered. Every process returns the global loss, and its features' gradient is world size times
            a single process's, so that DDP's mean over processes gives a single process's parameter gradients. Batches
            may differ in size: a group with a GPU's backend alone ("nccl") waits for the GPU to learn how large they
            are. None: the process's own batch.
        impl: `"auto"`: on a CPU `"cpu"`, on a GPU `"triton"` (both: loss and gradient in one sweep, memory O(N·D)),
            else `"reference"`, which alone has a second derivative.

    Raises ValueError or TypeError naming the argument. Values of domain ids and one-sample domains (an error for
    `"unbiased"`) are checked on the CPU only, and not inside `torch.compile`. Source: the conventions of DomainBed,
    TLlib and DAN.
    """
    return _mmd(features, domains, None, num_domains, kernel, estimator, reduction, pair_weights, group, impl)


def _mmd(
    features: Tensor,
    domains: Tensor,
    gate: Tensor | None = None,
    num_domains: int | None = None,
    kernel: str | Sequence[float] | Tensor = "adaptive",
    estimator: str | None = None,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    group: Any = None,
    impl: str = "auto",
    layer_weights: Sequence[float] | None = None,
) -> Tensor:
    """`mmd` of the features `[L, N, H·dh]`, times their heads' gates `[L, H]` where given; layers weighted so."""
    _check_samples(features, domains, num_domains)
    _check_kernel(kernel, features)
    check_impl(impl, names=MMD_NAMES)
    if estimator is None:
        estimator = PRESETS[kernel].estimator if isinstance(kernel, str) else "biased"
    elif estimator not in ("biased", "unbiased"):
        raise ValueError(f'estimator: got {estimator!r}; takes "biased", "unbiased", or None for the preset\'s own')
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction: got {reduction!r}; takes "mean" or "none"')
    x = features.unsqueeze(0) if features.dim() == 2 else features
    known = not isinstance(kernel, str) or kernel in SMALL_PRESETS or PRESETS[kernel].of == "nothing"
    small = known and reduction == "mean" and pair_weights is None and group is None
    small = small and x.shape[1] <= SMALL and x.numel() > 0
    if gate is not None and not (small and choose_mmd(impl, x, min(num_domains or 1, x.shape[1])) == "triton"):
        x = (x.unflatten(2, (gate.shape[1], -1)) * gate[:, None, :, None].to(x.dtype)).flatten(2)
        gate = None
    rows = Rows(x, domains.long()) if group is None else gather_rows(x, domains.long(), group)
    num_domains, samples = _number_of_domains(rows.all_domains, num_domains), len(rows.all_domains)
    _check_pair_weights(pair_weights, reduction, num_domains, x.device)
    if estimator == "unbiased":
        _check_no_lone_sample(rows.all_domains)
    if not samples:
        nothing = 0.0 * x.float().sum()
        return nothing if reduction == "mean" else nothing + x.new_full((len(x), num_domains, num_domains), math.nan)
    if reduction == "none" and num_domains > samples:
        raise ValueError(
            f'num_domains: got {num_domains} for {samples} samples; reduction="none" takes at most as many'
        )
    if num_domains > MAX_DOMAINS and reduction == "mean":
        rows, which = rows.renumbered(num_domains, looked_at(domains))
        pair_weights = None if pair_weights is None else pair_weights[which][:, which]
        num_domains = len(which)
    if small and choose_mmd(impl, x, num_domains) == "triton":
        return _over_layers(_small(x, rows.domains, num_domains, kernel, estimator, gate), layer_weights)
    counts = reference.in_domain(rows.all_domains, num_domains).sum(0)
    counted = None if looked_at(domains) else reference.is_counted(rows.all_domains, num_domains)
    gammas, powers = bandwidths(rows.all, kernel, counted)
    if reduction == "none":
        K = rows.kernel_sums(num_domains, gammas, powers, impl)
        return reference.mmd_from_sums(K, counts, gammas.shape[1], estimator)
    coeff, constant = reference.mmd_weights(counts, gammas.shape[1], estimator, pair_weights)
    loss = rows.weighted_sums(num_domains, gammas, powers, coeff, impl)
    return _over_layers(loss + constant.to(loss.dtype), layer_weights)


def _over_layers(each: Tensor, weights: Sequence[float] | None) -> Tensor:
    """The weighted mean of `[L]`; None: all alike."""
    return each.mean() if weights is None else each @ each.new_tensor(weights) / sum(weights)


def _check_layer_weights(weights: Sequence[float], features: str, layers: int) -> None:
    if features != "heads":
        raise ValueError(f'layer_weights: got {weights!r} with features={features!r}; takes None but with "heads"')
    if len(weights) != layers or not all(0 <= w < math.inf for w in weights) or not sum(weights):
        raise ValueError(f"layer_weights: got {weights!r}; takes {layers} finite numbers ≥ 0, one a layer, not all 0")


def _small(
    x: Tensor,
    domains: Tensor,
    num_domains: int,
    kernel: str | Sequence[float] | Tensor,
    estimator: str,
    gate: Tensor | None = None,
) -> Tensor:
    """The MMD of every layer `[L]` in one Triton launch, which finds a preset's bandwidths itself."""
    if isinstance(kernel, str) and kernel in SMALL_PRESETS:
        return ops.mmd_small(x, domains, num_domains=num_domains, preset=kernel, estimator=estimator, gate=gate)
    gammas, powers = bandwidths(x, kernel)  # constants: of no features
    return ops.mmd_small(
        x,
        domains,
        num_domains=num_domains,
        preset=None,
        gammas=gammas,
        powers=powers,
        estimator=estimator,
        gate=gate,
    )


def head_mmd(
    heads: CapturedHeads,
    domains: Tensor,
    *,
    features: str = "heads",
    embedding: Tensor | None = None,
    parameters: Sequence[Tensor] | None = None,
    layer_weights: Sequence[float] | None = None,
    **mmd_options: Any,
) -> Tensor:
    """The MMD of attention head purification: its gradient reaches the gates and nothing else, unless told otherwise.

    Args:
        heads: what `capture_heads` recorded.
        domains: int64 `[B]`.
        features: `"heads"`: the gated, concatenated heads of the pooled token at every layer, `[L, B, D]`, with the
            un-gated heads constant, so each layer's gradient is its own. `"embedding"`: the final embedding; the
            gradient flows back through the whole tower to the gates, and only there.
        embedding: `[B, E]` for `"embedding"`: `model.encode_image(images)`, computed inside the same capture.
        parameters: what the gradient reaches with `"embedding"` instead: `lora_parameters(model)`, or all adapters'.
        layer_weights: L numbers ≥ 0: how much each layer of `"heads"` counts in the mean; None: all alike.
        mmd_options: of `mmd`.

    Returns a scalar. For `"embedding"` it is the first-order surrogate `L + Σ ⟨∂L/∂theta, theta − theta.detach()⟩`,
    whose value and gates' (or parameters') gradient are L's: safe under DDP, whose hooks the inner `autograd.grad` does
    not run.

    Raises ValueError or TypeError naming the argument.
    """
    if not isinstance(heads, CapturedHeads):
        raise TypeError(f"heads: got {type(heads).__name__}; takes what `with capture_heads(model) as heads` yields")
    if mmd_options.get("reduction", "mean") != "mean":
        raise ValueError('reduction: head_mmd is a scalar; use mmd(…, reduction="none") on the features for pairs')
    if layer_weights is not None:
        _check_layer_weights(layer_weights, features, len(heads.thetas))
    if features == "heads":
        if parameters is not None:
            raise ValueError('parameters: the MMD of "heads" reaches gates alone; pass features="embedding" or None')
        return _mmd(heads.features.flatten(2), domains, heads.gates, layer_weights=layer_weights, **mmd_options)
    if features != "embedding":
        raise ValueError(f'features: got {features!r}; takes "heads" or "embedding"')
    if embedding is None:
        raise ValueError('embedding: is needed with features="embedding": pass model.encode_image(images)')
    _reached(heads, parameters)
    if not isinstance(embedding, Tensor):
        raise TypeError(f"embedding: got {type(embedding).__name__}; takes a tensor [B, E]")
    if not embedding.requires_grad:
        raise ValueError("embedding: carries no gradient; compute it with gradients on, inside the capture")
    return surrogate(mmd(embedding, domains, **mmd_options), heads, parameters)


def surrogate(loss: Tensor, heads: CapturedHeads, parameters: Sequence[Tensor] | None = None) -> Tensor:
    """The first-order surrogate of a scalar function of the embedding: its value, and its gradient in the gates alone,
    or in `parameters`.

    Raises ValueError where none of them is trained, or none reaches `loss`.
    """
    reached = _reached(heads, parameters)
    gradients = torch.autograd.grad(loss, reached, retain_graph=True, allow_unused=True)
    if all(g is None for g in gradients):
        raise ValueError(
            "embedding: does not depend on the gates; compute it with the captured model, patched and enabled"
        )
    pairs = [(g, p) for g, p in zip(gradients, reached, strict=True) if g is not None]
    return loss.detach() + torch.stack([(g * (p - p.detach())).sum() for g, p in pairs]).sum()


def _reached(heads: CapturedHeads, parameters: Sequence[Tensor] | None) -> list[Tensor]:
    """What the gradient is to reach. Raises ValueError where nothing of it is trained."""
    reached = [p for p in (heads.thetas if parameters is None else parameters) if p.requires_grad]
    if not reached:
        name, what = ("heads", "its gates") if parameters is None else ("parameters", "they")
        raise ValueError(f"{name}: {what} are all frozen (requires_grad=False), so the MMD could train nothing")
    return reached
