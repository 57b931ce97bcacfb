"""The four looks of the demo's domains: a drawing's mask becomes a picture of neon, paint, pencil or photographs.

None of them occurs in pretraining (`scenes.py`): there, colours are flat or blended, and nothing glows, casts a shadow,
wobbles like a hand, lies on paper, or shows a photograph.
"""

import functools
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images

SIZE = 96

Array = NDArray[np.float32]
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def draw(mask: NDArray[np.uint8], look: str, rng: Generator) -> NDArray[np.uint8]:
    """A drawing's mask `[96, 96]` in a look, in a random pose and random colours: uint8 `[96, 96, 3]`."""
    return np.rint(255 * np.clip(LOOKS[look](_posed(mask, rng), rng), 0, 1)).astype(np.uint8)


def _posed(mask: NDArray[np.uint8], rng: Generator) -> Array:
    """Turned by up to 15 degrees, 0.72 to 0.98 of its size, anywhere in the picture: `[96, 96]`, 0 … 1."""
    angle, zoom = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.72, 0.98)
    centre = SIZE / 2 + rng.uniform(-0.5, 0.5, size=2) * SIZE * (1 - zoom)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    turn = np.array([[cos, sin], [-sin, cos]])
    values = ndimage.affine_transform(mask.astype(np.float32) / 255, turn, SIZE / 2 - turn @ centre, order=1)
    return np.clip(values, 0, 1)


def _blur(values: Array, pixels: float) -> Array:
    blurred: Array = ndimage.gaussian_filter(values, pixels, truncate=3.0)
    return blurred


def _moved(values: Array, by: int) -> Array:
    """Shifted down and to the right."""
    moved = np.zeros_like(values)
    moved[by:, by:] = values[:-by, :-by]
    return moved


def _clouds(rng: Generator, cells: int) -> Array:
    """Smooth noise, 0 … 1, with `cells` bumps across."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _hue(hue: float, saturation: float, value: float) -> Array:
    """RGB `[3]` of a hue (one turn is 1), a saturation and a value."""
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation * (1 - wheel))).astype(np.float32)


def _mix(share: Array, below: Array, above: Array) -> Array:
    """`below` where share is 0, `above` where it is 1; colours `[3]` or pictures."""
    share = share[..., None]
    return (1 - share) * below + share * above


@functools.cache
def _photographs() -> list[Image.Image]:
    """The two that come with scikit-learn: a temple in China and a flower."""
    return [Image.fromarray(photo) for photo in load_sample_images().images]


def _crop(rng: Generator) -> Array:
    """A square of a photograph."""
    photo = _photographs()[rng.integers(2)]
    side = int(rng.integers(70, 260))
    left, top = (int(rng.integers(0, length - side)) for length in photo.size)
    box = (left, top, left + side, top + side)
    crop = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    return np.asarray(crop, dtype=np.float32) / np.float32(255)


def _art(mask: Array, rng: Generator) -> Array:
    """A poster: two-coloured stripes, dots or a disc, a hard shadow, a figure that fades between two hues."""
    hue = rng.random()
    ground, other = _hue(hue, 0.55, 0.95), _hue(hue + rng.uniform(0.1, 0.25), 0.6, 0.9)
    pitch = rng.uniform(0.15, 0.35)
    waves = (np.sin((X + Y) * pitch), np.sin(X * pitch) * np.sin(Y * pitch) - 0.25, 40 - np.hypot(X - 48, Y - 48))
    poster = _mix(np.clip(0.5 + 2 * waves[rng.integers(3)], 0, 1), ground, other)
    poster = _mix(0.45 * _moved(mask, 4), poster, _hue(hue, 0.7, 0.3))
    figure = hue + 0.5 + rng.uniform(-0.1, 0.1)
    bottom, top = _hue(figure, 0.75, rng.choice([1.0, 0.45])), _hue(figure + rng.uniform(0.08, 0.16), 0.7, 1.0)
    return _mix(mask, poster, _mix(0.85 * Y / SIZE, bottom, top))


def _neon(mask: Array, rng: Generator) -> Array:
    """A glowing tube before a brick wall at night."""
    colour = _hue(rng.random(), 0.85, 1.0)
    wall = np.array([0.07, 0.06, 0.12], np.float32) * (1 + _clouds(rng, 5))[..., None]
    joints = (Y % 16 < 1) | ((X + (Y // 16 % 2) * 16) % 32 < 1)
    glow = 1.2 * _blur(mask, 7) + 0.6 * _blur(mask, 3)
    core = _blur(mask, 0.8)
    lit = wall + 0.05 * joints[..., None] + glow[..., None] * colour
    return lit + core[..., None] * (0.6 * colour + 0.4)


def _photo(mask: Array, rng: Generator) -> Array:
    """A plate cut from one photograph, with its edge and its soft shadow, on another."""
    scene, plate = _crop(rng), _crop(rng)
    plate = np.clip(0.6 * plate + (0.65 if scene.mean() < 0.45 else -0.25), 0, 1)
    scene = scene * (1 - 0.5 * _blur(_moved(mask, 3), 3))[..., None]
    soft = _blur(mask, 2)
    grain = rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    return _mix(mask, scene, plate + 0.5 * (soft - _moved(soft, 2))[..., None]) + 0.03 * grain


def _sketch(mask: Array, rng: Generator) -> Array:
    """A pencil in a hand that isn't steady, on grainy paper."""
    wobble = [30 * _blur(rng.standard_normal((SIZE, SIZE), dtype=np.float32), 6) for _ in range(2)]
    line = ndimage.map_coordinates(mask, (Y + wobble[0], X + wobble[1]), order=1)
    line = np.clip(1.5 * line, 0, 1) * (0.45 + 0.55 * _clouds(rng, 32))
    grain = rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    paper = np.array([0.95, 0.93, 0.87], np.float32) * (1 - 0.08 * _clouds(rng, 6))[..., None] + 0.025 * grain
    return _mix(0.8 * line, paper, np.full(3, 0.25, np.float32))


LOOKS: dict[str, Callable[[Array, Generator], Array]] = {
    "art": _art,
    "neon": _neon,
    "photo": _photo,
    "sketch": _sketch,
}
