"""fastheads.train.data.batches: what training and evaluation do to an image."""

import numpy as np
import pytest
import torch
from loading import MEAN, STD
from PIL import Image
from torchvision.transforms import (
    Compose,
    ConvertImageDtype,
    InterpolationMode,
    Normalize,
    PILToTensor,
    RandomHorizontalFlip,
    RandomResizedCrop,
)

from fastheads.train.data import batches as data
from fastheads.train.models import transforms


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (20, 30)])
def test_the_evaluation_transform_is_open_clips(size):
    open_clip = pytest.importorskip("open_clip")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = data.clip_transforms(32, MEAN, STD)[1](Image.fromarray(pixels))
    theirs = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    assert torch.equal(ours, theirs(Image.fromarray(pixels)))


@pytest.mark.parametrize("kind", ["open_clip", "timm"])
def test_a_model_s_images_are_evaluated_by_its_own_transform(kind):
    import open_clip
    import timm

    if kind == "open_clip":
        model, _, theirs = open_clip.create_model_and_transforms("ViT-S-32", pretrained=None)
    else:
        model = timm.create_model("deit_tiny_patch16_224")
        theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = np.random.default_rng(0).integers(0, 256, (260, 300, 3), dtype=np.uint8)
    views, ours = transforms(model)
    assert torch.equal(ours(Image.fromarray(pixels)), theirs(Image.fromarray(pixels)))
    end = theirs.transforms[-1]
    assert torch.equal(torch.as_tensor(views.mean), torch.as_tensor(end.mean))
    assert torch.equal(torch.as_tensor(views.std), torch.as_tensor(end.std))


@pytest.mark.parametrize(("pillow", "levels"), [(True, 0), (False, 2)])
def test_training_views_are_torchvision_s_of_pillow_s_to_two_levels(pillow, levels):
    """Draws, crop and normalisation are torchvision's own; the uint8 kernels round otherwise than Pillow."""
    mode = InterpolationMode.BICUBIC
    theirs = Compose([RandomResizedCrop(48, (0.7, 1.0), interpolation=mode), RandomHorizontalFlip(), PILToTensor()])
    finish = Compose([ConvertImageDtype(torch.float), Normalize(MEAN, STD)])
    views, _ = data.clip_transforms(48, MEAN, STD, pillow=pillow)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 60, 70, 3), dtype=np.uint8)
    for seed, image in enumerate(map(Image.fromarray, pixels)):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        view = views(image)
        assert view.dtype == torch.uint8 and view.shape == (3, 48, 48)
        assert (view.int() - expected.int()).abs().max() <= levels
        assert torch.equal(views.finish(view[None])[0], finish(view))


def ramp(width=40):
    """Dark on the left, bright on the right."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (width, width, 3)).copy())


@pytest.mark.parametrize("flip", [True, False])
def test_training_views_are_mirrored_only_where_asked(flip):
    train, _ = data.clip_transforms(16, MEAN, STD, flip=flip)
    torch.manual_seed(0)
    views = [train(ramp()).int() for _ in range(40)]
    mirrored = sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in views)
    assert all(view.shape == (3, 16, 16) for view in views)
    assert 10 < mirrored < 30 if flip else mirrored == 0


def test_training_crops_keep_the_area_asked_for():
    def least_width(scale):
        train, _ = data.clip_transforms((16, 16), (0, 0, 0), (1, 1, 1), flip=False, scale=scale)
        torch.manual_seed(0)
        views = [train(ramp())[0, 0] / 255 for _ in range(60)]
        return min(float(view[-1] - view[0]) for view in views)

    # sqrt(0.7 · 3/4) = 0.72 of the width at least, less half a pixel on each side.
    assert least_width((0.7, 1.0)) > 0.6
    assert least_width((0.05, 0.1)) < 0.3


def test_training_views_are_normalised():
    train, _ = data.clip_transforms(8, MEAN, STD)
    grey = Image.new("RGB", (20, 20), (51, 102, 153))
    expected = (torch.tensor([0.2, 0.4, 0.6]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(train.finish(train(grey)[None]).mean((0, 2, 3)), expected, atol=1e-5)
