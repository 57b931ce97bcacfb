"""What a run depends on, and whether an earlier one in the same folder was the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import textwrap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastheads.hosts.vision import head_names
from fastheads.train.evaluation import Problem
from fastheads.train.methods import Method
from fastheads.train.ranks import everywhere, of_all
from fastheads.train.recipe import Recipe

CHECKSUMS = "checksums.json"

# How a user names what a run depends on; a number of the recipe is named by its option.
_NAMES = {
    "base": "--model, --pretrained",
    "method": "--method",
    "kind": "--method",
    "target": "--target",
    "sources": "--sources",
    "prompts": "--prompt",
    "class_names": "--class-names",
    "precision": "--precision",
    "split_by": "--split-by",
}
# Of a recipe: how images are loaded, and where, in which parts, and how often, the same is computed.
_NO_MATTER = (
    *("save_every", "workers", "batch_size", "cache"),
    *("accumulate", "recompute", "checkpointing", "compile", "fsdp"),
)
_RESULT = ("method", "target", "seed", "accuracy", "peak_memory_mb")  # a few of what a result must have


def hashes(model: nn.Module, problem: Problem) -> dict[str, Any]:
    """Of a run's key what is slow to find: the base's weights (`model`, not adapted yet) and the images there are.

    A linear head is left out: it is fitted anew.
    """
    weights, images, counts, head = hashlib.sha256(), hashlib.sha256(), {}, head_names(model)
    for name, tensor in model.state_dict().items():
        if name in head:
            continue
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for domain, files in zip(problem.folders.domains, problem.folders.files, strict=True):
        counts[domain] = len(files)
    for identity in problem.folders.identities():
        images.update(identity.encode(errors="surrogateescape") + b"\n")
    return {"weights": weights.hexdigest(), "images": images.hexdigest(), "image_counts": counts}


def run_key(
    hashed: Mapping[str, Any], method: Method, problem: Problem, recipe: Recipe, precision: str
) -> dict[str, Any]:
    """What must be the same for a saved state to go on from, and for a result to be taken over.

    The base's weights and the images (`hashes`), the prompts, and the recipe but for what changes no result;
    of a method that trains no tensor only the seed of its splits.
    """
    own = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in _NO_MATTER}
    numbers = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
    return {
        **hashed,
        "method": method.id,
        "kind": {k: v for k, v in dataclasses.asdict(method).items() if k not in ("id", "label", "description")},
        "target": problem.target,
        "sources": list(problem.sources),
        "prompts": list(problem.prompts),
        "class_names": list(problem.folders.class_names),
        "precision": precision,
        "split_by": problem.split_by,
        "recipe": numbers if method.trains in ("encoder", "adapter") else {"seed": recipe.seed},
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What differs between two keys, each in words: "--lr: was 0.0002, now 0.001".

    What an older file doesn't have counts as equal, or where it is a number of the recipe, as its default.
    """
    found = []
    for name, value in now.items():
        before = then.get(name, "image" if name == "split_by" else value)
        if name in ("recipe", "image_counts") or before == value:
            continue
        if name == "weights":
            found.append("the base's weights differ")
        elif name == "images":
            found.append("the images differ" + _recounted(then.get("image_counts", {}), now["image_counts"]))
        else:
            found.append(f"{_NAMES[name]}: was {_short(before)}, now {_short(value)}")
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    for name, value in now["recipe"].items():
        before = then.get("recipe", {}).get(name, defaults[name])
        if before != value:
            found.append(f"--{name.replace('_', '-')}: was {before!r}, now {value!r}")
    return found


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 200, placeholder=" …")


def _recounted(then: Mapping[str, int], now: Mapping[str, int]) -> str:
    names = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)] if then else []
    counts = "; ".join(f"{name}: was {then.get(name, 0)}, now {now.get(name, 0)}" for name in names)
    return f" ({counts})" if counts else ""


def agree(key: Mapping[str, Any], recipe: Recipe, **found: Any) -> None:
    """That every process has the same images, weights and settings (`run_key`), and `found` the same in `out`.

    Raises ValueError, on every process the same.
    """
    (first, what), *others = of_all([(dict(key), found)])
    for rank, (other, its) in enumerate(others, 1):
        told = [text.replace(": was ", ": process 0 has ").replace(", now ", f", process {rank} ")
                for text in differences(first, other, recipe)]  # fmt: skip
        told += [f"{name} in --out: process 0 has {what[name]}, process {rank} {its[name]}"
                 for name in what if what[name] != its[name]]  # fmt: skip
        if told:
            raise everywhere(
                ValueError(f"processes disagree: {'; '.join(told)}; start all with the same files and options")
            )


def earlier_run(folder: Path, key: Mapping[str, Any], recipe: Recipe) -> dict[str, Any] | None:
    """The run whose result lies in `folder`; None where there is none yet.

    Raises ValueError where a result or a saved state there is another run's, or corrupt.
    """
    path = folder / "result.json"
    if path.is_file():
        found = _read(path)
        run = found.get("run")
        if not isinstance(run, dict) or not set(_RESULT) <= set(run):
            raise corrupt(path, "it holds no run")
        _refuse_other(path, "result", found.get("key"), key, recipe)
        return run
    state, _ = intact_state(folder)
    if state is not None:
        check_state(state, key, recipe)
    return None


def checksums(state: Path) -> dict[str, int]:
    """File name → CRC-32 of what a saved state consists of."""
    return {path.name: _crc(path) for path in sorted(state.iterdir()) if path.name not in ("run.json", CHECKSUMS)}


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def intact_state(folder: Path) -> tuple[Path | None, str]:
    """The newest saved state in a run's folder that is whole, and what is wrong with a newer one ("": nothing).

    (None, "") where nothing was saved. Raises ValueError where something was, and nothing is whole.
    """
    damage: ValueError | None = None
    for state in (path for name in ("state", "state.old") if (path := folder / name).exists()):
        try:
            _look_over(state)
        except ValueError as e:
            damage = damage or e
        else:
            return state, str(damage).partition("; ")[0] if damage else ""
    if damage:
        raise damage
    return None, ""


def _look_over(state: Path) -> None:
    _read(state / "run.json")
    for name, value in _read(state / CHECKSUMS).items() if (state / CHECKSUMS).exists() else ():
        if not (state / name).is_file():
            raise corrupt(state, f"{name} is missing")
        if _crc(state / name) != value:
            raise corrupt(state / name, "its checksum differs")


def check_state(state: Path, key: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises ValueError where a saved state is another run's, or doesn't say whose."""
    path = state / "run.json"
    _refuse_other(path, "state", _read(path), key, recipe)


def _refuse_other(path: Path, what: str, then: Any, now: Mapping[str, Any], recipe: Recipe) -> None:
    if not isinstance(then, dict) or not all(isinstance(then.get(k, {}), dict) for k in ("recipe", "image_counts")):
        raise corrupt(path, "it names no settings")
    differing = differences(then, json.loads(json.dumps(now)), recipe)
    if differing:
        raise ValueError(
            f"out: {path.parent} holds the {what} of another run ({'; '.join(differing)}); "
            "name another --out, or remove it"
        )


def corrupt(path: Path, why: object) -> ValueError:
    """What is said of a file in a run's folder that can't be read."""
    return ValueError(f"out: {path} is corrupt ({why}); name another --out, or remove {path.parent}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise corrupt(path, e) from None
    if not isinstance(content, dict):
        raise corrupt(path, "it holds no object")
    return content
