"""Which images a step takes: the split of a domain, and batches balanced over domains.

Batch t is a function of (seed, t) alone, augmentation included, whatever the number of processes: each takes its share.
"""

import hashlib
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch.utils.data import Sampler

from fastheads.train.data.domains import DomainFolders

SPLITS = ("image", "folder")  # what `split` keeps whole

Split = tuple[list[int], list[int]]  # training, validation: file indices of one domain
Key = tuple[int, int, int]  # domain index, file index, augmentation seed


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
    order = shuffled(count, "split", operator.index(seed), domain)
    return sorted(order[held_out:]), sorted(order[:held_out])


def _split_folders(folders: DomainFolders, domain: str, most: int, seed: int) -> Split:
    """Whole folders, `most` images at most, unless the first has more; every class keeps a folder."""
    files = folders.files[folders.index(domain)]
    groups, class_of = dict[tuple[int, str], list[int]](), folders.class_of()
    for i, (path, label) in enumerate(files):
        folder = path.parent
        alone = folder.parent == folders.root / domain and class_of(folder.name) == folders.classes[label]
        groups.setdefault((label, str(path if alone else path.parent)), []).append(i)
    left = Counter(label for label, _ in groups)
    held: list[int] = []
    keys = list(groups)
    for at in shuffled(len(keys), "split", seed, domain):
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


class BalancedBatches(Sampler[list[Key]]):
    """One batch of keys per step: `per_domain` images of each domain, domain by domain.

    `indices` holds, per domain index, the file indices to draw from. Each domain is gone through
    in seeded shuffles of its own, every image once before any comes again; a batch may span two
    shuffles. Steps run from `start` to `steps - 1`.

    Of `processes`, this one (`process`) has every `processes`-th of each domain's images: together they are the batch
    that one process alone would have, in shares as equal as can be.
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
        self.per_domain = at_least("per_domain", per_domain, 1)
        self.start = at_least("start", start, 0)
        self.steps = at_least("steps", steps, max(start, 1))
        self.seed = operator.index(seed)
        self.processes = at_least("processes", processes, 1)
        self.process = at_least("process", process, 0)
        if self.process >= self.processes:
            raise ValueError(f"process: got {process} of {processes} processes, expected one below their number")
        if self.per_domain < self.processes:
            raise ValueError(
                f"per_domain: got {per_domain} for {processes} processes, expected an image for each of them or more"
            )
        self.batch_size = len(range(process, self.per_domain, processes)) * len(self.indices)
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.batch, range(self.start, self.steps))

    def batch(self, step: int) -> list[Key]:
        """This process's keys of one step; those of all are a function of the seed and the step alone."""
        keys = []
        for domain, files in self.indices.items():
            for drawn in range(step * self.per_domain + self.process, (step + 1) * self.per_domain, self.processes):
                epoch, place = divmod(drawn, len(files))
                if self._orders.get(domain, (-1,))[0] != epoch:
                    order = shuffled(len(files), "epoch", self.seed, domain, epoch)
                    self._orders[domain] = epoch, order
                file = files[self._orders[domain][1][place]]
                keys.append((domain, file, mixed("augment", self.seed, domain, drawn)))
        return keys


def mixed(*parts: int | str) -> int:
    """A 64 bit seed from numbers and names; the same in every process, version and machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def shuffled(count: int, *parts: int | str) -> list[int]:
    """0 … count - 1 in an order that is a function of `parts` alone."""
    # RandomState: numpy promises that its streams never change, which its Generator's may.
    state = np.random.RandomState(np.random.MT19937(mixed(*parts)))
    return list(map(int, state.permutation(count)))


def at_least(name: str, value: int, least: int) -> int:
    """`value` as an integer. Raises ValueError below `least`."""
    if operator.index(value) < least:
        raise ValueError(f"{name}: got {value}, expected an integer of at least {least}")
    return operator.index(value)
