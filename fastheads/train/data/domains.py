"""What images there are: domains, classes and files, read from folders laid out as DomainBed's, a list or shards.

    folders = read_domains("data/PACS")      # root/<domain>/<class>/<image>, images at any depth below the class
    folders = read_domains("data/pacs.csv")  # path,domain,class (or the same as JSON)

What is passed over on the way is counted: `print(folders.skipped)`.
"""

import dataclasses
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastheads.train.data.lists import SUFFIXES, read_class_names, read_list
from fastheads.train.data.presets import preset_of, presets
from fastheads.train.data.shards import is_shards, read_shards

# torchvision's ImageFolder reads these, but for .gif.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
# What archivers, file servers and file systems put beside the data.
SYSTEM = frozenset(
    ("__MACOSX", "@eaDir", "@Recycle", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information")
)
LAYOUT = "root/<domain>/<class>/<image>"

Unreadable = tuple[Path, str]  # a file, and why it cannot be read


@dataclass(frozen=True)
class DomainFolders:
    """Images by domain and class; domains, classes and files sorted by name.

    root: the folder, or the list, they were read from. `files[d]` holds domain d's `(file, class index)`, class by
    class: a domain index is a position in `domains`, a file index a position in `files[d]`. class_names: what prompts
    call the classes. skipped: what was passed over in reading, in words. unreadable: images left out by `without`.
    decoded: images kept in memory (`Images.keep_decoded`).
    """

    root: Path
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    files: tuple[tuple[tuple[Path, int], ...], ...]
    class_names: tuple[str, ...]
    skipped: str = dataclasses.field(default="", compare=False)
    unreadable: tuple[Unreadable, ...] = ()
    decoded: dict[Path, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def counts(self) -> list[list[int]]:
        """Number of images, `[domain][class]`."""
        labels = [[label for _, label in files] for files in self.files]
        return [np.bincount(row, minlength=len(self.classes)).tolist() for row in labels]

    def departures(self, *, whole: bool = True) -> str:
        """What the folder of a known data set lacks or has too much, in a line; empty where it is as it was published,
        or called after none. whole: whether all domains were to be read."""
        known = preset_of(self.root.absolute().name)
        images = {domain: len(files) for domain, files in zip(self.domains, self.files, strict=True)}
        found = presets()[known].departures(images, self.classes, whole=whole) if known else []
        return f"{self.root} is not all of {known}: {'; '.join(found)}" if found else ""

    def lacking(self, domain: str) -> list[bool] | None:
        """Of each class whether the domain has no image of it; None where it has images of all."""
        there = {label for _, label in self.files[self.index(domain)]}
        return [label not in there for label in range(len(self.classes))] if len(there) < len(self.classes) else None

    def index(self, domain: str) -> int:
        if domain not in self.domains:
            raise ValueError(f"{self.root}: no domain {domain!r}, expected one of {self.domains}")
        return self.domains.index(domain)

    def paths(self, domains: Collection[str] | None = None) -> list[Path]:
        """The files of all domains or of those named, domain by domain."""
        chosen = [files for name, files in zip(self.domains, self.files, strict=True) if name in (domains or {name})]
        return [path for path, _ in itertools.chain.from_iterable(chosen)]

    def class_of(self) -> Callable[[str], str]:
        """The class of a folder: its name, or what a known data set calls the number that it is."""
        known = presets().get(preset_of(self.root.absolute().name) or "")
        return known.called if known else str

    def identities(self) -> Iterator[str]:
        """Every image as domain/class/path, the path from the class folder on, or from the list's folder on."""
        base, class_of = self.root if self.root.is_dir() else self.root.parent, self.class_of()
        for domain, files in zip(self.domains, self.files, strict=True):
            for path, label in files:
                name, own = str(path).removeprefix(f"{base}{os.sep}"), self.classes[label]
                folder, *rest = name.split(os.sep, 2)
                inside = len(rest) == 2 and (folder, class_of(rest[0])) == (domain, own)
                yield f"{domain}/{own}/{rest[1] if inside else name}"

    def samples(self, count: int = 8) -> dict[str, list[tuple[Path, str]]]:
        """Up to `count` images of each domain with their class: the first of each class, then the second …"""
        chosen = {}
        for name, files in zip(self.domains, self.files, strict=True):
            by_class: dict[int, list[Path]] = defaultdict(list)
            for path, label in files:
                by_class[label].append(path)
            turns = itertools.zip_longest(*(by_class[label] for label in sorted(by_class)))
            drawn = [(i, path) for turn in turns for i, path in enumerate(turn) if path is not None][:count]
            chosen[name] = [(path, self.classes[label]) for label, path in sorted(drawn)]
        return chosen

    def without(self, unreadable: Sequence[Unreadable]) -> "DomainFolders":
        """The same without these images. Raises ValueError where a class has no other image in a domain."""
        out = {path for path, _ in unreadable}
        files = tuple(tuple(file for file in files if file[0] not in out) for files in self.files)
        left = dataclasses.replace(self, files=files, unreadable=(*self.unreadable, *unreadable))
        _check_complete(left, "that can be read ")
        return left

    def left_out(self) -> list[dict[str, str]]:
        """`unreadable` as JSON-like values: file, from the root on where it lies below, and reason."""
        base = f"{self.root if self.root.is_dir() else self.root.parent}{os.sep}"
        return [{"file": _shown(str(path).removeprefix(base)), "reason": reason} for path, reason in self.unreadable]


def domain_names(root: str | Path) -> list[str]:
    """The domains of a folder or list, sorted, without a look at the images. Raises as `read_domains`."""
    root = _existing(root)
    return sorted(_listed(root) or _folders(root, _Skipped(root)))


def read_domains(
    root: str | Path,
    *,
    domains: Sequence[str] | None = None,
    class_names: str | Path | None = None,
    least: int = 2,
) -> DomainFolders:
    """Reads `root/<domain>/<class>/…/<image>`, or a list of images; all domains or those named, in the order of names.

    Folders are read as torchvision's ImageFolder reads each domain: images at any depth, links followed, in its order;
    hidden entries, system folders (`SYSTEM`), links in a circle, and files that are no images by extension are skipped.

    Args:
        root: a folder of domains or of shards (`fastheads.train.data.shards`), or a `.csv` with the columns path,
            domain and class, or a `.json` with a list of such objects.
            Paths are relative to the list's folder; whatever is listed is an image.
        class_names: a file that says what prompts call the classes (see `read_class_names`); None: the classes' own
            names, "_" as space, and OpenCLIP's of ImageNet's.
        least: how many domains there must be: two to leave one out, one to be tested on.

    Raises:
        FileNotFoundError, NotADirectoryError: for `root`; FileNotFoundError for listed files that aren't there.
        ValueError: for fewer than `least` domains, an unknown name, a class that some domain has no image of (but for
            those that ImageNet-R and -A don't have), a bad list.
    """
    root = _existing(root)
    skipped = _Skipped(root)
    found: dict[str, Mapping[str, Sequence[Path | str]]] = {}
    known = presets().get(preset_of(root.absolute().name) or "")
    listed = _listed(root)
    names = sorted(listed or _folders(root, skipped))
    unknown = [name for name in domains or () if name not in names]
    if unknown:
        raise ValueError(f"domains: got {unknown}, not in {root}, expected some of {names}")
    names = names if domains is None else sorted(set(domains))
    if len(names) < least:
        got = f"one domain only ({names[0]!r})" if names else "no domain"
        raise ValueError(f"{root}: {got}, expected {('one', 'two')[least - 1]} or more, laid out as {LAYOUT}")
    for name in names:
        found[name] = listed[name] if listed else _classes(root / name, skipped)
        if known:
            called = defaultdict[str, list[Path | str]](list)
            for label, paths in found[name].items():
                called[known.called(label)] += paths
            found[name] = called
        if not found[name]:
            raise ValueError(f"{root / name}: no class folder in it, expected {LAYOUT}")
    classes = sorted({label for by_class in found.values() for label in by_class})
    unwritable = [name for name in (*names, *classes) if _shown(name) != name]
    if unwritable:
        raise ValueError(f"{root}: the name {_shown(unwritable[0])!r} is not UTF-8; takes names that are")
    files = tuple(
        tuple(
            (Path(path) if isinstance(path, str) else path, i)
            for i, label in enumerate(classes)
            for path in found[name].get(label, ())
        )
        for name in names
    )
    prompted = tuple(label.replace("_", " ") for label in classes)
    if known is presets()["ImageNet"] and set(classes) <= set(known.classes):
        from open_clip import IMAGENET_CLASSNAMES

        prompted = tuple(IMAGENET_CLASSNAMES[known.classes.index(label)] for label in classes)
    if class_names is not None:
        prompted = read_class_names(class_names, classes)
    folders = DomainFolders(root, tuple(names), tuple(classes), files, prompted, str(skipped))
    _check_complete(folders)
    return folders


def _listed(root: Path) -> Mapping[str, Mapping[str, Sequence[Path | str]]]:
    """What a list or an index names, by domain and class; nothing where `root` is a folder of domains."""
    if not root.is_dir():
        return read_list(root)
    return read_shards(root) if is_shards(root) else {}


def _existing(root: str | Path) -> Path:
    path = Path(root).expanduser()
    wanted = f"expected a folder laid out as {LAYOUT}, or a list of images ({' or '.join(SUFFIXES)})"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found, {wanted}")
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        raise NotADirectoryError(f"{path}: not a directory, {wanted}")
    return path


def _check_complete(folders: DomainFolders, kind: str = "") -> None:
    """That every domain has images of every class, or of those that it is known to have."""
    counts, known = folders.counts(), presets().get(preset_of(folders.root.absolute().name) or "")
    gaps = [
        f"of class {label!r} in domain {domain!r}"
        for domain, row in zip(folders.domains, counts, strict=True)
        for label, count in zip(folders.classes, row, strict=True)
        if not count and (known is None or label in known.classes_of(domain) or label not in known.classes)
    ]
    if gaps:
        shown = ", ".join(gaps[:3]) + (f" and {len(gaps) - 3} more" if len(gaps) > 3 else "")
        skipped = f" ({folders.skipped})" if folders.skipped else ""
        raise ValueError(
            f"{folders.root}: no image {kind}{shown}; takes images of every class in every domain{skipped}"
        )


class _Skipped:
    """What was passed over below `root`, by reason."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: dict[str, list[str]] = {}

    def add(self, reason: str, path: str) -> None:
        self.seen.setdefault(reason, []).append(path)

    def by_name(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry is passed over for its name, and notes it."""
        reason = "hidden" if entry.name.startswith(".") else "system folder" if entry.name in SYSTEM else ""
        if reason:
            self.add(reason, entry.path)
        return bool(reason)

    def __str__(self) -> str:
        """One line, or nothing."""
        parts = [
            f"{len(paths)} {reason} ({'as ' if len(paths) > 1 else ''}{_shown(os.path.relpath(min(paths), self.root))})"
            for reason, paths in sorted(self.seen.items())
        ]
        return f"skipped: {', '.join(parts)}" if parts else ""


def _shown(name: str) -> str:
    """A file's name as text that can be written, whatever its bytes."""
    return os.fsencode(name).decode(errors="replace")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise type(error)(f"{folder}: cannot be listed ({error.strerror})") from error


def _folders(folder: Path, skipped: _Skipped) -> list[str]:
    """The names of the folders in a folder of domains or of classes."""
    names = []
    for entry in _entries(folder):
        if skipped.by_name(entry):
            continue
        if _is_folder(entry):
            names.append(entry.name)
        elif entry.name.lower().endswith(EXTENSIONS):
            skipped.add("outside of a class folder", entry.path)
        else:
            skipped.add("not an image by extension", entry.path)
    return names


def _classes(domain: Path, skipped: _Skipped) -> dict[str, list[str]]:
    above = frozenset(map(_mark, (domain.parent, domain)))
    return {name: _images(str(domain / name), above, skipped) for name in _folders(domain, skipped)}


def _mark(folder: str | Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _images(folder: str, above: frozenset[tuple[int, int]], skipped: _Skipped) -> list[str]:
    """The images below a class folder in ImageFolder's order: folder by folder, each by name."""
    found, todo = [], [(folder, above)]
    while todo:
        here, above = todo.pop()
        mark = _mark(here)
        if mark in above:
            skipped.add("link to a folder above it", here)
            continue
        for entry in _entries(here):
            if skipped.by_name(entry):
                continue
            if _is_folder(entry):
                todo.append((entry.path, above | {mark}))
            elif not entry.name.lower().endswith(EXTENSIONS):
                skipped.add("not an image by extension", entry.path)
            elif entry.is_symlink() or entry.is_file():  # a dead link is an image that can't be read
                found.append((here, entry.name))
            else:
                skipped.add("neither file nor folder", entry.path)
    return [os.path.join(*each) for each in sorted(found)]
