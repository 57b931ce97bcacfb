"""The demo: digits in four looks, a tiny CLIP, every method, one report."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from fastheads.demo import digits
from fastheads.demo.pretrain import MODEL, PROMPT, TEMPLATES, pretrain, register
from fastheads.train.data.batches import clip_transforms
from fastheads.train.data.domains import DomainFolders, read_domains
from fastheads.train.evaluation import Problem, make_problem
from fastheads.train.experiment import device, run_experiment, run_method, versions, write_json
from fastheads.train.methods import METHODS
from fastheads.train.progress import Bars
from fastheads.train.recipe import Recipe
from fastheads.train.report.page import write_report

RECIPES = Path(__file__).with_name("recipes.json")
TARGET = "sketch"
TUNING_RESULT = "docs/results/demo-tuning.json"
LIMITS = [
    "A model of a million image-tower weights on 32 × 32 pixel drawings of 8 × 8 pixel digits: it shows that the "
    "method runs and what it does, not what it is worth on photographs.",
    "300 images per domain: differences of about five points between two methods are within chance.",
    "The looks and the pretraining were made so that some domains are easy and some hard for the pretrained model.",
    "Learning rates and lambda were searched once, over three or four values each, on the source validation images of "
    "ink, neon and photo with sketch held out; for the adapters the best was the last of the values tried. Where "
    "another domain is held out, its images took part in that choice.",
    "Published results use ViT-B/16 pretrained on 400 million images; its heads have far more to be purified of.",
]
# What `demo --tune` tries; the best on source validation stands in recipes.json.
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "fine-tune": {"lr": (1e-4, 3e-4, 1e-3)},
    "car-ft": {"lr": (1e-4, 3e-4, 1e-3)},
    "lora": {"lr": (1e-3, 3e-3, 1e-2)},
    "ha-lora": {"lr": (1e-3, 3e-3, 1e-2)},
    "dig": {"gate_lr": (1e-2, 3e-2, 1e-1)},
    "hap": {"mmd_weight": (0.01, 0.1, 1.0, 10.0)},
}


def recipe_of(method: str, steps: int | None = None) -> Recipe:
    """The recipe fixed beforehand for a method (recipes.json), optionally with other steps."""
    settings = json.loads(RECIPES.read_text())
    values = {**settings["all"], **settings["methods"].get(method, {})}
    return Recipe(**values) if steps is None else Recipe(**{**values, "steps": steps})


def demo_problem(base: nn.Module, folders: DomainFolders, target: str, seed: int) -> Problem:
    """Holding out `target`; class text from the generic caption, contexts from all captions of pretraining."""
    size = base.visual.image_size[0]  # type: ignore[union-attr,index]
    mean, std = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    transforms = clip_transforms(size, mean, std, flip=False)  # type: ignore[arg-type]
    return make_problem(
        base,
        open_clip.get_tokenizer(MODEL),
        folders,
        target,
        transforms,
        prompts=(PROMPT,),
        contexts=TEMPLATES,
        seed=seed,
    )


def set_up(out: Path, cache: Path, bars: Bars) -> tuple[nn.Module, DomainFolders]:
    """The pretrained tiny CLIP, from the cache where it has one, and the domains on disk."""
    register()
    folders = read_domains(digits.write_domains(out / "data"))
    report = bars.watch("pretraining a tiny CLIP")
    checkpoint = pretrain(
        cache, progress=lambda step, steps, loss: report({"step": step, "steps": steps, "loss": loss})
    )
    model = open_clip.create_model(MODEL, pretrained=str(checkpoint))
    return model.to(device()).eval(), folders


def run_demo(
    out: Path,
    cache: Path,
    *,
    targets: Iterable[str] = (TARGET,),
    seeds: Iterable[int] = (0,),
    steps: int | None = None,
    command: str = "fastheads demo",
) -> tuple[dict[str, Any], Path]:
    """All methods on the held-out `targets`; returns the results and the report's path."""
    began, out = time.perf_counter(), out.expanduser()
    with Bars() as bars:
        base, folders = set_up(out, cache, bars)
        experiment = run_experiment(
            base,
            functools.partial(demo_problem, base, folders),
            folders,
            methods=list(METHODS),
            targets=list(targets),
            seeds=list(seeds),
            recipes=lambda method: recipe_of(method, steps),
            out=out,
            title="Purifying the heads of a small CLIP",
            command=command,
            base_name=f"{MODEL} pretrained on digits in other styles",
            dataset_name="Handwritten digits in four looks",
            watch=bars.watch,
        )
    experiment["tuning"] = {"file": TUNING_RESULT, "note": json.loads(RECIPES.read_text())["note"]}
    experiment["limits"] = LIMITS
    experiment["wall_seconds"] = time.perf_counter() - began  # pretraining included
    write_json(out / "results.json", experiment)
    return experiment, write_report(experiment, out, samples=folders.samples())


def tune_demo(out: Path, cache: Path, *, target: str = TARGET, steps: int | None = None) -> dict[str, Any]:
    """Chooses learning rates and lambda on source validation, the target never scored; writes `out/tuning.json`.

    Methods take over what an earlier one settled: car-ft its own grid, hap HA-LoRA's and DIG's learning rates.
    """
    rows: list[dict[str, Any]] = []
    settled: dict[str, dict[str, float]] = {}
    out = out.expanduser()
    with Bars() as bars:
        base, folders = set_up(out, cache, bars)
        problem = demo_problem(base, folders, target, seed=0)
        blind = dataclasses.replace(problem, target=problem.sources[0])  # so that no run can score the target
        for name, grid in GRID.items():
            inherited = {**settled["ha-lora"], **settled["dig"]} if name == "hap" else {}
            for option, values in grid.items():
                for value in values:
                    changed = {**inherited, option: value}
                    recipe = dataclasses.replace(recipe_of(name, steps), **changed)  # type: ignore[arg-type]
                    report = bars.watch(f"{METHODS[name].label} {option} {value:g}")
                    folder = out / "tuning" / f"{name}-{option}-{value:g}"
                    run_method(base, METHODS[name], blind, recipe, folder, base_name=MODEL, report=report)
                    run = json.loads((folder / "result.json").read_text())["run"]
                    best = max(run["history"]["validation"], key=lambda entry: entry[1])
                    rows.append({"method": name, **changed, "steps": recipe.steps, "validation": best[1]})
                    rows[-1]["validation_loss"] = run["validation_loss"]
            mine = [row for row in rows if row["method"] == name]
            won = max(mine, key=lambda row: (round(row["validation"], 6), -row["validation_loss"]))
            settled[name] = {k: won[k] for k in ("lr", "gate_lr", "mmd_weight") if k in won}
    result: dict[str, Any] = {
        "target_held_out_and_never_scored": target,
        "sources": list(problem.sources),
        "rows": rows,
    }
    result |= {"command": "fastheads demo --tune", "versions": versions()}
    result |= {"chosen": settled, "threads": torch.get_num_threads()}
    write_json(out / "tuning.json", result)
    return result
