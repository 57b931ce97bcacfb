"""What a patched tower costs beside the stock one: forward, and forward + backward, of ViT-B-32's image tower.

    make bench RESULT=bench/results/<chip>.json

Ratios of medians within one run are what counts; absolute times are this machine's.
"""

import copy

import open_clip
import pytest
import torch

import fastheads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 256 if DEVICE == "cuda" else 8


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").to(DEVICE)
    return model.train().requires_grad_(False)


def variant(stock, name):
    """The tower as `name` says, all with the same frozen base."""
    model = copy.deepcopy(stock)
    if name == "stock frozen":
        return model
    configs = {
        "patched": None,
        "gates only": fastheads.HeadConfig(rank=0),
        "LoRA only": fastheads.HeadConfig.hap(12, gate=None),
    }
    fastheads.patch(model, configs[name])
    return model


def synchronised(run):
    def timed():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return timed


@pytest.mark.parametrize("name", ["stock frozen", "patched", "gates only", "LoRA only"])
@pytest.mark.benchmark(group="inference")
def test_inference(benchmark, stock, name):
    model, images = variant(stock, name).eval(), torch.randn(BATCH, 3, 224, 224, device=DEVICE)

    def run():
        with torch.no_grad():
            model.encode_image(images)

    benchmark.pedantic(synchronised(run), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("name", ["stock frozen", "patched", "gates only", "LoRA only"])
@pytest.mark.benchmark(group="training step")
def test_training_step(benchmark, stock, name):
    """Forward and backward to the images, so that the frozen tower has a backward pass too."""
    model = variant(stock, name)
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE, requires_grad=True)
    benchmark.pedantic(
        synchronised(lambda: model.encode_image(images).square().mean().backward()), rounds=10, warmup_rounds=2
    )
