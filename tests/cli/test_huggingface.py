"""A folder of Hugging Face's on the command line: its image tower, with the text tower or a linear head. `make test-hf`
runs it."""

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
from fastheads.hosts.vision import answer
from fastheads.train.models import load, transforms

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-hf")

VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
TEXT |= {"eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0, "max_position_embeddings": 12}
WORDS = ("a", "photo", "of", "cat", "dog", ".")
SHORT = ("--steps", "2", "--per-domain", "2", "--lr", "0.01", "--gate-lr", "0.3", "--workers", "0")


def write_tokenizer(folder, end=49):
    """One token a word, then the end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    own = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": end} | {w: i + 1 for i, w in enumerate(WORDS)}, "<pad>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", end)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<end>")
    made.save_pretrained(folder)


def written(name, folder, head):
    """A whole model, both towers, its tokenizer, what says how its images are prepared; head: with one, no text."""
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=VISION)
    with seeded(0):
        kind = f"{name}ForImageClassification" if head else f"{name}Model"
        disturb(getattr(transformers, kind)(config)).save_pretrained(folder)
    processor = getattr(transformers, f"{name}ImageProcessor")
    size = {"shortest_edge": 32} if name == "CLIP" else {"height": 32, "width": 32}
    processor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    if not head:
        write_tokenizer(folder)
    return folder


@pytest.fixture(params=["CLIP", "Siglip"])
def folder(request, tmp_path):
    """A model with a linear head."""
    return written(request.param, tmp_path / "model", head=True)


@pytest.fixture(params=["CLIP", "Siglip"])
def both(request, tmp_path):
    """A model of both towers."""
    return written(request.param, tmp_path / "model", head=False)


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


def test_a_folder_of_both_towers_classifies_by_text(both, tmp_path):
    data = ("--data", write_set(tmp_path / "images"), "--workers", "0")
    train = ("train", "--model", both, *data, "--target", "art", *SHORT, "--out", tmp_path / "run")
    done(*train, "--method", "zero-shot", "hap", "car-ft", "fine-tune", "--context-weight", "0.5")
    runs = {run["method"]: run for run in json.loads((tmp_path / "run/results.json").read_text())["runs"]}
    assert runs["hap"]["history"]["context_kl"][1] > 0 and runs["car-ft"]["history"]["context_kl"][1] > 0
    own, out = json.loads((both / "config.json").read_text())["architectures"][0], tmp_path / "run/art/seed0"
    adapter = ("--adapter", out / "hap/adapter")
    said = done("merge", "--model", both, *adapter, "--out", tmp_path / "merged.safetensors")
    merged = tmp_path / "merged"
    assert f"transformers.{own}.from_pretrained({str(merged)!r})" in said
    assert "LoRA and 12 gate parameters" in done("inspect", *adapter)

    lines = {}
    for method, (model, *rest) in {
        "zero-shot": (both,),
        "car-ft": (out / "car-ft/model",),
        "hap": (both, *adapter),
        "merged": (merged,),
    }.items():
        lines[method] = done("evaluate", "--model", model, *data, *rest, "--domain", "art")
        if method in runs:
            assert f"{100 * runs[method]['accuracy']['art']:5.1f} %" in lines[method]
    assert lines["merged"] == lines["hap"]

    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = transformers.AutoModel.from_pretrained(both).eval()
        before = stock.get_image_features(x).pooler_output
        assert torch.equal(answer(stock, x)[0], before)
        adapted = fastheads.load_adapter(stock, out / "hap/adapter").get_image_features(x).pooler_output
        after = transformers.AutoModel.from_pretrained(merged).eval().get_image_features(x).pooler_output
        assert relative(after, adapted) < 1e-5 < 1e-3 < relative(before, adapted)


def test_prompts_are_the_text_towers_own(both):
    model, tokenizer = load(str(both), "", 2)
    ids = tokenizer(["a photo of a cat .", "dog"])
    assert ids.tolist() == [[1, 2, 3, 1, 4, 6, 49, 0, 0, 0, 0, 0], [5, 49, *[0] * 10]]
    with torch.no_grad():
        expected = model.get_text_features(input_ids=ids).pooler_output
    found = fastheads.class_text_weights(model, tokenizer, ["cat", "dog"], ["a photo of a {} ."])
    assert relative(found[0], torch.nn.functional.normalize(expected[0], dim=-1)) < 1e-6
    step = fastheads.plan(model, batch=2, impl="cpu", method="car-ft")
    assert step.saved_bytes["attention"] and not step.saved_bytes.get("text tower")
    parts = fastheads.plan(model, batch=6, impl="cpu", captions=True).saved_bytes
    assert parts["ends of the tower"] and parts["attention"]


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


@pytest.mark.parametrize("gone", ["preprocessor_config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(both, tmp_path, gone):
    (both / gone).unlink()
    data = ("--data", write_set(tmp_path / "images"), "--workers", "0")
    code, _, err = run("train", "--model", both, *data, "--target", "art", *SHORT, "--out", tmp_path / "run")
    assert code == 2 and "--model" in err and str(both) in err and gone in err and "bring" in err, err


def test_a_tokenizer_of_another_model_and_naflex_are_refused(both, tmp_path):
    write_tokenizer(both, end=70)
    data = ("--data", write_set(tmp_path / "images"), "--workers", "0")
    command = (*data, "--target", "art", *SHORT, "--out", tmp_path / "run")
    code, _, err = run("train", "--model", both, *command)
    assert code == 2 and "--model" in err and "vocab_size 50" in err
    vision = {name: value for name, value in VISION.items() if name != "image_size"}
    transformers.Siglip2Config(text_config=TEXT, vision_config=vision).save_pretrained(tmp_path / "naflex")
    code, _, err = run("train", "--model", tmp_path / "naflex", *command)
    assert code == 2 and "NaFlex" in err and "images of one size" in err
