"""What the commands that take images ask of them: which domains, whether they can be read, how many there are."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastheads.cli.arguments import InputError, Outcome
from fastheads.train.ranks import is_main_process, local_processes, of_all, processes, rank

if TYPE_CHECKING:
    from fastheads.train.data.domains import DomainFolders, Unreadable
    from fastheads.train.data.sampling import Split


def as_options(error: Exception, *names: str) -> InputError:
    """The error with the names of arguments written as the options they come from."""
    return InputError(re.sub(rf"\b({'|'.join(names)})\b", lambda m: "--" + m[0].replace("_", "-"), str(error)))


def domains_of(args: argparse.Namespace) -> list[str]:
    """The domains of `--data`, without a look at the images."""
    from fastheads.train.data.domains import domain_names

    try:
        return domain_names(args.data)
    except (OSError, ValueError) as e:
        raise InputError(f"--data: {e}") from e


def check_domains(args: argparse.Namespace, option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """That `--data` has the domains an option names."""
    for name in names:
        if name not in known:
            raise InputError(f"{option}: {args.data} has no domain {name!r}; it has {', '.join(known)}")


def targets_of(args: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """The domains held out in turn, and all domains that take part (None: those there are)."""
    known = domains_of(args)
    sources = args.sources or []
    check_domains(args, "--sources", sources, known)
    targets = [name for name in known if name not in sources] if args.target == ["all"] else args.target
    check_domains(args, "--target", targets, known)
    if not targets:
        raise InputError("--sources: got every domain there is; takes all but those to test on")
    both = [name for name in targets if name in sources]
    if both:
        raise InputError(f"--sources: got {both[0]!r}, which --target holds out; takes other domains")
    return targets, None if args.sources is None else [*targets, *sources]


def images_of(
    args: argparse.Namespace, domains: Sequence[str] | None = None, *, used: Sequence[str] | None = None
) -> DomainFolders:
    """The images of `--data` that can be read, as far as `--on-bad-image` looks; what is left out is said.

    domains: those to read; used: those of them whose images matter. None: all.
    """
    from fastheads.train.data.domains import read_domains
    from fastheads.train.data.images import decode, look, unreadable_message
    from fastheads.train.progress import phase

    try:
        with phase("listing the images"):
            least = 2 if args.command in ("train", "heads") else 1
            folders = read_domains(args.data, domains=domains, class_names=args.class_names, least=least)
    except (OSError, ValueError) as e:
        if str(e).startswith("class_names: "):
            raise as_options(e, "^class_names") from e
        raise InputError(f"--data: {e}") from e
    _note(folders.skipped)
    _note(folders.departures(whole=domains is None))
    paths = folders.paths(used)
    if args.on_bad_image == "stop":
        bad = _unreadable(paths, look, "looking at the images")
        if bad:
            raise InputError(
                f"--data: {unreadable_message(*bad[0])}; {len(bad)} of {len(paths)} images are such: "
                f"fastheads check {args.data} lists them, --on-bad-image skip leaves them out"
            )
        return folders
    _note(f"--on-bad-image skip: every image is decoded first, all {len(paths)}")
    bad = _unreadable(paths, decode, "decoding every image")
    if bad:
        _note(f"left out: {len(bad)} of {len(paths)} images, the first {unreadable_message(*bad[0])}")
    return folders.without(bad)


def check_sources(args: argparse.Namespace, folders: DomainFolders, targets: Sequence[str]) -> None:
    """That each target's sources can be split, and hold enough for a linear probe, with which a linear head begins; an
    MMD of one domain is said."""
    from fastheads.train.evaluation import source_splits
    from fastheads.train.methods import METHODS
    from fastheads.train.models import has_text

    probe = "linear-probe" in args.method or not has_text(args.model)
    gated = [name for name in args.method if METHODS[name].mmd and args.mmd_weight]
    for target in targets:
        for seed in args.seed if probe else args.seed[:1]:
            parts = source_splits(folders, target, args.sources, seed, args.split_by)
            if probe:
                _check_probe(folders, parts)
        if gated and len(parts) == 1:
            _note(
                f"one source domain for {target}, {next(iter(parts))}: the MMD of one domain is 0, so the gates of "
                f"{', '.join(gated)} learn from the cross-entropy alone; more domains (--sources, --data) change that"
            )


def _check_probe(folders: DomainFolders, parts: Mapping[str, Split]) -> None:
    from fastheads.train.evaluation import check_probe

    try:
        check_probe(folders, {name: part[0] for name, part in parts.items()})
    except ValueError as e:
        raise InputError(f"--method: {e}") from e


def kept_images(args: argparse.Namespace, folders: DomainFolders) -> str:
    """What to say of the decoded images that are kept in memory, as `--cache-images` says or where they fit; "" where
    they are not, of which it is noted why."""
    from fastheads.train import logs
    from fastheads.train.data.images import decoded_bytes

    if args.cache_images is False:
        return ""
    size, room = decoded_bytes(folders.paths()), logs.free_memory() // 2
    own = size * local_processes()
    if args.cache_images or own <= room:
        return f"decoded images are kept in memory, about {own / 1e6:,.1f} MB"
    _note(
        f"images are decoded anew each time: kept in memory they would take {own / 1e6:,.1f} MB, and half of what is "
        f"free is {room / 1e6:,.1f}; --cache-images keeps them all the same"
    )
    return ""


def _note(text: str) -> None:
    if text and is_main_process():
        warnings.warn(text, stacklevel=3)


def _unreadable(paths: Sequence[Path], test: Callable[[Path], object], doing: str) -> list[Unreadable]:
    """The images that fail; of several processes each tests its share."""
    from fastheads.train.data.images import unreadable
    from fastheads.train.progress import phase

    mine = paths[rank() :: processes()]
    with phase(doing, len(mine), "images") as advance:
        found = unreadable(mine, test, advance=advance)
    reasons = dict(of_all(found))
    return [(path, reasons[path]) for path in paths if path in reasons]


def check(args: argparse.Namespace) -> Outcome:
    """Prints how many images there are and which can't be read; 1 where there are such."""
    from fastheads.train.data.domains import read_domains
    from fastheads.train.data.images import decode
    from fastheads.train.progress import Bars, phase

    with Bars() as bars:
        with phase("listing the images"):
            folders = read_domains(args.data, least=1)
        paths = folders.paths()
        bars.say("\n".join(filter(None, [table(folders), folders.skipped, folders.departures()])))
        bad = _unreadable(paths, decode, "decoding every image")
        if bad:
            bars.say(f"{len(bad)} of {len(paths)} images can't be read:")
            bars.say("\n".join(f"  {path}: {reason}" for path, reason in bad))
        else:
            bars.say(f"all {len(paths)} images can be read")
    counts = zip(folders.domains, folders.counts(), strict=True)
    return {
        "domains": {name: dict(zip(folders.classes, row, strict=True)) for name, row in counts},
        "skipped": folders.skipped,
        "unreadable": dataclasses.replace(folders, unreadable=tuple(bad)).left_out(),
    }, int(bool(bad))


def shards(args: argparse.Namespace) -> Outcome:
    """Packs images into shards."""
    from fastheads.train.data.domains import read_domains
    from fastheads.train.data.packing import write_shards
    from fastheads.train.progress import Bars, phase

    with Bars() as bars:
        with phase("listing the images"):
            folders = read_domains(args.data, least=1)
        count = len(folders.paths())
        with phase("packing", count, "images") as advance:
            written = write_shards(folders, args.out, advance=advance)
        bars.say("\n".join(filter(None, [folders.skipped, f"{args.out}: {count} images in {written} shards"])))
    return {"out": args.out, "images": count, "shards": written}, 0


def bench(args: argparse.Namespace) -> Outcome:
    """Prints how many images a second the loaders bring."""
    import torch

    from fastheads.train.data import measure
    from fastheads.train.experiment import versions
    from fastheads.train.progress import Bars

    torch.set_num_threads(1)
    with Bars() as bars:
        options = {"size": args.image_size, "batch": args.batch, "workers": args.workers, "batches": args.batches}
        rows = measure.measure(args.data, **options)
        bars.say(measure.table(rows))
    about = {"command": args.typed, "cores": os.cpu_count(), "load": os.getloadavg(), "versions": versions()}
    return {**about, "rows": rows}, 0


def table(folders: DomainFolders) -> str:
    """How many images of each class (a line) each domain has (a column), as text."""
    counts = [list(column) for column in zip(*folders.counts(), strict=True)]
    rows = [*counts, [sum(row) for row in zip(*counts, strict=True)]]
    head = [*folders.domains, "all"]
    first = max(map(len, ("class", *folders.classes)))
    widths = [max(len(name), len(str(sum(map(sum, counts))))) + 2 for name in head]
    lines = [f"{'class':<{first}}" + "".join(f"{name:>{w}}" for name, w in zip(head, widths, strict=True))]
    for label, row in zip((*folders.classes, "all"), rows, strict=True):
        cells = "".join(f"{count:>{w}}" for count, w in zip((*row, sum(row)), widths, strict=True))
        lines.append(f"{label:<{first}}{cells}")
    return "\n".join(lines)
