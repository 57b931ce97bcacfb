"""A model, its images and the numbers of its training, from the options of the command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastheads.cli import data
from fastheads.cli.arguments import InputError
from fastheads.train.ranks import is_main_process, of_all, processes

if TYPE_CHECKING:
    from torch import nn

    from fastheads.train.data.domains import DomainFolders
    from fastheads.train.evaluation import Problem
    from fastheads.train.loop import Report
    from fastheads.train.methods import Method
    from fastheads.train.progress import Bars
    from fastheads.train.recipe import Recipe


@contextmanager
def _as_options() -> Iterator[None]:
    """Errors that begin with an argument's name, with its option instead."""
    try:
        yield
    except ValueError as e:
        raise data.as_options(e, "^model", "^pretrained", "^image_size", "^method", "^context_weight", "^rank") from e


def load_model(args: argparse.Namespace, classes: int = 1000) -> tuple[nn.Module, Any]:
    """A model and its tokenizer, None where it has no text; what goes wrong, in words. classes: of a linear head.

    Where the weights were trained with QuickGELU and the model named has none (OpenCLIP only warns), `args.model`
    becomes the name of the one that has.
    """
    from fastheads.train import models
    from fastheads.train.experiment import device

    with _as_options():
        name = _model_name(args)
        model, tokenizer = models.load(name, args.pretrained, classes, args.image_size)
    if name != args.model:
        warnings.warn(
            f"the weights {args.pretrained!r} of {args.model} were trained with QuickGELU, so this is {name}",
            stacklevel=2,
        )
        args.model = name
    return model.to(device()).eval(), tokenizer


def _model_name(args: argparse.Namespace) -> str:
    """The model's name, OpenCLIP's with the activation its weights want; chooses the weights where none are named."""
    from fastheads.train import models

    if args.model == "fastheads-demo":
        from fastheads.demo.base import register

        register()
    if args.pretrained is None and args.command != "inspect":
        args.pretrained = models.default_weights(args.model)
    return models.with_activation(args.model, args.pretrained)


def _check_towers(args: argparse.Namespace, rows: Sequence[tuple[Method, Recipe]]) -> None:
    """Raises what `patch` will, for each method with an adapter, before a weight or a picture is loaded; and what a
    method (with its weight of the context's KL) lacks where the model has no text."""
    from fastheads.hosts import find_tower
    from fastheads.patching import explain
    from fastheads.train import models
    from fastheads.train.methods import check_text

    text = models.has_text(args.model)
    with _as_options():
        name = _model_name(args)
        try:
            model = models.build(name, size=args.image_size)
        except Exception:  # what cannot be built without a network is told when its weights are loaded
            if not text or models.is_folder(args.model):
                raise
            return
        for method, recipe in rows:
            check_text(model, method, recipe.context_weight)
        if text and any(recipe.fixed_head for _, recipe in rows):
            raise InputError(f"--fixed-head: {args.model} classifies by text, and has no linear head")
        for method, recipe in rows:
            config = method.config_for(model, **recipe.adapter)
            if config is not None:
                explain(model, config)
                depth = len(find_tower(model, "visual").attentions)
                if method.mmd and recipe.mmd_layers and len(recipe.mmd_layers) != depth:
                    raise InputError(f"--mmd-layers: got {len(recipe.mmd_layers)} numbers; takes {depth}, one a layer")


def transforms_of(model: nn.Module) -> Any:
    """(training, evaluation) transforms of the model's own."""
    from fastheads.train import models

    with _as_options():
        return models.transforms(model)


def load_adapter_of(model: nn.Module, args: argparse.Namespace, classes: Sequence[str] | None = None) -> None:
    from fastheads.adapters import AnotherBaseError, load_adapter

    try:
        load_adapter(model, args.adapter, check_base=not args.any_base, classes=classes)
    except AnotherBaseError as e:
        raise InputError(f"--adapter: {e.what}; --any-base takes it all the same") from e


def base_of_adapter(args: argparse.Namespace) -> None:
    """Where `--model` is not given it is the one that `--adapter` was saved with, and so are the weights."""
    from fastheads.adapters import read_adapter
    from fastheads.cli.arguments import MODEL
    from fastheads.train.models import is_folder

    if args.model is not None:
        return
    base = read_adapter(args.adapter)[0]["base_model"] if args.adapter else ""
    name, _, weights = (base, "", "") if is_folder(base) else base.partition(" ")
    named = weights or ":" in name or is_folder(name)  # save_adapter notes a class where it was told no base
    args.model = name if named else MODEL
    if args.pretrained is None and (" " not in weights or Path(weights).is_file()):
        args.pretrained = weights or None


def classes_of(args: argparse.Namespace, otherwise: int) -> int:
    """Of how many classes the linear head is that lies with `--adapter`, if there is one."""
    from fastheads.adapters import read_adapter

    if args.adapter is None:
        return otherwise
    about, tensors = read_adapter(args.adapter)
    heads = [len(tensors[name]) for name in about["modules_to_save"] if tensors[name].dim() == 2]
    return heads[0] if heads else otherwise


def prompts_of(args: argparse.Namespace) -> tuple[str, ...]:
    from fastheads.losses.context import fill
    from fastheads.train import models

    if args.prompt and not models.has_text(args.model):
        raise InputError(f"--prompt: {args.model} classifies by a linear head, and has no text tower to be prompted")
    for prompt in args.prompt or ():
        try:
            fill(prompt, "class")
        except ValueError as e:
            raise InputError(f"--prompt: {str(e).removeprefix('templates: ')}") from e
    return tuple(args.prompt or ("a photo of a {}.",))


def recipe_of(args: argparse.Namespace, method: Method) -> Recipe:
    """The numbers of a training run of `method`. Raises InputError where it can't be run by them."""
    from fastheads.train.recipe import Recipe, check_run

    lr = args.lr if args.lr is not None else 1e-5 if method.trains == "encoder" else 2e-4
    context = float(method.context) if args.context_weight is None else args.context_weight
    same = (
        *("steps", "accumulate", "gate_lr", "weight_decay", "mmd_weight", "mmd_kernel", "mmd_features", "mmd_to"),
        *("mmd_layers", "targets", "rank", "gate", "shared", "sequential", "evaluate_every", "save_every"),
        *("batch_size", "workers", "checkpointing", "compile", "fsdp", "tf32", "ema", "fixed_head", "target_curve"),
    )
    auto = args.per_domain == "auto"
    try:
        recipe = Recipe(
            per_domain=max(12, args.accumulate) if auto else args.per_domain,
            lr=lr,
            context_weight=context,
            cache=bool(args.cache_images),
            recompute=args.recompute if method.trains == "adapter" else 0,
            wise_ft=args.wise_ft is not False and (tuple(args.wise_ft) or True),
            **{name: getattr(args, name) for name in same},
        )
        check_run(method, recipe, args.precision, 1 if auto else processes())
    except ValueError as e:
        raise data.as_options(e, *same, "per_domain", "precision", "wise_ft") from e
    return recipe


@dataclass(frozen=True)
class Setting:
    """What runs are on: a model, images, and the problem of holding out a target, by (target, seed).

    found: what of the recipes is known only now; notes: what to say of it.
    """

    model: nn.Module
    folders: DomainFolders
    problem_of: Callable[[str, int], Problem]
    targets: Sequence[str]
    found: dict[str, Any]
    notes: Sequence[str]
    about: dict[str, Any]


def set_up(args: argparse.Namespace, rows: Sequence[tuple[Method, Recipe]]) -> Setting:
    """Loads the model and lists the images; what is wrong with either, or for a method, in words.

    `about` has `run_experiment`'s title, base_name, dataset_name, precision.
    """
    from fastheads.train.evaluation import make_problem
    from fastheads.train.methods import METHODS
    from fastheads.train.progress import phase

    if "tensorboard" in getattr(args, "log", ()) and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--log: TensorBoard is not installed; it comes with: pip install 'fastheads[tensorboard]'")
    targets, domains = data.targets_of(args)
    prompts = prompts_of(args)
    _check_towers(args, rows)
    folders = data.images_of(args, domains)
    data.check_sources(args, folders, targets)
    kept = data.kept_images(args, folders)
    found: dict[str, Any] = {"cache": bool(kept)}
    notes = [kept] if kept else []
    with phase(f"loading {args.model}"):
        model, tokenizer = load_model(args, len(folders.classes))
        transforms = transforms_of(model)
    if args.per_domain == "auto":
        sources = max(len(args.sources or ()), len(folders.domains) - 1 if args.sources is None else 0)
        found["per_domain"], note = _as_many_as_fit(args, model, rows, sources)
        notes.append(note)
    problem_of = lambda target, seed: make_problem(  # noqa: E731
        model,
        tokenizer,
        folders,
        target,
        transforms,
        prompts=prompts,
        with_contexts=any(recipe.context_weight for _, recipe in rows),
        with_domain_contexts=any(METHODS[name].trains in ("adapter", "encoder") for name in args.method),
        seed=seed,
        sources=args.sources,
        split_by=args.split_by,
    )
    name = args.data.absolute().name
    about = {
        "title": f"{args.model} on {name}",
        "base_name": f"{args.model} {args.pretrained}".strip(),
        "dataset_name": name,
        "precision": args.precision,
    }
    return Setting(model, folders, problem_of, targets, found, notes, about)


def _as_many_as_fit(
    args: argparse.Namespace, model: nn.Module, rows: Sequence[tuple[Method, Recipe]], sources: int
) -> tuple[int, str]:
    """`--per-domain auto`: what every method's step has room for on every process, and what to say of it; kept in
    `--out`, so that the same command goes on."""
    from fastheads.files import write_json
    from fastheads.train.progress import phase
    from fastheads.train.sizing import largest_batch

    kept = args.out / "per-domain.json"
    if kept.is_file():
        found, why = int(json.loads(kept.read_text())), f"as {kept} says"
    else:
        with phase("counting what fits"):
            each = [
                largest_batch(model, method, recipe, args.precision)
                for method, recipe in rows
                if method.trains in ("adapter", "encoder")
            ]
        batch = min(of_all([min(each)]) if each else each, default=sources * 12)
        found = batch * args.accumulate // sources * processes()
        where = "tried on the GPU" if next(model.parameters()).is_cuda else "by the ledger"
        why = f"{batch:,} images fit on a process at once, {where}"
    if found < 1:
        raise InputError(
            "--per-domain: auto found no batch that fits; --accumulate or --checkpointing need less memory"
        )
    if is_main_process():
        write_json(kept, found)
    return found, f"--per-domain {found}: {why}"


def experiment(
    setting: Setting,
    bars: Bars,
    methods: Sequence[Method],
    recipes: Callable[[str, str], Recipe],
    **options: Any,
) -> dict[str, Any]:
    """`run_experiment` on a setting, of every method; `options`: the others of its arguments."""
    from fastheads.train.data.images import UnreadableImageError
    from fastheads.train.experiment import run_experiment

    notes = list(setting.notes)

    def watch(run: str) -> Report:
        while notes:
            bars.say(notes.pop(0))
        return bars.watch(run)

    try:
        return run_experiment(
            setting.model,
            setting.problem_of,
            setting.folders,
            methods=methods,
            recipes=lambda method, target: replace(recipes(method, target), **setting.found),
            watch=watch if is_main_process() else None,
            **setting.about,
            **options,
        )
    except UnreadableImageError as e:
        raise InputError(f"{e}; once it can be read, the same command goes on from the last saved state") from e
