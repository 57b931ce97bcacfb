"""Which heads of a frozen model to close: what closing each does to each domain, and criteria that choose some.

Criteria see the sources' held-out images alone; what they chose is scored on one half of the target. An oracle chooses
on the other half: what selection could bring.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastheads.capture import capture_heads
from fastheads.config import HeadConfig
from fastheads.hosts import Tower, find_tower
from fastheads.hosts.vision import answer
from fastheads.losses import mmd
from fastheads.losses.context import evaluating
from fastheads.model import gate_parameters
from fastheads.patching import masked
from fastheads.train.data.batches import Loader, evaluation_loader
from fastheads.train.evaluation import Problem, fit_head
from fastheads.train.methods import class_logits
from fastheads.train.progress import phase
from fastheads.train.recipe import Recipe

CONFIG = HeadConfig(rank=0, gate="sigmoid")  # gates 2·sigmoid(theta), each by itself: 1 and slope 1/2 where it begins
DRAWS = 20  # random sets of heads

Head = tuple[int, int]  # layer, head


class Said(NamedTuple):
    """What a model says of N images, S times: `right` and `loss` (cross-entropy), `[S, N]`."""

    right: Tensor
    loss: Tensor

    def better(self) -> int:
        """The row with the most right answers, of equals that with the lower loss."""
        scores = list(zip(self.right.float().mean(1).tolist(), self.loss.mean(1).neg().tolist(), strict=True))
        return max(range(len(scores)), key=lambda i: scores[i])


class Frozen:
    """A frozen model, patched by `CONFIG`, on a problem's images."""

    def __init__(self, model: nn.Module, problem: Problem, recipe: Recipe) -> None:
        self.model, self.problem, self.recipe = model, problem, recipe
        self.tower = find_tower(model, "visual")
        self.heads: list[Head] = [
            (layer, head) for layer, theta in enumerate(gate_parameters(model)) for head in range(len(theta))
        ]

    def loader(self, domain: str, indices: Sequence[int]) -> Loader:
        """The images of a domain at `indices`, decoded once where the recipe says so."""
        transform, size, workers = self.problem.transforms[1], self.recipe.batch_size, self.recipe.workers
        return evaluation_loader(
            self.problem.folders, domain, indices, transform, size, workers=workers, keep=self.recipe.cache
        )

    def logits(self, images: Tensor) -> Tensor:
        """`[B, C]`, of the model's own head or the text."""
        features, logits = answer(self.model, images)
        if logits is None:
            assert self.problem.classifier is not None
            return class_logits(features, self.problem.classifier, self.problem.logit_scale)
        return logits.float()

    def closing(self, loader: Loader, closed: Sequence[Head], sets: Sequence[Sequence[Head]], doing: str) -> Said:
        """With `closed` heads closed, and with each of the sets of heads beside them: `[1 + len(sets), N]`.

        Blocks below all heads of a set say what they said without: they are not computed again.
        """
        device, found = self.problem.device, []
        steps = len(loader) * (1 + len(sets))
        with evaluating(self.model), masked(self.model, closed), phase(doing, steps, "passes") as advance:
            for images, labels, _ in loader:
                images, labels, rows = images.to(device), labels.to(device), []
                with _remembering(self.tower) as outputs:
                    rows.append(self.logits(images))
                advance(1)
                for heads in sets:
                    lowest = min((layer for layer, _ in heads), default=len(self.tower.blocks))
                    with _beginning(self.tower, lowest, outputs), masked(self.model, heads):
                        rows.append(self.logits(images))
                    advance(1)
                logits = torch.stack(rows)
                loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(rows)), reduction="none")
                found.append((logits.argmax(-1) == labels, loss.unflatten(0, logits.shape[:2])))
        return Said(*(torch.cat(parts, 1).cpu() for parts in zip(*found, strict=True)))

    def gate_gradients(self, loader: Loader) -> Tensor:
        """`[L · H]`: of the mean cross-entropy in each gate, where all are 1."""
        thetas, count = gate_parameters(self.model), 0
        total = torch.zeros(len(self.heads), device=self.problem.device)
        for images, labels, _ in loader:
            loss = F.cross_entropy(self.logits(images.to(total.device)), labels.to(total.device), reduction="sum")
            total += torch.cat(torch.autograd.grad(loss, thetas))
            count += len(labels)
        return 2 * total.cpu() / count

    def tokens(self, loader: Loader) -> tuple[Tensor, Tensor]:
        """What each head says of the pooled token, `[L · H, N, dh]`, and the classes `[N]`."""
        labels = []
        with evaluating(self.model), capture_heads(self.model) as heads:
            for images, classes, _ in loader:
                self.logits(images.to(self.problem.device))
                labels.append(classes)
        return heads.features.transpose(1, 2).flatten(0, 1), torch.cat(labels).to(self.problem.device)


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


# ------------------------------------------------------------------------------------------------- criteria


class Seen(NamedTuple):
    """What criteria see of the sources, in their order.

    said: of each source, with nothing closed and with each head. gradients: `[S, L · H]`. tokens, labels: of each
    source, `Frozen.tokens`.
    """

    said: Sequence[Said]
    gradients: Tensor
    tokens: Sequence[Tensor]
    labels: Sequence[Tensor]

    def effects(self) -> Tensor:
        """`[S, L · H]`: how much the mean cross-entropy of a source rises when a head is closed."""
        return torch.stack([(said.loss[1:] - said.loss[0]).mean(1) for said in self.said])


def between(tokens: Sequence[Tensor]) -> Tensor:
    """`[L · H]`: the mean MMD between pairs of domains, of each head's tokens `[L · H, N, dh]`."""
    ids = torch.cat([torch.full((part.shape[1],), i, device=part.device) for i, part in enumerate(tokens)])
    pairs = mmd(torch.cat(tuple(tokens), 1), ids, num_domains=len(tokens), reduction="none")
    above = torch.triu(torch.ones_like(pairs[0], dtype=torch.bool), 1)
    return pairs[:, above].mean(1).cpu()


def within_classes(seen: Seen) -> Tensor:
    """`between` of the images of one class, the mean over classes that have two images or more in every domain."""
    found = []
    for label in torch.cat(tuple(seen.labels)).unique():
        parts = [t[:, labels == label] for t, labels in zip(seen.tokens, seen.labels, strict=True)]
        found += [between(parts)] if min(part.shape[1] for part in parts) > 1 else []
    return torch.stack(found).mean(0) if found else between(seen.tokens)


def _v_rex(seen: Seen) -> Tensor:
    """The gradient in each gate of mean loss + 10 · variance of the sources' losses."""
    losses = torch.stack([said.loss[0].mean() for said in seen.said])
    return seen.gradients.mean(0) + 20 * ((losses - losses.mean())[:, None] * seen.gradients).mean(0)


# Of a head, by what is seen of the sources: the largest are closed first.
CRITERIA: dict[str, tuple[str, Callable[[Seen], Tensor]]] = {
    "mmd": ("MMD between sources", lambda seen: between(seen.tokens)),
    "class-mmd": ("MMD between sources, class by class", within_classes),
    "loss": ("falls most: the sources' loss with it closed", lambda seen: -seen.effects().mean(0)),
    "worst-source": ("falls most on the source where it falls least", lambda seen: -seen.effects().amax(0)),
    "spread": ("its effect on the loss differs most between sources", lambda seen: seen.effects().std(0)),
    "gradient": ("gradient of the sources' loss in its gate", lambda seen: seen.gradients.mean(0)),
    "agreement": (
        "the same over its spread between sources",
        lambda seen: seen.gradients.mean(0) / (seen.gradients.std(0) + 1e-12),
    ),
    "v-rex": ("gradient in its gate of V-REx's loss", _v_rex),
}


# ------------------------------------------------------------------------------------------------ selection


def greedy(
    frozen: Frozen, loaders: Sequence[Loader], first: Sequence[Said], most: int, doing: str
) -> tuple[list[Head], float]:
    """Closes the head whose closing helps most, again and again, until none does or `most` are closed.

    first: of each loader, what closing each head does, from `Frozen.closing`. Every domain counts alike. Returns
    the heads, and the accuracy in the end.
    """
    closed, said = list[Head](), list(first)
    while True:
        left = [head for head in frozen.heads if head not in closed]
        mean = _mean(said)
        best = mean.better()
        if best == 0:
            return closed, mean.right[0].mean().item()
        closed.append(left[best - 1])
        if len(closed) == most:
            return closed, mean.right[best].mean().item()
        left.remove(closed[-1])
        more = [[head] for head in left]
        said = [frozen.closing(loader, closed, more, f"{doing}, head {len(closed) + 1}") for loader in loaders]


def _mean(said: Sequence[Said]) -> Said:
    """One number a domain in place of images: `[S, domains]`."""
    return Said(*(torch.stack([x.float().mean(1) for x in parts], 1) for parts in zip(*said, strict=True)))


def _rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's; None where one of them is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(x.numpy(), y.numpy())[0]) if min(x.std(), y.std()) > 0 else None


def select_heads(
    model: nn.Module,
    problem: Problem,
    recipe: Recipe,
    *,
    most: int = 5,
    images: int | None = None,
) -> dict[str, Any]:
    """Measures the heads of a frozen model, patched by `CONFIG`, and what closing some brings on the target.

    Args:
        most: how many heads are closed at most.
        images: of each domain, how many to measure and choose by; None: all. The target's other half is always whole.

    Returns a JSON-like record: `baseline` accuracy by domain, `heads` (layer, head, the accuracy by domain with it
    closed, every criterion's score), `correlation` of each score with the target's gain, and `selections` (heads, how
    they were chosen, `sources` and `target` accuracy, `gain` on the target and its standard error over images). The
    target's numbers in `heads` are of the half that only the oracle may see.
    """
    fit_head(model, problem, recipe)
    frozen, draw, sources = Frozen(model, problem, recipe), random.Random(recipe.seed), problem.sources
    files = list(range(len(problem.folders.files[problem.folders.index(problem.target)])))
    draw.shuffle(files)
    half = len(files) // 2
    oracle_loader = frozen.loader(problem.target, sorted(files[:half][:images]))
    test_loader = frozen.loader(problem.target, sorted(files[half:]))
    loaders = []
    for name in sources:
        held = problem.validation[name]
        loaders.append(frozen.loader(name, sorted(draw.sample(held, min(images or len(held), len(held))))))

    alone = [[head] for head in frozen.heads]
    said = [frozen.closing(at, (), alone, f"heads on {name}") for at, name in zip(loaders, sources, strict=True)]
    unseen = frozen.closing(oracle_loader, (), alone, f"heads on {problem.target}")
    gradients = torch.stack([frozen.gate_gradients(loader) for loader in loaders])
    tokens, labels = zip(*(frozen.tokens(loader) for loader in loaders), strict=True)
    seen = Seen(said, gradients, tokens, labels)
    scores = {name: score(seen) for name, (_, score) in CRITERIA.items()} if len(sources) > 1 else {}
    gain = (unseen.right[1:].float() - unseen.right[0].float()).mean(1)
    by_domain = dict(zip((*sources, problem.target), (*said, unseen), strict=True))
    accuracy = {name: each.right.float().mean(1).tolist() for name, each in by_domain.items()}
    record: dict[str, Any] = {
        "target": problem.target,
        "sources": list(sources),
        "seed": recipe.seed,
        "images": {name: each.right.shape[1] for name, each in by_domain.items()},
        "baseline": {name: values[0] for name, values in accuracy.items()},
        "heads": [
            {
                "layer": layer,
                "head": head,
                "closed": {name: values[1 + at] for name, values in accuracy.items()},
                "scores": {name: float(score[at]) for name, score in scores.items()},
            }
            for at, (layer, head) in enumerate(frozen.heads)
        ],
        "correlation": {name: _rank_correlation(score, gain) for name, score in scores.items()},
        "selections": [],
    }

    sets: dict[str, list[Sequence[Head]]] = {}  # by criterion, those to choose from on the sources
    for name, score in scores.items():
        order = [frozen.heads[i] for i in score.argsort(descending=True)[:most]]
        sets[name] = [order[:k] for k in range(1, most + 1)]
    sets["random"] = [draw.sample(frozen.heads, draw.randint(1, most)) for _ in range(DRAWS)]
    flat = list(dict.fromkeys(tuple(heads) for some in sets.values() for heads in some))
    tried = _mean(
        [frozen.closing(at, (), flat, f"sets of heads on {n}") for at, n in zip(loaders, sources, strict=True)]
    )
    told = {name: words for name, (words, _) in CRITERIA.items()} | {"random": f"the best of {DRAWS} random sets"}
    chosen: list[tuple[str, str, Sequence[Head], float | None]] = []
    for name, some in sets.items():
        rows = [0, *(1 + flat.index(tuple(heads)) for heads in some)]
        best = Said(tried.right[rows], tried.loss[rows]).better()
        chosen.append((name, told[name], ([], *some)[best], tried.right[rows[best]].mean().item()))
    best_heads, _ = greedy(frozen, [oracle_loader], [unseen], most, "oracle")
    chosen.append(("oracle", f"greedy on {unseen.right.shape[1]} images of the target's other half", best_heads, None))
    best_heads, reached = greedy(frozen, loaders, said, most, "greedy on the sources")
    chosen.append(("greedy", "one by one, each the best for the sources", best_heads, reached))
    tested = frozen.closing(test_loader, (), [heads for _, _, heads, _ in chosen], "testing").right.float()
    plain = ("none", "all heads are open", list[Head](), tried.right[0].mean().item())
    record["test_images"] = tested.shape[1]
    for (name, words, closed, on_sources), right in zip((plain, *chosen), tested, strict=True):
        record["selections"].append(
            {
                "name": name,
                "chosen": words,
                "heads": list(map(list, closed)),
                "sources": on_sources,
                "target": right.mean().item(),
                "gain": (right - tested[0]).mean().item(),
                "error": (right - tested[0]).std().item() / len(right) ** 0.5,
            }
        )
    return record
