"""One step over a global batch, which lies spread over processes and comes in micro-batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastheads.capture import CapturedHeads, capture_heads
from fastheads.losses.mmd_loss import surrogate
from fastheads.train.methods import Objective

Batch = tuple[Tensor, Tensor, Tensor]  # images, class indices, domain indices


def micro_batches(batch: Sequence[Tensor], parts: int) -> list[Batch]:
    """`batch` in `parts` of nearly the same size, each of them with images of all domains."""
    images, labels, domains = batch
    return [(images[k::parts], labels[k::parts], domains[k::parts]) for k in range(parts)]


def backward(
    objective: Objective,
    encoder: nn.Module,
    model: nn.Module,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    *,
    total: int,
    seed: str,
    group: Any = None,
    keep: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Adds the gradients of the objective over the global batch, whose share of this process are `batches`.

    After DDP's or FSDP's mean they are those of one process with the whole batch: means over images are weighted by how
    many of all images (`total`) a micro-batch has, and the MMD is one, over all of `group`. Of `"heads"` it needs only
    what each micro-batch leaves, heads without a graph; of the `"embedding"`, split, a pass without gradients first.

    seed: of what is drawn at random in the passes.

    Returns the parts of the loss, each as this process's summand of the global one (the MMD over its number of
    processes), and with `keep` the captured heads times their gates, `[L, N, D]`.
    """
    processes = accelerator.num_processes
    domains = torch.cat([batch[2] for batch in batches])
    embedding = objective.mmd_features == "embedding"
    sums: dict[str, Tensor] = {}
    towards: list[Tensor] = []
    if objective.mmd_weight and embedding and len(batches) > 1:
        features = []
        with torch.no_grad(), accelerator.autocast():
            for k, (images, _, _) in enumerate(batches):
                _sow(seed, k)
                features.append(encoder(images)[0])
        sums["mmd"], gradient = objective.embedding_mmd(torch.cat(features), domains, group)
        towards = list(gradient.split([len(part) for part in features]))
    with capture_heads(model) if objective.mmd_weight else nullcontext() as heads:
        for k, (images, labels, _) in enumerate(batches):
            last = k + 1 == len(batches)
            _sow(seed, k)
            with nullcontext() if last else accelerator.no_sync(encoder):
                with accelerator.autocast():
                    features_k, means = objective.means(encoder, model, images, labels)
                    share = len(images) / total
                    loss = processes * share * objective.weighted(means)
                    if towards:
                        assert heads is not None
                        direction = surrogate((features_k.float() * towards[k]).sum(), heads, objective.reached(model))
                        loss = loss + objective.mmd_weight * (direction - direction.detach())
                    elif heads is not None and last:
                        sums["mmd"] = objective.mmd(heads, domains, features_k, group, reached=objective.reached(model))
                        loss = loss + objective.mmd_weight * sums["mmd"]
                accelerator.backward(loss)
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + share * mean.detach()
    if "mmd" in sums:
        sums["mmd"] = sums["mmd"].detach() / processes
    return sums, _gated(heads) if keep and heads is not None else None


def _gated(heads: CapturedHeads) -> Tensor:
    return (heads.features * heads.gates.detach()[:, None, :, None]).flatten(2)


def _sow(seed: str, micro: int) -> None:
    torch.manual_seed(random.Random(f"{seed}/{micro}").getrandbits(63))
