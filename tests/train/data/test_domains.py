"""fastheads.train.data.domains: what is read of folders, in which order, and what is said of the rest."""

import os
import shutil

import pytest
from pictures import BROKEN, CLASSES, DOMAINS, PER_CLASS, write_image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastheads.train.data import domains
from fastheads.train.data.domains import domain_names, read_domains
from fastheads.train.data.sampling import split


def same_as_image_folder(folders):
    """Whether every domain has the files and classes that torchvision reads, in its order."""
    for name, files in zip(folders.domains, folders.files, strict=True):
        theirs = ImageFolder(str(folders.root / name))
        if theirs.classes != list(folders.classes) or theirs.samples != [(str(path), label) for path, label in files]:
            return False
    return True


def test_domains_classes_and_files_are_sorted_by_name_and_counted(root):
    write_image(root / "art" / "cat" / "10.png")
    folders = read_domains(str(root))
    assert folders.domains == DOMAINS and folders.classes == CLASSES
    assert domain_names(root) == list(DOMAINS)
    assert [(f.name, c) for f, c in folders.files[0]] == [
        *(("0.png", 0), ("1.png", 0), ("10.png", 0), ("2.png", 0)),
        *(("0.png", 1), ("1.png", 1), ("2.png", 1)),
    ]
    assert all(f == root / "photo" / CLASSES[c] / f.name for f, c in folders.files[1])
    assert folders.counts() == [[4, 3], [5, 5], [2, 2]]
    assert folders.skipped == "" and same_as_image_folder(folders)


def test_named_domains_are_read_alone_and_in_the_order_of_names(root):
    (root / "art" / "horse").mkdir()  # a class of a domain that isn't read is no fault
    folders = read_domains(root, domains=["sketch", "photo"])
    assert folders.domains == ("photo", "sketch") and folders.classes == CLASSES


# --- as ImageFolder does ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted({*(e[1:] for e in IMG_EXTENSIONS), "JPG", "TIFF", "gif"}))
def test_every_extension_of_image_folder_is_read_in_either_case(root, kind):
    (root / "art" / "cat" / f"x.{kind}").touch()
    folders = read_domains(root)
    assert folders.counts()[0][0] == PER_CLASS["art"] + 1 and not folders.skipped
    assert kind == "gif" or same_as_image_folder(folders)


def test_images_at_any_depth_come_in_image_folders_order(root):
    for name in ("b/0.png", "a/z/1.png", "a/2.png", "a-b/3.png", "a b/4.png", "0/5.png", "10/6.png", "b.png/7.png"):
        write_image(root / "photo" / "dog" / name, size=(1, 1))
    folders = read_domains(root)
    assert folders.counts()[1] == [5, 13]
    assert same_as_image_folder(folders)
    # The nested ones come after the others, whose place they don't change.
    assert [path.parent.name for path, _ in folders.files[1][5:10]] == ["dog"] * 5


def test_links_are_followed_but_not_in_circles(root, tmp_path):
    shutil.move(root / "sketch", tmp_path / "far")
    (root / "sketch").symlink_to(tmp_path / "far")
    write_image(tmp_path / "more" / "x.png")
    (root / "art" / "cat" / "linked").symlink_to(tmp_path / "more")
    (root / "art" / "cat" / "x.png").symlink_to(root / "art" / "cat" / "0.png")
    folders = read_domains(root)
    assert same_as_image_folder(folders) and folders.counts() == [[5, 3], [5, 5], [2, 2]]
    for at, above in enumerate((root, root / "art", root / "art" / "cat")):
        (root / "art" / "cat" / f"loop{at}").symlink_to(above)
    again = read_domains(root)
    assert again == folders
    assert again.skipped == "skipped: 3 link to a folder above it (as art/cat/loop0)"


def test_a_dead_link_is_an_image_that_cannot_be_read(root):
    (root / "art" / "cat" / "x.png").symlink_to(root / "nowhere.png")
    (root / "art" / "cat" / "y.png").symlink_to(root / "art" / "cat" / "y.png")
    folders = read_domains(root)
    assert folders.counts()[0][0] == 5 and same_as_image_folder(folders)


# --- what is skipped ----------------------------------------------------------------------------


def test_what_is_skipped_is_counted_by_reason_with_an_example(root):
    expected = read_domains(root)
    for name in (
        *(".cache/cat/0.png", "art/.thumbnails/0.png", "art/cat/._0.png"),  # hidden
        *("__MACOSX/art/cat/0.png", "lost+found/0.png", "art/@eaDir/0.png", "photo/dog/@eaDir/0.png"),
        *("0.png", "art/1.png"),  # in no class
    ):
        write_image(root / name)
    (root / "README.md").write_text("no domain")
    (root / "art" / "cat" / "notes.txt").write_text("no image")
    (root / "art" / "cat" / "Thumbs.db").write_text("no image")
    os.mkfifo(root / "art" / "cat" / "pipe.png")  # which to open would wait for ever
    folders = read_domains(root)
    assert folders == expected and domain_names(root) == list(DOMAINS)
    assert folders.skipped == (
        "skipped: 3 hidden (as .cache), 1 neither file nor folder (art/cat/pipe.png), "
        "3 not an image by extension (as README.md), 2 outside of a class folder (as 0.png), "
        "4 system folder (as __MACOSX)"
    )


def test_the_whole_of_a_strange_disk_can_still_be_written_down(root):
    """A name that is no UTF-8: a file's does no harm, a class's could be neither printed nor put into a prompt."""
    odd = os.fsdecode(b"caf\xe9")
    write_image(root / "art" / "cat" / f"{odd}.png")
    (root / "art" / "cat" / f"{odd}.txt").touch()
    folders = read_domains(root)
    (
        folders.skipped + "".join(each["file"] for each in folders.without([folders.files[0][3] + ()]).left_out())
    ).encode()
    (root / "art" / "cat" / odd).mkdir()
    (root / "art" / odd).mkdir()
    with pytest.raises(ValueError, match="UTF-8"):
        read_domains(root)


# --- what hangs on the order --------------------------------------------------------------------


def test_a_split_of_flat_folders_is_the_one_it_always_was(root):
    folders = read_domains(root)
    assert split(folders, "photo", seed=0)[1] == [3, 6]
    assert list(folders.identities())[:4] == ["art/cat/0.png", "art/cat/1.png", "art/cat/2.png", "art/dog/0.png"]


def test_identities_tell_nested_images_of_one_name_apart_wherever_the_folder_lies(root, monkeypatch):
    for name in ("a/0.png", "b/0.png"):
        write_image(root / "art" / "cat" / name)
    identities = list(read_domains(root).identities())
    assert "art/cat/a/0.png" in identities and len(set(identities)) == len(identities) == 22
    monkeypatch.chdir(root)
    assert list(read_domains(".").identities()) == identities


def test_samples_are_of_every_class_in_turn(root):
    samples = read_domains(root).samples(3)
    assert {name: [label for _, label in chosen] for name, chosen in samples.items()} == dict.fromkeys(
        DOMAINS, ["cat", "cat", "dog"]
    )
    assert [path.name for path, _ in samples["art"]] == ["0.png", "1.png", "0.png"]
    assert len(read_domains(root).samples(99)["sketch"]) == 4


# --- leaving out --------------------------------------------------------------------------------


def test_without_leaves_images_out_and_remembers_why(root):
    folders = read_domains(root)
    bad = [(folders.files[0][1][0], "the file is empty")]
    left = folders.without(bad)
    assert left.counts() == [[2, 3], [5, 5], [2, 2]] and left.unreadable == tuple(bad)
    assert left.left_out() == [{"file": "art/cat/1.png", "reason": "the file is empty"}]
    assert folders.without([]) == folders and left != folders
    with pytest.raises(ValueError, match=r"no image that can be read of class 'cat' in domain 'art'"):
        folders.without([(path, "") for path, label in folders.files[0] if label == 0])


# --- bad input ----------------------------------------------------------------------------------


def without(root, *parts):
    folder = root.joinpath(*parts)
    for file in folder.iterdir():
        file.unlink()
    return folder


def empty(folder):
    folder.mkdir()
    return folder


def unlisted(root, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(domains.os, "scandir", refuse)
    return root


BAD = {
    "root missing": (FileNotFoundError, lambda r, _: r / "none", {}, ["/set/none: not found, expected a folder"]),
    "root a file": (
        *(NotADirectoryError, lambda r, _: r / "art" / "cat" / "0.png", {}),
        ["/0.png: not a directory, expected a folder", ".csv or .json"],
    ),
    "no domain": (ValueError, lambda r, _: empty(r / "empty"), {}, ["/empty: no domain, expected two or more"]),
    "one domain": (
        *(ValueError, lambda r, _: r, {"domains": ["art"]}),
        ["/set: one domain only ('art'), expected two or more"],
    ),
    "unknown domain": (
        *(ValueError, lambda r, _: r, {"domains": ["art", "photos"]}),
        ["domains: got ['photos'], not in"],
    ),
    "a system folder as domain": (
        *(ValueError, lambda r, _: write_image(r / "__MACOSX/cat/0.png") or r, {"domains": ["art", "__MACOSX"]}),
        ["domains: got ['__MACOSX'], not in"],
    ),
    "no class": (
        *(ValueError, lambda r, _: empty(r / "a").parent, {}),
        ["/a: no class folder in it, expected root/<domain>/<class>/<image>"],
    ),
    "class missing": (
        *(ValueError, lambda r, _: without(r, "photo", "dog").rmdir() or r, {}),
        ["/set: no image of class 'dog' in domain 'photo'; takes images of every class in every domain"],
    ),
    "classes missing": (
        *(ValueError, lambda r, _: [empty(r / "art" / name) for name in ("x", "y")] and r, {}),
        ["no image of class 'x' in domain 'art', of class 'y' in domain 'art', of class 'x' in domain 'photo' and 3"],
    ),
    "class of other files": (
        *(ValueError, lambda r, _: (without(r, "photo", "dog") / "x.avif").touch() or r, {}),
        ["of class 'dog' in domain 'photo'", "(skipped: 1 not an image by extension (photo/dog/x.avif))"],
    ),
    "may not be read": (PermissionError, unlisted, {}, ["/set: cannot be listed (Permission denied)"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_that_says_what_is_expected(root, monkeypatch, case):
    kind, spoil, options, fragments = BAD[case]
    path = spoil(root, monkeypatch)
    with pytest.raises(kind) as caught:
        read_domains(path, **options)
    monkeypatch.undo()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


@pytest.mark.parametrize("kind", BROKEN)
def test_reading_does_not_open_the_images(root, kind):
    BROKEN[kind](root / "art" / "cat" / "1.png")
    assert read_domains(root).counts()[0][0] == PER_CLASS["art"] - (kind == "gone")
