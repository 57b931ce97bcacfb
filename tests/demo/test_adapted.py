"""The demo's own model: it starts as it was, merges without a change, and comes back bit for bit."""

import copy
import json

import open_clip
import pytest
import torch

import fastheads
from fastheads.demo.base import CONFIG


@pytest.fixture
def model():
    torch.manual_seed(0)
    return open_clip.CLIP(**json.loads(CONFIG.read_text()))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("training", [True, False])
def test_the_demo_model_starts_merges_and_comes_back(model, training):
    model.train(training)
    images = torch.randn(4, 3, 48, 48)
    stock = copy.deepcopy(model)
    with torch.no_grad():
        fastheads.patch(model)
        assert relative(model.encode_image(images), stock.encode_image(images)) < 1e-5
        for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model):
            p.add_(0.1 * torch.randn_like(p))
        adapted = model.encode_image(images)
        assert relative(adapted, stock.encode_image(images)) > 1e-2
        merged = fastheads.merge(copy.deepcopy(model))
        assert merged.state_dict().keys() == stock.state_dict().keys()
        assert relative(merged.encode_image(images), adapted) < 1e-5
        fastheads.unpatch(model)
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in model.state_dict().items())
