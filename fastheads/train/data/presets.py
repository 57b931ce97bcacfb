"""Known data sets, by the name of their folder: what must be in it (`presets.json`).

Names and numbers are those of DomainBed's code (VLCS's list of files, TerraIncognita's categories, DomainNet's list of
duplicates), of ImageNet-R's and ImageNet-A's (the 200 classes of each, as WiSE-FT's code has them too), of the sets'
folders, and of papers on them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """Which domains, with their numbers of images where known, and which classes, as folders are named.

    images: of all domains, each number that is in use: of TerraIncognita papers have 24,788, whose domains these are,
    and DomainBed's download gives 24,330; none where it isn't known. subsets: the classes of a domain that has not all.
    """

    domains: Mapping[str, int | None]
    classes: tuple[str, ...]
    images: tuple[int, ...]
    subsets: Mapping[str, frozenset[str]]

    def classes_of(self, domain: str) -> Collection[str]:
        """Those that a domain must have images of."""
        return next((names for known, names in self.subsets.items() if _plain(known) == _plain(domain)), self.classes)

    def called(self, folder: str) -> str:
        """The class of a folder: its name, or, as ImageNet-V2 has them, the class's place among the others."""
        numbered = folder.isdecimal() and folder not in self.classes and int(folder) < len(self.classes)
        return self.classes[int(folder)] if numbered else folder

    def departures(self, images: Mapping[str, int], classes: Sequence[str], *, whole: bool) -> list[str]:
        """What is missing and surplus in a folder of these numbers of images by domain, and of these classes.

        whole: whether all domains were to be read.
        """
        found = _names("no domain", self.domains, images) if whole else []
        found += _names("surplus domain", images, self.domains)
        found += _names("no class", self.classes, classes)
        found += _names("surplus class", classes, self.classes)
        counts, total = {_plain(domain): count for domain, count in images.items()}, sum(images.values())
        if total in self.images or not (whole or len(self.images) < 2):
            return found
        wrong = [
            f"{counts[_plain(domain)]:,} images of {domain} for {count:,}"
            for domain, count in self.domains.items()
            if count is not None and counts.get(_plain(domain), count) != count
        ]
        if self.images and whole and not (wrong or found):
            wrong = [f"{total:,} images for {' or '.join(f'{n:,}' for n in self.images)}"]
        return found + wrong


@functools.cache
def presets() -> dict[str, Preset]:
    """Every known data set, by its name in papers."""
    found = json.loads(Path(__file__).with_name("presets.json").read_text())
    return {
        name: Preset(
            p["domains"],
            tuple(p["classes"].split()),
            tuple(p["images"]),
            {domain: frozenset(classes.split()) for domain, classes in p.get("subsets", {}).items()},
        )
        for name, p in found.items()
    }


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def preset_of(name: str) -> str | None:
    """The data set that a folder is called after ("office_home": OfficeHome); None for another name."""
    return next((known for known in presets() if _plain(known) == _plain(name)), None)


def _names(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """What is said of the names that are not known, the first three of them named; nothing where all are."""
    plain = set(map(_plain, known))
    others = [repr(name) for name in names if _plain(name) not in plain]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return [f"{what} {', '.join(others[:3])}{more}"] if others else []
