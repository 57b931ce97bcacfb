"""Which heads of a frozen model to close: what closing each does to each domain, and criteria that choose some.

Criteria see the sources' held-out images alone; what they chose is tested on images of the target that nothing was
chosen by. An oracle chooses by the target's own held-out images: what selection could bring.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.hosts.vision import head_of
from fastheads.train.criteria import CRITERIA, GATES, Seen, learned_gates
from fastheads.train.evaluation import Problem
from fastheads.train.frozen import Classifier, Frozen, Head, Measured, Said, said
from fastheads.train.recipe import Recipe

DRAWS = 20  # random sets of heads
ORACLE_PULL = 3.0  # of the oracle's gates


def greedy(
    heads: Sequence[Head],
    tell: Callable[[Sequence[Sequence[Head]]], Said],
    most: int,
    best_of: Callable[[Said], int] = Said.better,
) -> list[Head]:
    """Closes the head whose closing helps most, again and again, until none does or `most` are closed.

    tell: what is said with each of some sets closed, a row for each. best_of: which row is best.
    """
    closed: list[Head] = []
    while len(closed) < most:
        sets = [closed, *([*closed, head] for head in heads if head not in closed)]
        best = best_of(tell(sets))
        if best == 0:
            break
        closed = sets[best]
    return closed


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
    tested: int | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Measures the heads of a frozen model, patched by `CONFIG`, and what closing some brings on the target.

    Args:
        most: how many heads are closed at most.
        images: of each domain's held-out ones, how many to measure and choose by; None: all.
        tested: of the target's others, how many to test on; None: all.
        kept: `Frozen`'s.

    Returns a JSON-like record: `baseline` accuracy by domain, `heads` (layer, head, the accuracy by domain with it
    closed, every criterion's score), `correlation` of each score with the target's gain, and `selections` (heads or
    gates, how they were chosen, accuracy on the `sources` as it was seen while choosing, on the `target`, `gain` there
    and its standard error over images; and of a vision model the same where a linear head is fitted anew to the
    measured images of the sources, against one with all heads open). The target's numbers in `heads` are of the
    images that only the oracle may see. Where text classifies there is no head to fit, and nothing is left out.

    Raises ValueError for fewer than two images to choose by or to test on, a domain without a class, or `most`.
    """
    frozen, draw, sources = Frozen(model, problem, recipe, kept), random.Random(recipe.seed), problem.sources
    if not 1 <= most <= len(frozen.heads):
        raise ValueError(f"most: got {most}; takes 1 to {len(frozen.heads)}, the heads there are")
    for name in (*sources, problem.target):
        if problem.folders.lacking(name):
            raise ValueError(f"{name}: has no image of some class; heads are chosen on domains that have all")
        if min(len(frozen.held(name)), images or 2) < 2:
            raise ValueError(f"images: {name} has one held-out image to measure by; takes two or more")
    held = set(frozen.held(problem.target))
    left = [i for i in range(len(problem.folders.files[problem.folders.index(problem.target)])) if i not in held]
    if min(len(left), tested or 2) < 2:
        raise ValueError(f"tested: {problem.target} has one image to test on; takes two or more")
    classifier = frozen.own_classifier()
    own = [frozen.measured(name, images) for name in sources]
    unseen = frozen.measured(problem.target, images)

    def left_out(gates: Tensor) -> list[Classifier]:
        """Of each source a head that is fitted to the others under these gates."""
        rest = [[m for m in own if m is not out] for out in own]
        return [frozen.fitted([m.gated(gates) for m in some], [m.labels for m in some]) or classifier for some in rest]

    seen = Seen(own, classifier, left_out(frozen.gates([])) if len(own) > 1 else [classifier])
    refits = head_of(model) is not None
    criteria = {name: each for name, each in CRITERIA.items() if refits or "left-out" not in name}
    objectives = {name: each for name, each in GATES.items() if refits or "left-out" not in name}
    scores = {name: score(seen).cpu() for name, (_, score) in criteria.items()} if len(sources) > 1 else {}
    each = [said(classifier, m.features, m.labels) for m in (*own, unseen)]
    accuracy = {
        name: s.right.float().mean(1).tolist() for name, s in zip((*sources, problem.target), each, strict=True)
    }
    gain = (each[-1].right[1:].float() - each[-1].right[0].float()).mean(1).cpu()

    def on(domains: Sequence[Measured]) -> Callable[[Sequence[Sequence[Head]]], Said]:
        def tell(sets: Sequence[Sequence[Head]]) -> Said:
            gates = torch.stack([frozen.gates(closed) for closed in sets])
            return _mean([said(classifier, m.gated(gates), m.labels) for m in domains])

        return tell

    def tell_left_out(sets: Sequence[Sequence[Head]]) -> Said:
        """Of each source, by a head that is fitted to the others with the set closed."""
        rows = []
        for gates in map(frozen.gates, sets):
            each = zip(left_out(gates), own, strict=True)
            rows.append(_mean([said(by, m.gated(gates)[None], m.labels) for by, m in each]))
        return Said(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def best_of(sets: Sequence[Sequence[Head]]) -> Sequence[Head]:
        return ([], *sets)[on(own)([[], *sets]).better()]

    chosen: dict[str, tuple[str, Sequence[Head] | Tensor]] = {"none": ("all heads are open", [])}
    for name, score in scores.items():
        order = [frozen.heads[i] for i in score.argsort(descending=True)[:most]]
        chosen[name] = (CRITERIA[name][0], best_of([order[:k] for k in range(1, most + 1)]))
    for name, (words, objective) in objectives.items() if scores else ():
        chosen[name] = (words, learned_gates(lambda gates, f=objective: f(seen, gates), frozen.gates([])))  # type: ignore[misc]
    sets = [draw.sample(frozen.heads, draw.randint(1, most)) for _ in range(DRAWS)]
    chosen["random"] = (f"the best of {DRAWS} random sets", best_of(sets))
    chosen["greedy"] = ("one by one, each the best for the sources", greedy(frozen.heads, on(own), most))
    if scores and refits:
        words = "one by one, each the best for a source under a head fitted to the others, with it closed"
        chosen["greedy-left-out"] = (words, greedy(frozen.heads, tell_left_out, most))
    told = f"{len(unseen.labels)} images of the target that no other saw"
    closed = greedy(frozen.heads, on([unseen]), most, lambda found: int(found.loss.mean(1).argmin()))
    chosen["oracle"] = (f"one by one, each the best for the loss of {told}", closed)
    risk = Seen([unseen], classifier, []).risks
    gates = learned_gates(lambda gates: risk(gates).mean(), frozen.gates([]), pull=ORACLE_PULL)
    chosen["oracle-gates"] = (f"gates, by the loss of {told}", gates)

    left = sorted(draw.sample(left, min(tested or len(left), len(left))))
    choices = {_key(choice): choice for _, choice in chosen.values()}
    found, labels = frozen.features(frozen.loader(problem.target, left), list(choices.values())[1:], "testing")
    by_choice = dict(zip(choices, found, strict=True))
    selections, plains = list[dict[str, Any]](), dict[str, Tensor]()
    for name, (words, choice) in chosen.items():
        gates = choice if isinstance(choice, Tensor) else frozen.gates(choice)
        on_sources = _mean([said(classifier, m.gated(gates)[None], m.labels) for m in own]).right.mean().item()
        row = {
            "name": name,
            "chosen": words,
            "heads": None if isinstance(choice, Tensor) else list(map(list, choice)),
            "gates": [round(g, 4) for g in choice.tolist()] if isinstance(choice, Tensor) else None,
            "sources": None if name.startswith("oracle") else on_sources,
        }
        again = frozen.fitted([m.gated(gates) for m in own], [m.labels for m in own])
        for part, by in (("", classifier), ("refit_", again)):
            if by is None:
                continue
            right = said(by, by_choice[_key(choice)][None], labels).right[0].float()
            plain = plains.setdefault(part, right)  # the first row's: all heads open
            row |= {
                f"{part}target": right.mean().item(),
                f"{part}gain": (right - plain).mean().item(),
                f"{part}error": (right - plain).std().item() / len(right) ** 0.5,
            }
        selections.append(row)
    return {
        "target": problem.target,
        "sources": list(sources),
        "seed": recipe.seed,
        "images": {name: len(m.labels) for name, m in zip((*sources, problem.target), (*own, unseen), strict=True)},
        "test_images": len(left),
        "baseline": {name: values[0] for name, values in accuracy.items()},
        "heads": [
            {
                "layer": layer,
                "head": head,
                "closed": {name: round(values[1 + at], 5) for name, values in accuracy.items()},
                "scores": {name: float(f"{score[at]:.4g}") for name, score in scores.items()},
            }
            for at, (layer, head) in enumerate(frozen.heads)
        ],
        "correlation": {name: _rank_correlation(score, gain) for name, score in scores.items()},
        "selections": selections,
    }


def _key(choice: Sequence[Head] | Tensor) -> tuple[Any, ...]:
    return tuple(choice.tolist()) if isinstance(choice, Tensor) else tuple(sorted(choice))
