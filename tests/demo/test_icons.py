"""The demo's data: distinct drawings, none of them in pretraining, folders written whole or not at all."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from fastheads.demo import drawings, fonts, icons, looks
from fastheads.train.data.domains import read_domains
from fastheads.train.data.sampling import split


@pytest.fixture
def few(monkeypatch):
    """Three classes of two drawings."""
    found = icons.drawings()
    few = {domain: {name: by_class[name][:2] for name in list(by_class)[:3]} for domain, by_class in found.items()}
    monkeypatch.setattr(icons, "drawings", lambda: few)
    return few


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.png"))}


def test_every_class_has_two_distinct_drawings_in_every_domain():
    found = icons.drawings()
    classes = {domain: list(by_class) for domain, by_class in found.items()}
    assert set(map(tuple, classes.values())) == {tuple(classes["art"])} and len(classes["art"]) >= 60
    for by_class in found.values():
        for glyphs in by_class.values():
            masks = [fonts.mask(glyph, icons.SIDE) for glyph in glyphs]
            assert len(masks) >= 2
            alike = icons.fingerprints(masks) @ icons.fingerprints(masks).T
            assert (alike - np.eye(len(masks))).max() < 1 - 0.015


def test_a_drawing_is_in_one_domain_only():
    shown = [glyph for by_class in icons.drawings().values() for found in by_class.values() for glyph in found]
    assert len(shown) == len(set(shown)) > 500
    assert {glyph.family for glyph in shown}.isdisjoint(icons.PRETRAINING)


@pytest.mark.slow
def test_no_drawing_of_the_domains_nor_a_near_copy_is_in_pretraining():
    """By another distance than the one that sorted them out: of shapes brought to one size, at 64 pixels."""
    learned = drawings.Drawings()
    shown = [glyph for by_class in icons.drawings().values() for found in by_class.values() for glyph in found]
    assert {glyph.family for glyph in learned.glyphs}.isdisjoint(glyph.family for glyph in shown)

    def overlap(masks):
        """How much of both each pair of soft masks shares, at most, by drawing."""
        masks = np.stack(masks).reshape(len(masks), -1).astype(np.float32) / 255
        common = domains @ masks.T
        return (common / (domains.sum(1)[:, None] + masks.sum(1) - common)).max(0)

    domains = np.stack([fonts.mask(glyph, 64) for glyph in shown]).reshape(len(shown), -1).astype(np.float32) / 255
    # Of what was sorted out a tenth overlaps more than this, up to 0.95; of what was kept the most is 0.90.
    assert overlap(list(learned.masks.numpy())).max() < 0.91
    kept = set(learned.glyphs)
    out = [fonts.mask(glyph, 64) for glyph in fonts.glyphs(drawings.FAMILIES) if glyph not in kept]
    assert overlap([mask for mask in out if mask is not None]).max() > 0.93
    # Every class is known all the same, from two drawings at least.
    known = [glyph.word for glyph in learned.glyphs]
    assert min(known.count(name) for name in icons.drawings()["art"]) >= 2


def test_no_look_of_the_domains_is_drawn_in_pretraining(monkeypatch):
    """The scenes are made without the looks' code and without their photographs."""
    import torch

    from fastheads.demo.scenes import Scenes

    for name in ("draw", "_photographs", "_blur", "_moved", "_clouds"):
        monkeypatch.setattr(looks, name, lambda *_: pytest.fail("a look was drawn"))
    masks = torch.zeros(4, 64, 64, dtype=torch.uint8)
    masks[:, 16:48, 16:48] = 255
    pictures, values = Scenes(48, torch.Generator().manual_seed(0))(masks)
    assert pictures.shape == (4, 3, 48, 48) and 0 <= pictures.min() < pictures.max() <= 1
    assert set(values) == {"form", "tone", "ground"}


def test_the_pixels_are_the_same_on_every_machine():
    """Of every 48th picture: what is drawn must not depend on a renderer's version or a processor."""
    digest = hashlib.sha256()
    for path, described in list(icons.plan().items())[::48]:
        digest.update(path.encode() + icons.picture(*described).tobytes())
    assert digest.hexdigest()[:16] == PIXELS


PIXELS = "4a7dc894d8fafdea"


def test_masks_cover_what_outlines_enclose():
    """A square with a hole, in font units; a hole turns the other way round."""
    square = np.array([[0, 0], [0, 10], [10, 10], [10, 0]], float)
    hole = np.array([[2, 2], [8, 2], [8, 8], [2, 8]], float)
    filled = fonts._filled([square, hole], 10)
    expected = np.full((10, 10), 255)
    expected[2:8, 2:8] = 0
    assert np.array_equal(filled, expected)
    half = fonts._filled([square + (0.25, 0.5)], 12) / 255
    assert half.sum() == pytest.approx(100, abs=0.5) and half[0, 1] == pytest.approx(0.5, abs=0.01)
    # Overlapping contours of one direction are one shape.
    assert np.array_equal(fonts._filled([square, square[:, :]], 10), np.full((10, 10), 255))


def test_validation_keeps_drawings_whole_and_every_class_learns(few, tmp_path):
    folders = read_domains(icons.write_domains(tmp_path / "icons"))
    for domain in icons.DOMAINS:
        training, validation = split(folders, domain, by="folder")
        paths = [path for path, _ in folders.files[folders.index(domain)]]
        sides = [{paths[i].parent for i in part} for part in (training, validation)]
        assert validation and sides[0].isdisjoint(sides[1])
        assert {folders.files[folders.index(domain)][i][1] for i in training} == {0, 1, 2}


def test_files_are_pictures_in_folders_of_their_drawing(few, tmp_path):
    root = icons.write_domains(tmp_path / "icons")
    written = files(root)
    assert len(written) == 4 * 3 * icons.PER_CLASS and written.keys() == icons.plan().keys()
    with Image.open(root / next(iter(written))) as image:
        assert (image.size, image.mode) == ((96, 96), "RGB")


def test_writing_again_leaves_a_complete_folder_alone(few, tmp_path):
    root = icons.write_domains(tmp_path / "icons")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert icons.write_domains(root) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["icons"]


def test_a_damaged_folder_is_written_again_with_the_same_bytes(few, tmp_path):
    root = icons.write_domains(tmp_path / "icons")
    before = files(root)
    next(root.glob("sketch/*/*/*.png")).unlink()
    icons.write_domains(root)
    assert files(root) == before
    assert list(tmp_path.iterdir()) == [root]


def test_a_folder_of_other_looks_is_replaced(few, tmp_path, monkeypatch):
    root = icons.write_domains(tmp_path / "icons")
    before = files(root)
    monkeypatch.setitem(looks.LOOKS, "art", looks.LOOKS["neon"])
    after = files(icons.write_domains(root))
    assert {name for name in before if before[name] != after[name]} == {name for name in before if name[:3] == "art"}


def test_an_interrupted_writing_leaves_nothing(few, tmp_path, monkeypatch):
    drawn = []
    picture = icons.picture

    def draw_a_few(*described):
        drawn.append(described)
        if len(drawn) > 30:
            raise KeyboardInterrupt
        return picture(*described)

    monkeypatch.setattr(icons, "picture", draw_a_few)
    with pytest.raises(KeyboardInterrupt):
        icons.write_domains(tmp_path / "icons")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_touched(few, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not touching"):
        icons.write_domains(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("look", icons.DOMAINS)
def test_a_picture_follows_its_generator(look):
    mask = fonts.mask(icons.drawings()[look]["house"][0], looks.SIZE)
    first, again, other = (looks.draw(mask, look, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (96, 96, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.astype(float).std() > 15  # neither blank nor a faint hint


def test_what_a_held_out_domain_shares_is_told():
    assert icons.shared_families("photo") == (
        "Drawn by phosphor; also in other domains, in other styles: phosphor (neon, sketch)."
    )
    assert "remix (neon)" in icons.shared_families("art") and "elusive" in icons.shared_families("art")


def test_missing_fonts_are_told_in_words(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastheads\[demo\]'"):
        fonts.folder()


def test_fonts_of_another_version_are_told_in_words(monkeypatch, tmp_path):
    (tmp_path / "qtawesome/fonts").mkdir(parents=True)
    (tmp_path / "qtawesome/__init__.py").write_text("raise ImportError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match=r"qtawesome==1.4.2"):
        fonts.folder()
