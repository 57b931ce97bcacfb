"""The command line: `fastheads demo | check | plan | train | evaluate | merge | inspect`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastheads.cli import data
from fastheads.cli.arguments import InputError, parser

if TYPE_CHECKING:
    from torch import nn

    from fastheads.train.data.domains import DomainFolders
    from fastheads.train.progress import Bars
    from fastheads.train.recipe import Recipe


@contextmanager
def _as_options() -> Iterator[None]:
    """Errors that begin with an argument's name, with its option instead."""
    try:
        yield
    except ValueError as e:
        raise data.as_options(e, "^model", "^pretrained", "^image_size", "^method", "^context_weight") from e


def _load_model(args: argparse.Namespace, classes: int = 1000) -> tuple[nn.Module, Any]:
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
    return models.with_activation(args.model, args.pretrained) if models.has_text(args.model) else args.model


def _check_towers(args: argparse.Namespace, contexts: Mapping[str, float]) -> None:
    """Raises what `patch` will, for each method with an adapter, before a weight or a picture is loaded; and what a
    method (with its weight of the context's KL) lacks where the model has no text."""
    from fastheads.patching import explain
    from fastheads.train import models
    from fastheads.train.methods import METHODS, check_text

    text = models.has_text(args.model)
    with _as_options():
        name = _model_name(args)
        try:
            model = models.build(name, size=args.image_size)
        except Exception:  # what cannot be built without a network is told when its weights are loaded
            if not text:
                raise
            return
        for method, context in contexts.items():
            check_text(model, METHODS[method], context)
    if text and args.fixed_head:
        raise InputError(f"--fixed-head: {args.model} classifies by text, and has no linear head")
    for method in contexts:
        config = METHODS[method].config_for(model, args.targets)
        if config is not None:
            explain(model, config)


def _transforms(model: nn.Module) -> Any:
    """(training, evaluation) transforms of the model's own."""
    from fastheads.train import models

    with _as_options():
        return models.transforms(model)


def _load_adapter(model: nn.Module, args: argparse.Namespace) -> None:
    from fastheads.adapters import AnotherBaseError, load_adapter

    try:
        load_adapter(model, args.adapter, check_base=not args.any_base)
    except AnotherBaseError as e:
        raise InputError(f"--adapter: {e.what}; --any-base takes it all the same") from e


def _classes(args: argparse.Namespace, otherwise: int) -> int:
    """Of how many classes the linear head is that lies with `--adapter`, if there is one."""
    from fastheads.adapters import read_adapter

    if args.adapter is None:
        return otherwise
    about, tensors = read_adapter(args.adapter)
    heads = [len(tensors[name]) for name in about["modules_to_save"] if tensors[name].dim() == 2]
    return heads[0] if heads else otherwise


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
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
        from fastheads.train.ranks import ending_at_once
        from fastheads.train.report.page import write_report

        with ending_at_once("what was saved before"):
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
            per_domain=12 if args.per_domain == "auto" else args.per_domain,
            accumulate=args.accumulate,
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
            compile=args.compile,
            tf32=args.tf32,
            ema=args.ema,
            fixed_head=args.fixed_head,
        )

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    names = ("per_domain", "accumulate", "mmd_kernel", "mmd_features", "precision", "targets")
    for method in args.method:  # bad numbers are told before the model is loaded
        try:
            check_run(METHODS[method], recipe_of(method), args.precision, 1 if args.per_domain == "auto" else processes)
        except ValueError as e:
            raise data.as_options(e, *names) from e
    if "tensorboard" in args.log and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--log: TensorBoard is not installed; it comes with: pip install 'fastheads[tensorboard]'")
    prompts = _prompts(args)
    _check_towers(args, {method: recipe_of(method).context_weight for method in args.method})
    folders = data.images_of(args, domains)
    data.check_sources(args, folders, targets)
    with phase(f"loading {args.model}"):
        model, tokenizer = _load_model(args, len(folders.classes))
        transforms = _transforms(model)
    if args.per_domain == "auto":
        sources = max(len(args.sources or ()), len(folders.domains) - 1 if args.sources is None else 0)
        args.per_domain = _as_many_as_fit(args, model, recipe_of, sources, bars)
    problem_of = lambda target, seed: make_problem(  # noqa: E731
        model,
        tokenizer,
        folders,
        target,
        transforms,
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
            base_name=f"{args.model} {args.pretrained}".strip(),
            dataset_name=name,
            precision=args.precision,
            watch=bars.watch if is_main_process() else None,
            log=args.log,
        )
    except UnreadableImageError as e:
        raise InputError(f"{e}; once it can be read, the same command goes on from the last saved state") from e
    return experiment, folders


def _as_many_as_fit(
    args: argparse.Namespace, model: nn.Module, recipe_of: Callable[[str], Recipe], sources: int, bars: Bars
) -> int:
    """`--per-domain auto`: what every method's step has room for on every process; kept in `--out`, so that the same
    command goes on."""
    from accelerate.utils import gather_object

    from fastheads.files import write_json
    from fastheads.train.experiment import is_main_process
    from fastheads.train.methods import METHODS
    from fastheads.train.progress import phase
    from fastheads.train.ranks import join
    from fastheads.train.sizing import largest_batch

    kept, processes = args.out / "per-domain.json", join().num_processes
    if kept.is_file():
        found, why = int(json.loads(kept.read_text())), f"as {kept} says"
    else:
        trained = [METHODS[name] for name in args.method if METHODS[name].trains in ("adapter", "encoder")]
        with phase("counting what fits"):
            each = [largest_batch(model, method, recipe_of(method.id), args.precision) for method in trained]
        batch = min(gather_object([min(each)]) if each and processes > 1 else each, default=sources * 12)
        found = batch * args.accumulate * processes // sources
        where = "tried on the GPU" if next(model.parameters()).is_cuda else "by the ledger"
        why = f"{batch:,} images fit on a process at once, {where}"
    if found < 1:
        raise InputError(
            "--per-domain: auto found no batch that fits; --accumulate or --checkpointing need less memory"
        )
    if is_main_process():
        write_json(kept, found)
        bars.say(f"--per-domain {found}: {why}")
    return found


def _evaluate(args: argparse.Namespace) -> None:
    from fastheads.train.progress import Bars

    with Bars() as bars:
        _scores(args, bars)


def _scores(args: argparse.Namespace, bars: Bars) -> None:
    from fastheads.hosts.vision import head_of
    from fastheads.losses.context import class_text_weights
    from fastheads.train.data.batches import evaluation_loader
    from fastheads.train.evaluation import image_features, score_logits
    from fastheads.train.progress import phase

    data.check_domains(args, "--domain", args.domain or (), data.domains_of(args))
    classes = _classes(args, 0)
    prompts = _prompts(args)
    folders = data.images_of(args, used=args.domain)
    with phase(f"loading {args.model}"):
        model, tokenizer = _load_model(args, classes or len(folders.classes))
        if args.adapter is not None:
            _load_adapter(model, args)
    head = head_of(model)
    if head is None:
        with phase("encoding prompts"):
            weights = class_text_weights(model, tokenizer, folders.class_names, prompts)
    elif head.out_features != len(folders.classes) or not head.weight.any():
        raise InputError(
            f"--adapter, --pretrained: {args.model} has no head for the {len(folders.classes)} classes of {args.data}; "
            "takes an adapter that train wrote for them, or a checkpoint of train or merge"
        )
    transform = _transforms(model)[1]
    for name in args.domain or folders.domains:
        loader = evaluation_loader(folders, name, None, transform, args.batch_size, workers=args.workers)
        features, labels = image_features(model, loader, f"evaluating {name}")
        result = score_logits(features @ weights.T if head is None else head(features), labels)
        bars.say(f"{name:<16} {100 * result.accuracy:5.1f} %  of {result.images} images")


def _merge(args: argparse.Namespace) -> None:
    import fastheads
    from fastheads.train import models

    if args.out.suffix != ".safetensors":
        raise InputError(f"--out: got {args.out}; takes a file name that ends in .safetensors")
    model, _ = _load_model(args, _classes(args, 1000))
    _load_adapter(model, args)
    path = models.save(fastheads.merge(model), args.out)
    print(f"{path}: {models.how_to_load(args.model, model, path, args.image_size)}")


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
    """Runs one command. 0: done, or asked to end and saved; 1: images can't be read, or another process ended; 2: bad
    input, told in one line; 130: interrupted."""
    args = parser().parse_args(argv)
    args.typed = shlex.join(["fastheads", *(sys.argv[1:] if argv is None else argv)])
    for name in ("target", "sources", "method", "seed", "domain"):
        if isinstance(getattr(args, name, None), list):
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))  # named twice, done once
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    who = f"fastheads {args.command}:" + f" process {rank}:" * (rank > 0)
    goes_on = "the same command goes on from the last saved state, on any number of processes"
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
        if rank == 0 or not getattr(e, "everywhere", False):
            print(f"{who} {' '.join(str(e).split())}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastheads: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    except SystemExit as e:
        if rank == 0 and hasattr(e, "where"):
            print(f"{who} asked to end, after {e.where}; {goes_on}: {args.typed}", file=sys.stderr)
        raise
    except Exception as e:
        if processes == 1:
            raise
        from fastheads.train.ranks import lost

        if lost(e):
            print(f"{who} another process ended, or is silent ({str(e).splitlines()[0]})", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"{who} ended by that error, and all with it; {goes_on}: {args.typed}", file=sys.stderr)
        return 1
