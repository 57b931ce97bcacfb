"""Leave one domain out: the problem, its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastheads.hosts.vision import answer, head_of
from fastheads.losses.context import class_text_weights, context_text_weights, evaluating, fill
from fastheads.model.base import gathered
from fastheads.train.data.batches import (
    CPU,
    Images,
    Loader,
    Transform,
    evaluation_loader,
    training_loader,
)
from fastheads.train.data.domains import DomainFolders
from fastheads.train.data.sampling import Split, split
from fastheads.train.methods import class_logits
from fastheads.train.progress import phase
from fastheads.train.ranks import in_turn, processes, rank
from fastheads.train.recipe import Recipe


@dataclass(frozen=True)
class Score:
    """Accuracy (0 … 1) and mean cross-entropy over a set of images; of each its class, the answer, its probability.

    context: `[N, D]` logits of which domain's prompt each image fits, None where there is no text.
    """

    accuracy: float
    loss: float
    images: int
    labels: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    answers: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    confidence: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    context: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Problem:
    """One leave-one-domain-out problem: sources to learn from, a target to be tested on, text to classify by.

    training, validation: file indices per source, an 80/20 split. classifier `[C, E]`, contexts `[T, E]` and
    domain_contexts `[D, E]` (a context for each domain: the mean over classes of "a DOMAIN of a CLASS.") come from the
    frozen text tower, None where a linear head classifies; logit_scale is the factor itself; prompts are the
    classifier's templates, written out; device, where batches are wanted; loaders keeps the evaluation loaders; head,
    what a linear head starts from, and original, the original model's `context_logits` of the sources' held-out images,
    once they are known.
    """

    folders: DomainFolders
    target: str
    sources: tuple[str, ...]
    training: dict[str, list[int]]
    validation: dict[str, list[int]]
    transforms: tuple[Transform, Transform]
    classifier: Tensor | None
    contexts: Tensor | None
    logit_scale: float
    prompts: tuple[str, ...] = ()
    split_by: str = "image"
    domain_contexts: Tensor | None = None
    device: torch.device = CPU
    loaders: dict[Any, Loader] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    head: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    original: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Problem:
        """The same with its tensors and its training batches on `device`."""
        texts = {name: getattr(self, name) for name in ("classifier", "contexts", "domain_contexts")}
        moved: Any = {name: None if text is None else text.to(device) for name, text in texts.items()}
        return dataclasses.replace(self, **moved, device=device)

    def training_loader(self, recipe: Recipe, *, start: int = 0, process: int = 0, processes: int = 1) -> Loader:
        """Balanced batches from step `start` on: of `processes` this one's share."""
        return training_loader(
            self.folders,
            self.sources,
            self.training,
            self.transforms[0],
            recipe.per_domain,
            recipe.steps,
            seed=recipe.seed,
            start=start,
            process=process,
            processes=processes,
            workers=recipe.workers,
            device=self.device,
            keep=recipe.cache,
        )

    def evaluation_loader(self, domain: str, part: str, recipe: Recipe) -> Loader:
        """A domain's images in order, of several processes this one's; `part`: "training", "validation" or "all"."""
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
                keep=recipe.cache,
                process=rank(),
                processes=processes(),
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
    tokenizer: Callable[[list[str]], Tensor] | None,
    folders: DomainFolders,
    target: str,
    transforms: tuple[Transform, Transform],
    *,
    prompts: Sequence[Any] = ("a photo of a {}.",),
    contexts: Sequence[Any] | None = None,
    with_contexts: bool = True,
    with_domain_contexts: bool = True,
    seed: int = 0,
    sources: Sequence[str] | None = None,
    split_by: str = "image",
) -> Problem:
    """The problem of holding out `target`, its text weights from `model`'s text tower.

    tokenizer: None for a vision model whose linear head has a row for each class.
    prompts: templates of the classifier. contexts: templates of the context weights; None: the 80 ImageNet ones.
    with_contexts, with_domain_contexts: whether these are wanted, of the KL and of training's record.
    seed: of the 80/20 splits; split_by: what they keep whole, "image" or "folder". sources: domains to learn from;
    None: all but the target.
    """
    parts = source_splits(folders, target, sources, seed, split_by)
    names, logit_scale, classifier, context_weights, looks = folders.class_names, 1.0, None, None, None
    if tokenizer is None:
        head, prompts = head_of(model), ()
        if head is None or head.out_features != len(names):
            got = "no linear head" if head is None else f"a head of {head.out_features} classes"
            raise ValueError(f"model: {type(model).__name__} has {got}; takes one of {len(names)}, as the images have")
    else:
        logit_scale = float(cast(Tensor, model.logit_scale).detach().exp())
        with phase("encoding prompts"):
            classifier = class_text_weights(model, tokenizer, names, prompts)
            context_weights = context_text_weights(model, tokenizer, names, contexts) if with_contexts else None
            if with_domain_contexts:
                looks = context_text_weights(model, tokenizer, names, list(map(_context, folders.domains)))
    return Problem(
        folders,
        target,
        tuple(parts),
        {name: part[0] for name, part in parts.items()},
        {name: part[1] for name, part in parts.items()},
        transforms,
        classifier,
        context_weights,
        logit_scale,
        tuple(fill(template, "{}") for template in prompts),
        split_by,
        looks,
    )


def _context(domain: str) -> Callable[[str], str]:
    return lambda name: f"a {domain.replace('_', ' ')} of a {name}."


def image_features(model: nn.Module, loader: Loader, doing: str = "images") -> tuple[Tensor, Tensor]:
    """Features `[N, E]`, float32, and labels `[N]`, in the loader's order, in evaluation mode.

    Where the batches are dealt out every process must call it, and has all of them afterwards.
    L2-normalised, but as they are where the model has a linear head, which takes them so.
    doing: what the progress calls it.
    """
    device = next(model.parameters()).device
    found: list[tuple[Tensor, Tensor]] = []
    with evaluating(model), phase(doing, len(cast(Images, loader.dataset)), "images") as advance:
        for images, targets, _ in loader:
            features, logits = answer(model, images.to(device))
            features = features.float()
            found.append((F.normalize(features, dim=-1) if logits is None else features, targets.to(device)))
            advance(len(targets))
    if loader.dealt:
        found = in_turn([(features.cpu(), labels.cpu()) for features, labels in found], loader.dealt)
    features, labels = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
    return features, labels


def score(
    model: nn.Module, problem: Problem, domain: str, part: str, recipe: Recipe, head: nn.Linear | None = None
) -> Score:
    """How a head (None: the model's own, or the text classifier) does on a domain's images, among the classes it has.

    part: "training", "validation" or "all".
    """
    features, labels = image_features(model, problem.evaluation_loader(domain, part, recipe), f"evaluating {domain}")
    head = head or head_of(model)
    context = context_logits(features, problem)
    if head is None:
        assert problem.classifier is not None
        logits = class_logits(features, problem.classifier.to(features.device), problem.logit_scale)
    else:
        with torch.no_grad():
            logits = F.linear(features, *map(gathered, head.parameters()))
    return dataclasses.replace(score_logits(among_its_own(logits, problem.folders, domain), labels), context=context)


def among_its_own(logits: Tensor, folders: DomainFolders, domain: str) -> Tensor:
    """Logits `[N, C]` of a domain's images, −inf for the classes that it has no image of."""
    lacking = folders.lacking(domain)
    return logits if lacking is None else logits.masked_fill(torch.tensor(lacking, device=logits.device), -torch.inf)


def context_logits(features: Tensor, problem: Problem) -> Tensor | None:
    """`[N, D]`: how well features `[N, E]` fit each domain's prompt, as logits; None where there is no text."""
    if problem.domain_contexts is None:
        return None
    return class_logits(features, problem.domain_contexts.to(features.device), problem.logit_scale)


def context_kept(found: Tensor, original: Tensor, domain: int) -> tuple[float, float]:
    """What is left of the original model's sense of context, from both models' `context_logits` of a domain's images:
    the share of them whose context is told right, and `KL( original ‖ found )`, their mean."""
    kl = F.kl_div(found.log_softmax(-1), original.log_softmax(-1), reduction="batchmean", log_target=True)
    return (found.argmax(-1) == domain).float().mean().item(), kl.item()


def score_logits(logits: Tensor, labels: Tensor) -> Score:
    """Accuracy and cross-entropy of logits `[N, C]`."""
    confidence, answers = logits.softmax(-1).max(-1)
    accuracy = (answers == labels).float().mean().item()
    each: Any = {"labels": labels, "answers": answers, "confidence": confidence}
    each = {name: tuple(values.tolist()) for name, values in each.items()}
    return Score(accuracy, F.cross_entropy(logits, labels).item(), len(labels), **each)


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
            f"training images ({counts}); takes two classes or more, and an image of each: give the sources more "
            "images, or take sources that have these classes"
        )


def fit_probe(
    model: nn.Module,
    problem: Problem,
    recipe: Recipe,
    features: Callable[[str, str], tuple[Tensor, Tensor]] | None = None,
) -> nn.Linear:
    """A linear probe: a logistic regression on the frozen features of the sources' training images, its strength of
    regularisation chosen on their held-out ones. As a head `[C, E]` with bias for such features (`image_features`).

    features: of a domain and a part, where they are known.
    """
    from sklearn.linear_model import LogisticRegression

    check_probe(problem.folders, problem.training)
    parts = {}
    for part in ("training", "validation"):
        each = [
            features(name, part)
            if features
            else image_features(model, problem.evaluation_loader(name, part, recipe), f"features of {name}")
            for name in problem.sources
        ]
        parts[part] = (torch.cat([f for f, _ in each]), torch.cat([y for _, y in each]))
    size = parts["training"][0].norm(dim=-1).mean()  # 1 where features are normalised: the strengths mean the same
    (x, y), (x_held, y_held) = [(f.div(size).cpu().numpy(), y.cpu().numpy()) for f, y in parts.values()]
    best: tuple[float, Any] = (-1.0, None)
    strengths = (0.1, 1.0, 10.0, 100.0, 1000.0)
    with phase("fitting the probe", len(strengths), "regularisations") as advance:
        for C in strengths:
            probe = LogisticRegression(C=C, max_iter=2000).fit(x, y)
            best = max(best, (float(probe.score(x_held, y_held)), probe), key=lambda found: found[0])
            advance(1)
    weight, bias = torch.from_numpy(best[1].coef_), torch.from_numpy(best[1].intercept_)
    if len(weight) == 1:  # of two classes there is one row, of their difference
        weight, bias = torch.cat((-weight, weight)) / 2, torch.cat((-bias, bias)) / 2
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), device=size.device)
    head.load_state_dict({"weight": weight.to(size) / size, "bias": bias})
    return head


def fit_head(model: nn.Module, problem: Problem, recipe: Recipe) -> nn.Linear | None:
    """Puts a linear probe of the (frozen) model's features into its linear head, fitted once for a problem.

    Returns the head; None where the model has none.
    """
    head = head_of(model)
    if head is not None:
        if not problem.head:
            problem.head.update(fit_probe(model, problem, recipe).state_dict())
        head.load_state_dict(problem.head)
    return head
