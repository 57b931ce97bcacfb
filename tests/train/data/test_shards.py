"""fastheads.train.data.shards: what shards hold is what the folder held; every fault of theirs is told in one line."""

import io
import json
import pickle
import shutil

import pytest
import torch
from loading import loader, noisy
from pictures import write_image, write_set

from fastheads.train.data.domains import domain_names, read_domains
from fastheads.train.data.images import decode, look, unreadable
from fastheads.train.data.packing import write_shards
from fastheads.train.data.sampling import split

SHARD_BYTES = 16_000  # several images of some 1,000 bytes and their 5 headers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder, its shards): never written to."""
    folder = write_set(tmp_path_factory.mktemp("shards") / "set")
    write_image(folder / "photo" / "dog" / "deep" / "x.y.PNG")
    assert write_shards(read_domains(folder), folder.with_name("packed"), shard_bytes=SHARD_BYTES) == 6
    return folder, folder.with_name("packed")


@pytest.fixture
def packed(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "packed")


def test_shards_are_the_folder_they_were_made_from(made):
    folder, packed = map(read_domains, made)
    assert domain_names(made[1]) == domain_names(made[0])
    assert (packed.domains, packed.classes) == (folder.domains, folder.classes)
    assert list(packed.identities()) == list(folder.identities())
    assert [path.read_bytes() for path in packed.paths()] == [path.read_bytes() for path in folder.paths()]
    assert split(packed, "photo") == split(folder, "photo")
    assert not unreadable(packed.paths(), look) and not unreadable(packed.paths(), decode)
    again = pickle.loads(pickle.dumps(packed))  # as a worker that is spawned gets them
    assert again == packed and again.paths()[0].read_bytes() == packed.paths()[0].read_bytes()


@pytest.mark.parametrize("holder", ["shards", "list", "list of shards", "memory"])
@pytest.mark.parametrize("start", [0, 4])
def test_batches_do_not_depend_on_what_holds_the_images(made, tmp_path, holder, start):
    folder, packed = made
    expected = list(loader(read_domains(folder)))[start:]
    if holder.startswith("list"):
        rows = [
            {"path": str(path), "domain": path.parts[-3], "class": path.parts[-2]} for path in folder.rglob("?.png")
        ]
        deep = folder / "photo" / "dog" / "deep" / "x.y.PNG"
        rows.append({"path": str(deep), "domain": "photo", "class": "dog"})
        (tmp_path / "list.json").write_text(json.dumps(rows))
    if holder == "list of shards":
        write_shards(read_domains(tmp_path / "list.json"), tmp_path / "packed")
    held = read_domains({"list": tmp_path / "list.json", "list of shards": tmp_path / "packed"}.get(holder, packed))
    got = list(loader(held, start=start, workers=2 if holder == "shards" else 0, keep=holder == "memory"))
    assert len(got) == len(expected)
    for batch, other in zip(got, expected, strict=True):
        assert all(map(torch.equal, batch, other))


def test_others_read_them_as_a_web_dataset(made):
    wds = pytest.importorskip("webdataset")
    folder, packed = read_domains(made[0]), made[1]
    urls = sorted(map(str, packed.glob("*.tar")))
    seen = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        about = json.loads(sample["json"])
        seen[about["path"]] = sample.get("png"), folder.classes[int(sample["cls"])] == about["class"]
    assert seen == {
        name: (path.read_bytes(), True) for name, path in zip(folder.identities(), folder.paths(), strict=True)
    }


def swap(packed):
    one, two = packed / "00000.tar", packed / "00001.tar"
    size = max(one.stat().st_size, two.stat().st_size)
    index = json.loads((packed / "index.json").read_text())
    for shard, file in zip(index["shards"], (two, one), strict=False):
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
        shard["bytes"] = size
    one.rename(packed / "x"), two.rename(one), (packed / "x").rename(two)
    (packed / "index.json").write_text(json.dumps(index))


BAD = {
    "a shard is missing": (
        lambda p: (p / "00001.tar").unlink(),
        FileNotFoundError,
        "/packed/00001.tar: is not there, and ",
    ),
    "a shard is cut short": (
        lambda p: (p / "00001.tar").write_bytes((p / "00001.tar").read_bytes()[:-512]),
        ValueError,
        "it was cut short, or the index is of others",
    ),
    "other shards": (swap, ValueError, "/packed/index.json: is an index of other shards: the shard "),
    "no index": (lambda p: (p / "index.json").unlink(), FileNotFoundError, "/packed: holds shards, but no index.json"),
    "no JSON": (lambda p: (p / "index.json").write_text("{"), ValueError, "is no index of 'fastheads shards 1'"),
    "another kind": (
        lambda p: (p / "index.json").write_text('{"kind": "wids"}'),
        ValueError,
        "is no index of 'fastheads shards 1' (ValueError(\"its kind is 'wids'\"))",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shards_are_told_in_one_line_before_anything_is_read(packed, case):
    spoil, kind, message = BAD[case]
    spoil(packed)
    with pytest.raises(kind) as caught:
        read_domains(packed)
    assert type(caught.value) is kind
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_that_changed_since_are_told_in_one_line_when_they_come(packed, workers):
    held = read_domains(packed)
    for shard in packed.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match=r"not readable as an image \(the shard .* holds other bytes") as caught:
        list(loader(held, noisy, workers=workers))
    assert "\n" not in str(caught.value)


def test_shards_are_written_into_a_new_folder_only(made, tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="out: .* is not an empty folder; takes a new one"):
        write_shards(read_domains(made[0]), tmp_path)


def test_an_image_in_a_shard_opens_as_a_file(made):
    member = read_domains(made[1]).paths()[0]
    assert isinstance(member.open("rb"), io.BytesIO) and member.open().read() == member.read_bytes()
