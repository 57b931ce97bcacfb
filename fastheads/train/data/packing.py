"""Writing images into WebDataset shards with an index (see `fastheads.train.data.shards`)."""

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastheads.files import whole, write_whole
from fastheads.train.data.domains import DomainFolders
from fastheads.train.data.sampling import shuffled
from fastheads.train.data.shards import INDEX, KIND

SHARD_BYTES = 256 * 2**20  # of a shard, at most, unless one image is larger


def write_shards(
    folders: DomainFolders,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes the images into shards under `out`, and the index last; returns how many shards. Raises ValueError where
    `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is not an empty folder; takes a new one")
    images = [(d, path, label) for d, files in enumerate(folders.files) for path, label in files]
    names = list(folders.identities())
    places: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * len(images)
    sizes: list[int] = []
    waiting = list(reversed(shuffled(len(images), "shards")))
    while waiting:
        with whole(out / f"{len(sizes):05}.tar") as temporary, tarfile.open(temporary, "w") as tar:
            first = True
            while waiting:
                domain, path, label = images[waiting[-1]]
                content = path.read_bytes()
                if not first and tar.offset + len(content) > shard_bytes:
                    break
                first, at = False, waiting.pop()
                about = {"domain": folders.domains[domain], "class": folders.classes[label], "path": names[at]}
                key = f"{at:09}"
                _add(tar, key + path.suffix.lower(), content)
                places[at] = len(sizes), tar.offset - _padded(len(content)), len(content), zlib.crc32(content)
                _add(tar, f"{key}.cls", str(label).encode())
                _add(tar, f"{key}.json", json.dumps(about).encode())
                advance(1)
        sizes.append((out / f"{len(sizes):05}.tar").stat().st_size)
    found: dict[str, dict[str, list[Any]]] = {}
    for (domain, _, label), name, place in zip(images, names, places, strict=True):
        domain_name, class_name = folders.domains[domain], folders.classes[label]
        of_class = found.setdefault(domain_name, {}).setdefault(class_name, [])
        of_class.append([name.removeprefix(f"{domain_name}/{class_name}/").lstrip("/"), *place])
    shards = [{"name": f"{i:05}.tar", "bytes": size} for i, size in enumerate(sizes)]
    write_whole(out / INDEX, json.dumps({"kind": KIND, "shards": shards, "images": found}).encode())
    return len(sizes)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
