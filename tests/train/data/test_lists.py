"""fastheads.train.data.lists: images by a list are those by folders; every fault is named with its line."""

import csv
import json
import os
import random

import pytest
import torch
from pictures import CLASSES, DOMAINS, write_image, write_set

from fastheads.train.data.batches import training_loader
from fastheads.train.data.domains import domain_names, read_domains
from fastheads.train.data.sampling import split


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_set(tmp_path_factory.mktemp("listed") / "set")
    write_image(root / "photo" / "dog" / "deep" / "x.png")
    write_image(root / "photo" / "dog" / "deep-er" / "y.png")
    return root


def rows(root, start=""):
    """A row for each image, in no order."""
    found = [
        {"path": start + str(path.relative_to(root)), "domain": path.parts[d], "class": path.parts[d + 1]}
        for path in sorted(root.rglob("*.png"))
        for d in [len(root.parts)]
    ]
    random.Random(0).shuffle(found)
    return found


def write_list(file, rows):
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        with open(file, "w", newline="", encoding="utf-8-sig") as f:  # as spreadsheets write it
            writer = csv.DictWriter(f, ["note", "class", "path", "domain"])
            writer.writeheader()
            writer.writerows({"note": "a, b", **row} for row in rows)
    return file


@pytest.mark.parametrize("kind", [".csv", ".json", ".CSV"])
def test_a_list_gives_the_domains_classes_splits_and_batches_of_the_folders(root, tmp_path, kind):
    ours = read_domains(root)
    file = write_list(tmp_path / f"list{kind}", rows(root, start=os.path.relpath(root, tmp_path) + "/"))
    listed = read_domains(file)
    assert domain_names(file) == list(DOMAINS)
    assert (listed.domains, listed.classes, listed.class_names) == (ours.domains, ours.classes, ours.class_names)
    resolved = [[(path.resolve(), label) for path, label in files] for files in listed.files]
    assert resolved == [list(files) for files in ours.files]
    for name in DOMAINS:
        assert split(listed, name) == split(ours, name)
    batches = [
        training_loader(
            *(folders, DOMAINS[:2], {name: split(folders, name)[0] for name in DOMAINS}),
            *(lambda image: torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8), 3, 2),
        )
        for folders in (ours, listed)
    ]
    for mine, theirs in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_list_in_the_folder_itself_names_images_as_the_folder_does(root, tmp_path, monkeypatch):
    os.symlink(root, tmp_path / "set")
    for start in ("", f"{tmp_path}/set/", "~/set/"):
        monkeypatch.setenv("HOME", str(tmp_path))
        file = write_list(tmp_path / "set" / "list.csv", rows(root, start))
        try:
            assert list(read_domains("~/set/list.csv").identities()) == list(read_domains(root).identities())
        finally:
            file.unlink()


def test_a_list_may_name_some_domains_and_files_of_any_extension(root, tmp_path):
    write_image(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.image")
    more = [{"path": str(tmp_path / "x.image"), "domain": "art", "class": "cat"}]
    file = write_list(tmp_path / "list.json", rows(root, f"{root}/") + more)
    folders = read_domains(file, domains=["photo", "art"])
    assert folders.domains == ("art", "photo") and folders.counts()[0] == [4, 3]


BAD = {
    # what is wrong: the file, its content, and what the line must have
    "a column missing": ("x.csv", "path,label\n", ["line 1: no column domain, class", "got path, label"]),
    "another separator": ("x.csv", "path;domain;class\n", ["line 1: no column path, domain, class"]),
    "nothing": ("x.csv", "", ["line 1: no column path, domain, class, got none"]),
    "no row": ("x.csv", "path,domain,class\n", ["lists no image"]),
    "an empty field": ("x.csv", "path,domain,class\na.png,art,cat\nb.png,,cat\n", ["line 3: domain: is empty"]),
    "a short row": ("x.csv", "path,domain,class\na.png,art\n", ["line 2: class: is empty"]),
    "a file twice": (
        *("x.csv", "path,domain,class\na.png,art,cat\n./a.png,photo,cat\n"),
        ["line 3: path:", "a.png is listed already (line 2)"],
    ),
    "files missing": (
        *("x.csv", "path,domain,class\na.png,art,cat\nb.png,art,cat\nc.png,art,cat\n"),
        ["2 of 3 files are not there, the first", "/b.png (line 3)"],
    ),
    "a domain that is no name": ("x.csv", "path,domain,class\na.png,../up,cat\n", ["line 2: domain: got '../up'"]),
    "a class that is no name": ("x.csv", "path,domain,class\na.png,art,..\n", ["line 2: class: got '..'"]),
    "an open quote": ("x.csv", 'path,domain,class\n"a.png,art,cat\n', ["line", "unexpected end of data"]),
    "no text": ("x.csv", b"path,domain,class\n\xff\n", ["is not UTF-8 text"]),
    "no JSON": ("x.json", '[\n{"path": }]', ["line 2: is not JSON"]),
    "no list": ("x.json", '{"path": "a.png"}', ["got dict; takes a list"]),
    "no object": ("x.json", "[1]", ["entry 1: got 1"]),
    "a key missing": ("x.json", '[{"path": "a.png", "domain": "art"}]', ["entry 1: class: is empty"]),
    "a number": ("x.json", '[{"path": "a.png", "domain": "art", "class": 3}]', ["entry 1: class: got 3; takes text"]),
    "one domain": ("x.json", '[{"path": "a.png", "domain": "art", "class": "cat"}]', ["one domain only ('art')"]),
    "a class in one domain": (
        *("x.csv", "path,domain,class\na.png,art,cat\nd.png,photo,dog\n"),
        ["no image of class 'dog' in domain 'art', of class 'cat' in domain 'photo'"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_list_is_refused_in_one_line_with_the_place(tmp_path, case):
    name, content, fragments = BAD[case]
    for image in ("a.png", "d.png"):
        (tmp_path / image).touch()
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_domains(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


# --- class names --------------------------------------------------------------------------------


def names_from(root, file, content):
    file.write_text(content)
    return read_domains(root, class_names=file).class_names


def test_class_names_come_from_the_folders_or_a_file(root, tmp_path):
    assert read_domains(root).class_names == CLASSES
    assert names_from(root, tmp_path / "x.txt", "house cat\n dog \n\n") == ("house cat", "dog")
    assert names_from(root, tmp_path / "x.json", '{"dog": "Köter", "cat": "house cat"}') == ("house cat", "Köter")


BAD_NAMES = {
    "too few": ("x.txt", "cat\n", "got 1 lines; takes one for each of the 2 classes, in the order cat, dog"),
    "unknown": ("x.json", '{"cat": "a", "dog": "b", "cow": "c", "x": "d"}', "no class 'cow' in the data (and 1 more"),
    "missing": ("x.json", '{"cat": "a"}', "no name for 'dog'"),
    "empty": ("x.json", '{"cat": "a", "dog": ""}', "the name of 'dog' is empty"),
    "no text": ("x.json", '{"cat": "a", "dog": 2}', "the name of 'dog' is empty or no text"),
    "empty line": ("x.txt", "\ndog", "the name of 'cat' is empty"),
    "twice": ("x.txt", "cat\ncat", "'cat' names two classes"),
    "no object": ("x.json", '["cat", "dog"]', "got list; takes an object"),
    "no JSON": ("x.json", "cat", "line 1: is not JSON"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_bad_class_names_are_refused_in_one_line(root, tmp_path, case):
    name, content, message = BAD_NAMES[case]
    with pytest.raises(ValueError) as caught:
        names_from(root, tmp_path / name, content)
    assert str(tmp_path / name) in str(caught.value) and message in str(caught.value)
    with pytest.raises(FileNotFoundError, match="class_names"):
        read_domains(root, class_names=tmp_path)
