"""Images of several domains: splitting, balanced batches, transforms.

    folders = read_domains("data/PACS")                     # fastheads.train.data.domains
    indices = {name: split(folders, name)[0] for name in sources}
    loader = training_loader(folders, sources, indices, transform, per_domain=12, steps=5000)

Batch t, augmentation included, is a function of (seed, t) alone, whatever the workers: `start=t`
sees what an uninterrupted run sees from step t on. No loader draws from torch's global generator.
"""

import hashlib
import operator
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

try:
    from PIL import Image
    from torchvision import transforms
except ImportError as error:
    raise ImportError(
        f"fastheads.train.data.batches needs torchvision and Pillow ({error}): pip install fastheads[train]"
    ) from error

from fastheads.train.data.domains import DomainFolders
from fastheads.train.data.images import decode

SPLITS = ("image", "folder")  # what `split` keeps whole

Split = tuple[list[int], list[int]]  # training, validation: file indices of one domain
Transform = Callable[[Image.Image], torch.Tensor]
Item = tuple[torch.Tensor, int, int]  # image [3, H, W], class index, domain index
Pair = tuple[int, int]  # domain index, file index
Key = tuple[int, int, int]  # domain index, file index, augmentation seed
Cache = bool | dict[Pair, np.ndarray]  # whether to keep decoded images; or where


def split(folders: DomainFolders, domain: str, *, holdout: float = 0.2, seed: int = 0, by: str = "image") -> Split:
    """Training and validation file indices of one domain, disjoint, each in ascending order.

    DomainBed's rule: a seeded shuffle whose first `int(n * holdout)` (at least one) are held out.
    The seed is mixed with the domain's name: a split depends neither on the other domains nor on
    which one is the target. (The shuffle is not DomainBed's, bit for bit.)

    by: "image", or "folder": images that lie in one folder below their class stay on one side (pictures of one object,
    say, that would tell the answer), whole folders are held out up to `holdout` of the images, and every class keeps
    one. Raises ValueError where no class has two.
    """
    files = folders.files[folders.index(domain)]
    count = len(files)
    if not 0 < holdout < 1:
        raise ValueError(f"holdout: got {holdout}, expected a fraction between 0 and 1, exclusive")
    if count < 2:
        raise ValueError(f"{folders.root}: {count} image(s) in domain {domain!r}, expected at least 2 to split")
    if by not in SPLITS:
        raise ValueError(f"by: got {by!r}; takes {' or '.join(map(repr, SPLITS))}")
    held_out = min(max(int(count * holdout), 1), count - 1)
    if by == "folder":
        return _split_folders(folders, domain, held_out, operator.index(seed))
    order = _shuffled(count, "split", operator.index(seed), domain)
    return sorted(order[held_out:]), sorted(order[:held_out])


def _split_folders(folders: DomainFolders, domain: str, most: int, seed: int) -> Split:
    """Whole folders, `most` images at most, unless the first has more; every class keeps a folder."""
    files = folders.files[folders.index(domain)]
    groups: dict[tuple[int, str], list[int]] = {}
    for i, (path, label) in enumerate(files):
        alone = path.parent == folders.root / domain / folders.classes[label]
        groups.setdefault((label, str(path if alone else path.parent)), []).append(i)
    left = Counter(label for label, _ in groups)
    held: list[int] = []
    keys = list(groups)
    for at in _shuffled(len(keys), "split", seed, domain):
        label, members = keys[at][0], groups[keys[at]]
        if left[label] > 1 and (not held or len(held) + len(members) <= most):
            left[label] -= 1
            held += members
    if not held:
        raise ValueError(
            f"{folders.root}: no class of domain {domain!r} has images in two folders below it, so none can be held "
            'out; split by "image"'
        )
    return sorted(set(range(len(files))) - set(held)), sorted(held)


class Images(Dataset[Item]):
    """`items`, pairs (domain index, file index), as (image tensor, class index, domain index).

    A position yields its item; a key (domain index, file index, augmentation seed) yields it with
    `transform` under torch's CPU generator seeded so, whose state is put back afterwards. Draws
    from `random` or numpy escape the seed. A key outside `items` is refused: no held-out image
    slips into training. `cache` keeps decoded images as uint8 arrays, one cache per worker; a dict: in there, so that
    others can share it.
    """

    def __init__(
        self,
        folders: DomainFolders,
        items: Sequence[Pair],
        transform: Transform,
        cache: Cache = False,
    ) -> None:
        sizes = [len(files) for files in folders.files]
        for domain, file in items:
            if not (0 <= domain < len(sizes) and 0 <= file < sizes[domain]):
                raise ValueError(f"items: got {(domain, file)}, expected indices within {sizes}")
        self.folders, self.items, self.transform = folders, tuple(items), transform
        self._members = frozenset(self.items)
        self._cache: dict[Pair, np.ndarray] | None = cache if isinstance(cache, dict) else {} if cache else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | Key) -> Item:
        domain, file, *seed = key if isinstance(key, tuple) else self.items[key]
        if seed and (domain, file) not in self._members:
            raise ValueError(f"key: got {key}, whose (domain, file) is not among the items")
        image, label = self._image(domain, file), self.folders.files[domain][file][1]
        if not seed:
            return self.transform(image), label, domain
        # 11 to 27 µs an item. torch.manual_seed takes 370 and reseeds the GPUs' generators too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed[0])
            return self.transform(image), label, domain

    def _image(self, domain: int, file: int) -> Image.Image:
        path = self.folders.files[domain][file][0]
        if self._cache is None:
            return decode(path)
        if (domain, file) not in self._cache:
            self._cache[domain, file] = np.asarray(decode(path))
        return Image.fromarray(self._cache[domain, file])


class BalancedBatches(Sampler[list[Key]]):
    """One batch of keys per step: `per_domain` images of each domain, domain by domain.

    `indices` holds, per domain index, the file indices to draw from. Each domain is gone through
    in seeded shuffles of its own, every image once before any comes again; a batch may span two
    shuffles. Steps run from `start` to `steps - 1`. One of several `processes` gets every so manieth image of each
    domain, so that together they have the batch of one.
    """

    drop_last = False  # with `batch_size`, what accelerate asks of a batch sampler

    def __init__(
        self,
        indices: Mapping[int, Sequence[int]],
        per_domain: int,
        steps: int,
        *,
        seed: int = 0,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.indices = {int(d): sorted({int(i) for i in indices[d]}) for d in sorted(indices)}
        sizes = [len(files) for files in self.indices.values()]
        if not sizes or not min(sizes):
            raise ValueError(f"indices: got {sizes} images by domain, expected one or more of each")
        self.per_domain = _at_least("per_domain", per_domain, 1)
        self.start = _at_least("start", start, 0)
        self.steps = _at_least("steps", steps, max(start, 1))
        self.seed = operator.index(seed)
        self.process, self.processes = process, processes
        self.batch_size = len(range(process, self.per_domain, processes)) * len(self.indices)
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.batch, range(self.start, self.steps))

    def batch(self, step: int) -> list[Key]:
        """The keys of one step: over all processes a function of the seed and the step alone."""
        keys = []
        for domain, files in self.indices.items():
            for drawn in range(step * self.per_domain + self.process, (step + 1) * self.per_domain, self.processes):
                epoch, place = divmod(drawn, len(files))
                if self._orders.get(domain, (-1,))[0] != epoch:
                    order = _shuffled(len(files), "epoch", self.seed, domain, epoch)
                    self._orders[domain] = epoch, order
                file = files[self._orders[domain][1][place]]
                keys.append((domain, file, _mixed("augment", self.seed, domain, drawn)))
        return keys


def training_loader(
    folders: DomainFolders,
    sources: Sequence[str],
    train_indices: Mapping[str, Sequence[int]],
    transform: Transform,
    per_domain: int,
    steps: int,
    seed: int = 0,
    start: int = 0,
    workers: int = 0,
    cache: Cache = False,
    process: int = 0,
    processes: int = 1,
) -> DataLoader[Item]:
    """Balanced batches of the sources: (images `[S * per_domain, 3, H, W]`, classes, domains), of several `processes`
    this one's part.

    `train_indices` holds, per source, the file indices to draw from (the first of `split`'s two);
    `steps` is the length of the whole run, of which steps `start` to `steps - 1` come.
    """
    indices = {folders.index(name): train_indices.get(name, ()) for name in sources}
    for name in sources:
        if not len(train_indices.get(name, ())):
            raise ValueError(f"train_indices[{name!r}]: got no image, expected at least one")
    share: Any = {"process": process, "processes": processes}
    batches = BalancedBatches(indices, per_domain, steps, seed=seed, start=start, **share)
    items = [(domain, file) for domain, files in batches.indices.items() for file in files]
    return _loader(Images(folders, items, transform, cache), workers, batch_sampler=batches)


def evaluation_loader(
    folders: DomainFolders,
    domain: str,
    indices: Sequence[int] | None,
    transform: Transform,
    batch_size: int,
    workers: int = 0,
    cache: Cache = False,
) -> DataLoader[Item]:
    """The images of one domain in order, those at `indices` or (None) all; no batch dropped."""
    index = folders.index(domain)
    files = range(len(folders.files[index])) if indices is None else indices
    if not len(files):
        raise ValueError(f"indices: got no image of {domain!r}, expected at least one, or None")
    images = Images(folders, [(index, file) for file in files], transform, cache)
    # Workers stay for the next iteration when they hold a cache, which dies with them.
    return _loader(images, workers, batch_size=batch_size, persistent_workers=cache is not False and workers > 0)


def clip_transforms(
    image_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip: bool = True,
    scale: tuple[float, float] = (0.7, 1.0),
    interpolation: str = "bicubic",
    evaluation: Transform | None = None,
) -> tuple[Transform, Transform]:
    """(training, evaluation) transforms: RGB image → float32 `[3, image_size, image_size]`.

    Training crops a random part of `scale` of the area and, with `flip` (not for digits or
    letters), mirrors every second image; evaluation is CLIP's (shorter side to size, centre crop) unless given.
    """
    size = image_size if isinstance(image_size, int) else image_size[0]
    if size < 1 or image_size not in (size, (size, size), [size, size]):
        raise ValueError(f"image_size: got {image_size}, expected a positive int or a square pair")
    if not len(mean) == len(std) == 3 or min(std) <= 0:
        raise ValueError(f"mean, std: got {mean}, {std}, expected three numbers each, std above 0")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: got {scale}, expected (low, high) with 0 < low <= high <= 1")
    mode = transforms.InterpolationMode(interpolation)
    crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=mode)
    train = [crop, transforms.RandomHorizontalFlip()] if flip else [crop]
    whole = [transforms.Resize(size, interpolation=mode), transforms.CenterCrop(size)]
    end = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(train + end), evaluation or transforms.Compose(whole + end)


def _loader(images: Images, workers: int, **options: Any) -> DataLoader[Item]:
    # A generator of its own: a loader otherwise draws from the global one at each iteration.
    options |= {"generator": torch.Generator(), "pin_memory": torch.cuda.is_available()}
    options |= {"worker_init_fn": _ends_with_its_run}
    return DataLoader(images, num_workers=_at_least("workers", workers, 0), **options)


def _ends_with_its_run(worker: int) -> None:
    """SIGTERM, which launchers send to whole groups of processes, is the run's to act on: it may still need images."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _mixed(*parts: int | str) -> int:
    """A 64 bit seed from numbers and names; the same in every process, version and machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _shuffled(count: int, *parts: int | str) -> list[int]:
    # RandomState: numpy promises that its streams never change, which its Generator's may.
    state = np.random.RandomState(np.random.MT19937(_mixed(*parts)))
    return list(map(int, state.permutation(count)))


def _at_least(name: str, value: int, least: int) -> int:
    if operator.index(value) < least:
        raise ValueError(f"{name}: got {value}, expected an integer of at least {least}")
    return operator.index(value)
