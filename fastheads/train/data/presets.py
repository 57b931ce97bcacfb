"""The data sets of DomainBed: what a folder of that name must hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastheads.train.data.domains import DomainFolders


@dataclass(frozen=True)
class Preset:
    """How many classes, which domains, as folders are named, and how many images in all; by domain where known.

    images: None where sources give different numbers.
    """

    classes: int
    domains: tuple[str, ...]
    images: int | None
    by_domain: Mapping[str, int] | None = None


_PACS = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}
# Totals as surveys of the field give them; of TerraIncognita they say 24,788 and 24,330.
PRESETS = {
    "PACS": Preset(7, tuple(_PACS), 9991, _PACS),
    "VLCS": Preset(5, ("Caltech101", "LabelMe", "SUN09", "VOC2007"), 10_729),
    "OfficeHome": Preset(65, ("Art", "Clipart", "Product", "Real World"), 15_588),
    "TerraIncognita": Preset(10, ("location_100", "location_38", "location_43", "location_46"), None),
    "DomainNet": Preset(345, ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), 586_575),
}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def preset_of(name: str) -> str | None:
    """The data set that a folder is called after ("office_home": OfficeHome); None for another name."""
    return next((known for known in PRESETS if _plain(known) == _plain(name)), None)


def departures(name: str, folders: DomainFolders, read: Sequence[str] | None = None) -> str:
    """What a data set's folder lacks or has too much, in a line; empty where it is as DomainBed has it.

    read: the domains that were read; None: all.
    """
    preset, found = PRESETS[name], []
    called = {_plain(domain): domain for domain in folders.domains}
    lacking = [d for d in preset.domains if _plain(d) not in called]
    if lacking and read is None:
        found.append(f"no domain {', '.join(map(repr, lacking))}")
    surplus = [d for d in folders.domains if _plain(d) not in map(_plain, preset.domains)]
    if surplus:
        found.append(f"{', '.join(map(repr, surplus))} is none of its domains")
    if len(folders.classes) != preset.classes:
        found.append(f"{len(folders.classes)} classes for {preset.classes}")
    counts = {_plain(d): len(files) for d, files in zip(folders.domains, folders.files, strict=True)}
    for domain, count in (preset.by_domain or {}).items():
        if counts.get(_plain(domain), count) != count:
            found.append(f"{counts[_plain(domain)]:,} images of {domain} for {count:,}")
    if not (preset.by_domain or found or read) and preset.images not in (None, sum(counts.values())):
        found.append(f"{sum(counts.values()):,} images for {preset.images:,}")
    return f"{folders.root} is not all of DomainBed's {name}: {'; '.join(found)}" if found else ""
