"""Runs: methods × held-out domains × seeds, each saved when it is done, so that a killed experiment goes on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastheads.adapters import save_adapter
from fastheads.files import write_json
from fastheads.folding import merge, wise_ft
from fastheads.hosts import find_tower
from fastheads.hosts.vision import head_names, head_of
from fastheads.model import is_patched
from fastheads.train.answers import details, write_answers
from fastheads.train.data.domains import DomainFolders
from fastheads.train.earlier import agree, earlier_run, hashes, run_key
from fastheads.train.evaluation import Problem, fit_head, fit_probe, image_features, score
from fastheads.train.logs import peak_memory_mb, reset_peak_memory
from fastheads.train.loop import Report, fit
from fastheads.train.methods import METHODS, Method, check_text
from fastheads.train.models import save
from fastheads.train.ranks import is_main_process, local_rank
from fastheads.train.recipe import Recipe
from fastheads.train.state import trainable

WISE_FT_ALPHA = 0.5  # of which `wise_ft_accuracy` is, and what fully fine-tuned encoders are always scored at too


def device() -> torch.device:
    """Where this process computes: its own GPU where there is one, as accelerate will choose it, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def run_method(
    base: nn.Module,
    method: Method,
    problem: Problem,
    recipe: Recipe,
    out: Path,
    *,
    base_name: str,
    precision: str = "no",
    report: Report | None = None,
    log: Sequence[str] = (),
    hashed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One run: trains a copy of `base` by `method`, scores it, saves what was learned under `out`.

    Returns the run's entry of the experiment (see `run_experiment`), read back from `out/result.json` where the same
    run, on the same weights, images and prompts, was done before. hashed: of `fit`. Raises ValueError where `out` holds
    another run.
    """
    hashed = hashed or hashes(base, problem)
    key = run_key(hashed, method, problem, recipe, precision) | {"base": base_name}
    done = earlier_run(out, key, recipe)
    agree(key, recipe, results=int(done is not None))
    if done is not None:
        return done
    out.mkdir(parents=True, exist_ok=True)
    reset_peak_memory()
    run: dict[str, Any] = {
        "method": method.id,
        "target": problem.target,
        "seed": recipe.seed,
        "sources": list(problem.sources),
        "trainable_parameters": 0,
    }
    run |= dict.fromkeys(
        ("selected_step", "steps", "seconds", "images_per_second", "saved_bytes", "merge_max_difference", "history")
    )
    run["gates"] = None
    check_text(base, method, recipe.context_weight)
    model, probe = copy.deepcopy(base), None
    if method.trains == "probe":
        began = time.perf_counter()
        probe = fit_head(model, problem, recipe) or fit_probe(model, problem, recipe)
        run["seconds"] = time.perf_counter() - began
        run["trainable_parameters"] = probe.weight.numel() + len(probe.bias)
    elif method.trains != "nothing":
        run |= fit(model, method, problem, recipe, out=out, precision=precision, report=report, log=log, hashed=hashed)
        run["trainable_parameters"] = sum(p.numel() for p in trainable(model).values())
    parts = [(name, "validation") for name in problem.sources] + [(problem.target, "all")]
    scores = {name: score(model, problem, name, part, recipe, probe) for name, part in parts}
    run["accuracy"] = {name: found.accuracy for name, found in scores.items()}
    run |= details(scores[problem.target], len(problem.folders.classes))
    if method.trains == "encoder" or (method.trains == "adapter" and recipe.wise_ft):
        original = base.state_dict() | dict(zip(head_names(base), problem.head.values(), strict=True))
        tuned = merge(copy.deepcopy(model)) if is_patched(model) else model
        found: dict[float, dict[str, float]] = {}
        for alpha in sorted({WISE_FT_ALPHA, *(() if isinstance(recipe.wise_ft, bool) else recipe.wise_ft)}):
            averaged = wise_ft(copy.deepcopy(tuned), original, alpha)
            found[alpha] = {name: score(averaged, problem, name, part, recipe).accuracy for name, part in parts}
        run["wise_ft_accuracy"] = found[WISE_FT_ALPHA]
        run["wise_ft"] = [{"alpha": alpha, "accuracy": accuracy} for alpha, accuracy in found.items()]
    run["peak_memory_mb"] = peak_memory_mb()
    if is_patched(model):
        run["merge_max_difference"] = _merged_difference(model, problem, recipe)
    if is_main_process():
        run |= _save(model, method, problem, out, base_name)
        write_answers(out, scores[problem.target])
        write_json(out / "result.json", {"key": key, "run": run})
        for name in ("state", "state.old"):
            shutil.rmtree(out / name, ignore_errors=True)
    return run


def _merged_difference(model: nn.Module, problem: Problem, recipe: Recipe) -> float:
    """How far merging an adapter moves the features of the first source's held-out images, beside the largest."""
    loader = problem.evaluation_loader(problem.sources[0], "validation", recipe)
    before, _ = image_features(model, loader)
    after, _ = image_features(merge(copy.deepcopy(model)), loader)
    return ((after - before).abs().max() / before.abs().max()).item()


def _save(model: nn.Module, method: Method, problem: Problem, out: Path, base_name: str) -> dict[str, Any]:
    """Saves an adapter, with the linear head if there is one, or the model of a fine-tuned encoder or a fitted head."""
    head = head_names(model)
    if is_patched(model):
        classes = problem.folders.classes if head else None
        folder = save_adapter(model, out / "adapter", base=base_name, modules_to_save=head, classes=classes)
        return {"saved_bytes": sum(f.stat().st_size for f in folder.iterdir())}
    if method.trains == "encoder" or head:
        path = save(model, out / "model.safetensors")
        return {"saved_bytes": sum(f.stat().st_size for f in (path.iterdir() if path.is_dir() else [path]))}
    return {}


@dataclass(frozen=True)
class _Planned:
    """One run of an experiment."""

    method: Method
    target: str
    recipe: Recipe
    folder: Path


def _refuse_others(
    hashed: Mapping[str, Any], base_name: str, problem: Problem, precision: str, planned: Sequence[_Planned]
) -> None:
    """Raises ValueError where a planned run's folder holds another run. `problem` is that of any of them."""
    domains = problem.folders.domains
    for plan in planned:
        # Domains that are sources wherever they are not held out, or (`--sources`) the same for every target.
        sources = problem.sources
        if plan.target in sources:
            sources = tuple(name for name in domains if name != plan.target)
        own = dataclasses.replace(problem, target=plan.target, sources=sources)
        key = run_key(hashed, plan.method, own, plan.recipe, precision) | {"base": base_name}
        earlier_run(plan.folder, key, plan.recipe)


def run_experiment(
    base: nn.Module,
    problem_of: Callable[[str, int], Problem],
    folders: DomainFolders,
    *,
    methods: Sequence[str | Method],
    targets: Sequence[str],
    seeds: Callable[[str], Sequence[int]],
    recipes: Callable[[str, str], Recipe],
    out: Path,
    title: str,
    command: str,
    base_name: str,
    dataset_name: str,
    precision: str = "no",
    watch: Callable[[str], Report | None] | None = None,
    record: bool = True,
    log: Sequence[str] = (),
) -> dict[str, Any]:
    """Every method on every held-out target with every seed; the results as one JSON-like dict, and `out/results.json`.

    methods: ids, or methods of one's own. record: whether to write `out/results.json`.
    problem_of: (target, seed) → Problem. seeds: method id → seeds. recipes: (method id, target) → Recipe (its seed is
    set here). watch: called with the
    name of each run, gives the callback for its steps. log: of `fit`.
    Raises ValueError where a run's folder holds another one, before any run is begun.
    """
    began, runs, out = time.perf_counter(), [], out.expanduser()
    problem_of = functools.lru_cache(maxsize=1)(problem_of)
    known = {m.id: m for m in (METHODS[m] if isinstance(m, str) else m for m in methods)}
    planned = [
        _Planned(
            known[name],
            target,
            dataclasses.replace(recipes(name, target), seed=seed),
            out / target / f"seed{seed}" / name,
        )
        for target in targets
        for seed in sorted({seed for name in known for seed in seeds(name)})
        for name in known
        if seed in seeds(name)
    ]
    earlier = [plan for plan in planned if plan.folder.exists()]
    first = (earlier or planned)[0]
    problem = problem_of(first.target, first.recipe.seed)
    hashed = hashes(base, problem)  # the same of all problems
    _refuse_others(hashed, base_name, problem, precision, earlier)
    for plan in planned:
        method, target, seed = plan.method, plan.target, plan.recipe.seed
        report = watch(f"{method.label.split(' (')[0]} · {target} · {seed}") if watch else None
        problem = problem_of(target, seed)
        options: dict[str, Any] = {"base_name": base_name, "precision": precision, "report": report, "log": log}
        options |= {"hashed": hashed}
        runs.append(run_method(base, method, problem, plan.recipe, plan.folder, **options))
    threads = torch.get_num_threads()
    cpu = "CPU, 1 thread" if threads == 1 else f"CPU, {threads} threads"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    experiment = {
        "title": title,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": where,
        "wall_seconds": max(time.perf_counter() - began, sum(run["seconds"] or 0 for run in runs)),  # it may be resumed
        "peak_memory_mb": max(run["peak_memory_mb"] for run in runs),
        "versions": versions(),
        "dataset": {
            "name": dataset_name,
            "root": folders.root.name,
            "domains": list(folders.domains),
            "classes": list(folders.classes),
            "class_names": list(folders.class_names),
            "images": {name: len(files) for name, files in zip(folders.domains, folders.files, strict=True)},
            "evaluation": "all",
            "skipped": folders.skipped or None,
            "unreadable": folders.left_out(),
        },
        "model": _about(base, base_name),
        "methods": [
            _method_entry(method, [recipes(name, target) for target in targets], head_of(base) is not None)
            for name, method in known.items()
        ],
        "runs": runs,
        "tuning": None,
    }
    if record and is_main_process():
        write_json(out / "results.json", experiment)
    return experiment


def _method_entry(method: Method, recipes: Sequence[Recipe], head: bool) -> dict[str, Any]:
    """Of a method and its recipes, one a target: a setting that differs between targets is left to `by_target`.

    head: whether the model has a linear head.
    """
    trained = method.trains in ("encoder", "adapter")
    with_context = bool(trained and recipes[0].context_weight and not method.context)
    used = {
        "lr": trained and (method.lora or method.trains == "encoder" or (head and not recipes[0].fixed_head)),
        "gate_lr": method.gate is not None,
        "mmd_weight": method.mmd,
        "context_weight": trained and recipes[0].context_weight > 0,
    }
    values = {name: list(dict.fromkeys(getattr(recipe, name) for recipe in recipes)) for name in used}
    return {
        "id": method.id,
        "label": method.label + " + context KL" * with_context,
        "description": method.description + _deltas(method, recipes[0]),
        **{name: values[name][0] if used[name] and len(values[name]) == 1 else None for name in used},
        "by_target": {
            name: [getattr(r, name) for r in recipes] for name in used if used[name] and len(values[name]) > 1
        },
    }


def _deltas(method: Method, recipe: Recipe) -> str:
    return f" Here the deltas are on {', '.join(recipe.targets)}." if method.lora and recipe.targets else ""


def _about(model: nn.Module, name: str) -> dict[str, Any]:
    try:
        attentions: tuple[nn.Module, ...] = find_tower(model, "visual").attentions
    except TypeError:  # a tower that isn't patched is none of attention layers to count
        attentions = ()
    architecture, _, pretrained = name.partition(" ")
    return {
        "name": architecture,
        "pretrained": pretrained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(attentions) or None,
        "heads": getattr(attentions[0], "num_heads", None) if attentions else None,
        "bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "open_clip_torch", "fastheads", "accelerate", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout this file is in, if it is in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def table(experiment: dict[str, Any]) -> str:
    """The results as text: target accuracy (%) per method and held-out domain, mean ± standard error over seeds."""
    runs = experiment["runs"]
    targets = list(dict.fromkeys(run["target"] for run in runs))
    rows = [(method["label"], method["id"], "accuracy") for method in experiment["methods"]]
    averaged = {run["method"] for run in runs if "wise_ft_accuracy" in run}
    rows += [(f"{label} + WiSE-FT", id_, "wise_ft_accuracy") for label, id_, _ in rows if id_ in averaged]
    width = max(len(label) for label in ["held out →", *(label for label, _, _ in rows)])
    lines = [f"{'held out →':<{width}}" + "".join(f"{t:>16}" for t in targets) + f"{'mean':>9}"]
    for label, method, part in rows:
        cells, means = "", []
        for target in targets:
            values = [100 * run[part][target] for run in runs if run["method"] == method and run["target"] == target]
            mean = sum(values) / len(values)
            means.append(mean)
            spread = (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1) / len(values)) ** 0.5
            cells += f"{mean:>9.1f} ± {spread:<4.1f}" if len(values) > 1 else f"{mean:>16.1f}"
        lines.append(f"{label:<{width}}{cells}{sum(means) / len(means):>9.1f}")
    return "\n".join(lines)
