"""Runs of several experiments as one record: side by side, paired differences, and by the setting they differ in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastheads.train.answers import read_answers
from fastheads.train.recipe import Recipe
from fastheads.train.report.record import Record

Cell = tuple[str, int]  # target, seed
Right = NDArray[np.float64]


@dataclass
class Row:
    """A method with settings: its runs, their keys and folders, by target and seed."""

    method: str
    home: Path
    entry: Mapping[str, Any]
    runs: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    keys: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    folders: dict[Cell, Path] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The numbers of the recipe that all runs share, and None for those that differ from target to target."""
        defaults = {f.name: f.default for f in dataclasses.fields(Recipe) if f.name != "seed"}
        recipes = [{**defaults, **key.get("recipe", {})} for key in self.keys.values()]
        return {k: recipes[0][k] if all(r[k] == recipes[0][k] for r in recipes) else None for k in defaults}

    def goes_on(self, other: Row) -> bool:
        """Whether the other's runs are more of this row: the same where both have one, else of the same settings."""
        if self.method != other.method:
            return False
        both = self.keys.keys() & other.keys.keys()
        return all(self.keys[c] == other.keys[c] for c in both) if both else self.settings() == other.settings()

    def add(self, other: Row) -> None:
        self.runs |= other.runs
        self.keys |= other.keys
        self.folders |= other.folders

    def right(self, cell: Cell) -> tuple[list[int], Right] | None:
        """The classes of the target's images, and whether each was right; None where it was not kept."""
        found = read_answers(self.folders[cell])
        return (found["labels"], np.equal(found["labels"], found["answers"]).astype(float)) if found else None


def _rows(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The experiment's record in a folder (empty where it isn't done), and its rows."""
    record = json.loads((folder / "results.json").read_text()) if (folder / "results.json").is_file() else {}
    entries, rows = {m["id"]: m for m in record.get("methods") or ()}, dict[str, Row]()
    for path in sorted(folder.rglob("result.json")):
        if "search" in path.relative_to(folder).parts:
            continue
        try:
            content = json.loads(path.read_text())
            run, key = content["run"], content["key"]
            cell = (run["target"], run["seed"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is corrupt; the command that wrote it does it again once it is gone") from e
        row = rows.setdefault(run["method"], Row(run["method"], folder, entries.get(run["method"], {})))
        row.runs[cell], row.folders[cell] = run, path.parent
        row.keys[cell] = {k: v for k, v in key.items() if k not in ("class_names", "image_counts")}
    if not rows:
        raise ValueError(f"{folder}: no run in it that is done; takes a folder that train or sweep wrote")
    return record, list(rows.values())


def _named(rows: Sequence[Row]) -> dict[str, Row]:
    """The rows by a name of their own: the method, and where it has several, the settings that tell it apart."""
    named = dict[str, Row]()
    for row in rows:
        alike = [other for other in rows if other.method == row.method]
        settings = [other.settings() for other in alike]
        differ = [k for k in settings[0] if any(s[k] != settings[0][k] for s in settings)]
        told = ", ".join(f"{k} {_short(row.settings()[k])}" for k in differ)
        clear = len({tuple(map(str, (s[k] for k in differ))) for s in settings}) == len(alike)
        name = row.method if len(alike) == 1 else f"{row.method}, {told if clear and told else row.home}"
        named[name] = row
    return named


def _short(value: Any) -> str:
    return "by target" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def paired(mine: Row, other: Row, target: str) -> dict[str, Any] | None:
    """How far a row lies above another on a target, in points, over the seeds that both have, image by image.

    error: standard error clustered over images: each image's difference is a mean over seeds first. seeds_error: of
    the seeds' differences; None for one seed. None where no seed has both, or they are of other images.
    """
    seeds = sorted(seed for name, seed in mine.runs.keys() & other.runs.keys() if name == target)
    each = []
    for seed in seeds:
        ours, theirs = mine.right((target, seed)), other.right((target, seed))
        if ours is None or theirs is None or ours[0] != theirs[0]:
            return None
        each.append(100 * (ours[1] - theirs[1]))
    if not each:
        return None
    by_image, by_seed = np.mean(each, axis=0), np.mean(each, axis=1)
    return {
        "target": target,
        "mean": float(by_image.mean()),
        "error": float(by_image.std(ddof=1) / math.sqrt(len(by_image))),
        "seeds_error": float(by_seed.std(ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else None,
        "by_seed": dict(zip(map(str, seeds), by_seed.tolist(), strict=True)),
        "images": len(by_image),
    }


def _average(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the differences on several targets: their images are others, their seeds are not."""
    seeds = [seed for seed in parts[0]["by_seed"] if all(seed in part["by_seed"] for part in parts)]
    by_seed = [float(np.mean([part["by_seed"][seed] for part in parts])) for seed in seeds]
    return {
        "target": "average",
        "mean": float(np.mean([part["mean"] for part in parts])),
        "error": math.hypot(*(part["error"] for part in parts)) / len(parts),
        "seeds_error": float(np.std(by_seed, ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else None,
        "by_seed": dict(zip(seeds, by_seed, strict=True)),
        "images": sum(part["images"] for part in parts),
    }


def _differences(rows: Mapping[str, Row], targets: Sequence[str]) -> list[dict[str, Any]]:
    found, names = [], list(rows)
    for at, name in enumerate(names):
        for other in names[:at]:
            parts = [part for target in targets if (part := paired(rows[name], rows[other], target))]
            whole = [_average(parts)] if len(parts) == len(targets) > 1 else []
            found += [{"method": name, "than": other, **part} for part in (*parts, *whole)]
    return found


def _curves(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Rows that differ in one number alone: the setting, and by a name of the line its (value, row)s in order."""
    found = []
    settings = {name: row.settings() for name, row in rows.items()}
    kinds = {name: str(row.entry.get("description") or row.method).split(" Here: ")[0] for name, row in rows.items()}
    for setting in next(iter(settings.values())):
        lines: dict[Any, list[tuple[float, str]]] = {}
        for name, own in settings.items():
            value = own[setting][0] if isinstance(own[setting], list) and len(set(own[setting])) == 1 else own[setting]
            if isinstance(value, int | float) and not isinstance(value, bool):
                rest = json.dumps({k: v for k, v in own.items() if k != setting}, sort_keys=True)
                lines.setdefault((kinds[name], rest), []).append((float(value), name))
        several = [sorted(points) for points in lines.values() if len({value for value, _ in points}) > 1]
        found += [{"setting": setting, "lines": {rows[points[0][1]].method: points for points in several}}] * bool(
            several
        )
    return found


def compare(folders: Sequence[Path], command: str) -> dict[str, Any]:
    """One experiment's record of all runs in these folders, a row for each method with other settings.

    With `differences` (each row less each above it, `paired`, by target and on average) and `curves` (rows that differ
    in one setting). A run that several folders have counts once. Raises ValueError for a folder without runs.
    """
    records, rows = list[dict[str, Any]](), list[Row]()
    for folder in folders:
        record, own = _rows(folder)
        records.append(record)
        for row in own:
            known = next((other for other in rows if other.goes_on(row)), None)
            if known is None:
                rows.append(row)
            else:
                known.add(row)
    named = _named(rows)
    runs = [{**run, "method": name} for name, row in named.items() for run in row.runs.values()]
    first = next((record for record in records if record), {})
    about = {name: first.get(name) for name in ("date", "commit", "device", "versions", "dataset", "model", "tuning")}
    label = {
        name: str(row.entry.get("label") or row.method) + name.removeprefix(row.method) for name, row in named.items()
    }
    experiment = {
        "title": f"{len(runs)} runs compared",
        "command": command,
        "wall_seconds": sum(run["seconds"] or 0 for run in runs),
        "peak_memory_mb": max(run["peak_memory_mb"] for run in runs),
        **about,
        "methods": [{**row.entry, "id": name, "label": label[name]} for name, row in named.items()],
        "runs": runs,
        "curves": _curves(named),
    }
    experiment["differences"] = _differences(named, Record(experiment).targets)
    return experiment
