"""The command line: `fastheads demo | check | plan | train | evaluate | merge | inspect`."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastheads.cli import data
from fastheads.cli.arguments import InputError, parser

if TYPE_CHECKING:
    from torch import nn

    from fastheads.train.data.domains import DomainFolders
    from fastheads.train.progress import Bars


@contextmanager
def _no_logging() -> Iterator[None]:
    """OpenCLIP logs what it then raises, and what nobody asked."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _load_model(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """An OpenCLIP model and its tokenizer; what goes wrong, in words.

    Where the weights were trained with QuickGELU and the model named has none (OpenCLIP only warns), `args.model`
    becomes the name of the one that has.
    """
    import open_clip

    name, pretrained = _model_name(args), args.pretrained
    try:
        with _no_logging():
            model = open_clip.create_model(name, pretrained=pretrained)
    except Exception as e:
        reason = textwrap.shorten(str(e) or type(e).__name__, 300, placeholder=" …")
        if pretrained and Path(pretrained).is_file():
            raise InputError(f"--pretrained: {pretrained} does not fit {name}: {reason}") from e
        raise InputError(
            f"--pretrained: could not get the weights {pretrained!r} of {name} ({reason}); without a network, give "
            "--pretrained the path of a checkpoint you have"
        ) from e
    if name != args.model:
        warnings.warn(
            f"the weights {pretrained!r} of {args.model} were trained with QuickGELU, so this is {name}", stacklevel=2
        )
        args.model = name
    from fastheads.train.experiment import device

    return model.to(device()).eval(), open_clip.get_tokenizer(name)


def _model_name(args: argparse.Namespace) -> str:
    """OpenCLIP's name of the model with the activation its weights want. What it cannot be is told in words."""
    import open_clip

    name, pretrained = args.model, args.pretrained
    if name == "fastheads-demo":
        from fastheads.demo.base import register

        register()
    known = {model.lower(): model for model in open_clip.list_models()}
    if name not in known.values() and ":" not in name:
        close = [known[m] for m in difflib.get_close_matches(name.lower(), known, n=5)]
        raise InputError(f"--model: OpenCLIP has no {name!r}; it has {', '.join([*close, 'others'])} …")
    local = bool(pretrained) and Path(pretrained).is_file()
    if pretrained and not local:
        if Path(pretrained).exists():
            raise InputError(f"--pretrained: {pretrained} is not a file")
        if os.sep in pretrained or Path(pretrained).suffix:
            raise InputError(f"--pretrained: {pretrained} does not exist")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tags and pretrained not in tags:
            raise InputError(
                f"--pretrained: {name} has no weights {pretrained!r}; it has {', '.join(tags)}, or give a file"
            )
        quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
        if quick and not open_clip.get_model_config(name).get("quick_gelu", False):
            name = f"{name}-quickgelu"
    return name


def _check_towers(args: argparse.Namespace) -> None:
    """Raises what `patch` will, for each method with an adapter, before a weight or a picture is loaded."""
    import open_clip

    from fastheads.patching import explain
    from fastheads.train.methods import METHODS

    name = _model_name(args)
    try:
        with _no_logging():
            model = open_clip.create_model(name, device="meta")
    except Exception:  # what cannot be built without a network is told when its weights are loaded
        return
    for method in args.method:
        config = METHODS[method].config_for(model, args.targets)
        if config is not None:
            explain(model, config)


def _load_adapter(model: nn.Module, args: argparse.Namespace) -> None:
    from fastheads.adapters import AnotherBaseError, load_adapter

    try:
        load_adapter(model, args.adapter, check_base=not args.any_base)
    except AnotherBaseError as e:
        raise InputError(f"--adapter: {e.what}; --any-base takes it all the same") from e


def _transforms(model: nn.Module) -> Any:
    import open_clip

    from fastheads.train.data.batches import clip_transforms

    visual: Any = model.visual
    cfg = getattr(visual, "preprocess_cfg", {}) or {}
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    constants = open_clip.constants
    mean, std = cfg.get("mean", constants.OPENAI_DATASET_MEAN), cfg.get("std", constants.OPENAI_DATASET_STD)
    return clip_transforms(size, mean, std)


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
    from fastheads.losses.context import fill

    for prompt in args.prompt or ():
        try:
            fill(prompt, "class")
        except ValueError as e:
            raise InputError(f"--prompt: {str(e).removeprefix('templates: ')}") from e
    return tuple(args.prompt or ("a photo of a {}.",))


def _demo(args: argparse.Namespace) -> None:
    from fastheads.train.progress import Bars

    with Bars():  # before the imports, which can take half a minute
        from fastheads.demo.icons import DOMAINS
        from fastheads.demo.run import TARGET, run_demo, tune_demo
        from fastheads.train.experiment import table

    if args.target is not None and args.target not in DOMAINS:
        raise InputError(f"--target: got {args.target!r}; takes {', '.join(DOMAINS)}")
    if args.target and args.full:
        raise InputError("--target: --full holds out every domain; give one of the two")
    if args.tune and args.full:
        raise InputError("--tune: searches for every domain; give it without --full")
    if args.tune:
        result = tune_demo(args.out, targets=[args.target] if args.target else DOMAINS, steps=args.steps)
        print(f"chosen on sources held out in turn: {result['chosen']}\n{args.out / 'tuning.json'}")
        return
    targets = DOMAINS if args.full else (args.target or TARGET,)
    experiment, page = run_demo(args.out, targets=targets, full=args.full, steps=args.steps, command=args.typed)
    print("accuracy on the domain held out, %\n" + table(experiment))
    print(f"\nreport: {page}")


def _train(args: argparse.Namespace) -> None:
    from fastheads.train.progress import Bars, phase

    with Bars() as bars:  # before the imports, which can take half a minute
        from fastheads.train.experiment import is_main_process, table
        from fastheads.train.report.page import write_report

        experiment, folders = _experiment(args, bars)
        if not is_main_process():
            return
        with phase("writing the report"):
            page = write_report(experiment, args.out, samples=folders.samples())
    print("accuracy on the domain held out, %\n" + table(experiment))
    print(f"\nreport: {page}")


def _experiment(args: argparse.Namespace, bars: Bars) -> tuple[dict[str, Any], DomainFolders]:
    """All of `train` but its output."""
    from fastheads.train.data.images import UnreadableImageError
    from fastheads.train.evaluation import make_problem
    from fastheads.train.experiment import is_main_process, run_experiment
    from fastheads.train.methods import METHODS
    from fastheads.train.progress import phase
    from fastheads.train.recipe import Recipe, check_run

    targets, domains = data.targets_of(args)
    for name in args.method:
        if name not in METHODS:
            raise InputError(f"--method: got {name!r}; takes {', '.join(METHODS)}")

    def recipe_of(method: str) -> Recipe:
        encoder = METHODS[method].trains == "encoder"
        context = float(METHODS[method].context) if args.context_weight is None else args.context_weight
        return Recipe(
            steps=args.steps,
            per_domain=args.per_domain,
            lr=args.lr if args.lr is not None else 1e-5 if encoder else 2e-4,
            gate_lr=args.gate_lr,
            weight_decay=args.weight_decay,
            mmd_weight=args.mmd_weight,
            context_weight=context,
            mmd_kernel=args.mmd_kernel,
            mmd_features=args.mmd_features,
            targets=args.targets,
            evaluate_every=args.evaluate_every,
            save_every=args.save_every,
            batch_size=args.batch_size,
            workers=args.workers,
            cache=args.cache_images,
            recompute=args.recompute if METHODS[method].trains == "adapter" else 0,
            checkpointing=args.checkpointing,
        )

    for method in args.method:  # bad numbers are told before the model is loaded
        try:
            check_run(METHODS[method], recipe_of(method), args.precision)
        except ValueError as e:
            raise data.as_options(e, "per_domain", "mmd_kernel", "mmd_features", "precision", "targets") from e
    prompts = _prompts(args)
    _check_towers(args)
    folders = data.images_of(args, domains)
    data.check_sources(args, folders, targets)
    with phase(f"loading {args.model}"):
        model, tokenizer = _load_model(args)
    problem_of = lambda target, seed: make_problem(  # noqa: E731
        model,
        tokenizer,
        folders,
        target,
        _transforms(model),
        prompts=prompts,
        with_contexts=any(recipe_of(method).context_weight for method in args.method),
        seed=seed,
        sources=args.sources,
        split_by=args.split_by,
    )
    name = args.data.absolute().name
    try:
        experiment = run_experiment(
            model,
            problem_of,
            folders,
            methods=args.method,
            targets=targets,
            seeds=lambda method: args.seed,
            recipes=lambda method, target: recipe_of(method),
            out=args.out,
            title=f"{args.model} on {name}",
            command=args.typed,
            base_name=f"{args.model} {args.pretrained}",
            dataset_name=name,
            precision=args.precision,
            watch=bars.watch if is_main_process() else None,
        )
    except UnreadableImageError as e:
        raise InputError(f"{e}; once it can be read, the same command goes on from the last saved state") from e
    return experiment, folders


def _evaluate(args: argparse.Namespace) -> None:
    from fastheads.train.progress import Bars

    with Bars() as bars:
        _scores(args, bars)


def _scores(args: argparse.Namespace, bars: Bars) -> None:
    from fastheads.adapters import read_adapter
    from fastheads.losses.context import class_text_weights
    from fastheads.train.data.batches import evaluation_loader
    from fastheads.train.evaluation import image_features, score_logits
    from fastheads.train.progress import phase

    data.check_domains(args, "--domain", args.domain or (), data.domains_of(args))
    if args.adapter is not None:
        read_adapter(args.adapter)
    prompts = _prompts(args)
    folders = data.images_of(args, used=args.domain)
    with phase(f"loading {args.model}"):
        model, tokenizer = _load_model(args)
        if args.adapter is not None:
            _load_adapter(model, args)
    with phase("encoding prompts"):
        classifier = class_text_weights(model, tokenizer, folders.class_names, prompts)
    transform = _transforms(model)[1]
    for name in args.domain or folders.domains:
        loader = evaluation_loader(folders, name, None, transform, args.batch_size, workers=args.workers)
        features, labels = image_features(model, loader, f"evaluating {name}")
        result = score_logits(features @ classifier.T, labels)
        bars.say(f"{name:<16} {100 * result.accuracy:5.1f} %  of {result.images} images")


def _merge(args: argparse.Namespace) -> None:
    import fastheads
    from fastheads.adapters import read_adapter
    from fastheads.train.experiment import save_stock

    if args.out.suffix != ".safetensors":
        raise InputError(f"--out: got {args.out}; takes a file name that ends in .safetensors")
    read_adapter(args.adapter)
    model, _ = _load_model(args)
    _load_adapter(model, args)
    fastheads.merge(model)
    print(f"{save_stock(model, args.out)}: open_clip.create_model({args.model!r}, pretrained={str(args.out)!r})")


def _inspect(args: argparse.Namespace) -> None:
    import fastheads
    from fastheads.adapters import read_adapter
    from fastheads.model import first_few
    from fastheads.reference import GATES

    if args.adapter is None:
        model, _ = _load_model(args)
        print(fastheads.explain(model))
        return
    about, tensors = read_adapter(args.adapter)
    size = sum(f.stat().st_size for f in args.adapter.iterdir() if f.is_file())
    print(f"base     {about['base_model']} (sha256 {about['base_sha256'][:12]}…), {about['host']}")
    print(
        f"size     {about['lora_parameters']:,} LoRA and {about['gate_parameters']:,} gate parameters, {size:,} bytes"
    )
    print("config   " + ", ".join(f"{k}={v}" for k, v in about["config"].items()))
    for word, names in (("with", about["modules_to_save"]), ("without", about["trained_beside"])):
        if names:
            print(f"{word:<8} {first_few(names)}, trained beside the adapter")
    gate = about["config"]["gate"]
    for name, theta in tensors.items():
        if name.endswith(".theta"):
            values = " ".join(f"{g:5.2f}" for g in GATES[gate](theta).tolist())
            print(f"gates    {name.removesuffix('.attn.heads.theta'):<36} {values}")


def _plan(args: argparse.Namespace) -> None:
    import fastheads

    if args.model == "fastheads-demo":
        from fastheads.demo.base import register

        register()
    names = ("batch", "gpu", "method", "targets", "precision", "recompute", "checkpointing", "impl", "classes")
    rank = args.rank[0] if args.rank and len(args.rank) == 1 else args.rank
    options = {name: getattr(args, name) for name in (*names, "captions")}
    found = fastheads.plan(args.model, rank=rank, **options)
    print(json.dumps(found.as_dict(), indent=1) if args.json else found)


EXTRA = ("accelerate", "matplotlib", "PIL", "rich", "sklearn", "torchvision")
COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "demo": _demo,
    "check": data.check,
    "plan": _plan,
    "train": _train,
    "evaluate": _evaluate,
    "merge": _merge,
    "inspect": _inspect,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done; 1: images can't be read; 2: bad input, told in one line; 130: interrupted."""
    args = parser().parse_args(argv)
    args.typed = shlex.join(["fastheads", *(sys.argv[1:] if argv is None else argv)])
    for name in ("target", "sources", "method", "seed", "domain"):
        if isinstance(getattr(args, name, None), list):
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))  # named twice, done once
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest: print(f"fastheads: note: {message}", file=sys.stderr)
            return COMMANDS[args.command](args) or 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as e:
        if os.environ.get("FASTHEADS_TRACEBACK"):
            raise
        hint = ""
        if isinstance(e, ModuleNotFoundError) and (e.name or "").split(".")[0] in EXTRA:
            hint = "; it comes with: pip install 'fastheads[train]'"
        print(f"fastheads {args.command}: {' '.join(str(e).split())}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastheads: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130
