"""The demo's data: every handwritten digit in one place, and folders written whole or not at all."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastheads.demo import digits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.write_domains(tmp_path_factory.mktemp("demo") / "digits")


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.png"))}


def test_every_digit_is_in_exactly_one_part() -> None:
    parts = digits.partition()
    assert set(parts) == {*digits.DOMAINS, "pretraining"}
    everything = np.concatenate(list(parts.values()))
    assert sorted(everything) == list(range(len(digits.handwritten()[1])))


def test_domains_have_equal_numbers_of_every_class() -> None:
    _, labels = digits.handwritten()
    parts = digits.partition()
    for domain in digits.DOMAINS:
        assert Counter(labels[parts[domain]].tolist()) == dict.fromkeys(range(10), 30)
    assert np.bincount(labels[parts["pretraining"]]).min() >= 54


def test_partition_follows_the_seed() -> None:
    first, again, other = digits.partition(1), digits.partition(1), digits.partition(2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_written_files_show_no_digit_twice_and_none_from_pretraining(written: Path) -> None:
    _, labels = digits.handwritten()
    seen: Counter[int] = Counter()
    for name in _files(written):
        domain, label, index = Path(name).with_suffix("").parts
        assert domain in digits.DOMAINS
        assert len(index) == 4
        assert digits.CLASSES[labels[int(index)]] == label
        seen[int(index)] += 1
    assert len(seen) == 1200
    assert set(seen.values()) == {1}
    assert seen.keys().isdisjoint(digits.partition()["pretraining"].tolist())


def test_written_images_are_small_colour_pictures(written: Path) -> None:
    for path in written.glob("*/*/*.png"):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")


def test_writing_again_leaves_a_complete_folder_alone(written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert digits.write_domains(written) == written
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_damaged_folder_is_written_again_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "PER_CLASS", 2)
    root = digits.write_domains(tmp_path / "digits")
    before = _files(root)
    next(root.glob("sketch/*/*.png")).unlink()
    digits.write_domains(root)
    assert len(before) == 80
    assert _files(root) == before
    assert list(tmp_path.iterdir()) == [root]


def test_a_folder_of_another_seed_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "PER_CLASS", 2)
    first = _files(digits.write_domains(tmp_path / "digits", seed=0))
    second = _files(digits.write_domains(tmp_path / "digits", seed=1))
    assert len(first) == len(second) == 80
    assert first.keys() != second.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = 0
    draw = digits.draw

    def draw_a_few(*args: object) -> object:
        nonlocal drawn
        drawn += 1
        if drawn > 30:
            raise KeyboardInterrupt
        return draw(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(digits, "draw", draw_a_few)
    with pytest.raises(KeyboardInterrupt):
        digits.write_domains(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not touching"):
        digits.write_domains(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("style", digits.DOMAINS + digits.STYLES)
def test_a_drawing_follows_its_generator(style: str) -> None:
    images, _ = digits.handwritten()
    first, again, other = (digits.draw(images[3], style, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # neither blank nor a faint hint
    assert first.astype(float).std() > 20


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="no style 'oil'"):
        digits.draw(digits.handwritten()[0][0], "oil", np.random.default_rng(0))
