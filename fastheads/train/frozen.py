"""A frozen model's heads: its features with each of them closed, or by gates, and what a classifier says of them.

One pass over a domain's held-out images, with each head closed by itself, serves every target that is held out. What
several heads do is taken for the sum of what each does to the features (exact for one) while choosing; what was chosen
is tested by the model itself.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastheads.capture import capture_heads
from fastheads.config import HeadConfig
from fastheads.files import whole
from fastheads.hosts import Tower, find_tower
from fastheads.hosts.vision import answer, head_of
from fastheads.losses.context import evaluating
from fastheads.model import gate_parameters
from fastheads.patching import masked
from fastheads.train.data.batches import Loader, evaluation_loader
from fastheads.train.data.sampling import split
from fastheads.train.evaluation import Problem, fit_probe, image_features
from fastheads.train.methods import class_logits
from fastheads.train.progress import phase
from fastheads.train.recipe import Recipe

CONFIG = HeadConfig(rank=0, gate="sigmoid")  # gates 2·sigmoid(theta), each by itself: 1 where it begins, never over 2
RIDGE = 0.1  # of heads that are fitted to a few images of each source, whose features have length 1 on average

Head = tuple[int, int]  # layer, head
Classifier = Callable[[Tensor], Tensor]  # features [..., E] to logits [..., C]


class Said(NamedTuple):
    """What a model says of N images, S times: `right` and `loss` (cross-entropy), `[S, N]`."""

    right: Tensor
    loss: Tensor

    def better(self) -> int:
        """The row with the most right answers, of equals that with the lower loss."""
        scores = list(zip(self.right.float().mean(1).tolist(), self.loss.mean(1).neg().tolist(), strict=True))
        return max(range(len(scores)), key=lambda i: scores[i])


class Measured(NamedTuple):
    """What a domain's held-out images give, with nothing closed and with each head closed.

    features: `[1 + L · H, N, E]`. labels: `[N]`. tokens: what each head says of the pooled token, `[L · H, N, dh]`.
    """

    features: Tensor
    labels: Tensor
    tokens: Tensor

    def gated(self, gates: Tensor) -> Tensor:
        """Features `[..., N, E]` under gates `[..., L · H]`, as if what heads do added up:
        `f + Σ (1 − g_h)(f_h − f)`."""
        plain, each = self.features[0], self.features[1:]
        return plain + torch.tensordot(1 - gates, each - plain, 1)


class Frozen:
    """A frozen model, patched by `CONFIG`, on a problem's images.

    kept: a folder where features lie once they are computed; of the same model and images only.
    """

    def __init__(self, model: nn.Module, problem: Problem, recipe: Recipe, kept: Path | None = None) -> None:
        self.model, self.problem, self.recipe, self.kept = model, problem, recipe, kept
        self.tower = find_tower(model, "visual")
        self.heads: list[Head] = [
            (layer, head) for layer, theta in enumerate(gate_parameters(model)) for head in range(len(theta))
        ]

    def keep(self, name: str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` gives, or gave before."""
        path = self.kept and self.kept / f"{name}.pt"
        if path is not None and path.is_file():
            found: tuple[Tensor, ...] = torch.load(path, map_location=self.problem.device)
            return found
        made = make()
        if path is not None:
            with whole(path) as temporary:
                torch.save(made, temporary)
        return made

    def loader(self, domain: str, indices: Sequence[int] | None) -> Loader:
        """The images of a domain at `indices` (None: all), decoded once where the recipe says so."""
        transform, size, workers = self.problem.transforms[1], self.recipe.batch_size, self.recipe.workers
        return evaluation_loader(
            self.problem.folders, domain, indices, transform, size, workers=workers, keep=self.recipe.cache
        )

    def own_classifier(self) -> Classifier:
        """Of the text; or a linear probe, fitted to the sources' training images."""
        problem = self.problem
        if head_of(self.model) is None:
            return lambda features: class_logits(features, problem.classifier, problem.logit_scale)  # type: ignore[arg-type]

        if not problem.head:

            def whole(domain: str) -> tuple[Tensor, ...]:
                return image_features(self.model, self.loader(domain, None), f"features of {domain}")

            every = {name: self.keep(name, functools.partial(whole, name)) for name in problem.sources}
            indices = {"training": problem.training, "validation": problem.validation}

            def of(domain: str, part: str) -> tuple[Tensor, Tensor]:
                features, labels = every[domain]
                return features[indices[part][domain]], labels[indices[part][domain]]

            problem.head.update(fit_probe(self.model, problem, self.recipe, of).state_dict())
        return lambda features: F.linear(features, problem.head["weight"], problem.head["bias"])

    def fitted(self, features: Sequence[Tensor], labels: Sequence[Tensor]) -> Classifier | None:
        """A linear head by ridge regression on classes, of features of some domains; None where text classifies."""
        if head_of(self.model) is None:
            return None
        weight, bias = ridge(torch.cat(tuple(features)), torch.cat(tuple(labels)), len(self.problem.folders.classes))
        return lambda x: F.linear(x, weight, bias)

    def measured(self, domain: str, images: int | None) -> Measured:
        """Of a domain's held-out images, `images` of them at most."""
        held = self.held(domain)
        if images is not None and images < len(held):
            held = sorted(random.Random(self.recipe.seed).sample(held, images))

        def make() -> tuple[Tensor, ...]:
            loader = self.loader(domain, held)
            features, labels = self.features(loader, [[head] for head in self.heads], f"heads on {domain}")
            with evaluating(self.model), capture_heads(self.model) as heads:
                for batch, _, _ in loader:
                    answer(self.model, batch.to(self.problem.device))
            return features, labels, heads.features.transpose(1, 2).flatten(0, 1)

        return Measured(*self.keep(f"{domain}-seed{self.recipe.seed}-{len(held)}", make))

    def held(self, domain: str) -> list[int]:
        """The images of a domain that are held out of training, or would be were it a source."""
        if domain in self.problem.validation:
            return self.problem.validation[domain]
        return split(self.problem.folders, domain, seed=self.recipe.seed, by=self.problem.split_by)[1]

    def features(self, loader: Loader, choices: Sequence[Sequence[Head] | Tensor], doing: str) -> tuple[Tensor, Tensor]:
        """Features `[1 + len(choices), N, E]`, with nothing closed and by each choice, and classes `[N]`.

        A choice is heads to close, or gates `[L · H]`. Blocks below all heads of a set say what they said without: they
        are not computed again.
        """
        device, found, labels = self.problem.device, list[Tensor](), list[Tensor]()
        with evaluating(self.model), phase(doing, len(loader) * (1 + len(choices)), "passes") as advance:
            for images, classes, _ in loader:
                images = images.to(device)
                with _remembering(self.tower) as outputs:
                    rows = [answer(self.model, images)[0].float()]
                advance(1)
                for choice in choices:
                    with self._by(choice, outputs):
                        rows.append(answer(self.model, images)[0].float())
                    advance(1)
                found.append(torch.stack(rows))
                labels.append(classes.to(device))
        return torch.cat(found, 1), torch.cat(labels)

    @contextmanager
    def _by(self, choice: Sequence[Head] | Tensor, outputs: Sequence[Any]) -> Iterator[None]:
        if not isinstance(choice, Tensor):
            lowest = min((layer for layer, _ in choice), default=len(self.tower.blocks))
            with _beginning(self.tower, lowest, outputs), masked(self.model, choice):
                yield
            return
        thetas = gate_parameters(self.model)
        before = [theta.detach().clone() for theta in thetas]
        try:
            for theta, part in zip(thetas, choice.split([len(theta) for theta in thetas]), strict=True):
                theta.data.copy_(torch.logit(part / 2))
            yield
        finally:
            for theta, old in zip(thetas, before, strict=True):
                theta.data.copy_(old)

    def gates(self, closed: Sequence[Head]) -> Tensor:
        """`[L · H]`: 0 for closed heads, 1 for the others."""
        return torch.tensor([float(head not in closed) for head in self.heads], device=self.problem.device)


def said(classifier: Classifier, features: Tensor, labels: Tensor) -> Said:
    """What a classifier says of features `[S, N, E]`."""
    logits = classifier(features).float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    return Said(logits.argmax(-1) == labels, loss.unflatten(0, logits.shape[:2]))


def ridge(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """`argmin ‖x W + b − onehot‖² + RIDGE ‖(W, b)‖²`, x of mean length 1, for features `[N, E]`: weight
    `[C, E]`, bias `[C]`."""
    size = features.norm(dim=-1).mean()
    x = torch.cat((features / size, torch.ones_like(features[:, :1])), 1).double()
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    solution = torch.linalg.solve(x.T @ x + RIDGE * eye, x.T @ F.one_hot(labels, classes).to(x)).T.float()
    return solution[:, :-1] / size, solution[:, -1]


@contextmanager
def _remembering(tower: Tower) -> Iterator[list[Any]]:
    """What each block of the tower gives out."""
    outputs: list[Any] = []
    hooks = [b.register_forward_hook(lambda module, args, out: outputs.append(out)) for b in tower.blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _beginning(tower: Tower, layer: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Blocks below `layer` give out what they gave before."""
    below: Sequence[Any] = tower.blocks[:layer]
    for block, out in zip(below, outputs, strict=False):
        block.forward = lambda *args, out=out, **options: out
    try:
        yield
    finally:
        for block in below:
            del block.forward
