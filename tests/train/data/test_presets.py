"""The data sets of DomainBed: a folder of that name is told what it lacks and has too much."""

from pathlib import Path

import pytest

from fastheads.train.data.domains import DomainFolders
from fastheads.train.data.presets import PRESETS, departures, preset_of


def folders(name, counts, classes):
    files = tuple(tuple((Path(f"{d}/{i}"), 0) for i in range(n)) for d, n in counts.items())
    labels = tuple(map(str, range(classes)))
    return DomainFolders(Path(name), tuple(counts), labels, files, labels)


PACS = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}


@pytest.mark.parametrize(
    ("counts", "classes", "told"),
    [
        (PACS, 7, ""),
        (PACS, 6, "6 classes for 7"),
        (PACS | {"sketch": 3928}, 7, "3,928 images of sketch for 3,929"),
        ({"cartoon": 2344, "clipart": 3}, 7, "no domain 'art_painting', 'photo', 'sketch'; 'clipart' is none of its"),
    ],
)
def test_what_is_missing_and_surplus_is_named(counts, classes, told):
    found = departures("PACS", folders("data/PACS", counts, classes))
    assert told in found and bool(found) == bool(told)
    assert len(found.splitlines()) <= 1


def test_domains_that_were_not_asked_for_are_not_missing():
    assert not departures("PACS", folders("PACS", {"photo": 1670, "sketch": 3929}, 7), ["photo", "sketch"])
    vlcs = dict.fromkeys(PRESETS["VLCS"].domains, 10)
    assert departures("VLCS", folders("VLCS", vlcs, 5)).endswith("40 images for 10,729")
    assert not departures("VLCS", folders("VLCS", vlcs, 5), list(vlcs))


def test_domainbeds_own_folders_are_known_by_name():
    for folder, name in {"PACS": "PACS", "office_home": "OfficeHome", "terra_incognita": "TerraIncognita"}.items():
        assert preset_of(folder) == name
    assert preset_of("domain_net") == "DomainNet" and preset_of("pacs144") is None
    assert all(
        preset.by_domain is None or sum(preset.by_domain.values()) == preset.images for preset in PRESETS.values()
    )
