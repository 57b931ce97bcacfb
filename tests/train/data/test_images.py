"""fastheads.train.data.images: every pixel format as RGB, and which files are none."""

import struct
import time
import warnings

import numpy as np
import pytest
from pictures import BROKEN, write_image
from PIL import Image

from fastheads.train.data import images
from fastheads.train.data.images import UnreadableImageError, decode, look, unreadable


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_every_pixel_format_becomes_rgb(tmp_path, mode):
    grey = (np.arange(320, dtype=np.uint8).reshape(16, 20) % 2) * 255
    path = tmp_path / ("0.tif" if mode == "CMYK" else "0.png")
    if mode == "I;16":  # 16 bit PNG
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "I":  # 16 bit PGM
        path = path.with_suffix(".pgm")
        path.write_bytes(b"P5 20 16 65535\n" + (grey.astype(">u2") * 257).tobytes())
    else:
        Image.fromarray(np.stack([grey] * 3, -1)).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    image = decode(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.stack([grey] * 3, -1))


def test_16_bit_grey_keeps_its_shades(tmp_path):
    shades = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "x.png")
    (tmp_path / "x.ppm").write_bytes(b"P5 16 16 65535\n" + shades.astype(">u2").tobytes())
    for name in ("x.png", "x.ppm"):
        assert np.array_equal(np.asarray(decode(tmp_path / name))[..., 0], shades >> 8)


def test_transparent_pixels_keep_their_colour_and_palettes_warn_of_nothing(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0] = 200
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.asarray(decode(tmp_path / "rgba.png"))[0, 0].tolist() == [200, 0, 0]
    rgba[2:, :, 1] = 100  # a palette of two colours, each partly transparent
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    palette.save(tmp_path / "p.png", transparency=bytes([10, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = np.asarray(decode(tmp_path / "p.png"))
    assert np.array_equal(decoded, rgba[..., :3])


# --- looking at many ----------------------------------------------------------------------------


@pytest.mark.parametrize("test", [look, decode])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_look_finds_what_decoding_would(tmp_path, kind, test):
    path = tmp_path / "x.png"
    write_image(path)
    test(path)
    BROKEN[kind](path)
    with pytest.raises(UnreadableImageError) as caught:
        test(path)
    assert str(caught.value).startswith(f"{path}: not readable as an image (")
    ((found, reason),) = unreadable([path], test)
    assert found == path and str(path) not in reason and f"({reason})" in str(caught.value)
    assert reason == {"empty": "the file is empty", "text": "no image format that Pillow knows"}.get(kind, reason)


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp"])
@pytest.mark.parametrize("lost", [1, 2, 30])
def test_a_look_finds_an_end_that_is_missing_where_decoding_does(tmp_path, kind, lost):
    """Pillow forgives the loss of a PNG's last bytes, which hold no pixels: so does a look, which asks it."""
    path = tmp_path / f"x.{kind}"
    write_image(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-lost])
    bad = [bool(unreadable([path], test)) for test in (look, decode)]
    assert bad[0] == bad[1] and (kind != "jpg" or bad[0])


def test_bytes_after_the_end_are_no_fault(tmp_path):
    for kind in ("jpg", "png", "webp"):
        path = tmp_path / f"x.{kind}"
        write_image(path)
        path.write_bytes(path.read_bytes() + bytes(100))
        look(path)


def test_a_look_does_not_decode(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "decode", lambda path: pytest.fail("decoded"))
    for kind in ("jpg", "png", "gif", "webp", "tif", "bmp", "pgm"):
        path = tmp_path / f"x.{kind}"
        if kind == "pgm":
            path.write_bytes(b"P5 2 2 255\n" + bytes(4))
        else:
            write_image(path)
        look(path)


def test_an_error_in_the_middle_is_found_by_decoding_only(tmp_path):
    path = tmp_path / "x.png"
    write_image(path, size=(64, 64))
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 40
    content[at : at + 4] = struct.pack(">I", 0)
    path.write_bytes(bytes(content))
    assert not unreadable([path], look)
    assert [p for p, _ in unreadable([path])] == [path]


def test_the_unreadable_of_many_come_in_order_and_progress_is_told(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths[1:3]:
        write_image(path)
    told = []
    many = paths * 40
    found = unreadable(many, look, advance=told.append)
    assert [path for path, _ in found] == [paths[i % 5] for i in range(200) if i % 5 not in (1, 2)]
    assert sum(told) == 200 and len(told) == 4
    assert unreadable([], look) == []


def test_an_interruption_leaves_no_image_to_wait_for(tmp_path):
    tested = []

    def slow(path):
        time.sleep(1e-4)
        tested.append(path)

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unreadable([tmp_path] * 40_000, slow, advance=stop)
    assert len(tested) < 20_000
