"""bench-data: images per second that loaders bring, beside torchvision's ImageFolder and a plain DataLoader."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastheads.train.data.batches import clip_transforms, training_loader
from fastheads.train.data.domains import DomainFolders, read_domains
from fastheads.train.data.shards import is_shards
from fastheads.train.progress import phase

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
PLAIN, KEPT = "ImageFolder + DataLoader", "memory"


def measure(
    data: Sequence[Path], *, size: int, batch: int, workers: int, batches: int = 20, rounds: int = 5
) -> list[dict[str, Any]]:
    """Images per second of training batches of each of `data`, of what the first keeps decoded, and of the plain way
    for those that are folders; `batches` of each in turn, `rounds` times.

    Rows: what, data, images_per_second (median), low, high.
    """
    each = {path: read_domains(path, least=1) for path in data}
    kept = read_domains(data[0], least=1)  # what it decodes no other uses
    steps = rounds * (batches + _warm(workers))
    loaders: dict[tuple[str, Path], Callable[[], Any]] = {}
    for path, folders in each.items():
        if path.is_dir() and not is_shards(path):
            loaders[PLAIN, path] = _plain(folders, size, batch, workers, steps)
        kind = "list" if path.is_file() else "shards" if is_shards(path) else "folder"
        loaders[kind, path] = _ours(folders, size, batch, workers, steps, keep=False)
    loaders[KEPT, data[0]] = _ours(kept, size, batch, workers, steps, keep=True)
    rates: dict[tuple[str, Path], list[float]] = {key: [] for key in loaders}
    with phase("measuring the loaders", rounds * len(loaders), "turns") as advance:
        for _ in range(rounds):
            for key, loader in loaders.items():
                rates[key].append(_rate(iter(loader()), batches, _warm(workers)))
                advance(1)
    return [
        {
            "what": what,
            "data": path.name,
            "images_per_second": round(statistics.median(found), 1),
            "low": round(min(found), 1),
            "high": round(max(found), 1),
        }
        for (what, path), found in rates.items()
    ]


def _warm(workers: int) -> int:
    """Batches before the first that is timed: those that were fetched ahead, and one of each worker."""
    return 3 * workers + 1


def _rate(batches: Iterator[Any], count: int, warm: int) -> float:
    for _ in islice(batches, warm):
        pass
    began = time.perf_counter()
    images = sum(len(batch[1]) for batch in islice(batches, count))
    return images / (time.perf_counter() - began)


def _ours(folders: DomainFolders, size: int, batch: int, workers: int, steps: int, keep: bool) -> Callable[[], Any]:
    views, _ = clip_transforms(size, MEAN, STD)
    indices = {name: range(len(files)) for name, files in zip(folders.domains, folders.files, strict=True)}
    per_domain = max(1, batch // len(folders.domains))
    return lambda: training_loader(
        folders, folders.domains, indices, views, per_domain, steps, workers=workers, keep=keep
    )


def _plain(folders: DomainFolders, size: int, batch: int, workers: int, steps: int) -> Callable[[], Any]:
    """What a script has: torchvision's transforms on Pillow's images, each image normalised in the worker."""
    mode = transforms.InterpolationMode.BICUBIC
    views = [transforms.RandomResizedCrop(size, (0.7, 1.0), interpolation=mode), transforms.RandomHorizontalFlip()]
    views += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    transform = transforms.Compose(views)
    images: Dataset[Any] = ConcatDataset([ImageFolder(folders.root / name, transform) for name in folders.domains])
    sampler = RandomSampler(images, replacement=True, num_samples=batch * steps)  # type: ignore[arg-type]
    return lambda: DataLoader(images, batch, sampler=sampler, num_workers=workers)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, each beside the plain way where that was measured."""
    plain = next((row["images_per_second"] for row in rows if row["what"] == PLAIN), None)
    lines = [f"{'':<26}{'images/s':>10}{'low … high':>18}{'/ plain':>9}   data"]
    for row in rows:
        ratio = "" if plain is None else f"{row['images_per_second'] / plain:.2f}"
        spread = f"{row['low']:,.0f} … {row['high']:,.0f}"
        lines.append(f"{row['what']:<26}{row['images_per_second']:>10,.0f}{spread:>18}{ratio:>9}   {row['data']}")
    return "\n".join(lines)
