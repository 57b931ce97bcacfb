"""Icons that people drew: the outlines in the fonts of the wheel `qtawesome`, as glyphs with names, and as masks.

The wheel is read as files and never imported (it wants Qt). Outlines are filled here, in plain numpy, so that the
pixels don't depend on the version of a font renderer.
"""

import functools
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.pens.recordingPen import DecomposingRecordingPen
from fontTools.ttLib import TTFont
from numpy.typing import NDArray

WHEEL = "qtawesome==1.4.2"
# Family -> the font's file; its names stand in <stem>-charmap-<version>.json.
FAMILIES = {
    "codicon": "codicon-0.0.36.ttf",
    "elusive": "elusiveicons-webfont-2.0.ttf",
    "fontawesome5": "fontawesome5-solid-webfont-5.15.4.ttf",
    "fontawesome5-regular": "fontawesome5-regular-webfont-5.15.4.ttf",
    "fontawesome6": "fontawesome6-solid-webfont-6.7.2.ttf",
    "fontawesome6-regular": "fontawesome6-regular-webfont-6.7.2.ttf",
    "material5": "materialdesignicons5-webfont-5.9.55.ttf",
    "material6": "materialdesignicons6-webfont-6.9.96.ttf",
    "phosphor": "phosphor-1.3.0.ttf",
    "remix": "remixicon-2.5.0.ttf",
}
_STYLES = {"phosphor": ("bold", "fill", "light", "thin"), "remix": ("fill", "line")}
_VARIANT = re.compile(r"-(alt|variant|o|simple|s|\d+)$")
# What families call differently. Left: a family's name; right: ours.
_SYNONYMS = {
    name: word
    for word, names in {
        "bicycle": "bike",
        "boat": "ship sailboat sail-boat",
        "bell": "bell-ring bell-ringing notification",
        "book": "book-closed notebook",
        "briefcase": "suitcase",
        "bug": "bug-report",
        "camera": "camera-photo camera-retro",
        "car": "car-side automobile",
        "chair": "chair-rolling",
        "clock": "clock-rotate time",
        "cloud": "weather-cloudy cloudy",
        "comment": "chat comments message chat-dots chat-text message-square",
        "compass": "navigation-compass",
        "computer": "desktop monitor computer-desktop television-classic",
        "cube": "cube-outline box-3d",
        "envelope": "email mail",
        "eye": "eye-open",
        "fire": "fire-flame flame",
        "file": "file-document",
        "film": "filmstrip film-strip movie",
        "filter": "funnel",
        "first-aid": "first-aid-kit medkit medical-bag",
        "flag": "flag-banner",
        "folder": "folder-close",
        "gear": "cog settings settings-gear",
        "gift": "gift-alt",
        "glasses": "eyeglasses",
        "globe": "earth globe-simple",
        "hand": "hand-palm",
        "headphones": "headphone headset",
        "heart": "heart-empty",
        "hospital": "hospital-building",
        "hourglass": "hourglass-half",
        "house": "home house-line",
        "image": "image-filter picture",
        "key": "key-variant",
        "leaf": "leaf-maple",
        "life-ring": "lifebuoy",
        "lightbulb": "bulb light-bulb lightbulb-on lightbulb-filament",
        "lightning": "flash bolt lightning-bolt thunderbolt",
        "lock": "lock-closed lock-simple",
        "magnifying-glass": "magnify search",
        "map-pin": "map-marker",
        "medal": "award",
        "microphone": "mic",
        "moon": "moon-waning-crescent weather-night night",
        "mortarboard": "graduation-cap school",
        "mouse": "mouse-simple computer-mouse",
        "mug": "coffee coffee-cup cup mug-hot mug-saucer",
        "music": "music-note music-notes",
        "paint-brush": "brush paintbrush brush-alt",
        "pencil": "pencil-alt edit pen pencil-line",
        "phone": "phone-alt telephone phone-call",
        "pill": "pills capsule",
        "plane": "airplane airplane-tilt",
        "plug": "plug-charging power-plug plugs",
        "printer": "print",
        "push-pin": "pushpin pin thumb-tack thumbtack",
        "puzzle": "puzzle-piece",
        "robot": "robot-happy",
        "rocket": "rocket-launch",
        "save": "floppy-disk floppy content-save",
        "scissors": "cut content-cut",
        "send": "paper-plane send-plane paper-plane-tilt",
        "shield": "shield-check security",
        "shopping-cart": "cart cart-shopping shopping-cart-simple",
        "snowflake": "weather-snowy snowy",
        "star": "star-empty",
        "sun": "white-balance-sunny weather-sunny",
        "t-shirt": "tshirt t-shirt-crew shirt",
        "thumbs-down": "thumb-down",
        "thumbs-up": "thumb-up",
        "trash": "trash-can trash-alt delete delete-bin",
        "trophy": "trophy-variant",
        "truck": "truck-fast",
        "tv": "television television-simple",
        "umbrella": "umbrella-simple",
        "user": "account person adult",
        "users": "users-three account-group group",
        "video": "video-camera camera-alt",
        "water": "drop tint droplet",
        "wrench": "wrench-simple tools",
    }.items()
    for name in names.split()
}

Mask = NDArray[np.uint8]

logging.getLogger("fontTools").setLevel(logging.ERROR)  # of the fonts' own flaws


@dataclass(frozen=True)
class Glyph:
    """One drawing: its family, the style within it ("" where it has one only), its name there, and the word for it."""

    family: str
    style: str
    name: str
    word: str
    code: int

    @property
    def designer(self) -> str:
        """The family without its version."""
        return self.family.rstrip("56")


def folder() -> Path:
    """Where the wheel's fonts are installed. Raises ModuleNotFoundError, in words, where they are not."""
    spec = importlib.util.find_spec("qtawesome")
    fonts = Path(spec.submodule_search_locations[0]) / "fonts" if spec and spec.submodule_search_locations else None
    if fonts is None or not fonts.is_dir():
        raise ModuleNotFoundError(f"the demo draws icons from {WHEEL}: pip install 'fastheads[demo]'")
    missing = [name for name in FAMILIES.values() if not (fonts / name).is_file()]
    if missing:
        raise ModuleNotFoundError(f"{fonts}: no {missing[0]}, the demo wants {WHEEL}: pip install 'fastheads[demo]'")
    return fonts


def glyphs(families: tuple[str, ...] | None = None) -> Iterator[Glyph]:
    """The drawings of all families or those named, each code point once, in the order of the families' tables."""
    for family in families or FAMILIES:
        stem, version = FAMILIES[family].removesuffix(".ttf").rsplit("-", 1)
        table = json.loads((folder() / f"{stem}-charmap-{version}.json").read_text())
        seen = set()
        for name, code in table.items():
            code = int(code, 16)
            if code not in seen:
                seen.add(code)
                style, word = _parse(family, name)
                yield Glyph(family, style, name, word, code)


def _parse(family: str, name: str) -> tuple[str, str]:
    """Style and word of a name: `house-simple-bold` in Phosphor is ("bold", "house")."""
    style = "regular" if family == "phosphor" else ""
    for suffix in _STYLES.get(family, ("outline",)):
        if name.endswith(f"-{suffix}"):
            name, style = name.removesuffix(f"-{suffix}"), suffix
    base = _VARIANT.sub("", name)
    return style, _SYNONYMS.get(name, _SYNONYMS.get(base, base))


@functools.cache
def _font(family: str) -> TTFont:
    return TTFont(folder() / FAMILIES[family], lazy=True)


def outline(glyph: Glyph) -> list[NDArray[np.float64]]:
    """The contours of a glyph as closed polygons `[points, 2]` (x, y upwards, font units); curves in eight pieces."""
    font = _font(glyph.family)
    name = font.getBestCmap().get(glyph.code)
    if name is None:
        return []
    shapes = font.getGlyphSet()
    pen = DecomposingRecordingPen(shapes)
    shapes[name].draw(pen)
    contours: list[NDArray[np.float64]] = []
    points: list[tuple[float, float]] = []
    steps = np.linspace(0, 1, 9)[1:, None]
    for kind, given in pen.value:
        if kind == "qCurveTo" and given[-1] is None:  # a contour without a point on the curve
            given = (*given[:-1], tuple((np.array(given[0]) + given[-2]) / 2))
            points = [given[-1]]
        if kind in ("moveTo", "lineTo"):
            points.append(given[0])
        elif kind == "qCurveTo":
            controls = [np.array(point, float) for point in given]
            ends = [(a + b) / 2 for a, b in zip(controls[:-1], controls[1:-1], strict=False)] + [controls[-1]]
            for control, end in zip(controls, ends, strict=False):
                start = np.array(points[-1], float)
                points.extend(map(tuple, (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * control + steps**2 * end))
        elif kind in ("closePath", "endPath"):
            contours.append(np.array(points, float))
            points = []
    return [contour for contour in contours if len(contour) > 2]


def mask(glyph: Glyph, size: int, margin: float = 0.07) -> Mask | None:
    """How much of each pixel the drawing covers, `[size, size]` 0 … 255, centred, its longer side 1 - 2 margin.

    None for an empty glyph. Nonzero winding, as TrueType fills; exact along x, four lines a pixel along y.
    """
    contours = outline(glyph)
    if not contours:
        return None
    low, high = (pick(np.concatenate(contours), axis=0) for pick in (np.min, np.max))
    if (high - low).max() <= 0:
        return None
    scale = size * (1 - 2 * margin) / (high - low).max()
    middle = (low + high) / 2
    return _filled([(contour - middle) * (scale, -scale) + size / 2 for contour in contours], size)


def _filled(contours: list[NDArray[np.float64]], size: int, lines: int = 4) -> Mask:
    """Fills polygons (x, y downwards, in pixels)."""
    start = np.concatenate(contours)
    end = np.concatenate([np.roll(contour, -1, axis=0) for contour in contours])
    # The scan lines that each edge crosses, every crossing with its x and direction.
    row_start, row_end = (np.ceil(points[:, 1] * lines - 0.5).astype(int) for points in (start, end))
    first, count = np.minimum(row_start, row_end), np.abs(row_end - row_start)
    edge = np.repeat(np.arange(len(count)), count)
    row = np.repeat(first - np.r_[0, np.cumsum(count)[:-1]], count) + np.arange(len(edge))
    share = ((row + 0.5) / lines - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    x = start[edge, 0] + share * (end[edge, 0] - start[edge, 0])
    order = np.lexsort((x, row))
    row, x, turn = row[order], np.clip(x[order], 0, size), np.sign(row_end - row_start)[edge][order]
    winding = np.cumsum(turn)  # every line's turns add up to zero
    was = np.r_[0, winding[:-1]]
    side = (winding != 0).astype(int) - (was != 0)  # +1 where a span begins, -1 where it ends
    kept = (side != 0) & (row >= 0) & (row < size * lines)
    row, x, side = row[kept], x[kept], side[kept]
    # A span's beginning at x covers the rest of its pixel, and all pixels behind it.
    cell = np.minimum(x.astype(int), size - 1)
    covered = np.zeros((size * lines, size + 1))
    np.add.at(covered, (row, cell), side * (cell + 1 - x))
    np.add.at(covered, (row, cell + 1), side * (x - cell))
    area = np.cumsum(covered, axis=1)[:, :size].reshape(size, lines, size).mean(1)
    return np.rint(255 * np.clip(area, 0, 1)).astype(np.uint8)
