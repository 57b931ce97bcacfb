"""A folder of Hugging Face's on the command line: its image tower, with a linear head. `make test-hf` runs it."""

import json

import numpy as np
import pytest
import torch
from commands import done, run
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from pictures import write_set
from PIL import Image
from safetensors.torch import load_file
from standins import disturb, relative, seeded

import fastheads
from fastheads.train.models import load, transforms

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-hf")

VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
TEXT |= {"eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
SHORT = ("--steps", "2", "--per-domain", "2", "--lr", "0.01", "--gate-lr", "0.3", "--workers", "0")


@pytest.fixture(params=["CLIP", "Siglip"])
def folder(request, tmp_path):
    """A whole model, both towers, with what says how its images are prepared."""
    name = request.param
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=VISION)
    with seeded(0):
        disturb(getattr(transformers, f"{name}Model")(config)).save_pretrained(tmp_path / "model")
    processor = getattr(transformers, f"{name}ImageProcessor")
    size = {"shortest_edge": 32} if name == "CLIP" else {"height": 32, "width": 32}
    processor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_trained_scored_merged_and_loaded(folder, tmp_path):
    data = ("--data", write_set(tmp_path / "images"), "--workers", "0")
    train = ("train", "--model", folder, *data, "--target", "art", *SHORT, "--out", tmp_path / "run")
    done(*train, "--method", "linear-probe", "hap", "fine-tune")
    runs = {run["method"]: run for run in json.loads((tmp_path / "run/results.json").read_text())["runs"]}
    out = tmp_path / "run/art/seed0"
    said = done("merge", "--model", folder, "--adapter", out / "hap/adapter", "--out", tmp_path / "merged.safetensors")
    merged = tmp_path / "merged"
    assert f"ForImageClassification.from_pretrained({str(merged)!r})" in said

    where = {"linear-probe": out / "linear-probe/model", "fine-tune": out / "fine-tune/model", "hap": merged}
    for method, model in where.items():
        line = done("evaluate", "--model", model, *data, "--domain", "art")
        assert f"{100 * runs[method]['accuracy']['art']:5.1f} %" in line
    assert done("evaluate", "--model", folder, *data, "--adapter", out / "hap/adapter", "--domain", "art") == line

    stock = transformers.AutoModelForImageClassification.from_pretrained
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = fastheads.load_adapter(stock(folder, num_labels=2).eval(), out / "hap/adapter")
        assert relative(stock(merged)(x).logits, adapted(x).logits) < 1e-5
        assert relative(stock(where["linear-probe"])(x).logits, adapted(x).logits) > 1e-3
    assert load_file(merged / "model.safetensors").keys() == stock(folder, num_labels=2).state_dict().keys()


def test_captured_heads_are_those_of_the_patches_mean(folder):
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=2).eval()
    fastheads.patch(model)
    first = type(model).__name__.startswith("CLIP")
    with fastheads.capture_heads(model) as heads, torch.no_grad():
        model(torch.randn(3, 3, 32, 32))
    assert heads.pool == slice(int(first), None) and heads.features.shape == (3, 3, 4, 16)


def test_images_are_prepared_by_the_folders_own_processor(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    model, _ = load(str(folder), "", 2)
    whole = Image.fromarray(pixels)
    if type(model).__name__.startswith("CLIP"):  # the shorter side, then the middle
        whole = whole.resize((51, 32), Image.Resampling.BICUBIC).crop((9, 0, 41, 32))
        mean, std = np.array(OPENAI_DATASET_MEAN), np.array(OPENAI_DATASET_STD)
    else:
        whole, mean, std = whole.resize((32, 32), Image.Resampling(model_resample(folder))), 0.5, 0.5
    expected = torch.from_numpy((np.array(whole) / 255 - mean) / std).permute(2, 0, 1)
    found = transforms(model)[1](Image.fromarray(pixels))
    assert (found - expected).abs().max() < 0.02  # a step of the eight bits is 0.015 … 0.008


def model_resample(folder):
    return json.loads((folder / "preprocessor_config.json").read_text())["resample"]


@pytest.mark.parametrize(("gone", "words"), [
    ("preprocessor_config.json", ["preprocessor_config.json", "bring"]),
    ("model.safetensors", ["model.safetensors", "bring"]),
])  # fmt: skip
def test_a_missing_file_is_named(folder, tmp_path, gone, words):
    (folder / gone).unlink()
    data = ("--data", write_set(tmp_path / "images"), "--workers", "0")
    code, _, err = run("train", "--model", folder, *data, "--target", "art", *SHORT, "--out", tmp_path / "run")
    assert code == 2 and "--model" in err and str(folder) in err and all(word in err for word in words), err
