"""Leave one domain out: the problem, its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastheads.losses.context import class_text_weights, context_text_weights, evaluating, fill
from fastheads.train.data.batches import Images, Split, Transform, evaluation_loader, split, training_loader
from fastheads.train.data.domains import DomainFolders
from fastheads.train.methods import class_logits
from fastheads.train.progress import phase
from fastheads.train.recipe import Recipe


@dataclass(frozen=True)
class Score:
    """Accuracy (0 … 1) and mean cross-entropy over a set of images; of each its class, the answer, its probability."""

    accuracy: float
    loss: float
    images: int
    labels: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    answers: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    confidence: tuple[float, ...] = dataclasses.field(default=(), repr=False)


@dataclass(frozen=True)
class Problem:
    """One leave-one-domain-out problem: sources to learn from, a target to be tested on, text to classify by.

    training, validation: file indices per source, an 80/20 split. classifier `[C, E]` and contexts `[T, E]` come from
    the frozen text tower; logit_scale is the factor itself; prompts are the classifier's templates, written out;
    loaders keeps the evaluation loaders; images, decoded ones of every run on the problem, where a recipe caches.
    """

    folders: DomainFolders
    target: str
    sources: tuple[str, ...]
    training: dict[str, list[int]]
    validation: dict[str, list[int]]
    transforms: tuple[Transform, Transform]
    classifier: Tensor
    contexts: Tensor | None
    logit_scale: float
    prompts: tuple[str, ...] = ()
    split_by: str = "image"
    loaders: dict[Any, DataLoader[Any]] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    images: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Problem:
        """The same with its tensors on `device`."""
        contexts = None if self.contexts is None else self.contexts.to(device)
        return dataclasses.replace(self, classifier=self.classifier.to(device), contexts=contexts)

    def training_loader(self, recipe: Recipe, *, start: int = 0, process: int = 0) -> DataLoader[Any]:
        """Balanced batches from step `start` on; every process draws its own."""
        return training_loader(
            self.folders,
            self.sources,
            self.training,
            self.transforms[0],
            recipe.per_domain,
            recipe.steps,
            seed=recipe.seed + 1_000_003 * process,
            start=start,
            workers=recipe.workers,
            cache=self.images if recipe.cache else False,
        )

    def evaluation_loader(self, domain: str, part: str, recipe: Recipe) -> DataLoader[Any]:
        """The images of a domain in order; `part`: "training", "validation" or "all"."""
        key = (domain, part, recipe.batch_size, recipe.workers, recipe.cache)
        if key not in self.loaders:
            indices = {"training": self.training, "validation": self.validation, "all": {}}[part].get(domain)
            self.loaders[key] = evaluation_loader(
                self.folders,
                domain,
                indices,
                self.transforms[1],
                recipe.batch_size,
                workers=recipe.workers,
                cache=self.images if recipe.cache else False,
            )
        return self.loaders[key]


def source_splits(
    folders: DomainFolders, target: str, sources: Sequence[str] | None = None, seed: int = 0, by: str = "image"
) -> dict[str, Split]:
    """The 80/20 split of each source, in the order of `folders`; sources: None: all domains but the target.

    by: of `split`: "image" or "folder".

    Raises ValueError for an unknown domain, no source, the target among them, a source with one image.
    """
    folders.index(target)
    chosen = [name for name in folders.domains if name != target] if sources is None else sources
    if isinstance(chosen, str) or not chosen or target in chosen:
        raise ValueError(f"sources: got {chosen!r} with the target {target!r}; takes one or more other domains")
    for name in chosen:
        folders.index(name)
    return {name: split(folders, name, seed=seed, by=by) for name in folders.domains if name in chosen}


def make_problem(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    folders: DomainFolders,
    target: str,
    transforms: tuple[Transform, Transform],
    *,
    prompts: Sequence[Any] = ("a photo of a {}.",),
    contexts: Sequence[Any] | None = None,
    with_contexts: bool = True,
    seed: int = 0,
    sources: Sequence[str] | None = None,
    split_by: str = "image",
) -> Problem:
    """The problem of holding out `target`, its text weights from `model`'s text tower.

    prompts: templates of the classifier. contexts: templates of the context weights; None: the 80 ImageNet ones.
    seed: of the 80/20 splits; split_by: what they keep whole, "image" or "folder". sources: domains to learn from;
    None: all but the target.
    """
    parts = source_splits(folders, target, sources, seed, split_by)
    names, logit_scale = folders.class_names, cast(Tensor, model.logit_scale)
    with phase("encoding prompts"):
        classifier = class_text_weights(model, tokenizer, names, prompts)
        context_weights = context_text_weights(model, tokenizer, names, contexts) if with_contexts else None
    return Problem(
        folders,
        target,
        tuple(parts),
        {name: part[0] for name, part in parts.items()},
        {name: part[1] for name, part in parts.items()},
        transforms,
        classifier,
        context_weights,
        float(logit_scale.detach().exp()),
        tuple(fill(template, "{}") for template in prompts),
        split_by,
    )


def image_features(model: nn.Module, loader: DataLoader[Any], doing: str = "images") -> tuple[Tensor, Tensor]:
    """L2-normalised features `[N, E]`, float32, and labels `[N]`, in the loader's order, in evaluation mode.

    doing: what the progress calls it.
    """
    device = next(model.parameters()).device
    encode: Any = model.encode_image
    features, labels = [], []
    with evaluating(model), phase(doing, len(cast(Images, loader.dataset)), "images") as advance:
        for images, targets, _ in loader:
            features.append(F.normalize(encode(images.to(device)).float(), dim=-1))
            labels.append(targets.to(device))
            advance(len(targets))
    return torch.cat(features), torch.cat(labels)


def score(model: nn.Module, problem: Problem, domain: str, part: str, recipe: Recipe) -> Score:
    """How the text classifier does on a domain's images; `part`: "training", "validation" or "all"."""
    features, labels = image_features(model, problem.evaluation_loader(domain, part, recipe), f"evaluating {domain}")
    return score_logits(class_logits(features, problem.classifier.to(features.device), problem.logit_scale), labels)


def score_logits(logits: Tensor, labels: Tensor) -> Score:
    """Accuracy and cross-entropy of logits `[N, C]`."""
    confidence, answers = logits.softmax(-1).max(-1)
    accuracy = (answers == labels).float().mean().item()
    each = (tuple(values.tolist()) for values in (labels, answers, confidence))
    return Score(accuracy, F.cross_entropy(logits, labels).item(), len(labels), *each)


@dataclass(frozen=True)
class LinearProbe:
    """A logistic regression on frozen features; its strength of regularisation chosen on source validation."""

    classifier: Any
    C: float

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return int(self.classifier.coef_.size + self.classifier.intercept_.size)

    def score(self, model: nn.Module, problem: Problem, domain: str, part: str, recipe: Recipe) -> Score:
        """As `score`, by the probe's own classifier."""
        loader = problem.evaluation_loader(domain, part, recipe)
        features, labels = image_features(model, loader, f"evaluating {domain}")
        logits = torch.from_numpy(self.classifier.predict_log_proba(features.cpu().numpy()))
        return score_logits(logits, labels.cpu())


def check_probe(folders: DomainFolders, training: Mapping[str, Sequence[int]]) -> None:
    """That a linear probe can learn from these file indices of each source: two classes, an image of each.

    Raises ValueError with the classes that have none, and how many images each source has.
    """
    seen = {folders.files[folders.index(name)][i][1] for name, indices in training.items() for i in indices}
    lacking = [label for i, label in enumerate(folders.classes) if i not in seen]
    if lacking or len(folders.classes) < 2:
        counts = ", ".join(f"{name}: {len(indices)}" for name, indices in training.items())
        of = f"no image of class {', '.join(map(repr, lacking[:3]))}{' …' if lacking[3:] else ''}"
        raise ValueError(
            f"linear-probe: got {of if lacking else f'the only class {folders.classes[0]!r}'} among the sources' "
            f"training images ({counts}); takes two classes or more, and an image of each: give the sources more images"
        )


def fit_probe(model: nn.Module, problem: Problem, recipe: Recipe) -> LinearProbe:
    """Trains a linear probe on the sources' training images."""
    from sklearn.linear_model import LogisticRegression

    check_probe(problem.folders, problem.training)
    parts = {}
    for part in ("training", "validation"):
        loaders = {name: problem.evaluation_loader(name, part, recipe) for name in problem.sources}
        each = [image_features(model, loader, f"features of {name}") for name, loader in loaders.items()]
        parts[part] = (torch.cat([f for f, _ in each]).cpu().numpy(), torch.cat([y for _, y in each]).cpu().numpy())
    best: tuple[float, LinearProbe] | None = None
    strengths = (0.1, 1.0, 10.0, 100.0, 1000.0)
    with phase("fitting the probe", len(strengths), "regularisations") as advance:
        for C in strengths:
            probe = LinearProbe(LogisticRegression(C=C, max_iter=2000).fit(*parts["training"]), C)
            accuracy = float(probe.classifier.score(*parts["validation"]))
            if best is None or accuracy > best[0]:
                best = (accuracy, probe)
            advance(1)
    assert best is not None
    return best[1]
