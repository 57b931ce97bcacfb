"""A vision model without a text tower, on the command line: trained with a linear head, scored, merged."""

import argparse
import json
import re
import sys

import pytest
import timm
import torch
from commands import done, run
from pictures import write_image
from safetensors.torch import load_file, save_file
from standins import relative, seeded

import fastheads

MODEL = "timm:test_vit"
METHODS = ("linear-probe", "ha-lora", "hap", "fine-tune")
SHORT = ("--steps", "2", "--per-domain", "3", "--lr", "0.01", "--gate-lr", "0.3", "--workers", "0")


def stock(path, classes, **options):
    return timm.create_model("test_vit", num_classes=classes, checkpoint_path=str(path), **options).eval()


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Four methods on a ViT with random weights and a head of five other classes, and HA-LoRA with its head fixed."""
    root = tmp_path_factory.mktemp("vision")
    with seeded(0):
        save_file(timm.create_model("test_vit", num_classes=5, img_size=32).state_dict(), root / "vit.safetensors")
    model = ("--model", MODEL, "--pretrained", root / "vit.safetensors", "--image-size", "32")
    data = ("--data", world.root / "shapes", "--workers", "0")
    train = ("train", *model, *data, "--target", "sepia", *SHORT)
    done(*train, "--method", *METHODS, "--out", root / "run")
    done(*train, "--method", "ha-lora", "--fixed-head", "--out", root / "fixed")
    runs = {run["method"]: run for run in json.loads((root / "run/results.json").read_text())["runs"]}
    return argparse.Namespace(root=root, model=model, data=data, train=train, runs=runs, out=root / "run/sepia/seed0")


def evaluated(trained, *options, file="vit.safetensors"):
    model = ("--model", MODEL, "--pretrained", trained.root / file, "--image-size", "32")
    return float(
        re.match(r"sepia +([\d.]+) %", done("evaluate", *model, *trained.data, "--domain", "sepia", *options))[1]
    )


def test_evaluate_agrees_with_training(trained):
    wanted = {name: 100 * run["accuracy"]["sepia"] for name, run in trained.runs.items()}
    found = {name: evaluated(trained, "--adapter", trained.out / name / "adapter") for name in ("ha-lora", "hap")}
    for name in ("linear-probe", "fine-tune"):
        found[name] = evaluated(trained, file=f"run/sepia/seed0/{name}/model.safetensors")
    assert found == pytest.approx(wanted, abs=0.051)
    assert trained.runs["linear-probe"]["accuracy"]["day"] > 0.9  # brightness, which random features show


def test_the_head_starts_as_the_probe_and_is_trained_on_unless_fixed(trained):
    probe = load_file(trained.out / "linear-probe/model.safetensors")
    base = load_file(trained.root / "vit.safetensors")
    assert all(torch.equal(probe[name], tensor) for name, tensor in base.items() if not name.startswith("head."))
    heads = {
        where: load_file(trained.root / where / "sepia/seed0/ha-lora/adapter/adapter_model.safetensors")
        for where in ("run", "fixed")
    }
    for name in ("head.weight", "head.bias"):
        assert torch.equal(heads["fixed"][name], probe[name])
        assert not torch.equal(heads["run"][name], probe[name])
    adapter = sum(p.numel() for name, p in heads["fixed"].items() if ".heads." in name)
    assert trained.runs["ha-lora"]["trainable_parameters"] == adapter + 2 * 64 + 2


def test_merge_writes_what_stock_timm_loads(trained):
    out, adapter = trained.root / "merged.safetensors", trained.out / "hap/adapter"
    said = done("merge", *trained.model, "--adapter", adapter, "--out", out)
    assert f"timm.create_model('test_vit', num_classes=2, img_size=32, checkpoint_path={str(out)!r})" in said
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged, model = (
            stock(out, 2, img_size=32),
            stock(trained.out / "linear-probe/model.safetensors", 2, img_size=32),
        )
        before = model(x)
        fastheads.load_adapter(model, adapter)
        assert relative(merged(x), model(x)) < 1e-5 and relative(before, model(x)) > 1e-3
    assert evaluated(trained, file="merged.safetensors") == evaluated(trained, "--adapter", adapter)


def test_inspect_and_plan_take_it(trained):
    assert "6 attention layers adapted" in done("inspect", "--model", MODEL)
    assert "classes  black_square, white_square" in done("inspect", "--adapter", trained.out / "hap/adapter")
    said = done("plan", MODEL, "--batch", "8", "--impl", "cpu", "--method", "ha-lora", "--classes", "7")
    assert "ha-lora, 7 classes" in said and "attention" in said and "residual stream" in said


BAD = {
    # what is wrong: the command line, and what the line on stderr must have
    "zero-shot": ("TRAIN --method hap zero-shot", ["--method", "'zero-shot' needs a text tower", "linear-probe, fine"]),
    "car-ft": ("TRAIN --method car-ft", ["--method", "'car-ft'", "lora, ha-lora, dig, hap"]),
    "contexts": ("TRAIN --method hap --context-weight 1", ["--context-weight", "text tower", "takes 0"]),
    "prompts": ("TRAIN --prompt {}", ["--prompt", "linear head"]),
    "another size": ("inspect --model timm:resnet18 --image-size 64", ["--image-size", "64", "resnet18"]),
    "two heads": ("inspect --model timm:deit_tiny_distilled_patch16_224", ["--model", "one linear head"]),
    "unknown model": (
        "inspect --model timm:deit_tiny",
        ["--model", "timm has no 'deit_tiny'", "deit_tiny_patch16_224,"],
    ),
    "unknown tag": ("inspect --model timm:test_vit --pretrained openai", ["--pretrained", "r160_in1k", "a file"]),
    "a file of another model": ("inspect --model timm:test_vit3 --pretrained VIT", ["--pretrained", "does not fit"]),
    "no head": ("EVALUATE --pretrained VIT", ["--adapter, --pretrained", "no head for the 2 classes"]),
    "an adapter of another size": (
        "EVALUATE --pretrained VIT --image-size 48 --adapter ADAPTER",
        ["--adapter", "position embedding 1 × 5 × 64, here 1 × 10 × 64"],
    ),
    "other classes": (
        "EVALUATE --pretrained VIT --adapter ADAPTER --data OTHER",
        ["other classes", "'black_square' not here, 'blue_square' here only"],
    ),
    "a fixed head of text": ("train --model ViT-B-32 DATA --fixed-head", ["--fixed-head", "by text"]),
    "a folder that is no model": ("inspect --model ./", ["--model", "config.json"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, trained, tmp_path, monkeypatch):
    line, words = BAD[case]
    options = {
        "TRAIN": [*trained.train, "--out", "out"],
        "EVALUATE": ["evaluate", *trained.model, *trained.data],
        "DATA": trained.data,
        "ADAPTER": [trained.out / "hap/adapter"],
        "VIT": [trained.root / "vit.safetensors"],
        "OTHER": [trained.root / "other"],
    }
    if case == "other classes":
        for name in ("blue_square", "white_square"):
            write_image(trained.root / "other/sepia" / name / "0.png")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(part for word in line.split() for part in options.get(word, [word])))
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_hugging_faces_asks_for_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    code, out, err = run("inspect", "--model", tmp_path)
    assert (code, out) == (2, "") and "--model" in err and "pip install 'fastheads[hf]'" in err


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    code, _, err = run("inspect", "--model", MODEL, "--pretrained", "r160_in1k")
    assert code == 2 and "no network" in err and "https://huggingface.co/timm/test_vit.r160_in1k" in err
