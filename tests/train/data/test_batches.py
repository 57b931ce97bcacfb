"""fastheads.train.data.batches: the split, balanced batches that resume, evaluation, the cache."""

from collections import Counter

import numpy as np
import pytest
import torch
from loading import loader, noisy, to_tensor
from pictures import BROKEN, write_image
from PIL import Image

from fastheads.train.data import batches as data
from fastheads.train.data.domains import read_domains


def assert_same_batches(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for batch, other in zip(got, expected, strict=True):
        for value, reference in zip(batch, other, strict=True):
            assert torch.equal(value, reference)


# --- the split ----------------------------------------------------------------------------------


def test_split_is_disjoint_complete_and_a_fifth_held_out(folders):
    for domain, held_out in (("art", 1), ("photo", 2), ("sketch", 1)):  # of 6, 10 and 4
        train, validation = data.split(folders, domain)
        count = len(folders.files[folders.index(domain)])
        assert sorted(train + validation) == list(range(count))
        assert len(validation) == held_out
    assert len(data.split(folders, "photo", holdout=0.5)[1]) == 5
    assert len(data.split(folders, "sketch", holdout=0.99)[0]) == 1


def test_split_of_a_seed_never_changes(folders):
    # Written down once: another split would put validation images into runs that resume.
    assert data.split(folders, "photo", seed=0)[1] == [3, 6]
    assert data.split(folders, "photo", seed=np.int64(0))[1] == [3, 6]
    assert data.split(folders, "photo", seed=1)[1] == [2, 7]


def test_batches_of_a_seed_never_change():
    batch = data.BalancedBatches({0: range(4), 2: range(4)}, 2, 2, seed=5).batch(1)
    assert [key[:2] for key in batch] == [(0, 2), (0, 0), (2, 3), (2, 1)]
    assert batch[0][2] == 8365929630057263191
    same = data.BalancedBatches({2: range(4), np.int64(0): range(4)}, 2, 2, seed=np.int64(5))
    assert same.batch(1) == batch


def test_split_does_not_depend_on_the_other_domains(root, folders):
    alone = read_domains(root, domains=["photo", "sketch"])
    for seed in range(5):
        assert data.split(alone, "photo", seed=seed) == data.split(folders, "photo", seed=seed)


def test_two_domains_of_a_size_are_split_differently(root):
    for i in range(40):
        write_image(root / "art" / "dog" / f"more{i}.png", size=(1, 1))
        write_image(root / "photo" / "dog" / f"more{i}.png", size=(1, 1))
    for i in range(4):
        write_image(root / "art" / "cat" / f"more{i}.png", size=(1, 1))
    folders = read_domains(root)
    assert len(folders.files[0]) == len(folders.files[1])
    assert data.split(folders, "art") != data.split(folders, "photo")


@pytest.fixture
def objects(tmp_path):
    """Two classes; five pictures of each of four dogs, of one cat, and two cats that have no folder of their own."""
    for domain in ("art", "photo"):
        for at in range(4):
            for i in range(5):
                write_image(tmp_path / domain / "dog" / f"dog{at}" / f"{i}.png", size=(1, 1))
        for i in range(5):
            write_image(tmp_path / domain / "cat" / "felix" / f"{i}.png", size=(1, 1))
        for i in range(2):
            write_image(tmp_path / domain / "cat" / f"{i}.png", size=(1, 1))
    return read_domains(tmp_path)


def test_split_by_folder_keeps_folders_whole_and_every_class_in_training(objects):
    paths = [path for path, _ in objects.files[0]]
    seen = set()
    for seed in range(20):
        train, validation = data.split(objects, "art", seed=seed, by="folder")
        assert sorted(train + validation) == list(range(27)) and 1 <= len(validation) <= 5
        folders = [{paths[i].parent.name for i in part} - {"cat"} for part in (train, validation)]
        assert folders[0].isdisjoint(folders[1])
        assert {objects.files[0][i][1] for i in train} == {0, 1}
        seen.add(tuple(validation))
    assert len(seen) > 5
    assert data.split(objects, "art", by="folder") == data.split(objects, "art", by="folder")
    assert any(len({paths[i].parent.name for i in data.split(objects, "art", seed=s)[1]}) > 1 for s in range(3))


def test_split_by_folder_needs_two_folders_of_a_class(folders):
    with pytest.raises(ValueError, match="by: got 'class'; takes 'image' or 'folder'"):
        data.split(folders, "art", by="class")


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


@pytest.mark.parametrize("per_domain", [1, 3, 7, 12])
def test_every_image_comes_once_before_any_comes_again(per_domain):
    indices = {0: [0, 2, 3, 5, 9], 2: list(range(7))}
    keys = [k for batch in data.BalancedBatches(indices, per_domain, 35, seed=3) for k in batch]
    for domain, files in indices.items():
        drawn = [file for d, file, _ in keys if d == domain]
        epochs = [drawn[i : i + len(files)] for i in range(0, len(drawn), len(files))]
        assert all(sorted(epoch) == files for epoch in epochs)
        if len(epochs) > 6:
            assert len({tuple(epoch) for epoch in epochs}) > 3  # shuffled anew each time


def test_seeds_and_domains_are_shuffled_and_augmented_apart():
    def drawn(seed, domain):
        batch = data.BalancedBatches({0: range(50), 1: range(50)}, 50, 1, seed=seed).batch(0)
        return [key[1:] for key in batch if key[0] == domain]

    runs = [drawn(seed, domain) for seed in (0, 1, 2**40) for domain in (0, 1)]
    assert len({tuple(file for file, _ in run) for run in runs}) == 6
    assert len({seed for run in runs for _, seed in run}) == 300


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


def test_the_cache_gives_the_same_batches_without_reading_a_file_twice(folders, monkeypatch):
    expected = list(loader(folders))
    read = Counter()
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda path: read.update([path]) or decode(path))
    assert_same_batches(loader(folders, cache=True), expected)
    assert set(read.values()) == {1} and len(read) == 10
    shared = {}
    for _ in range(2):  # two runs that share what was decoded
        assert_same_batches(loader(folders, cache=shared), expected)
    assert set(read.values()) == {2} and len(shared) == 10


def test_a_transform_in_place_cannot_spoil_the_cache(folders):
    def blacken(image):
        view = to_tensor(image)
        image.paste(0, (0, 0, *image.size))
        return view

    images = data.Images(folders, [(0, 0)], blacken, cache=True)
    assert torch.equal(images[0][0], images[0][0]) and images[0][0].any()


def test_workers_keep_their_cache_from_one_evaluation_to_the_next(folders):
    batches = data.evaluation_loader(folders, "art", None, to_tensor, 4, workers=1, cache=True)
    first = list(batches)
    for path, _ in folders.files[0]:
        path.unlink()
    assert_same_batches(batches, first)


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
