"""Images in WebDataset shards, with an index that says what they are and where: `fastheads shards DATA OUT`.

    OUT/00000.tar, 00001.tar …   each image's own bytes, with its class (.cls) and what it is (.json), mixed
    OUT/index.json               of each shard its size; of each image domain, class, name, shard, place and checksum

Whoever reads WebDataset streams the shards; here an image is read at its place, so that sampling stays what it is. They
are read as the folder they were made from: the same names in the same order, as paths whose bytes lie in a shard.
"""

import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

INDEX, KIND = "index.json", "fastheads shards 1"


class Shard:
    """A file that is opened at the first need and stays open, in this process and those forked from it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: int | None = None

    def __reduce__(self) -> Any:
        return Shard, (self.path,)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def read(self, offset: int, size: int, checksum: int) -> bytes:
        """Raises ValueError where other bytes lie there than the index says."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        content = os.pread(self._file, size, offset)  # at its place: processes share how far a file was read
        if len(content) < size or zlib.crc32(content) != checksum:
            what = "ends before this image" if len(content) < size else "holds other bytes than the index says"
            raise ValueError(f"the shard {self.path} {what}")
        return content


class Member(PosixPath):
    """A path of an image whose bytes lie in a shard."""

    __slots__ = ("place", "shard")
    shard: Shard
    place: tuple[int, int, int]  # offset, size, checksum

    @classmethod
    def at(cls, path: str, shard: Shard, place: tuple[int, int, int]) -> "Member":
        member = cls(path)
        member.shard, member.place = shard, place
        return member

    def __reduce__(self) -> Any:
        return Member.at, (str(self), self.shard, self.place)

    def read_bytes(self) -> bytes:
        return self.shard.read(*self.place)

    def open(self, *_: Any, **__: Any) -> BinaryIO:  # type: ignore[override]
        """For reading bytes, as which alone an image is opened."""
        return io.BytesIO(self.read_bytes())


def is_shards(root: Path) -> bool:
    """Whether a folder holds shards. Raises FileNotFoundError where it holds some without an index."""
    if not root.is_dir():
        return False
    if not (root / INDEX).is_file() and any(root.glob("*.tar")):
        raise FileNotFoundError(f"{root}: holds shards, but no {INDEX}; fastheads shards DATA OUT writes both")
    return (root / INDEX).is_file()


def read_shards(root: Path) -> Mapping[str, Mapping[str, Sequence[Path]]]:
    """The images of `root`'s index, by domain and class, in its order.

    Of every shard the size is held against the index, and the bytes of one image. Raises FileNotFoundError for a shard
    that is not there, ValueError for one of another size or other bytes, and for an index that is none.
    """
    file = root / INDEX
    try:
        content = json.loads(file.read_text())
        if content["kind"] != KIND:
            raise ValueError(f"its kind is {content['kind']!r}")
        shards = [(Shard(str(root / shard["name"])), int(shard["bytes"])) for shard in content["shards"]]
        found = {
            domain: {
                label: [
                    Member.at(f"{root}/{domain}/{label}/{name}", shards[shard][0], (offset, size, checksum))
                    for name, shard, offset, size, checksum in images
                ]
                for label, images in by_class.items()
            }
            for domain, by_class in content["images"].items()
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{file}: is no index of {KIND!r} ({error!r}); fastheads shards DATA OUT writes one"
        ) from error
    for shard, size in shards:
        if not os.path.isfile(shard.path):
            raise FileNotFoundError(f"{shard.path}: is not there, and {file} names it")
        if (there := os.path.getsize(shard.path)) != size:
            raise ValueError(
                f"{shard.path}: has {there:,} bytes and {size:,} by {file}; it was cut short, or the index is of others"
            )
    members = (member for by_class in found.values() for each in by_class.values() for member in each)
    for member in {member.shard: member for member in members}.values():
        try:
            member.read_bytes()
        except ValueError as error:
            raise ValueError(f"{file}: is an index of other shards: {error}, at {member}") from error
    return found
