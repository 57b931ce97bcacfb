"""fastheads.train.data.batches: what is refused, in one line that says what is expected."""

import importlib.util
import sys

import pytest
from loading import MEAN, STD, loader, to_tensor
from pictures import CLASSES, DOMAINS

from fastheads.train.data import batches as data
from fastheads.train.data import sampling
from fastheads.train.data.domains import read_domains


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
        *(lambda r: sampling.split(read_domains(r), "arts"), ValueError),
        "/set: no domain 'arts', expected one of ('art', 'photo', 'sketch')",
    ),
    "split of one image": (
        *(lambda r: sampling.split(read_domains(one_image_each(r)), "art"), ValueError),
        "/set: 1 image(s) in domain 'art', expected at least 2",
    ),
    **{
        f"holdout {value}": (
            *(lambda r, v=value: sampling.split(read_domains(r), "art", holdout=v), ValueError),
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
        *(lambda r: sampling.BalancedBatches({0: [1], 1: []}, 1, 1), ValueError),
        "indices: got [1, 0] images by domain, expected",
    ),
    "more processes than images": (
        *(lambda r: training(r, per_domain=3, processes=4), ValueError),
        "per_domain: got 3 for 4 processes, expected an image for each of them or more",
    ),
    "process 2 of 2": (
        *(lambda r: training(r, process=2, processes=2), ValueError),
        "process: got 2 of 2 processes, expected one below their number",
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
