"""The data sets of DomainBed: a folder of that name is told what it lacks and has too much."""

from pathlib import Path

import pytest

from fastheads.train.data.domains import DomainFolders, read_domains
from fastheads.train.data.presets import preset_of, presets
from fastheads.train.data.sampling import split


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
    found = folders("data/PACS", counts, classes).departures()
    assert told in found and bool(found) == bool(told)
    assert len(found.splitlines()) <= 1


def test_domains_that_were_not_asked_for_are_not_missing():
    assert not folders("PACS", {"photo": 1670, "sketch": 3929}, CLASSES).departures(whole=False)
    domain_net = presets()["DomainNet"]
    counts = dict.fromkeys(domain_net.domains, 10)
    assert folders("domain_net", counts, domain_net.classes).departures().endswith("60 images for 586,575")
    assert not folders("domain_net", counts, domain_net.classes).departures(whole=False)


def test_both_numbers_of_terra_incognitas_images_are_right():
    domains, classes = presets()["TerraIncognita"].domains, presets()["TerraIncognita"].classes
    fewer = {**domains, "location_100": domains["location_100"] - 458}
    for counts in (domains, fewer):
        assert not folders("terra_incognita", counts, classes).departures()
    other = {**domains, "location_100": 1}
    assert "1 images of location_100 for 4,879" in folders("terra_incognita", other, classes).departures()


def test_domainbeds_own_folders_are_known_by_name():
    for folder, name in {"PACS": "PACS", "office_home": "OfficeHome", "terra_incognita": "TerraIncognita"}.items():
        assert preset_of(folder) == name
    assert preset_of("domain_net") == "DomainNet" and preset_of("pacs144") is None
    numbers = {"PACS": (7, 9991), "VLCS": (5, 10_729), "OfficeHome": (65, 15_588), "TerraIncognita": (10, 24_788)}
    for name, (classes, images) in (numbers | {"DomainNet": (345, 586_575)}).items():
        preset = presets()[name]
        assert (len(set(preset.classes)), preset.images[0]) == (classes, images)
        assert None in preset.domains.values() or sum(preset.domains.values()) == images


def test_folders_that_are_numbered_are_their_classes(tmp_path):
    """What lies in two folders of a class is all of it, and each image is alone, not one object with all others."""
    for place in ("LabelMe/0", "LabelMe/bird", "SUN09/bird"):
        (tmp_path / "VLCS" / place).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "VLCS" / place / f"{i}{place[-1]}.png").write_bytes(b"")
    found = read_domains(tmp_path / "VLCS")
    assert found.classes == ("bird",) and [len(files) for files in found.files] == [10, 5]
    assert min(found.identities()) == "LabelMe/bird/00.png"
    assert len(split(found, "LabelMe", by="folder")[1]) == 2


def test_imagenets_domains_may_have_fewer_classes_and_answers_are_among_those(tmp_path):
    """ImageNet-R has 200 of the classes, ImageNet-V2 numbers its folders; a class that R should have is missed."""
    known = presets()["ImageNet"]
    assert {domain: len(names) for domain, names in known.subsets.items()} == {"imagenet-a": 200, "imagenet-r": 200}
    assert all(names < set(known.classes) for names in known.subsets.values()) and len(set(known.classes)) == 1000
    goldfish, tench, shark = known.classes[1], known.classes[0], known.classes[2]
    assert {goldfish, shark} <= known.subsets["imagenet-r"] and tench not in known.subsets["imagenet-r"]
    for place in (
        f"imagenet/{tench}",
        f"imagenet/{goldfish}",
        "imagenet-v2/0",
        "imagenet-v2/1",
        f"imagenet-r/{goldfish}",
    ):
        (tmp_path / "ImageNet" / place).mkdir(parents=True)
        (tmp_path / "ImageNet" / place / "0.png").write_bytes(b"")
    found = read_domains(tmp_path / "ImageNet")
    assert found.classes == (tench, goldfish) and found.class_names == ("tench", "goldfish")
    assert found.lacking("imagenet-r") == [True, False] and found.lacking("imagenet-v2") is None
    assert "no domain 'imagenet-a', 'imagenet-sketch'; no class 'n01484850', " in found.departures()
    for domain in ("imagenet", "imagenet-v2"):
        (tmp_path / "ImageNet" / domain / shark).mkdir()
        (tmp_path / "ImageNet" / domain / shark / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=f"no image of class '{shark}' in domain 'imagenet-r'"):
        read_domains(tmp_path / "ImageNet")
