"""fastheads sweep: a table of runs from a TOML file, as jobs."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastheads.cli.arguments import InputError, Outcome, Parser, parser
from fastheads.cli.training import Setting, experiment, recipe_of, set_up
from fastheads.files import write_json

if TYPE_CHECKING:
    from fastheads.train.methods import Method
    from fastheads.train.progress import Bars
    from fastheads.train.recipe import Recipe

TRAINING = "the training"  # the group of train's options that may differ from row to row
TABLES = {"methods", "submit", "demo"}  # of a file, beside train's options
CHOSEN = "chosen.json"


class _Keys(Parser):
    """train's parser, whose errors are of a file."""

    def error(self, message: str) -> NoReturn:
        raise InputError(re.sub(r"argument --([\w-]+)", r"\1", message))


@dataclass(frozen=True)
class Row:
    """A method with settings: train's options by key, and those to choose from on the sources.

    like: the row whose choice is taken over.
    """

    method: Method
    keys: dict[str, Any]
    points: tuple[dict[str, Any], ...]
    like: str | None


@dataclass(frozen=True)
class Sweep:
    """A file that was read: train's options for all rows, the rows by name, where jobs run."""

    args: argparse.Namespace
    rows: dict[str, Row]
    submit: dict[str, Any]
    demo: bool

    def recipe(self, row: Row, target: str, point: Mapping[str, Any]) -> Recipe:
        """The numbers of a row's runs on a target, with the `point` that was chosen."""
        args = _parse({**row.keys, **point})
        recipe = recipe_of(args, row.method)
        if not self.demo:
            return recipe
        from fastheads.demo.run import recipe_of as demo_recipe

        given = {name: getattr(recipe, name) for name in args.given & set(recipe.__dataclass_fields__)}
        return replace(demo_recipe(args.method[0], target), **given)


def read(text: str) -> Sweep:
    """What a file says. Raises InputError for a key, a method or a value that is none, naming its table."""
    from fastheads.train.methods import METHODS

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"no TOML: {e}") from e
    tables = {name: values.pop(name, {}) for name in TABLES}
    train = _train_options()
    rows_may = {o.dest for o in next(g for g in train._action_groups if g.title == TRAINING)._group_actions}
    rows_may -= {"precision", "log", "cache_images"}
    options = _options()
    of_file = {key: o for key, o in options.items() if o.dest not in ("help", "json", "out", "method")}
    if not isinstance(tables["submit"], dict):
        raise InputError(f"submit: got {tables['submit']!r}; takes a table")
    demo = bool(tables["demo"])
    fixed = {"model": "fastheads-demo", "data": "icons"} if demo else {}
    if demo:
        of_file = {key: o for key, o in of_file.items() if o.dest in {*rows_may, "target", "seed"}}
    _check_keys(values, [*of_file, *TABLES], "")
    args = _parse({**fixed, **values})
    if not tables["methods"]:
        raise InputError("methods: got none; takes a table [methods.NAME] for each row")
    rows = dict[str, Row]()
    for name, table in tables["methods"].items():
        where = f"methods.{name}: "
        if not re.fullmatch(r"[\w.+-]+", name) or not isinstance(table, dict):
            raise InputError(f"methods: got {name!r}; takes tables with names of letters, digits, '-', '+', '.'")
        if not isinstance(table.get("search", {}), dict) or not isinstance(table.get("method", name), str):
            raise InputError(f"{where}takes a table for search, and a name for method")
        own = {key: value for key, value in table.items() if key not in ("method", "label", "search", "like")}
        keys, points = [key for key, o in options.items() if o.dest in rows_may], _points(table.get("search"), where)
        _check_keys(own, keys, where)
        for point in points:
            _check_keys(point, keys, f"{where}search: ")
        method, like = METHODS.get(table.get("method", name)), table.get("like")
        if method is None:
            raise InputError(f"{where}got the method {table.get('method', name)!r}; takes {', '.join(METHODS)}")
        if points and method.trains not in ("adapter", "encoder"):
            raise InputError(f"{where}search: {method.id} has nothing to choose")
        if like is not None and (like not in rows or not rows[like].points):
            raise InputError(f"{where}got like = {like!r}; takes a row above it that has a search")
        told = f" Here: {', '.join(f'{key} {value}' for key, value in own.items())}." if own else ""
        label = table.get("label", name if method.id != name else method.label)
        row = {**fixed, **values, **own, "method": [method.id]}
        method = replace(method, id=name, label=label, description=method.description + told)
        rows[name] = Row(method, row, points, like)
        for point in points or ({},):
            try:
                recipe_of(_parse({**row, **point}), method)
            except InputError as e:
                raise InputError(where + str(e).replace("--", "")) from e
    return Sweep(args, rows, tables["submit"], demo)


@functools.cache
def _train_options() -> argparse.ArgumentParser:
    (commands,) = (a for a in parser(_Keys)._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = commands.choices["train"]
    return found


def _check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"takes {', '.join(sorted(known))}"
            raise InputError(f"{where}there is no key {key!r}; {hint}")


def _options() -> dict[str, argparse.Action]:
    names = ((name, o) for o in _train_options()._actions for name in o.option_strings)
    return {name[2:]: o for name, o in names if name.startswith("--") and not name.startswith("--no-")}


def _parse(values: Mapping[str, Any]) -> argparse.Namespace:
    """train's arguments with these values; `given`: their names in Recipe. Raises InputError."""
    argv, options = list[str](), _options()
    for key, value in values.items():
        if isinstance(value, bool):
            no = isinstance(options[key], argparse.BooleanOptionalAction)
            argv += [f"--{key}"] if value else [f"--no-{key}"] * no
        elif isinstance(value, list) and isinstance(options[key], argparse._AppendAction):
            argv += [f"--{key}={item}" for item in value]
        elif isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        else:
            argv += [f"--{key}={value}"]
    args = _train_options().parse_args(argv)
    args.command = "train"
    if args.per_domain == "auto":
        raise InputError("per-domain: got 'auto'; a sweep takes a number, the same wherever its jobs run")
    for name in ("target", "sources", "seed"):
        if getattr(args, name):
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.given = {{"cache_images": "cache"}.get(options[key].dest, options[key].dest) for key in values}
    return args


def _points(search: dict[str, Any] | None, where: str) -> tuple[dict[str, Any], ...]:
    """What to choose from: every combination of the lists, or `trials` draws, of {low, high} by logarithm."""
    if not search:
        return ()
    search = dict(search)
    trials = search.pop("trials", None)
    for key, value in search.items():
        numbers = isinstance(value, dict) and all([isinstance(x, (int, float)) for x in value.values()])
        ranged = numbers and set(value) == {"low", "high"} and 0 < value["low"] < value["high"]
        if not (ranged and trials) and not (isinstance(value, list) and value):
            takes = "a list of values, or with trials a range {low, high}"
            raise InputError(f"{where}search: got {value!r} for {key!r}; takes {takes}")
    if trials is None:
        return tuple(dict(zip(search, point, strict=True)) for point in itertools.product(*search.values()))
    if not isinstance(trials, int) or trials < 1:
        raise InputError(f"{where}search: got {trials!r} for 'trials'; takes an integer ≥ 1")
    draw = random.Random(0)

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return draw.choice(value)
        return float(f"{math.exp(draw.uniform(math.log(value['low']), math.log(value['high']))):.3g}")

    return tuple({key: one(value) for key, value in search.items()} for _ in range(trials))


# ---------------------------------------------------------------------------------------------------- running


def _set_up(sweep: Sweep, out: Path) -> Setting:
    if not sweep.demo:
        args = argparse.Namespace(**vars(sweep.args))
        args.method, args.out = list(dict.fromkeys(row.keys["method"][0] for row in sweep.rows.values())), out
        each = [(row, point) for row in sweep.rows.values() for point in row.points or ({},)]
        return set_up(args, [(row.method, sweep.recipe(row, "", point)) for row, point in each])
    from fastheads.demo import run

    base, folders = run.set_up(out)
    targets = list(folders.domains) if sweep.args.target == ["all"] else sweep.args.target
    about = {
        "title": "Icons that people drew, in four looks",
        "base_name": f"{run.MODEL} pretrained on other designers' icons",
        "dataset_name": "icons",
        "precision": "no",
    }
    return Setting(base, folders, functools.partial(run.demo_problem, base, folders), targets, {}, (), about)


def _run(
    sweep: Sweep, setting: Setting, bars: Bars, out: Path, targets: Sequence[str], seeds: Sequence[int], **options: Any
) -> dict[str, Any]:
    """The experiment of all rows on some targets and seeds, by what was chosen for them."""
    chosen = {target: _chosen(out, target) for target in targets}

    def recipe(name: str, target: str) -> Recipe:
        return sweep.recipe(sweep.rows[name], target, chosen[target].get(name, {}).get("chosen", {}))

    methods = [row.method for row in sweep.rows.values()]
    options |= {"targets": targets, "seeds": lambda method: seeds, "out": out, "log": sweep.args.log}
    return experiment(setting, bars, methods, recipe, **options)


def job(text: str, out: str, target: str, seed: int, search: bool) -> str | None:
    """All rows on one target with one seed, what is to be chosen first where it is to `search`.

    Returns what was wrong, in a line.
    """
    from fastheads.train.jobs import alone_in
    from fastheads.train.progress import Bars

    folder = Path(out)
    try:
        sweep = read(text)
        with Bars() as bars, alone_in(folder / target / f"seed{seed}"):
            setting = _set_up(sweep, folder)
            if search:
                _search(sweep, setting, bars, folder, target, seed)
            _run(sweep, setting, bars, folder, [target], [seed], command="", record=False)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as e:
        if os.environ.get("FASTHEADS_TRACEBACK"):
            raise
        return " ".join(str(e).split())
    return None


def _search(sweep: Sweep, setting: Setting, bars: Bars, out: Path, target: str, seed: int) -> None:
    """Chooses for each row the trial with the highest mean accuracy on the sources' held-out images, of equals the one
    with the lower loss there (training-domain validation); writes all of them, and keeps the chosen run."""
    from fastheads.train.experiment import run_method

    problem, home = setting.problem_of(target, seed), out / target / f"seed{seed}"
    found: dict[str, Any] = {}
    for name, row in sweep.rows.items():
        taken = found[row.like]["chosen"] if row.like else {}
        trials: list[dict[str, Any]] = [{"point": {**taken, **point}} for point in row.points or ({},) * bool(taken)]
        for trial in trials if len(trials) > 1 else ():
            run = run_method(
                setting.model,
                row.method,
                problem,
                replace(sweep.recipe(row, target, trial["point"]), seed=seed, **setting.found),
                home / "search" / _label(name, trial["point"]),
                base_name=setting.about["base_name"],
                precision=setting.about["precision"],
                report=bars.watch(f"{_label(name, trial['point'])} · {target} · {seed}"),
                log=sweep.args.log,
            )
            accuracy = sum(run["accuracy"][source] for source in problem.sources) / len(problem.sources)
            trial |= {"sources": round(accuracy, 6), "loss": run["validation_loss"]}
        if trials:
            best = max(trials, key=lambda trial: (trial.get("sources", 0), -trial.get("loss", 0)))
            found[name] = {"chosen": best["point"], "trials": trials}
            if len(trials) > 1 and not (home / name).exists():
                shutil.copytree(home / "search" / _label(name, best["point"]), home / name)
    if found:
        write_json(out / target / CHOSEN, found)


def _label(name: str, point: Mapping[str, Any]) -> str:
    return ",".join([name, *(f"{key}={value}" for key, value in point.items())]).replace("/", "_").replace(" ", "")


def _chosen(out: Path, target: str) -> dict[str, Any]:
    path = out / target / CHOSEN
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _jobs(sweep: Sweep, text: str, out: Path, targets: Sequence[str]) -> Iterator[dict[str, Sequence[Any]]]:
    """The jobs, in waves: what one chooses, the next takes."""
    seeds = sweep.args.seed
    searched = any(row.points for row in sweep.rows.values())
    for wave in [seeds[:1], seeds[1:]] if searched else [seeds]:
        calls: dict[str, Sequence[Any]] = {
            f"{t} · {s}": (text, str(out), t, s, searched and s == seeds[0]) for t in targets for s in wave
        }
        yield calls


def sweep(args: argparse.Namespace) -> Outcome:
    """The command: 0 where every job was done, 1 where one was not."""
    from fastheads.train.progress import Bars, phase

    try:
        text = args.file.read_text()
        found = read(text)
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{args.file}: {getattr(e, 'strerror', None) or e}") from e
    except InputError as e:
        raise InputError(f"{args.file}: {e}") from e
    submit = dict(found.submit)
    processes, threads = submit.pop("processes", 1), submit.pop("threads", None)
    for name, value in (("processes", processes), ("threads", threads or 1)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{args.file}: submit: got {value!r} for {name!r}; takes an integer ≥ 1")
    if threads:  # for jobs to inherit: of OpenMP's (torch, ours) and of scikit-learn's
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    out = (args.out or Path("runs") / args.file.stem).absolute()
    with Bars() as bars:
        from fastheads.train.experiment import table
        from fastheads.train.jobs import run_jobs
        from fastheads.train.report.page import write_report

        setting = _set_up(found, out)
        failed: dict[str, str] = {}
        cluster = submit.pop("cluster", "local")
        for calls in _jobs(found, text, out, setting.targets):
            options: Any = {"processes": processes, "cluster": cluster, "parameters": submit, "say": bars.say}
            failed |= run_jobs(job, calls, out / "jobs", **options)
            if failed:
                break
        if failed:
            name, error = next(iter(failed.items()))
            print(
                f"fastheads sweep: {len(failed)} jobs failed, the first {name}: {error}; "
                "the same command does what is left",
                file=sys.stderr,
            )
            return {"failed": failed}, 1
        record = _run(found, setting, bars, out, setting.targets, found.args.seed, command=args.typed)
        with phase("writing the report"):
            page = write_report(record, out, samples=setting.folders.samples())
    print("accuracy on the domain held out, %\n" + table(record))
    print(f"\nreport: {page}")
    return {"results": out / "results.json", "report": page}, 0
