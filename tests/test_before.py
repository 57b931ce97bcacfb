"""Adapters and run folders that an earlier version wrote are still read: tests/before/ was made by commit bab63d1."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from standins import clip, images

import fastheads
from fastheads.train.data.batches import clip_transforms
from fastheads.train.data.domains import read_domains
from fastheads.train.evaluation import make_problem
from fastheads.train.experiment import run_experiment
from fastheads.train.recipe import Recipe

BEFORE = Path(__file__).with_name("before")
RECIPE = {"steps": 2, "per_domain": 4, "lr": 0.01, "mmd_weight": 0.1, "evaluate_every": 1, "save_every": 1}


def plain_model():
    """A small CLIP whose weights are the same numbers everywhere: no generator's."""
    model = clip().eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            numbers = (torch.arange(p.numel(), dtype=torch.int64) * 7919 + 104729 * i) % 2003 - 1001
            p.copy_((numbers.to(torch.float32) / 8192).view(p.shape))
    return model


def plain_tokenizer(texts):
    """Two tokens that depend on the text, and the end token."""
    return torch.tensor([[len(t), ord(t[0]) % 40, 49] + [0] * 9 for t in texts])


@pytest.fixture
def pictures(tmp_path):
    for colour, domain in enumerate(("blue", "green", "red")):
        for kind, name in enumerate(("dark", "light")):
            (tmp_path / "pictures" / domain / name).mkdir(parents=True)
            for i in range(6):
                image = np.full((32, 32, 3), 40 + 150 * kind + 3 * i, np.uint8)
                image[..., colour] += 20
                Image.fromarray(image).save(tmp_path / "pictures" / domain / name / f"{i}.png")
    return read_domains(tmp_path / "pictures")


def test_an_adapter_is_loaded_on_its_base_and_acts():
    model, pictures = plain_model(), images(2)
    before = model.encode_image(pictures)
    fastheads.load_adapter(model, BEFORE / "red/seed0/hap/adapter")  # its base's hash among what is compared
    assert fastheads.gates(model).shape == (3, 4) and not torch.equal(model.encode_image(pictures), before)
    assert (fastheads.gates(model) - 1).abs().max() > 0
    fastheads.unpatch(model)
    assert torch.equal(model.encode_image(pictures), before)


def test_a_run_folder_is_taken_over(pictures, tmp_path, monkeypatch):
    """Nothing is trained again, and every number is the earlier one."""
    shutil.copytree(BEFORE, tmp_path / "run")
    monkeypatch.setattr("fastheads.train.experiment.fit", lambda *_, **__: pytest.fail("was trained again"))
    model = plain_model()
    transforms = clip_transforms(32, (0.5,) * 3, (0.25,) * 3, flip=False)
    text = {"prompts": ("a {}.",), "contexts": ("a {}.", "no {}.")}
    found = run_experiment(
        model,
        lambda target, seed: make_problem(model, plain_tokenizer, pictures, target, transforms, **text, seed=seed),
        pictures,
        methods=["zero-shot", "hap"],
        targets=["red"],
        seeds=lambda method: [0],
        recipes=lambda method, target: Recipe(**RECIPE),
        out=tmp_path / "run",
        title="before",
        command="none",
        base_name="plain",
        dataset_name="pictures",
    )
    assert found["runs"] == json.loads((BEFORE / "results.json").read_text())["runs"]
