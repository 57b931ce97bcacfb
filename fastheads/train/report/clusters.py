"""Errors clustered by class: pictures of one class are drawings of one thing, and not independent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ByClass:
    """Of each class of a target, how many images there are, and how many are right (a mean over seeds)."""

    images: NDArray[np.float64]
    right: NDArray[np.float64]


def by_class(runs: Sequence[Mapping[str, Any]]) -> ByClass | None:
    """The mean over the runs of one target; None where one of them has no counts, or others' images."""
    counts = [run.get("by_class") or {} for run in runs]
    images = [np.asarray(each.get("images") or [], dtype=np.float64) for each in counts]
    right = [np.asarray(each.get("right") or [], dtype=np.float64) for each in counts]
    fits = [n.shape == r.shape and n.sum() > 0 for n, r in zip(images, right, strict=True)]
    if not fits or not all(fits) or any(not np.array_equal(n, images[0]) for n in images):
        return None
    return ByClass(images[0], np.mean(right, axis=0))


def gained(mine: ByClass, other: ByClass) -> ByClass | None:
    """`mine` less `other`, class by class; None where they are of other images."""
    return ByClass(mine.images, mine.right - other.right) if np.array_equal(mine.images, other.images) else None


def clustered_error(targets: Sequence[ByClass]) -> float | None:
    """Standard error of the mean over `targets` of right / images, 0 to 1; None for fewer than two classes.

    The classes are drawn, not the images, and the targets share them. So a class's part in the mean is summed over the
    targets before it is squared. It is (right − p · images) / N, with p the target's accuracy and N its images.
    """
    if len({len(target.images) for target in targets}) != 1:
        return None
    parts = [(t.right - t.right.sum() / t.images.sum() * t.images) / t.images.sum() for t in targets]
    drawn = np.count_nonzero(np.sum([t.images for t in targets], axis=0))
    if drawn < 2:
        return None
    return math.sqrt(drawn / (drawn - 1) * float((np.mean(parts, axis=0) ** 2).sum()))
