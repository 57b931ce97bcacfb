"""Models by name: their weights; images are prepared as the model's own settings say, by hand here."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from standins import clip

from fastheads.demo.base import CONFIG
from fastheads.train import models
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


def test_a_local_dirs_model_takes_a_files_weights_in_place_of_its_own(tmp_path):
    config = json.loads(CONFIG.read_text())
    states = []
    for seed, path in enumerate((tmp_path / "open_clip_model.safetensors", tmp_path / "other.safetensors")):
        torch.manual_seed(seed)
        states.append(open_clip.CLIP(**config).state_dict())
        save_file(states[-1], path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 48}}))
    name, other = f"local-dir:{tmp_path}", str(tmp_path / "other.safetensors")
    assert models.default_weights(name) == ""
    for weights, state in zip(("", other), states, strict=True):
        assert models.with_activation(name, weights) == name
        found = models.load(name, weights)[0]
        assert all(torch.equal(tensor, state[key]) for key, tensor in found.state_dict().items())
    with pytest.raises(ValueError, match="^pretrained: got 'openai', but local-dir"):
        models.with_activation(name, "openai")
    assert "load_weights=False); open_clip.load_checkpoint(model" in models.how_to_load(
        name, found, tmp_path / "m", None
    )
