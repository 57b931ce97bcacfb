"""The demo's data: real handwritten digits drawn in four domains, with nothing to download.

The 1,797 handwritten digits that ship with scikit-learn (8 x 8 pixels) are drawn as 32 x 32 colour
images. :data:`DOMAINS` differ as art, photo and sketch do; :data:`STYLES` are other looks, for
pretraining. :func:`partition` gives every handwritten digit to exactly one domain or to pretraining,
so nothing a domain shows has been seen elsewhere. To add a look, write a function from a mask to
colours and list it in ``_LOOKS`` and in one of the two tuples.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits, load_sample_images

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DOMAINS = ("ink", "neon", "photo", "sketch")
STYLES = ("blocks", "chalk", "noise", "stamp", "stripes")

SIZE = 32
PER_CLASS = 30  # digits of one class in one domain; the rest (54 to 63 of a class) are for pretraining

_SCALE = 3  # looks are painted at three times the size, then averaged down
_FINE = _SCALE * SIZE
_STAMP = "digits.json"

Array = NDArray[np.float32]


@lru_cache(maxsize=1)
def handwritten() -> tuple[Array, NDArray[np.int64]]:
    """Scikit-learn's digits: images [1797, 8, 8] with values in [0, 1], and labels [1797]."""
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


def partition(seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Indices of the handwritten digits, by domain and for ``"pretraining"``; no index occurs twice.

    Each domain has ``PER_CLASS`` digits of each class (300 in all), pretraining the other 597.
    """
    _, labels = handwritten()
    rng = np.random.default_rng([seed, len(labels)])
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in (*DOMAINS, "pretraining")}
    for label in range(len(CLASSES)):
        shuffled = rng.permutation(np.flatnonzero(labels == label))
        cuts = [PER_CLASS * (i + 1) for i in range(len(DOMAINS))]
        for name, part in zip(parts, np.split(shuffled, cuts), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(chunks)) for name, chunks in parts.items()}


def draw(digit: Array, style: str, rng: Generator) -> NDArray[np.uint8]:
    """A digit [8, 8] with values in [0, 1] drawn in a style or domain: uint8 [32, 32, 3].

    The strokes are smoothed, turned, scaled and shifted at random, then painted.
    """
    if style not in _LOOKS:
        raise ValueError(f"no style {style!r}: choose from {', '.join(_LOOKS)}")
    picture = np.clip(_LOOKS[style](_strokes(digit, rng), rng), 0, 1)
    blocks = picture.reshape(SIZE, _SCALE, SIZE, _SCALE, 3)
    return np.rint(255 * blocks.mean(axis=(1, 3))).astype(np.uint8)


def fingerprint(seed: int = 0) -> str:
    """A short hash of what would be drawn: it changes with the looks and with the partition."""
    images, _ = handwritten()
    digest = hashlib.sha256()
    for style in _LOOKS:
        digest.update(draw(images[0], style, np.random.default_rng(0)).tobytes())
    for name, indices in partition(seed).items():
        digest.update(name.encode() + indices.tobytes())
    return digest.hexdigest()[:12]


def write_domains(root: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write the domains as ``root/<domain>/<class>/<index>.png`` and return root.

    ``index`` is the digit's index in ``load_digits``. The folder appears complete or not at all; one
    that is complete and up to date is reused, an older one of ours is replaced.

    Raises:
        FileExistsError: root holds something that this function did not write.
    """
    root = Path(root).expanduser()
    expected = _expected_files(seed)
    stamp = {"fastheads": "demo digits", "seed": seed, "fingerprint": fingerprint(seed)}
    if _complete(root, stamp, expected):
        return root
    if root.is_dir() and any(root.iterdir()) and not (root / _STAMP).is_file():
        raise FileExistsError(f"{root} exists and does not hold the demo's digits; not touching it")

    root.parent.mkdir(parents=True, exist_ok=True)
    fresh = root.with_name(f".{root.name}-{uuid.uuid4().hex}")
    stale = root.with_name(f"{fresh.name}-old")
    try:
        _paint_all(fresh, seed, expected)
        (fresh / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        if (root / _STAMP).is_file():
            os.replace(root, stale)
        os.replace(fresh, root)
    except OSError:
        # another process may have finished the same folder first
        if not _complete(root, stamp, expected):
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
    return root


def _expected_files(seed: int) -> dict[str, tuple[str, int]]:
    """File path below the root -> (domain, digit index)."""
    _, labels = handwritten()
    parts = partition(seed)
    return {
        f"{domain}/{CLASSES[labels[index]]}/{index:04d}.png": (domain, int(index))
        for domain in DOMAINS
        for index in parts[domain]
    }


def _complete(root: Path, stamp: dict[str, object], expected: dict[str, tuple[str, int]]) -> bool:
    try:
        found = json.loads((root / _STAMP).read_text())
    except (OSError, ValueError):
        return False
    return found == stamp and all((root / name).is_file() for name in expected)


def _paint_all(folder: Path, seed: int, expected: dict[str, tuple[str, int]]) -> None:
    images, _ = handwritten()
    for name, (domain, index) in expected.items():
        rng = np.random.default_rng([seed, DOMAINS.index(domain), index])
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(images[index], domain, rng)).save(path)


# ---- strokes and textures, at the fine size; lengths in pixels of the finished image ----


def _strokes(digit: Array, rng: Generator) -> Array:
    """Mask [96, 96] in [0, 1] of the digit's strokes, with a soft edge, in a random pose."""
    angle = np.deg2rad(rng.uniform(-10, 10))
    zoom = (_FINE / 10.2) * rng.uniform(0.92, 1.08)
    shift = rng.uniform(-1.5, 1.5, size=2) * _SCALE
    # PIL's affine transform maps output pixels to input pixels
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    cx, cy = _FINE / 2 + shift
    padded = np.pad(digit, 3)
    middle = padded.shape[0] / 2
    affine = (cos, sin, middle - cos * cx - sin * cy, -sin, cos, middle + sin * cx - cos * cy)
    grown = Image.fromarray(padded).transform(
        (_FINE, _FINE), Image.Transform.AFFINE, affine, resample=Image.Resampling.BICUBIC
    )
    smooth = _blur(np.asarray(grown, dtype=np.float32), 0.7)
    # against the neighbourhood's mean, which opens the loops of 4, 6, 8 and 9
    return _step(smooth - 0.6 * _blur(smooth, 3.0), 0.21, 0.06)


def _blur(values: Array, pixels: float) -> Array:
    blurred: Array = gaussian_filter(values, pixels * _SCALE, truncate=3.0)
    return blurred


def _step(values: Array, at: float, width: float) -> Array:
    """0 below ``at``, 1 above, with a linear ramp of half-width ``width``."""
    ramp: Array = np.clip((values - at) / (2 * width) + 0.5, 0, 1)
    return ramp


def _clouds(rng: Generator, cells: int) -> Array:
    """Smooth noise [96, 96] in about [0, 1], with ``cells`` bumps across."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((_FINE, _FINE), Image.Resampling.BICUBIC))


def _hue(hue: float, saturation: float, value: float) -> Array:
    """An RGB colour [3] from hue (one turn is 1), saturation and value in [0, 1]."""
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation * (1 - wheel))).astype(np.float32)


def _mix(mask: Array, below: Array, above: Array) -> Array:
    """``below`` where the mask [96, 96] is 0, ``above`` where it is 1; colours [3] or images."""
    m = mask[..., None]
    return (1 - m) * below + m * above


# ---- the four domains ----


def _ink(mask: Array, rng: Generator) -> Array:
    """Dark, slightly uneven ink on warm paper."""
    paper = _hue(rng.uniform(0.09, 0.14), rng.uniform(0.05, 0.16), rng.uniform(0.93, 0.99))
    sheet = paper * (1 - 0.07 * _clouds(rng, 6)[..., None])
    colour = _hue(rng.uniform(0.58, 0.72), rng.uniform(0.5, 0.9), rng.uniform(0.15, 0.42))
    flow = 0.72 + 0.30 * _clouds(rng, 9)
    bleed = 0.15 * _blur(mask, 1.2)
    return _mix(np.clip(mask * flow + bleed, 0, 1), sheet, colour)


def _neon(mask: Array, rng: Generator) -> Array:
    """A glowing tube with a white-hot core in front of a dark wall."""
    colour = _hue(rng.random(), 0.95, 1.0)
    wall = _hue(rng.random(), 0.5, 0.10) * (0.6 + 0.8 * _clouds(rng, 5)[..., None])
    soft = _blur(mask, 1.0)
    core = _step(soft, 0.92, 0.14)
    tube = _step(soft, 0.45, 0.3) * 0.8 + 0.35 * _blur(mask, 1.5) + 0.55 * _blur(mask, 4)
    return wall + tube[..., None] * colour + (0.7 * core)[..., None]


@lru_cache(maxsize=1)
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in load_sample_images().images]


def _photo(mask: Array, rng: Generator) -> Array:
    """A digit that inverts a crop of a real photograph, as in MNIST-M."""
    photographs = _photographs()
    for _ in range(20):
        photo = photographs[rng.integers(len(photographs))]
        side = int(rng.integers(60, 200))
        left, top = (int(rng.integers(0, length - side)) for length in photo.size)
        crop = photo.resize((_FINE, _FINE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        scene = np.asarray(crop, dtype=np.float32) / 255
        # a mid-grey crop looks the same inverted: take another
        contrast = np.abs(1 - 2 * scene).mean(axis=-1)
        if (contrast * mask).sum() > 0.45 * mask.sum():
            break
    return np.abs(scene - mask[..., None])


def _sketch(mask: Array, rng: Generator) -> Array:
    """Only the outline, gone over twice in pencil on white paper."""
    paper = np.full(3, rng.uniform(0.95, 1.0), dtype=np.float32)
    graphite = _hue(0.62, 0.15, rng.uniform(0.05, 0.25))
    soft = _blur(mask, 0.6)
    lines = np.zeros_like(mask)
    for _ in range(2):
        wobble = tuple(rng.integers(-1, 2, size=2))
        edge = np.roll(soft, wobble, axis=(0, 1)) * rng.uniform(0.92, 1.08)
        pressure = 0.6 + 0.4 * _clouds(rng, 7)
        lines = np.maximum(lines, pressure * np.clip(1.6 - 4 * np.abs(edge - 0.5), 0, 1))
    return _mix(lines * (0.6 + 0.4 * _clouds(rng, 40)), paper, graphite)


# ---- the styles for pretraining ----


def _blocks(mask: Array, rng: Generator) -> Array:
    """A mosaic of small square tiles: dark ones of one hue on light ones of another."""
    tile = 2 * _SCALE * int(rng.integers(1, 3))
    across = _FINE // tile
    share = mask.reshape(across, tile, across, tile).mean(axis=(1, 3))
    hue = rng.random()
    ground = _hue(hue, rng.uniform(0.2, 0.5), rng.uniform(0.8, 0.95))
    figure = _hue(hue + rng.uniform(0.3, 0.7), rng.uniform(0.6, 0.9), rng.uniform(0.3, 0.55))
    shade = rng.uniform(0.85, 1.15, size=(across, across, 1)).astype(np.float32)
    mosaic = _mix(share, ground, figure) * shade
    big: Array = mosaic.repeat(tile, axis=0).repeat(tile, axis=1)
    return big


def _chalk(mask: Array, rng: Generator) -> Array:
    """Dusty pale strokes on a school board."""
    board = _hue(rng.uniform(0.38, 0.5), rng.uniform(0.25, 0.5), rng.uniform(0.25, 0.4))
    dust = _step(_clouds(rng, 48) + 0.5 * _clouds(rng, 12), 0.5, 0.5)
    smears = 0.10 * _clouds(rng, 4)
    return _mix(mask * dust * 0.9 + smears, board, np.array([0.96, 0.96, 0.9], np.float32))


def _noise(mask: Array, rng: Generator) -> Array:
    """Coloured static that is brighter where the digit is."""
    static = rng.normal(0, 0.16, size=(SIZE, SIZE, 3)).astype(np.float32)
    figure = (rng.uniform(0.2, 0.35) + rng.uniform(0.35, 0.5) * mask)[..., None]
    noisy: Array = figure + static.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
    return noisy


def _stamp(mask: Array, rng: Generator) -> Array:
    """A rubber stamp: a worn block of colour with the digit cut out."""
    paper = _hue(rng.random(), 0.05, rng.uniform(0.85, 1.0))
    colour = _hue(rng.choice([0.0, 0.33, 0.6, 0.78]) + rng.uniform(-0.04, 0.04), 0.8, 0.7)
    along = np.abs(np.linspace(-1, 1, _FINE, dtype=np.float32)) ** rng.choice([2, 6])
    seal = _step(-along[:, None] - along, -0.85, 0.04)
    wear = _step(_clouds(rng, 24), 0.15, 0.2)
    return _mix(seal * (1 - mask) * wear, paper, colour)


def _stripes(mask: Array, rng: Generator) -> Array:
    """Pale stripes that turn dark and run another way inside the digit."""
    y, x = np.mgrid[0:_FINE, 0:_FINE].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    frequency = 2 * np.pi / (rng.uniform(3.5, 5) * _SCALE)
    hue = rng.random()
    painted = []
    for turn in (0, np.pi / 2):
        phase = x * np.cos(angle + turn) + y * np.sin(angle + turn)
        wave = _step(np.sin(frequency * phase), 0.0, 0.4)
        depth = 0.75 if turn else 0.2
        light, dark = _hue(hue, depth, 1.1 - 0.5 * depth), _hue(hue, depth + 0.2, 1 - 0.7 * depth)
        painted.append(_mix(wave, light, dark))
        hue += rng.uniform(0.15, 0.4)
    return _mix(mask, painted[0], painted[1])


_LOOKS: dict[str, Callable[[Array, Generator], Array]] = {
    "ink": _ink,
    "neon": _neon,
    "photo": _photo,
    "sketch": _sketch,
    "blocks": _blocks,
    "chalk": _chalk,
    "noise": _noise,
    "stamp": _stamp,
    "stripes": _stripes,
}
