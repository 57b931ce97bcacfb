"""Models by name: images are prepared as the model's own settings say, by hand here."""

import numpy as np
import timm
import torch
from PIL import Image
from standins import clip

from fastheads.train.models import transforms

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def prepared(image, mean, std):
    return ((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255) - mean) / std


def test_open_clips_squashed_and_bilinear():
    model = clip()
    own = {"resize_mode": "squash", "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    model.visual.preprocess_cfg = own
    train, evaluation = transforms(model)
    expected = prepared(Image.fromarray(PIXELS).resize((32, 32), Image.Resampling.BILINEAR), 0.5, 0.25)
    assert torch.allclose(evaluation(Image.fromarray(PIXELS)), expected, atol=1e-6)
    assert train.mode.value == "bilinear" and train.mean == (0.5,) * 3


def test_timms_crop_of_its_own_share_at_the_models_size():
    model = timm.create_model("test_vit", num_classes=2, img_size=32)  # crop_pct 0.95, mean and std 0.5
    shorter = int(32 / 0.95)
    whole = Image.fromarray(PIXELS).resize((int(shorter * 60 / 40), shorter), Image.Resampling.BICUBIC)
    left, top = round((whole.width - 32) / 2), round((whole.height - 32) / 2)
    expected = prepared(whole.crop((left, top, left + 32, top + 32)), 0.5, 0.5)
    assert torch.allclose(transforms(model)[1](Image.fromarray(PIXELS)), expected, atol=1e-6)
