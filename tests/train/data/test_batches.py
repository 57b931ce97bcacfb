"""fastheads.train.data: the split, balanced batches that resume, transforms, what is refused."""

import importlib.util
import sys
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
from pictures import BROKEN, CLASSES, DOMAINS, write_image, write_set
from PIL import Image

from fastheads.train.data import batches as data
from fastheads.train.data.domains import read_domains

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set")


@pytest.fixture
def folders(root):
    return read_domains(root)


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def noisy(image):
    """A transform of which every draw shows."""
    return to_tensor(image)[:, :2, :2].double() + torch.rand(3, 2, 2, dtype=torch.float64)


def loader(folders, transform=noisy, sources=("art", "sketch"), indices=None, **options):
    if indices is None:
        indices = {n: range(len(folders.files[folders.index(n)])) for n in sources}
    options = {"per_domain": 3, "steps": 7, "seed": 5} | options
    return data.training_loader(folders, sources, indices, transform, **options)


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


# --- transforms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (20, 30)])
def test_the_evaluation_transform_is_open_clips(size):
    open_clip = pytest.importorskip("open_clip")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = data.clip_transforms(32, MEAN, STD)[1](Image.fromarray(pixels))
    theirs = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    assert torch.equal(ours, theirs(Image.fromarray(pixels)))


def ramp(width=40):
    """Dark on the left, bright on the right."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (width, width, 3)).copy())


@pytest.mark.parametrize("flip", [True, False])
def test_training_views_are_mirrored_only_where_asked(flip):
    train, _ = data.clip_transforms(16, MEAN, STD, flip=flip)
    torch.manual_seed(0)
    views = [train(ramp()) for _ in range(40)]
    mirrored = sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in views)
    assert all(view.shape == (3, 16, 16) for view in views)
    assert 10 < mirrored < 30 if flip else mirrored == 0


def test_training_crops_keep_the_area_asked_for():
    def least_width(scale):
        train, _ = data.clip_transforms((16, 16), (0, 0, 0), (1, 1, 1), flip=False, scale=scale)
        torch.manual_seed(0)
        views = [train(ramp())[0, 0] for _ in range(60)]
        return min(float(view[-1] - view[0]) for view in views)

    # sqrt(0.7 · 3/4) = 0.72 of the width at least, less half a pixel on each side.
    assert least_width((0.7, 1.0)) > 0.6
    assert least_width((0.05, 0.1)) < 0.3


def test_training_views_are_normalised():
    train, _ = data.clip_transforms(8, MEAN, STD)
    grey = Image.new("RGB", (20, 20), (51, 102, 153))
    expected = (torch.tensor([0.2, 0.4, 0.6]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(train(grey).mean((1, 2)), expected, atol=1e-5)


# --- bad input ----------------------------------------------------------------------------------


def without(root, *parts):
    folder = root.joinpath(*parts)
    for file in folder.iterdir():
        file.unlink()
    return folder


def training(root, **options):
    return loader(read_domains(root), **options)


def evaluation(root, indices, batch_size=4):
    return data.evaluation_loader(read_domains(root), "art", indices, to_tensor, batch_size)


def one_image_each(root):
    for domain in DOMAINS:
        for label in CLASSES[1:]:
            without(root, domain, label).rmdir()
        for file in sorted((root / domain / CLASSES[0]).iterdir())[1:]:
            file.unlink()
    return root


BAD = {
    "split of an unknown domain": (
        *(lambda r: data.split(read_domains(r), "arts"), ValueError),
        "/set: no domain 'arts', expected one of ('art', 'photo', 'sketch')",
    ),
    "split of one image": (
        *(lambda r: data.split(read_domains(one_image_each(r)), "art"), ValueError),
        "/set: 1 image(s) in domain 'art', expected at least 2",
    ),
    **{
        f"holdout {value}": (
            *(lambda r, v=value: data.split(read_domains(r), "art", holdout=v), ValueError),
            f"holdout: got {value}, expected",
        )
        for value in (0, 1, -0.1, 1.5, float("nan"))
    },
    "no training image": (
        *(lambda r: training(r, indices={"art": [0], "sketch": []}), ValueError),
        "train_indices['sketch']: got no image, expected at least one",
    ),
    "source without indices": (
        *(lambda r: training(r, indices={"art": [0]}), ValueError),
        "train_indices['sketch']: got no image, expected at least one",
    ),
    "no source": (*(lambda r: training(r, sources=()), ValueError), "indices: got [] images"),
    "no image of a domain": (
        *(lambda r: data.BalancedBatches({0: [1], 1: []}, 1, 1), ValueError),
        "indices: got [1, 0] images by domain, expected",
    ),
    "unknown source": (
        *(lambda r: training(r, sources=("x",), indices={"x": [0]}), ValueError),
        "no domain 'x', expected one of",
    ),
    "index too large": (
        *(lambda r: training(r, indices={"art": [0], "sketch": [4]}), ValueError),
        "items: got (2, 4), expected indices within [6, 10, 4]",
    ),
    "index -1": (*(lambda r: evaluation(r, [-1]), ValueError), "items: got (0, -1), expected"),
    "per_domain 0": (
        *(lambda r: training(r, per_domain=0), ValueError),
        "per_domain: got 0, expected an integer of at least 1",
    ),
    "steps 0": (*(lambda r: training(r, steps=0), ValueError), "steps: got 0, expected an integer"),
    "start -1": (*(lambda r: training(r, start=-1), ValueError), "start: got -1, expected"),
    "start after the end": (
        *(lambda r: training(r, start=8), ValueError),
        "steps: got 7, expected an integer of at least 8",
    ),
    "workers -1": (*(lambda r: training(r, workers=-1), ValueError), "workers: got -1, expected"),
    "nothing to evaluate": (
        *(lambda r: evaluation(r, []), ValueError),
        "indices: got no image of 'art', expected at least one, or None",
    ),
    "batch_size 0": (*(lambda r: evaluation(r, None, 0), ValueError), "batch_size"),
    "image not square": (
        *(lambda r: data.clip_transforms((224, 192), MEAN, STD), ValueError),
        "image_size: got (224, 192), expected",
    ),
    "size 0": (*(lambda r: data.clip_transforms(0, MEAN, STD), ValueError), "image_size: got 0"),
    "two means": (
        *(lambda r: data.clip_transforms(8, (0, 0), STD), ValueError),
        "mean, std: got (0, 0), (0.2, 0.3, 0.4), expected three",
    ),
    "std 0": (
        *(lambda r: data.clip_transforms(8, MEAN, (1, 0, 1)), ValueError),
        "expected three numbers each, std above 0",
    ),
    "scale reversed": (
        *(lambda r: data.clip_transforms(8, MEAN, STD, scale=(1.0, 0.7)), ValueError),
        "scale: got (1.0, 0.7), expected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_that_says_what_is_expected(root, case):
    call, kind, message = BAD[case]
    with pytest.raises(kind) as caught:
        call(root)
    assert type(caught.value) is kind
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_torchvision_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    spec = importlib.util.spec_from_file_location("data_without_torchvision", data.__file__)
    with pytest.raises(ImportError, match=r"pip install fastheads\[train\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
