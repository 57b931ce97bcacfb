"""The data sets of DomainBed: a folder of that name is told what it lacks and has too much."""

from pathlib import Path

import pytest

from fastheads.train.data.domains import DomainFolders
from fastheads.train.data.presets import departures, preset_of, presets


def folders(name, counts, classes):
    files = tuple(tuple((Path(f"{d}/{i}"), 0) for i in range(n)) for d, n in counts.items())
    return DomainFolders(Path(name), tuple(counts), tuple(classes), files, tuple(classes))


PACS = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.mark.parametrize(
    ("counts", "classes", "told"),
    [
        (PACS, CLASSES, ""),
        (PACS, CLASSES[:-1], "no class 'person'"),
        (PACS, (*CLASSES, "cat"), "surplus class 'cat'"),
        (PACS | {"sketch": 3928}, CLASSES, "3,928 images of sketch for 3,929"),
        ({"cartoon": 2344, "clipart": 3}, CLASSES, "no domain 'art_painting', 'photo', 'sketch'; surplus domain 'clip"),
        (PACS, "abcde", "no class 'dog', 'elephant', 'giraffe' and 4 more; surplus class 'a', 'b', 'c' and 2 more"),
    ],
)
def test_what_is_missing_and_surplus_is_named(counts, classes, told):
    found = departures("PACS", folders("data/PACS", counts, classes))
    assert told in found and bool(found) == bool(told)
    assert len(found.splitlines()) <= 1


def test_domains_that_were_not_asked_for_are_not_missing():
    assert not departures("PACS", folders("PACS", {"photo": 1670, "sketch": 3929}, CLASSES), ["photo", "sketch"])
    domain_net = presets()["DomainNet"]
    counts = dict.fromkeys(domain_net.domains, 10)
    assert departures("DomainNet", folders("d", counts, domain_net.classes)).endswith("60 images for 586,575")
    assert not departures("DomainNet", folders("d", counts, domain_net.classes), list(counts))


def test_both_numbers_of_terra_incognitas_images_are_right():
    domains, classes = presets()["TerraIncognita"].domains, presets()["TerraIncognita"].classes
    fewer = {**domains, "location_100": domains["location_100"] - 458}
    for counts in (domains, fewer):
        assert not departures("TerraIncognita", folders("t", counts, classes))
    other = {**domains, "location_100": 1}
    assert "1 images of location_100 for 4,879" in departures("TerraIncognita", folders("t", other, classes))


def test_domainbeds_own_folders_are_known_by_name():
    for folder, name in {"PACS": "PACS", "office_home": "OfficeHome", "terra_incognita": "TerraIncognita"}.items():
        assert preset_of(folder) == name
    assert preset_of("domain_net") == "DomainNet" and preset_of("pacs144") is None
    numbers = {"PACS": (7, 9991), "VLCS": (5, 10_729), "OfficeHome": (65, 15_588), "TerraIncognita": (10, 24_788)}
    for name, (classes, images) in (numbers | {"DomainNet": (345, 586_575)}).items():
        preset = presets()[name]
        assert (len(set(preset.classes)), preset.images[0]) == (classes, images)
        assert None in preset.domains.values() or sum(preset.domains.values()) == images
