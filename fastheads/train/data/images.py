"""Files as images: decoding one, and finding those among many that cannot be decoded."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

try:
    from PIL import Image, UnidentifiedImageError
except ImportError as error:
    raise ImportError(f"fastheads.train.data.images needs Pillow ({error}): pip install fastheads[train]") from error

# The last bytes of a whole file, by Pillow's name of its format.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
CHUNK = 64  # images looked at between two reports
LOOKED_AT = 512  # images whose headers tell how large all are

Result = TypeVar("Result")


class UnreadableImageError(ValueError):
    """A file that cannot be decoded as an image. The message is one line, also from a worker."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's exception again as type("Caught … <traceback>"): the
        # traceback's last line is "fastheads.train.data.images.UnreadableImageError: <message>".
        super().__init__(message.rstrip().splitlines()[-1].split(f"{type(self).__name__}: ")[-1])


def decode(path: Path) -> Image.Image:
    """The file as RGB: `convert("RGB")` as in DomainBed, so alpha is dropped, not blended.

    Unlike there, 16 bit grey keeps its high byte: Pillow clips it at 255, which is nearly white.
    """
    try:
        with path.open("rb") as file:
            image: Image.Image = Image.open(file)
            _check_mode(image)
            if image.mode == "I" or image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            # By way of RGBA: the same pixels, without Pillow's warning on transparent palettes.
            image = image.convert("RGBA") if image.mode == "P" else image
            if image.mode != "RGB":
                return image.convert("RGB")
            image.load()
            return image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, and more
        raise UnreadableImageError(unreadable_message(path, _reason(path, error))) from error


def look(path: Path) -> None:
    """Whether a file can be an image: not empty, its header opens, it ends as its format does where that is known.

    One without the usual end is decoded, to be sure. An error in the middle stays unseen.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            _check_mode(image)
            whole = _ends_well(file, image.format or "")
    except Exception as error:
        raise UnreadableImageError(unreadable_message(path, _reason(path, error))) from error
    if not whole:
        decode(path)


def unreadable(
    paths: Sequence[Path],
    test: Callable[[Path], object] = decode,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[Path, str]]:
    """The files that fail `test` (`decode` or `look`), in their order, each with the reason; in threads.

    advance: called with the number of images that were just looked at.
    """

    def failures(chunk: Sequence[Path]) -> list[tuple[Path, str]]:
        found = []
        for path in chunk:
            try:
                test(path)
            except UnreadableImageError as error:
                found.append((path, _reason(path, error.__cause__ or error)))
        return found

    return [each for found in _in_threads(failures, paths, advance) for each in found]


def decoded_bytes(paths: Sequence[Path]) -> int:
    """About how much memory the images take as decoded pixels: by the headers of up to `LOOKED_AT` of them."""
    sizes = []
    for path in paths[:: max(1, len(paths) // LOOKED_AT)]:
        with path.open("rb") as file, Image.open(file) as image:
            sizes.append(3 * image.width * image.height)
    return len(paths) * sum(sizes) // max(1, len(sizes))


def decode_all(
    paths: Sequence[Path], kept: dict[Path, np.ndarray], *, advance: Callable[[int], None] = lambda count: None
) -> None:
    """Decodes into `kept`, as uint8 `[H, W, 3]`; in threads. advance: as for `unreadable`."""

    def pixels(chunk: Sequence[Path]) -> list[np.ndarray]:
        return [np.array(decode(path)) for path in chunk]

    kept.update(zip(paths, itertools.chain.from_iterable(_in_threads(pixels, paths, advance)), strict=True))


def _in_threads(
    work: Callable[[Sequence[Path]], Result], paths: Sequence[Path], advance: Callable[[int], None]
) -> Iterator[Result]:
    """`work` on chunks of `paths`, its results in their order."""
    Image.init()  # Pillow loads its plugins at the first need, which two threads must not do at once
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    pool = ThreadPoolExecutor()
    try:
        for chunk, result in zip(chunks, pool.map(work, chunks), strict=True):
            yield result
            advance(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)


def unreadable_message(path: Path, reason: str) -> str:
    """The line in which training and the command line name a file that is no image."""
    return f"{path}: not readable as an image ({reason}), expected an 8 or 16 bit image file"


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("float pixels, whose range is not known")


def _ends_well(file: BinaryIO, kind: str) -> bool:
    """Whether the file ends as a whole one does; True where its format doesn't tell."""
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= file.seek(0, os.SEEK_END)
    end = ENDS.get(kind, b"")
    file.seek(-len(end), os.SEEK_END)
    return file.read() == end


def _reason(path: Path, error: BaseException) -> str:
    """What is wrong with the file, without its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            return "no image format that Pillow knows" if file.read(1) else "the file is empty"
    return " ".join(str(error).split()) or type(error).__name__
