"""The command line: what each of `arguments.parser`'s commands does."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastheads.cli import data, sweep
from fastheads.cli.arguments import InputError, Outcome, parser
from fastheads.cli.training import (
    base_of_adapter,
    classes_of,
    experiment,
    load_adapter_of,
    load_model,
    prompts_of,
    recipe_of,
    set_up,
    transforms_of,
)
from fastheads.train import ranks

if TYPE_CHECKING:
    from fastheads.train.progress import Bars


def _demo(args: argparse.Namespace) -> Outcome:
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
        return {"results": args.out / "tuning.json"}, 0
    targets = DOMAINS if args.full else (args.target or TARGET,)
    experiment, page = run_demo(args.out, targets=targets, full=args.full, steps=args.steps, command=args.typed)
    print("accuracy on the domain held out, %\n" + table(experiment))
    print(f"\nreport: {page}")
    return {"results": args.out / "results.json", "report": page}, 0


def _train(args: argparse.Namespace) -> Outcome:
    from fastheads.train.progress import Bars, phase

    with Bars() as bars:  # before the imports, which can take half a minute
        from fastheads.train.experiment import table
        from fastheads.train.methods import METHODS
        from fastheads.train.report.page import write_report

        for name in args.method:
            if name not in METHODS:
                raise InputError(f"--method: got {name!r}; takes {', '.join(METHODS)}")
        recipes = {name: recipe_of(args, METHODS[name]) for name in args.method}  # bad numbers are told first
        with ranks.ending_at_once(""):
            setting = set_up(args, [(METHODS[name], recipe) for name, recipe in recipes.items()])
            found = experiment(
                setting,
                bars,
                args.method,
                lambda method, target: recipes[method],
                targets=setting.targets,
                seeds=lambda method: args.seed,
                out=args.out,
                command=args.typed,
                log=args.log,
            )
        if not ranks.is_main_process():
            return {}, 0
        with phase("writing the report"):
            page = write_report(found, args.out, samples=setting.folders.samples())
    print("accuracy on the domain held out, %\n" + table(found))
    print(f"\nreport: {page}")
    return {"results": args.out / "results.json", "report": page}, 0


def _report(args: argparse.Namespace) -> Outcome:
    from fastheads.train.progress import Bars, phase

    with Bars():
        from fastheads.files import write_whole
        from fastheads.train.compare import compare
        from fastheads.train.experiment import table
        from fastheads.train.report.page import write_report
        from fastheads.train.report.sections import Page

        found = compare(args.runs, args.typed)
        page = Page(found)
        with phase("writing the report"):
            paths = {"report": write_report(found, args.out)}
        for kind, wanted, name, text in (
            ("csv", args.csv, "report.csv", page.csv),
            ("latex", args.latex, "report.tex", page.latex),
        ):
            if wanted:
                paths[kind] = write_whole(args.out / name, text().encode())
    print("accuracy on the domain held out, %\n" + table(found))
    print("\n" + "\n".join(map(str, paths.values())))
    return paths, 0


def _heads(args: argparse.Namespace) -> Outcome:
    from fastheads.train.progress import Bars, phase

    with Bars() as bars:
        from fastheads.files import write_json
        from fastheads.patching import patch
        from fastheads.train.criteria import CRITERIA, GATES
        from fastheads.train.earlier import hashes
        from fastheads.train.experiment import versions
        from fastheads.train.frozen import CONFIG
        from fastheads.train.heads import select_heads
        from fastheads.train.methods import METHODS
        from fastheads.train.recipe import Recipe
        from fastheads.train.report.closed import table, write_heads

        recipe = Recipe(batch_size=args.batch_size, workers=args.workers)
        setting = set_up(args, [(METHODS["dig"], recipe)])
        hashed = hashes(setting.model, setting.problem_of(setting.targets[0], args.seed[0]))
        same = ("most", "images", "test_images", "prompt", "sources", "split_by", "image_size")
        patch(setting.model, CONFIG)
        about = {
            **setting.about,
            "command": args.typed,
            "key": hashed
            | {name: getattr(args, name) for name in same}
            | {"class_names": list(setting.folders.class_names)},
            "versions": versions(),
            "criteria": {name: told for name, (told, _) in (CRITERIA | GATES).items()},
        }
        path, kept, done = args.out / "heads.json", args.out / "features", list[dict[str, Any]]()
        if path.is_file():
            earlier = json.loads(path.read_text())
            if earlier.get("key") != about["key"]:
                raise InputError(f"--out: {args.out} holds what other options found; takes another folder")
            done = earlier["runs"]
        else:  # features belong to what heads.json says
            shutil.rmtree(kept, ignore_errors=True)
            write_json(path, {**about, "runs": done})
        for seed in args.seed:
            for target in setting.targets:
                if any((run["target"], run["seed"]) == (target, seed) for run in done):
                    continue
                problem = setting.problem_of(target, seed)
                own = dataclasses.replace(recipe, seed=seed, **setting.found)
                options = {"most": args.most, "images": args.images, "tested": args.test_images, "kept": kept}
                done.append(select_heads(setting.model, problem, own, **options))
                write_json(path, {**about, "runs": done})
                bars.say(table(done[-1]))
        with phase("writing the page"):
            page = write_heads({**about, "runs": done}, args.out)
    print(f"\n{args.out / 'heads.json'}\n{page}")
    return {"results": args.out / "heads.json", "report": page}, 0


def _evaluate(args: argparse.Namespace) -> Outcome:
    from fastheads.train.progress import Bars

    with Bars() as bars:
        base_of_adapter(args)
        scores = _scores(args, bars)
    about = {"model": args.model, "pretrained": args.pretrained, "adapter": args.adapter, "data": args.data}
    return {**about, "domains": scores}, 0


def _scores(args: argparse.Namespace, bars: Bars) -> dict[str, dict[str, float]]:
    """Of each domain; each is said as it comes."""
    from fastheads.hosts.vision import head_of
    from fastheads.losses.context import class_text_weights
    from fastheads.train.data.batches import evaluation_loader
    from fastheads.train.evaluation import among_its_own, image_features, score_logits
    from fastheads.train.progress import phase

    data.check_domains(args, "--domain", args.domain or (), data.domains_of(args))
    classes = classes_of(args, 0)
    prompts = prompts_of(args)
    folders = data.images_of(args, used=args.domain)
    with phase(f"loading {args.model}"):
        model, tokenizer = load_model(args, classes or len(folders.classes))
        if args.adapter is not None:
            load_adapter_of(model, args, None if head_of(model) is None else folders.classes)
    head = head_of(model)
    if head is None:
        with phase("encoding prompts"):
            weights = class_text_weights(model, tokenizer, folders.class_names, prompts)
    elif head.out_features != len(folders.classes) or not head.weight.any():
        raise InputError(
            f"--adapter, --pretrained: {args.model} has no head for the {len(folders.classes)} classes of {args.data}; "
            "takes an adapter that train wrote for them, or a checkpoint of train or merge"
        )
    transform, found = transforms_of(model)[1], {}
    for name in args.domain or folders.domains:
        loader = evaluation_loader(folders, name, None, transform, args.batch_size, workers=args.workers)
        features, labels = image_features(model, loader, f"evaluating {name}")
        logits = features @ weights.T if head is None else head(features)
        result = score_logits(among_its_own(logits, folders, name), labels)
        bars.say(f"{name:<16} {100 * result.accuracy:5.1f} %  of {result.images} images")
        found[name] = {"accuracy": result.accuracy, "loss": result.loss, "images": result.images}
    return found


def _merge(args: argparse.Namespace) -> Outcome:
    import fastheads
    from fastheads.train import models

    if args.out.suffix != ".safetensors":
        raise InputError(f"--out: got {args.out}; takes a file name that ends in .safetensors")
    base_of_adapter(args)
    model, _ = load_model(args, classes_of(args, 1000))
    load_adapter_of(model, args)
    path = models.save(fastheads.merge(model), args.out)
    load = models.how_to_load(args.model, model, path, args.image_size)
    print(f"{path}: {load}")
    return {"merged": path, "load": load}, 0


def _inspect(args: argparse.Namespace) -> Outcome:
    import fastheads
    from fastheads.adapters import read_adapter
    from fastheads.model import first_few
    from fastheads.reference import GATES

    if args.adapter is None:
        model, _ = load_model(args)
        found = fastheads.explain(model)
        print(found)
        return {"model": args.model, **dataclasses.asdict(found)}, 0
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
    if about.get("classes"):
        print(f"classes  {first_few(about['classes'], 10, 'classes')}")
    gate, end = about["config"]["gate"], ".attn.heads.theta"
    gates = {n.removesuffix(end): GATES[gate](theta).tolist() for n, theta in tensors.items() if n.endswith(".theta")}
    for name, values in gates.items():
        print(f"gates    {name:<36} {' '.join(f'{g:5.2f}' for g in values)}")
    return {"adapter": args.adapter, **about, "bytes": size, "gates": gates}, 0


def _plan(args: argparse.Namespace) -> Outcome:
    import fastheads

    if args.model == "fastheads-demo":
        from fastheads.demo.base import register

        register()
    names = ("batch", "gpu", "method", "targets", "precision", "recompute", "checkpointing", "impl", "classes")
    rank = args.rank[0] if args.rank and len(args.rank) == 1 else args.rank
    options = {name: getattr(args, name) for name in (*names, "captions")}
    found = fastheads.plan(args.model, rank=rank, **options)
    print(found)
    return found.as_dict(), 0


EXTRA = dict.fromkeys(("accelerate", "matplotlib", "PIL", "rich", "sklearn", "torchvision"), "train")
EXTRA |= dict.fromkeys(("submitit", "tomli"), "train,sweep")
COMMANDS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "demo": _demo,
    "check": data.check,
    "shards": data.shards,
    "bench-data": data.bench,
    "plan": _plan,
    "train": _train,
    "sweep": sweep.sweep,
    "report": _report,
    "heads": _heads,
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
    main_process = ranks.is_main_process()
    who = f"fastheads {args.command}:" + f" process {ranks.rank()}:" * (not main_process)
    goes_on = "the same command goes on from the last saved state, on any number of processes"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO() if args.json else sys.stdout):
            warnings.showwarning = lambda message, *rest: print(f"fastheads: note: {message}", file=sys.stderr)
            found, code = COMMANDS[args.command](args)
        if args.json and found:
            print(json.dumps(found, indent=1, default=str))
        return code
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as e:
        if os.environ.get("FASTHEADS_TRACEBACK"):
            raise
        hint = ""
        if isinstance(e, ModuleNotFoundError) and (missing := (e.name or "").split(".")[0]) in EXTRA:
            hint = f"; it comes with: pip install 'fastheads[{EXTRA[missing]}]'"
        if main_process or not getattr(e, "everywhere", False):
            print(f"{who} {' '.join(str(e).split())}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastheads: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    except SystemExit as e:
        if main_process and hasattr(e, "where"):
            print(f"{who} asked to end{e.where and ', after '}{e.where}; {goes_on}: {args.typed}", file=sys.stderr)
        raise
    except Exception as e:
        if ranks.processes() == 1:
            raise
        if ranks.lost(e):
            print(f"{who} another process ended, or is silent ({str(e).splitlines()[0]})", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"{who} ended by that error, and all with it; {goes_on}: {args.typed}", file=sys.stderr)
        return 1
