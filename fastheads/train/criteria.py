"""Criteria that say of each head of a frozen model, by the source domains alone, whether to close it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastheads.losses import mmd
from fastheads.train.frozen import Classifier, Measured, Said, said

PULL = 30.0  # of learned gates towards 1; chosen on the study's targets of development (docs/study.md)


class Seen(NamedTuple):
    """What criteria see of the sources: what is measured of each; the classifier; and of each source one that never
    saw it, fitted to the others' (by text, the same)."""

    sources: Sequence[Measured]
    classifier: Classifier
    left_out: Sequence[Classifier]

    def said(self, unseen: bool = False) -> list[Said]:
        """Of each source, with nothing closed and with each head."""
        each = self.left_out if unseen else [self.classifier] * len(self.sources)
        return [said(by, own.features, own.labels) for by, own in zip(each, self.sources, strict=True)]

    def effects(self, unseen: bool = False) -> Tensor:
        """`[S, L · H]`: how much the mean cross-entropy of a source rises when a head is closed."""
        return torch.stack([(said.loss[1:] - said.loss[0]).mean(1) for said in self.said(unseen)])

    def risks(self, gates: Tensor, unseen: bool = False) -> Tensor:
        """`[S]`: the mean cross-entropy of each source under gates `[L · H]`, differentiable in them."""
        each = self.left_out if unseen else [self.classifier] * len(self.sources)
        return torch.stack(
            [F.cross_entropy(by(own.gated(gates)), own.labels) for by, own in zip(each, self.sources, strict=True)]
        )

    def gradients(self) -> Tensor:
        """`[S, L · H]`: of each source's risk in each gate, where all are 1."""
        gates = torch.ones(len(self.sources[0].tokens), device=self.sources[0].labels.device)
        return torch.autograd.functional.jacobian(self.risks, gates)


def between(tokens: Sequence[Tensor]) -> Tensor:
    """`[L · H]`: the mean MMD between pairs of domains, of each head's tokens `[L · H, N, dh]`."""
    ids = torch.cat([torch.full((part.shape[1],), i, device=part.device) for i, part in enumerate(tokens)])
    pairs = mmd(torch.cat(tuple(tokens), 1), ids, num_domains=len(tokens), reduction="none")
    above = torch.triu(torch.ones_like(pairs[0], dtype=torch.bool), 1)
    return pairs[:, above].mean(1).cpu()


def within_classes(seen: Seen) -> Tensor:
    """`between` of the images of one class, the mean over classes that have two images or more in every domain."""
    found = []
    for label in torch.cat([own.labels for own in seen.sources]).unique():
        parts = [own.tokens[:, own.labels == label] for own in seen.sources]
        found += [between(parts)] if min(part.shape[1] for part in parts) > 1 else []
    return torch.stack(found).mean(0) if found else between([own.tokens for own in seen.sources])


def spread(seen: Seen) -> Tensor:
    """Standard deviation over sources of a head's mean contribution to the right logit, over the others' mean."""
    each = []
    for own in seen.sources:
        logits = seen.classifier(own.features)
        logits = logits - logits.mean(-1, keepdim=True)
        right = logits.gather(-1, own.labels.expand(len(logits), -1)[..., None])[..., 0].mean(1)
        each.append(right[0] - right[1:])
    return torch.stack(each).std(0)


def agreement(seen: Seen) -> Tensor:
    """The mean over sources of the gradient in each gate, over its spread."""
    gradients = seen.gradients()
    return gradients.mean(0) / (gradients.std(0) + 1e-12)


def v_rex(risks: Tensor) -> Tensor:
    """Mean + 10 · variance of the sources' risks `[S]`."""
    return risks.mean() + 10 * risks.var(unbiased=False)


def _v_rex(seen: Seen) -> Tensor:
    """The gradient of `v_rex` in each gate."""
    gates = torch.ones(len(seen.sources[0].tokens), device=seen.sources[0].labels.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(v_rex(seen.risks(gates)), gates)
    return gradient


def learned_gates(objective: Callable[[Tensor], Tensor], start: Tensor, pull: float = PULL, steps: int = 100) -> Tensor:
    """Gates `[L · H]` from 0 to 2 that minimise `objective(g) + pull · mean (1 − g)²`: Adam's steps from `start`."""
    gates = start.clone().requires_grad_()
    adam = torch.optim.Adam([gates], lr=0.02)
    for _ in range(steps):
        adam.zero_grad()
        (objective(gates) + pull * (1 - gates).square().mean()).backward()
        adam.step()
        with torch.no_grad():
            gates.clamp_(0.01, 1.99)
    return gates.detach()


# Of a head, by what is seen of the sources: the largest are closed first.
CRITERIA: dict[str, tuple[str, Callable[[Seen], Tensor]]] = {
    "mmd": ("MMD between sources", lambda seen: between([own.tokens for own in seen.sources])),
    "class-mmd": ("MMD between sources, class by class", within_classes),
    "loss": ("falls most: the sources' loss with it closed", lambda seen: -seen.effects().mean(0)),
    "worst-source": ("falls most on the source where it falls least", lambda seen: -seen.effects().amax(0)),
    "spread": ("what it adds to the right logit differs most between sources", spread),
    "gradient": ("gradient of the sources' loss in its gate", lambda seen: seen.gradients().mean(0)),
    "agreement": (
        "the same over its spread between sources",
        agreement,
    ),
    "v-rex": ("gradient in its gate of V-REx's loss", _v_rex),
    "left-out": (
        "falls most: the loss of a source under a head fitted to the others",
        lambda seen: -seen.effects(unseen=True).mean(0),
    ),
}
# Gates that are learned, none closed: what they minimise.
GATES: dict[str, tuple[str, Callable[[Seen, Tensor], Tensor]]] = {
    "gates": ("gates, by the sources' loss", lambda seen, gates: seen.risks(gates).mean()),
    "gates-v-rex": ("gates, by V-REx's loss", lambda seen, gates: v_rex(seen.risks(gates))),
    "gates-left-out": (
        "gates, by the loss of a source under a head fitted to the others",
        lambda seen, gates: seen.risks(gates, unseen=True).mean(),
    ),
}
