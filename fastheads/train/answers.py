"""What runs answered to the images of their target: by class, confusions, calibration, and what changed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastheads.files import write_json
from fastheads.train.data.domains import DomainFolders
from fastheads.train.evaluation import Score
from fastheads.train.report.record import Changed

_FILE = "answers.json"


def write_answers(out: Path, score: Score) -> None:
    """Writes every image's class, answer and probability into a run's folder, in the order of the target's files."""
    confidence = [round(value, 4) for value in score.confidence]
    write_json(out / _FILE, {"labels": score.labels, "answers": score.answers, "confidence": confidence})


def read_answers(folder: Path) -> dict[str, Any] | None:
    """What `write_answers` wrote; None where it wrote nothing."""
    path = folder / _FILE
    return json.loads(path.read_text()) if path.is_file() else None


def details(score: Score, classes: int) -> dict[str, Any]:
    """Of the answers on a target: how many right by class, the 20 largest confusions, calibration in ten bins."""
    labels, answers, confidence = map(np.asarray, (score.labels, score.answers, score.confidence))
    right = (labels == answers).astype(float)
    wrong = Counter(zip(labels[right == 0].tolist(), answers[right == 0].tolist(), strict=True))
    bins = np.minimum((10 * confidence).astype(int), 9)
    return {
        "by_class": {
            "images": np.bincount(labels, minlength=classes).tolist(),
            "right": np.bincount(labels, right, minlength=classes).astype(int).tolist(),
        },
        "confusions": [[*pair, count] for pair, count in wrong.most_common(20)],
        "calibration": {
            "images": np.bincount(bins, minlength=10).tolist(),
            "confidence": np.bincount(bins, confidence, minlength=10).round(4).tolist(),
            "right": np.bincount(bins, right, minlength=10).astype(int).tolist(),
        },
    }


def changed_answers(
    out: Path, folders: DomainFolders, runs: Sequence[Mapping[str, Any]], most: int = 8
) -> dict[str, list[Changed]]:
    """Images of the first target that a method answers otherwise than zero-shot.

    Up to `most` that became right and as many that became wrong, of different classes; by the saved answers.
    """
    target, seed = runs[0]["target"], runs[0]["seed"]
    files, names = folders.files[folders.index(target)], folders.class_names
    folder = out / target / f"seed{seed}"
    if not (zero_shot := read_answers(folder / "zero-shot")):
        return {}
    before = zero_shot["answers"]
    changed = {}
    for method in dict.fromkeys(run["method"] for run in runs if run["method"] != "zero-shot"):
        after = (read_answers(folder / method) or zero_shot)["answers"]
        found: dict[bool, dict[int, Path]] = {True: {}, False: {}}
        rows = []
        for (path, label), was, now in zip(files, before, after, strict=True):
            better = now == label
            if was != now and label in (was, now) and label not in found[better] and len(found[better]) < most:
                found[better][label] = path
                rows.append(Changed(path, names[label], names[was], names[now]))
        changed[method] = rows
    return changed
