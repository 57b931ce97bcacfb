"""The demo: icons in four looks, a small CLIP, every method on a look that it never saw, one report."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from fastheads.demo import icons
from fastheads.demo.base import AXES, LOOK_WORDS, MODEL, PROMPT, caption, load, opposite, sayings
from fastheads.files import write_json
from fastheads.losses.context import class_text_weights
from fastheads.ops.dispatch import IMPL_VARIABLE
from fastheads.train.answers import changed_answers
from fastheads.train.data.batches import clip_transforms
from fastheads.train.data.domains import DomainFolders, read_domains
from fastheads.train.earlier import hashes, run_key
from fastheads.train.evaluation import Problem, image_features, make_problem, score
from fastheads.train.experiment import device, run_experiment, versions
from fastheads.train.loop import fit
from fastheads.train.methods import METHODS
from fastheads.train.progress import Bars, phase
from fastheads.train.recipe import Recipe
from fastheads.train.report.page import write_report

RECIPES = Path(__file__).with_name("recipes.json")
TARGET = "sketch"
SEEDS = {"adapter": (0, 1)}  # of `make demo`, by what a method trains; the others: one
FULL_SEEDS = (0, 1, 2)
TUNING_RESULT = "docs/results/demo-tuning.json"
LIMITS = [
    "A model of a million image-tower weights on icons of 48 × 48 pixels: it shows that the method runs and what it "
    "does, not what it is worth on photographs.",
    "71 classes of twelve pictures in a domain, of two to six drawings: they show one thing, so the errors are taken "
    "over classes, and they are the larger for it.",
    "Learning rates and lambda were searched once for each held-out domain on the three others, each of them held out "
    "in turn. How many pictures and steps, and the grids, were ours, chosen after a look at how HA-LoRA carries over "
    "between all four domains.",
    "Families of icons are drawn by the same designers in several domains; what a held-out domain shares with its "
    "sources stands beside its pictures.",
    "Published results use ViT-B/16 pretrained on 400 million images; its heads have far more to be purified of.",
]
# What `demo --tune` tries, one setting after the other; it goes on beyond the end where the best is, to MOST values.
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "fine-tune": {"lr": (3e-4, 1e-3, 3e-3)},
    "car-ft": {"lr": (3e-4, 1e-3, 3e-3)},
    "lora": {"lr": (3e-3, 1e-2, 3e-2)},
    "ha-lora": {"lr": (3e-3, 1e-2, 3e-2)},
    "dig": {"gate_lr": (1e-3, 1e-2, 1e-1)},
    "hap": {"gate_lr": (1e-4, 1e-3, 1e-2), "mmd_weight": (1e-2, 1e-1, 1.0)},
}
MOST = 5


def recipe_of(method: str, target: str | None, steps: int | None = None) -> Recipe:
    """The recipe fixed beforehand for a method and a held-out domain (recipes.json), optionally with other steps.

    target: None: without what was searched for a target.
    """
    settings = json.loads(RECIPES.read_text())
    values = {**settings["all"], **settings["methods"].get(method, {})}
    values |= {} if target is None else settings["targets"][target].get(method, {})
    return Recipe(**values) if steps is None else Recipe(**{**values, "steps": steps})


def demo_problem(
    base: nn.Module, folders: DomainFolders, target: str, seed: int, sources: Sequence[str] | None = None
) -> Problem:
    """Holding out `target`; class text from the plain caption, contexts from all captions of pretraining.

    sources: None: all other domains.
    """
    size = base.visual.image_size[0]  # type: ignore[union-attr,index]
    mean, std = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    return make_problem(
        base,
        open_clip.get_tokenizer(MODEL),
        folders,
        target,
        clip_transforms(size, mean, std, flip=False, pillow=True),  # type: ignore[arg-type]
        prompts=(PROMPT,),
        contexts=sayings(),
        seed=seed,
        sources=sources,
        split_by="folder",
    )


def set_up(out: Path) -> tuple[nn.Module, DomainFolders]:
    """The pretrained small CLIP, and the domains on disk. Raises, in words, where the fonts or the weights lack."""
    base = load()
    folders = read_domains(icons.write_domains(out / "data"))
    return base.to(device()).eval(), folders


def run_demo(
    out: Path,
    *,
    targets: Iterable[str] = (TARGET,),
    full: bool = False,
    steps: int | None = None,
    command: str = "fastheads demo",
) -> tuple[dict[str, Any], Path]:
    """All methods on the held-out `targets`; returns the results and the report's path. full: three seeds of each."""
    began, out, targets = time.perf_counter(), out.expanduser(), list(targets)
    with Bars() as bars:
        base, folders = set_up(out)
        problem_of = functools.partial(demo_problem, base, folders)
        experiment = run_experiment(
            base,
            problem_of,
            folders,
            methods=list(METHODS),
            targets=targets,
            seeds=lambda method: FULL_SEEDS if full else SEEDS.get(METHODS[method].trains, (0,)),
            recipes=lambda method, target: recipe_of(method, target, steps),
            out=out,
            title="Purifying the heads of a small CLIP",
            command=command,
            base_name=f"{MODEL} pretrained on other designers' icons",
            dataset_name="Icons that people drew, in four looks",
            watch=bars.watch,
        )
        experiment["beside_plain"] = beside_plain(base, problem_of(experiment["runs"][0]["target"], 0))
        experiment["captions"] = what_captions_mean(base, folders, targets)
    experiment["dataset"]["errors"] = "class"
    experiment["dataset"]["shared_sources"] = {domain: icons.shared_families(domain) for domain in icons.DOMAINS}
    experiment["tuning"] = {"file": TUNING_RESULT, "note": json.loads(RECIPES.read_text())["note"]}
    experiment["limits"] = LIMITS
    experiment["wall_seconds"] = max(time.perf_counter() - began, experiment["wall_seconds"])  # drawing included
    write_json(out / "results.json", experiment)
    changed = changed_answers(out, folders, experiment["runs"])
    return experiment, write_report(experiment, out, samples=folders.samples(), changed=changed)


def what_captions_mean(base: nn.Module, folders: DomainFolders, domains: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracy in these domains: by the plain prompt, by those that tell the look, by those of its opposite.

    And "words": axis -> word -> the share of pictures that match the caption with it better than with its opposite,
    the name being right. That is what CAR-FT's contexts are made of.
    """
    tokenizer = open_clip.get_tokenizer(MODEL)
    encode = functools.cache(lambda *prompts: class_text_weights(base, tokenizer, folders.class_names, prompts))
    found: dict[str, dict[str, Any]] = {}
    for domain in domains:
        words = LOOK_WORDS[domain]
        loader = demo_problem(base, folders, domain, 0).evaluation_loader(domain, "all", Recipe(cache=True))
        features, labels = image_features(base, loader)
        prompts = {"plain": (PROMPT,), "told": sayings(words), "opposite": sayings(opposite(words))}
        right = {name: (features @ encode(*said).T).argmax(1) == labels for name, said in prompts.items()}
        found[domain] = {name: each.float().mean().item() for name, each in right.items()} | {"words": {}}
        for axis, values in AXES.items():
            matched = torch.stack([(features * encode(caption(**{axis: word}))[labels]).sum(1) for word in values], 1)
            shares = torch.bincount(matched.argmax(1), minlength=len(values)) / len(labels)
            found[domain]["words"][axis] = dict(zip(values, shares.tolist(), strict=True))
    return found


def beside_plain(
    base: nn.Module, problem: Problem, method: str = "hap", turns: int = 5, steps: int = 4
) -> list[dict[str, Any]]:
    """Training steps by fastheads and by plain PyTorch in turn: median seconds, MB kept for the backward pass."""
    recipe = dataclasses.replace(recipe_of(method, problem.target), steps=steps, evaluate_every=steps)
    few = {domain: files[:8] for domain, files in problem.validation.items()}  # a run evaluates, which isn't timed
    problem = dataclasses.replace(problem, validation=few, loaders={})
    seconds: dict[str, list[float]] = {"auto": [], "reference": []}
    kept = {}
    with phase("beside plain PyTorch", 2 * turns, "turns") as advance:
        for turn in range(turns):
            for name, times in seconds.items():
                with _implementation(name):
                    times.append(fit(copy.deepcopy(base), METHODS[method], problem, recipe)["seconds"] / steps)
                    if not turn:
                        kept[name] = _kept_megabytes(base, method, problem, dataclasses.replace(recipe, steps=1))
                advance(1)
    ours, plain = (statistics.median(times) for times in seconds.values())
    row = {"method": method, "seconds": ours, "plain_seconds": plain, "steps": turns * steps}
    return [{**row, "memory_mb": kept["auto"], "plain_memory_mb": kept["reference"]}]


@contextmanager
def _implementation(name: str) -> Iterator[None]:
    """FASTHEADS_IMPL for a while."""
    before = os.environ.get(IMPL_VARIABLE)
    os.environ[IMPL_VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[IMPL_VARIABLE]
        if before is not None:
            os.environ[IMPL_VARIABLE] = before


def _kept_megabytes(base: nn.Module, method: str, problem: Problem, recipe: Recipe) -> float:
    """What autograd keeps of one training step, parameters left out."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if not isinstance(whole, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fit(copy.deepcopy(base), METHODS[method], problem, recipe)
    return sum(sizes.values()) / 1e6


def tune_demo(out: Path, *, targets: Iterable[str] = icons.DOMAINS, steps: int | None = None) -> dict[str, Any]:
    """Chooses learning rates and lambda for each held-out domain on its sources alone; writes `out/tuning.json`.

    DomainBed's leave-one-domain-out validation (Gulrajani and Lopez-Paz, 2021, section 3): each source is held out in
    turn, the setting with the best mean accuracy there wins, of equals the one with the lower loss. HAP takes over
    HA-LoRA's learning rate. A search that was killed goes on.
    """
    rows: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, dict[str, float]]] = {}
    out = out.expanduser()
    with Bars() as bars:
        trials = Trials(*set_up(out), out / "tuning", steps, bars)
        for target in targets:
            settled: dict[str, dict[str, float]] = {}
            for name, grid in GRID.items():
                settled[name] = dict(settled["ha-lora"]) if name == "hap" else {}
                for option, values in grid.items():
                    tried: dict[float, dict[str, Any]] = {}
                    left: tuple[float, ...] = values
                    while left:
                        for value in left:
                            tried[value] = trials.transfer(name, target, {**settled[name], option: value})
                        won = max(tried, key=lambda value: (round(tried[value]["mean"], 6), -tried[value]["loss"]))
                        left = _beyond(sorted(tried), won)
                    about = {"target": target, "method": name, "option": option}
                    rows += [about | settled[name] | {option: value} | tried[value] for value in sorted(tried)]
                    settled[name][option] = won
            chosen[target] = settled
    result: dict[str, Any] = {"rows": rows, "chosen": chosen, "threads": torch.get_num_threads()}
    result |= {"command": "fastheads demo --tune", "versions": versions()}
    write_json(out / "tuning.json", result)
    return result


def _beyond(tried: list[float], best: float) -> tuple[float, ...]:
    """The next value past an end of those `tried` where the best is there, as far from it as they are apart."""
    if tried[0] < best < tried[-1] or not 1 < len(tried) < MOST:
        return ()
    halves = [round(2 * math.log10(value)) for value in tried]  # the values are 1 and 3 times powers of ten
    past = halves[0] - halves[1] + halves[0] if best == tried[0] else halves[-1] - halves[-2] + halves[-1]
    return (float(f"{10 ** (past / 2):.0e}"),)


@dataclass
class Trials:
    """The search's runs: on two domains each, scored on the two others, kept in `folder`."""

    base: nn.Module
    folders: DomainFolders
    folder: Path
    steps: int | None
    bars: Bars
    problems: dict[tuple[str, ...], Problem] = field(default_factory=dict)

    def transfer(self, method: str, target: str, settings: dict[str, float]) -> dict[str, Any]:
        """Of each source of `target` the accuracy where it is held out too, their mean, and the mean loss."""
        sources = [domain for domain in icons.DOMAINS if domain != target]
        found = {held: self._run(method, [d for d in sources if d != held], settings)[held] for held in sources}
        accuracy = {held: accuracy for held, (accuracy, _) in found.items()}
        loss = statistics.fmean(loss for _, loss in found.values())
        return {"accuracy": accuracy, "mean": statistics.fmean(accuracy.values()), "loss": loss}

    def _run(self, method: str, sources: Sequence[str], settings: dict[str, float]) -> dict[str, tuple[float, float]]:
        """Accuracy and loss on the domains that are not among the sources."""
        others = [domain for domain in icons.DOMAINS if domain not in sources]
        pair = tuple(sources)
        if pair not in self.problems:
            self.problems[pair] = demo_problem(self.base, self.folders, others[0], 0, sources)
        problem = self.problems[pair]
        recipe = dataclasses.replace(recipe_of(method, None, self.steps), **settings)  # type: ignore[arg-type]
        key = run_key(hashes(self.base, problem), METHODS[method], problem, recipe, "no")
        path = self.folder / "-".join(sources) / f"{method}-{'-'.join(f'{k}-{v:g}' for k, v in settings.items())}.json"
        if path.is_file() and (saved := json.loads(path.read_text()))["key"] == key:
            return dict(saved["scores"])
        label = f"{METHODS[method].label.split(' (')[0]} {settings} on {' and '.join(sources)}"
        model = copy.deepcopy(self.base)
        fit(model, METHODS[method], problem, recipe, report=self.bars.watch(label))
        scores = {domain: score(model, problem, domain, "all", recipe) for domain in others}
        found = {domain: (each.accuracy, each.loss) for domain, each in scores.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "scores": found})
        return found
