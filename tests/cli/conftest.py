"""A folder with images, checkpoints, a trained run, and every sort of broken thing."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from commands import CLASSES, DOMAINS, SHORT, base, checkpoint, data, done
from PIL import Image
from safetensors.torch import save_file

from fastheads.demo.base import register


def paint(root, domains=DOMAINS, classes=CLASSES, count=6):
    """Domains differ by tint, classes by the brightness of a square."""
    rng = np.random.default_rng(0)
    for domain in domains:
        tint = np.array([(20, 40, 90), (10, 20, 30), (90, 60, 20)][DOMAINS.index(domain)])
        for name in classes:
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 60, (40, 36, 3)) + tint
                image[10:30, 8:28] = (20 if name.startswith("black") else 230) + rng.integers(-20, 20, (20, 20, 3))
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with images, checkpoints, a trained run, and every sort of broken thing."""
    root = tmp_path_factory.mktemp("world")
    register()
    paint(root / "shapes")
    checkpoint(root / "demo.safetensors", 0)
    checkpoint(root / "other.safetensors", 1)
    checkpoint(root / "misfit.safetensors", 0, vocab_size=100)
    (root / "note.pt").write_text("not a checkpoint")

    paint(root / "one", DOMAINS[:1])
    paint(root / "hollow", count=2)
    for path in (root / "hollow/night/white_square").iterdir():
        path.unlink()
    paint(root / "corrupt", count=2)
    (root / "corrupt/night/white_square/1.png").write_bytes(b"\x89PNG not at all")
    (root / "empty").mkdir()

    train = ("train", *base(root), *data(root), "--target", "sepia", "--method", "zero-shot", "hap", *SHORT)
    out = done(*train, "--out", root / "run")
    adapter = root / "run/sepia/seed0/hap/adapter"
    (root / "peft").mkdir()
    (root / "peft/adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    shutil.copytree(adapter, root / "broken")
    content = (adapter / "adapter_model.safetensors").read_bytes()
    (root / "broken/adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    (root / "foreign").mkdir()
    save_file({"weight": torch.zeros(2)}, root / "foreign/adapter_model.safetensors")
    world = argparse.Namespace(root=root, train=train, trained=out, adapter=adapter)
    world.results = json.loads((root / "run/results.json").read_text())
    return world
