"""Batches of images of several domains: loading, transforms.

    folders = read_domains("data/PACS")                     # fastheads.train.data.domains
    indices = {name: split(folders, name)[0] for name in sources}
    loader = training_loader(folders, sources, indices, transform, per_domain=12, steps=5000)

Batch t, augmentation included, is a function of (seed, t) alone, whatever the workers: `start=t`
sees what an uninterrupted run sees from step t on. No loader draws from torch's global generator.
"""

import functools
import multiprocessing
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

try:
    from PIL import Image
    from torchvision import transforms
    from torchvision.transforms import functional
    from torchvision.transforms.v2.functional import resized_crop_image
except ImportError as error:
    raise ImportError(
        f"fastheads.train.data.batches needs torchvision and Pillow ({error}): pip install fastheads[train]"
    ) from error

from fastheads.train.data.domains import DomainFolders
from fastheads.train.data.images import decode, decode_all
from fastheads.train.data.sampling import BalancedBatches, Key, at_least
from fastheads.train.progress import phase

RECENT = 32  # batches that rates are the median of

Transform = Callable[[Image.Image], Tensor]
Item = tuple[Tensor, int, int]  # image [3, H, W], class index, domain index
Batch = tuple[Tensor, Tensor, Tensor]  # images [B, 3, H, W], class indices [B], domain indices [B]
Pair = tuple[int, int]  # domain index, file index

CPU = torch.device("cpu")


class Images(Dataset[Item]):
    """`items`, pairs (domain index, file index), as (image tensor, class index, domain index).

    A position yields its item; a key (domain index, file index, augmentation seed) yields it with
    `transform` under torch's CPU generator seeded so, whose state is put back afterwards. Draws
    from `random` or numpy escape the seed. A key outside `items` is refused: no held-out image
    slips into training. What `folders.decoded` holds is not read again.
    """

    def __init__(self, folders: DomainFolders, items: Sequence[Pair], transform: Transform) -> None:
        sizes = [len(files) for files in folders.files]
        for domain, file in items:
            if not (0 <= domain < len(sizes) and 0 <= file < sizes[domain]):
                raise ValueError(f"items: got {(domain, file)}, expected indices within {sizes}")
        self.folders, self.items, self.transform = folders, tuple(items), transform
        self._members = frozenset(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | Key) -> Item:
        domain, file, *seed = key if isinstance(key, tuple) else self.items[key]
        if seed and (domain, file) not in self._members:
            raise ValueError(f"key: got {key}, whose (domain, file) is not among the items")
        path, label = self.folders.files[domain][file]
        kept = self.folders.decoded.get(path)
        image = decode(path) if kept is None else Image.fromarray(kept)
        if not seed:
            return self.transform(image), label, domain
        # 11 to 27 µs an item. torch.manual_seed takes 370 and reseeds the GPUs' generators too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed[0])
            return self.transform(image), label, domain

    def keep_decoded(self) -> None:
        """Decodes the items into `folders.decoded`, uint8 `[H, W, 3]`; workers that are forked share them."""
        kept = self.folders.decoded
        paths = [path for d, file in self.items if (path := self.folders.files[d][file][0]) not in kept]
        if paths:
            with phase("decoding images", len(paths), "images") as advance:
                decode_all(paths, kept, advance=advance)

    def __getitems__(self, keys: Sequence[int | Key]) -> tuple[list[Tensor], float]:
        """A batch, and the seconds it took."""
        began = time.perf_counter()
        batch = default_collate([self[key] for key in keys])
        return batch, time.perf_counter() - began


class Loader(DataLoader[Item]):
    """Batches on `device`: (images, class indices, domain indices).

    A transform that has a `finish` (see `Views`) finishes whole batches, there. `rates` says who waits for whom. With
    `keep` the decoded images stay in memory. dealt: how many batches there are, where they are dealt out to processes
    in turn; 0: this one has all.
    """

    def __init__(
        self, images: Images, workers: int, device: torch.device, keep: bool, dealt: int = 0, **options: Any
    ) -> None:
        if keep:
            images.keep_decoded()
        # A generator of its own: a loader otherwise draws from the global one at each iteration.
        options |= {"generator": torch.Generator(), "pin_memory": torch.cuda.is_available(), "collate_fn": _as_it_is}
        options |= {"worker_init_fn": _ends_with_its_run}
        if workers and images.folders.decoded and "fork" in multiprocessing.get_all_start_methods():
            options["multiprocessing_context"] = "fork"  # which shares the decoded images, where others would copy them
        super().__init__(images, num_workers=at_least("workers", workers, 0), **options)
        self.device, self.dealt = device, dealt
        self.finish: Callable[[Tensor], Tensor] = getattr(images.transform, "finish", _as_it_is)
        self._loading, self._using = (deque[float](maxlen=RECENT) for _ in range(2))  # seconds per image

    def __iter__(self) -> Any:
        for (images, labels, domains), seconds in super().__iter__():
            self._loading.append(seconds / len(labels) / max(1, self.num_workers))
            images, labels, domains = (t.to(self.device, non_blocking=True) for t in (images, labels, domains))
            began = time.perf_counter()
            yield self.finish(images), labels, domains
            self._using.append((time.perf_counter() - began) / len(labels))

    def rates(self) -> dict[str, float]:
        """Images per second that this process's workers can bring, and that what it does with them can take."""
        each = {"loader": self._loading, "model": self._using}
        return {name: 1 / max(statistics.median(seconds), 1e-9) for name, seconds in each.items() if seconds}


def _as_it_is(batch: Any) -> Any:
    return batch


def training_loader(
    folders: DomainFolders,
    sources: Sequence[str],
    train_indices: Mapping[str, Sequence[int]],
    transform: Transform,
    per_domain: int,
    steps: int,
    seed: int = 0,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    device: torch.device = CPU,
    keep: bool = False,
) -> Loader:
    """Balanced batches of the sources: (images `[S * per_domain, 3, H, W]`, classes, domains).

    `train_indices` holds, per source, the file indices to draw from (the first of `split`'s two);
    `steps` is the length of the whole run, of which steps `start` to `steps - 1` come. Of `processes`, this one gets
    its share of each batch (see `BalancedBatches`). keep: decoded images in memory.
    """
    indices = {folders.index(name): train_indices.get(name, ()) for name in sources}
    for name in sources:
        if not len(train_indices.get(name, ())):
            raise ValueError(f"train_indices[{name!r}]: got no image, expected at least one")
    batches = BalancedBatches(indices, per_domain, steps, seed=seed, start=start, process=process, processes=processes)
    items = [(domain, file) for domain, files in batches.indices.items() for file in files]
    return Loader(Images(folders, items, transform), workers, device, keep, batch_sampler=batches)


def evaluation_loader(
    folders: DomainFolders,
    domain: str,
    indices: Sequence[int] | None,
    transform: Transform,
    batch_size: int,
    workers: int = 0,
    device: torch.device = CPU,
    keep: bool = False,
    process: int = 0,
    processes: int = 1,
) -> Loader:
    """The images of one domain in order, those at `indices` or (None) all; no batch dropped.

    Of `processes`, this one gets every so-manieth batch, and as many as each of the others: where they don't come out
    even, the last one again.
    """
    index = folders.index(domain)
    files = range(len(folders.files[index])) if indices is None else indices
    if not len(files):
        raise ValueError(f"indices: got no image of {domain!r}, expected at least one, or None")
    starts = range(0, len(files), at_least("batch_size", batch_size, 1))
    own = [starts[min(at, len(starts) - 1)] for at in range(process, len(starts) + process, processes)]
    images = Images(folders, [(index, file) for start in own for file in files[start : start + batch_size]], transform)
    return Loader(images, workers, device, keep, batch_size=batch_size, dealt=len(starts) * (processes > 1))


class Views:
    """Random views of an RGB image for training: uint8 `[3, size, size]`; `finish` makes float32 batches of them.

    A part of `scale` of the area, of a ratio of sides from 3:4 to 4:3, resized; with `flip` every second one mirrored.
    Resized by torchvision's uint8 kernels, in half the time of Pillow's and within 2 of its 255 levels, or with
    `pillow` by that.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        flip: bool,
        scale: tuple[float, float],
        interpolation: str,
        pillow: bool,
    ) -> None:
        self.size, self.mean, self.std, self.flip, self.scale, self.pillow = size, mean, std, flip, scale, pillow
        self.mode = transforms.InterpolationMode(interpolation)

    def __call__(self, image: Image.Image) -> Tensor:
        crop = transforms.RandomResizedCrop.get_params(image, list(self.scale), [3 / 4, 4 / 3])
        size = [self.size, self.size]
        if self.pillow:
            view = functional.pil_to_tensor(functional.resized_crop(image, *crop, size, self.mode))
        else:
            view = resized_crop_image(functional.pil_to_tensor(image), *crop, size, self.mode)
        return view.flip(-1) if self.flip and torch.rand(1) < 0.5 else view

    def finish(self, views: Tensor) -> Tensor:
        """`[B, 3, size, size]`, normalised, where they are."""
        mean, std = _constants(tuple(self.mean), tuple(self.std), views.device)
        return views.float().div_(255).sub_(mean).div_(std)


@functools.lru_cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor((mean, std), device=device)[..., None, None]


def clip_transforms(
    image_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip: bool = True,
    scale: tuple[float, float] = (0.7, 1.0),
    interpolation: str = "bicubic",
    evaluation: Transform | None = None,
    pillow: bool = False,
) -> tuple[Views, Transform]:
    """Training `Views`, which crop a random part of `scale` of the area and, with `flip` (not for digits or letters),
    mirror every second image; and the evaluation transform, RGB image → float32 `[3, image_size, image_size]`: CLIP's
    (shorter side to size, centre crop) unless given.
    """
    size = image_size if isinstance(image_size, int) else image_size[0]
    if size < 1 or image_size not in (size, (size, size), [size, size]):
        raise ValueError(f"image_size: got {image_size}, expected a positive int or a square pair")
    if not len(mean) == len(std) == 3 or min(std) <= 0:
        raise ValueError(f"mean, std: got {mean}, {std}, expected three numbers each, std above 0")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: got {scale}, expected (low, high) with 0 < low <= high <= 1")
    mode = transforms.InterpolationMode(interpolation)
    views = Views(size, mean, std, flip=flip, scale=scale, interpolation=interpolation, pillow=pillow)
    whole = [transforms.Resize(size, interpolation=mode), transforms.CenterCrop(size)]
    end = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return views, evaluation or transforms.Compose(whole + end)


def _ends_with_its_run(worker: int) -> None:
    """SIGTERM, which launchers send to whole groups of processes, is the run's to act on: it may still need images."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
