"""Small sets of images on disk for the tests of data. Not a test file."""

import numpy as np
from PIL import Image

from fastheads.demo import icons

DOMAINS, CLASSES = ("art", "photo", "sketch"), ("cat", "dog")
PER_CLASS = {"art": 3, "photo": 5, "sketch": 2}  # images per class


def write_image(path, seed=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_set(root):
    """Three domains × two classes, `PER_CLASS` PNGs each, no two the same."""
    for d, domain in enumerate(DOMAINS):
        for c, label in enumerate(CLASSES):
            for i in range(PER_CLASS[domain]):
                write_image(root / domain / label / f"{i}.png", seed=100 * d + 10 * c + i)
    return root


def cut_short(path):
    write_image(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:2000])


# What can be wrong with an image file.
BROKEN = {
    "text": lambda path: path.write_text("this is no image"),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": cut_short,
    "gone": lambda path: path.unlink(),
    "float": lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF"),
}


def few_icons(monkeypatch):
    """The demo draws three classes of two drawings."""
    found = icons.drawings()
    few = {domain: {name: by_class[name][:2] for name in list(by_class)[:3]} for domain, by_class in found.items()}
    monkeypatch.setattr(icons, "drawings", lambda: few)
