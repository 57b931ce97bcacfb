"""fastheads.train.data.batches: batches that resume, evaluation, decoded images kept."""

import time
from collections import Counter

import numpy as np
import pytest
import torch
from loading import loader, noisy, to_tensor
from pictures import BROKEN
from PIL import Image

from fastheads.train.data import batches as data
from fastheads.train.data import images as reading


def assert_same_batches(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for batch, other in zip(got, expected, strict=True):
        for value, reference in zip(batch, other, strict=True):
            assert torch.equal(value, reference)


# --- balanced batches ---------------------------------------------------------------------------


def test_every_batch_holds_per_domain_images_of_each_source_and_none_of_the_target(folders):
    batches = list(loader(folders, sources=("sketch", "art"), per_domain=4, steps=9))
    assert len(batches) == len(loader(folders, steps=9)) == 9
    for images, labels, domains in batches:
        assert images.shape[0] == labels.shape[0] == 8
        assert Counter(domains.tolist()) == {0: 4, 2: 4}


def test_labels_and_domains_are_those_of_the_image(folders):
    truth = {}
    for d, files in enumerate(folders.files):
        for path, label in files:
            truth[np.asarray(Image.open(path)).tobytes()] = (label, d)
    for images, labels, domains in loader(folders, transform=to_tensor):
        for image, label, domain in zip(images, labels.tolist(), domains.tolist(), strict=True):
            assert truth[image.permute(1, 2, 0).contiguous().numpy().tobytes()] == (label, domain)


def test_indices_in_any_order_give_the_same_batches(folders):
    backwards = {name: range(3, -1, -1) for name in ("sketch", "art")}
    forwards = {name: np.arange(4) for name in ("art", "sketch")}
    got = loader(folders, indices=backwards, sources=("sketch", "art"))
    assert_same_batches(got, loader(folders, indices=forwards))


def test_images_outside_the_training_indices_are_refused(folders):
    images = data.Images(folders, [(0, 1)], noisy)
    images[0, 1, 7]
    with pytest.raises(ValueError, match=r"key: got \(0, 2, 7\)"):
        images[0, 2, 7]


# --- resuming and augmentation ------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 4, 7])
def test_a_resumed_run_sees_the_tail_of_an_uninterrupted_one(folders, start, workers):
    whole = list(loader(folders))
    torch.manual_seed(start)  # whatever state the process is in
    resumed = loader(folders, start=start, workers=workers)
    assert len(resumed) == 7 - start
    assert_same_batches(resumed, whole[start:])


def test_a_loader_gone_through_twice_repeats_itself(folders):
    batches = loader(folders)
    assert_same_batches(batches, list(batches))


def test_a_longer_run_begins_like_a_shorter_one(folders):
    assert_same_batches(list(loader(folders, steps=20))[:7], loader(folders))


def test_augmentation_is_that_of_the_seed_and_nothing_else(folders):
    images = data.Images(folders, [(0, 0), (0, 1)], noisy)
    first, again, other = images[0, 0, 7][0], images[0, 0, 7][0], images[0, 0, 8][0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    expected = torch.rand(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    pixels = to_tensor(Image.open(folders.files[0][0][0]))[:, :2, :2]
    assert torch.allclose(first - pixels, expected)


def test_each_image_of_a_batch_and_each_epoch_is_augmented_differently(folders):
    only = loader(folders, noisy, sources=("art",), indices={"art": [0]}, per_domain=4, steps=5)
    views = torch.cat([images for images, _, _ in only])
    assert len(torch.unique(views.flatten(1), dim=0)) == 20


def test_loading_leaves_the_random_state_of_the_process_alone(folders, monkeypatch):
    reseeded = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda seed: reseeded.append(seed))
    before = torch.get_rng_state()
    list(loader(folders))
    list(data.evaluation_loader(folders, "art", None, to_tensor, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert not reseeded  # else dropout on a GPU would repeat itself at every step


def test_the_random_state_is_put_back_when_a_transform_fails(folders):
    def fail(image):
        torch.rand(1)
        raise RuntimeError("broken transform")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken transform"):
        data.Images(folders, [(0, 0)], fail)[0, 0, 7]
    assert torch.equal(torch.get_rng_state(), before)


# --- evaluation, cache --------------------------------------------------------------------------


def test_evaluation_goes_through_all_images_in_order_or_those_asked_for(folders):
    def labels(indices):
        batches = data.evaluation_loader(folders, "photo", indices, to_tensor, 4)
        return [batch[1].tolist() for batch in batches]

    assert labels(None) == [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1]]
    assert labels([9, 0]) == [[1, 0]]
    _, _, domains = next(iter(data.evaluation_loader(folders, "photo", None, to_tensor, 4)))
    assert domains.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_images_give_the_same_batches_and_no_file_is_read_again(folders, workers):
    expected = list(loader(folders))
    evaluated = list(data.evaluation_loader(folders, "art", None, to_tensor, 4))
    loader(folders, keep=True)
    data.evaluation_loader(folders, "art", None, to_tensor, 4, keep=True)
    assert {path.parts[-3] for path in folders.decoded} == {"art", "sketch"}
    for path in folders.paths():
        path.unlink()
    for _ in range(2):  # two runs share what was decoded
        assert_same_batches(loader(folders, keep=True, workers=workers), expected)
    again = data.evaluation_loader(folders, "art", None, to_tensor, 4, keep=True, workers=workers)
    assert_same_batches(again, evaluated)


def test_a_transform_in_place_cannot_spoil_what_is_kept(folders):
    def blacken(image):
        view = to_tensor(image)
        image.paste(0, (0, 0, *image.size))
        return view

    images = data.Images(folders, [(0, 0)], blacken)
    images.keep_decoded()
    assert torch.equal(images[0][0], images[0][0]) and images[0][0].any()


def test_the_memory_that_images_take_is_told_from_headers(folders, monkeypatch):
    paths = folders.paths(["art"])
    for looked_at in (512, 3):
        monkeypatch.setattr(reading, "LOOKED_AT", looked_at)
        assert reading.decoded_bytes(paths) == 6 * 20 * 16 * 3
    data.evaluation_loader(folders, "art", None, to_tensor, 4, keep=True)
    assert sum(kept.nbytes for kept in folders.decoded.values()) == 6 * 20 * 16 * 3


def test_rates_say_who_waits(folders):
    def slow(image):
        time.sleep(0.01)
        return to_tensor(image)

    batches = loader(folders, slow, per_domain=1)
    assert batches.rates() == {}
    for _ in batches:
        time.sleep(0.1)
    rates = batches.rates()
    assert rates.keys() == {"loader", "model"}
    assert rates["model"] < 2 / 0.1 < rates["loader"] < 1 / 0.01


# --- what can't be read ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unreadable_file_is_named_in_one_line(folders, kind):
    path = folders.files[0][1][0]
    BROKEN[kind](path)
    batches = data.evaluation_loader(folders, "art", None, to_tensor, 4)
    with pytest.raises(ValueError) as caught:
        list(batches)
    assert str(caught.value).startswith(f"{path}: not readable as an image (")
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named_in_the_same_line_from_a_worker(folders):
    path = folders.files[0][1][0]
    path.write_text("this is no image")
    messages = []
    for workers in (0, 1):
        with pytest.raises(ValueError) as caught:
            list(loader(folders, workers=workers, steps=2, per_domain=6))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and messages[0].startswith(f"{path}: not readable")
