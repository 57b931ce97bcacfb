"""The demo's domains: 71 things that people drew, in four looks, as `root/<domain>/<class>/<drawing>/<n>.png`.

A drawing, one outline of one family, is in one domain only. Its pictures differ in pose and colours. They share a
folder, so that the validation split can keep them together (`split(…, by="folder")`).
"""

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastheads.demo import fonts, looks
from fastheads.demo.fonts import Glyph
from fastheads.train.progress import phase

# Whose drawings a domain shows: families and their styles.
SOURCES = {
    "art": (("remix", "fill"), ("remix", ""), ("elusive", ""), ("fontawesome5-regular", "")),
    "neon": (("remix", "line"), ("phosphor", "regular")),
    "photo": (("phosphor", "bold"), ("phosphor", "fill")),
    "sketch": (("phosphor", "thin"), ("phosphor", "light")),
}
DOMAINS = tuple(SOURCES)
# Left to pretraining.
PRETRAINING = ("codicon", "fontawesome5", "fontawesome6", "material5", "material6")
PER_CLASS = 12  # pictures of a class in a domain
MOST_DRAWINGS = 6  # of a class in a domain
SEED = 0
# Words for what isn't a thing, or isn't one that a name tells from another.
_NO_CLASS = (
    "arrow-down arrow-left arrow-right arrow-up asterisk at percent check play-circle pause-circle stop-circle "
    "star-half calendar-check folder-open book-open copyright radio stop pause question code git-branch git-commit "
    "git-merge git-pull-request layout file-pdf closed-captioning repeat share eject skip-forward rewind alarm timer "
    "swap stack link table"
)
# So plain that all draw them alike: without near copies, pretraining would have one drawing of them or none.
_ALIKE = "bookmark clock compass folder heart life-ring play scissors star"
_STAMP = "icons.json"
SIDE = 24  # pixels at which drawings are compared


def drawings() -> dict[str, dict[str, tuple[Glyph, ...]]]:
    """Domain -> class -> its distinct drawings, two or more; classes sorted, the same in every domain."""
    return {
        domain: {name: found for name, found in by_class.items() if name not in _ALIKE.split()}
        for domain, by_class in candidates().items()
    }


@functools.cache
def candidates() -> dict[str, dict[str, tuple[Glyph, ...]]]:
    """As `drawings`, with the classes that all draw alike; pretraining shows no near copy of any of these."""
    by_word: dict[str, dict[tuple[str, str], list[Glyph]]] = defaultdict(lambda: defaultdict(list))
    known: dict[str, set[str]] = defaultdict(set)  # word -> designers that draw it for pretraining
    for glyph in fonts.glyphs():
        if glyph.family in PRETRAINING:
            known[glyph.word].add(glyph.designer)
        else:
            by_word[glyph.word][glyph.family, glyph.style].append(glyph)
    chosen: dict[str, dict[str, tuple[Glyph, ...]]] = {domain: {} for domain in DOMAINS}
    for word in sorted(set(by_word) - set(_NO_CLASS.split())):
        if len(known[word]) < 2:
            continue
        found = {d: _distinct([g for source in SOURCES[d] for g in by_word[word][source]]) for d in DOMAINS}
        if min(map(len, found.values())) >= 2:
            for domain in DOMAINS:
                chosen[domain][word] = found[domain]
    return chosen


def _distinct(glyphs: list[Glyph], apart: float = 0.015) -> tuple[Glyph, ...]:
    """Without empty drawings and those that are near copies of an earlier one; at most MOST_DRAWINGS."""
    kept: list[Glyph] = []
    seen: list[NDArray[np.float32]] = []
    for glyph in glyphs:
        drawn = fonts.mask(glyph, SIDE)
        if drawn is None:
            continue
        print_ = fingerprints([drawn])[0]
        if all(1 - print_ @ other > apart for other in seen):
            kept.append(glyph)
            seen.append(print_)
    return tuple(kept[:MOST_DRAWINGS])


def fingerprints(masks: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Rows of unit length, one a mask `[24, 24]`: 1 - their product is the distance of two drawings."""
    flat = np.stack(masks).reshape(len(masks), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def near_copies(masks: NDArray[np.uint8], closer: float = 0.08) -> NDArray[np.bool_]:
    """Which of these drawings, masks `[n, 24, 24]`, look like one that a domain may show, `[n]`."""
    shown = [fonts.mask(g, SIDE) for by_class in candidates().values() for found in by_class.values() for g in found]
    domains = fingerprints([mask for mask in shown if mask is not None])
    return (1 - fingerprints(list(masks)) @ domains.T).min(1) < closer


def shared_families(target: str) -> str:
    """Which families a held-out domain shares with the others, in words."""
    families = {domain: sorted({family for family, _ in sources}) for domain, sources in SOURCES.items()}
    shared = [
        f"{family} ({', '.join(domain for domain in DOMAINS if domain != target and family in families[domain])})"
        for family in families[target]
        if any(family in families[domain] for domain in DOMAINS if domain != target)
    ]
    also = f"also in other domains, in other styles: {', '.join(shared)}" if shared else "in no other domain"
    return f"Drawn by {', '.join(families[target])}; {also}."


def picture(domain: str, glyph: Glyph, number: int) -> NDArray[np.uint8]:
    """The pixels `[96, 96, 3]` of one file."""
    drawn = fonts.mask(glyph, looks.SIZE)
    assert drawn is not None
    return looks.draw(drawn, domain, np.random.default_rng([SEED, DOMAINS.index(domain), glyph.code, number]))


def plan() -> dict[str, tuple[str, Glyph, int]]:
    """Every file below the root -> (domain, drawing, number); a class's pictures go round its drawings."""
    files = {}
    for domain, by_class in drawings().items():
        for name, found in by_class.items():
            for number in range(PER_CLASS):
                glyph = found[number % len(found)]
                drawing = f"{glyph.family}-{glyph.name}"
                path = f"{domain}/{name.replace('-', '_')}/{drawing}/{number // len(found)}.png"
                files[path] = (domain, glyph, number)
    return files


def fingerprint() -> str:
    """Of what would be drawn: the names of all files, and the pixels of some sixteen."""
    digest = hashlib.sha256()
    files = plan()
    for path in files:
        digest.update(path.encode())
    for path in list(files)[:: len(files) // 16]:
        digest.update(picture(*files[path]).tobytes())
    return digest.hexdigest()[:12]


def write_domains(root: str | os.PathLike[str]) -> Path:
    """Writes the four domains and returns root.

    The folder appears complete or not at all; one that is complete and up to date is reused, an older one of ours is
    replaced.

    Raises:
        FileExistsError: root holds something that this function did not write.
        ModuleNotFoundError: the fonts are not installed.
    """
    root = Path(root).expanduser()
    files = plan()
    stamp = {"fastheads": "demo icons", "fingerprint": fingerprint()}
    if _complete(root, stamp, files):
        return root
    if root.is_dir() and any(root.iterdir()) and not (root / _STAMP).is_file():
        raise FileExistsError(f"{root} exists and does not hold the demo's icons; not touching it")
    root.parent.mkdir(parents=True, exist_ok=True)
    fresh = root.with_name(f".{root.name}-{uuid.uuid4().hex}")
    stale = root.with_name(f"{fresh.name}-old")
    try:
        with phase("drawing the icons", len(files), "pictures") as advance:
            for name, described in files.items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(*described)).save(path)
                advance(1)
        (fresh / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        if (root / _STAMP).is_file():
            os.replace(root, stale)
        os.replace(fresh, root)
    except OSError:
        # another process may have finished the same folder first
        if not _complete(root, stamp, files):
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
    return root


def _complete(root: Path, stamp: dict[str, str], files: dict[str, tuple[str, Glyph, int]]) -> bool:
    try:
        found = json.loads((root / _STAMP).read_text())
    except (OSError, ValueError):
        return False
    return bool(found == stamp) and all((root / name).is_file() for name in files)
