"""A small problem to train on: sixty images of squares, a random tiny CLIP."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image

from fastheads.demo.base import CONFIG, MODEL, register
from fastheads.hosts.vision import head_of, image_size
from fastheads.train.data.batches import clip_transforms
from fastheads.train.data.domains import read_domains
from fastheads.train.evaluation import make_problem


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Three domains × two classes × ten images: a bright or dark square on a background of the domain's colour."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for colour, domain in enumerate(("blue", "green", "red")):
        for bright, name in ((40, "dark"), (220, "light")):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(10):
                image = rng.integers(0, 60, (32, 32, 3))
                image[..., colour] += 100
                image[8:24, 8:24] = bright + rng.integers(-20, 20, (16, 16, 3))
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return read_domains(root)


VISION = {
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "ConvNeXt": {"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"},
}


def demo_model(vision=None):
    """The demo's model with random weights, or with another image tower."""
    register()
    config = json.loads(CONFIG.read_text())
    torch.manual_seed(0)
    return open_clip.CLIP(config["embed_dim"], vision or config["vision_cfg"], config["text_cfg"]).eval()


@pytest.fixture
def base():
    return demo_model()


@pytest.fixture(params=VISION)
def other_base(request):
    """A model whose image tower isn't patched."""
    return demo_model(VISION[request.param])


@pytest.fixture
def timm_base():
    """A model whose image tower is a vision transformer of timm's: 6 layers of 2 heads."""
    return demo_model({"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"})


@pytest.fixture
def problem(base, folders):
    return squares(base, folders)


@pytest.fixture
def other_problem(other_base, folders):
    return squares(other_base, folders)


@pytest.fixture
def timm_problem(timm_base, folders):
    return squares(timm_base, folders)


@pytest.fixture
def vit():
    """timm's vision transformer alone, with a linear head of two classes."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=2, img_size=32).eval()


@pytest.fixture
def vit_problem(vit, folders):
    return squares(vit, folders)


@pytest.fixture
def resnet(folders):
    """A model with a ResNet tower, and its problem."""
    base = demo_model(VISION["ResNet"])
    return base, squares(base, folders)


def squares(base, folders):
    transforms = clip_transforms(image_size(base), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip=False)
    templates = ("a {} square.", "a photo of a {} thing.", "a drawing of a {} box.")
    tokenizer = open_clip.get_tokenizer(MODEL) if head_of(base) is None else None
    return make_problem(base, tokenizer, folders, "red", transforms, prompts=templates[:1], contexts=templates)
