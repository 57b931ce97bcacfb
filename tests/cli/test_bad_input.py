"""The one line that the command line says of bad input, before it writes anything."""

import json
import re

import open_clip
import pytest
from commands import SHORT, base, data, listing, run

from fastheads.demo.base import CONFIG

BASE = "--model fastheads-demo --pretrained W/demo.safetensors"
DATA = "--data W/shapes --workers 0"
EVALUATE, TRAIN = f"evaluate {BASE} {DATA}", f"train {BASE} {DATA}"
MERGE = f"merge {BASE} --out W/merged.safetensors"

BAD = {
    # what is wrong: the command line, and what the line on stderr must have
    "unknown model": (f"evaluate --model ViT-B16 {DATA}", ["--model", "'ViT-B16'", "ViT-B-16"]),
    "unknown model in small letters": ("inspect --model vit-b-16", ["--model", "'vit-b-16'", " ViT-B-16,"]),
    "unknown model like none": ("inspect --model frobnicate", ["--model", "'frobnicate'"]),
    "unknown model to plan": ("plan ViT-B16 --batch 8", ["plan: model", "'ViT-B16'", "ViT-B-16"]),
    "a plan of no image": ("plan ViT-B-16 --batch 0", ["--batch", "'0'", "≥ 1"]),
    "unknown layer to plan": ("plan ViT-B-16 --batch 8 --targets q w", ["targets", "'w'", "'o', 'fc1', 'fc2', 'mlp'"]),
    "unknown layer to adapt": (f"{TRAIN} --targets sepia", ["--targets", "'sepia'", "'o', 'fc1', 'fc2', 'mlp'"]),
    "targets of a plan without LoRA": ("plan ViT-B-16 --batch 8 --method dig --targets q", ["targets", "dig has none"]),
    "unknown gpu": ("plan ViT-B-16 --batch 8 --gpu V100", ["gpu", "'V100'", "A100-40, A100-80, H100"]),
    "unknown tag": (f"evaluate --model ViT-B-16 --pretrained opanai {DATA}", ["--pretrained", "'opanai'", "openai"]),
    "a tag for a model without any": (
        f"evaluate --model fastheads-demo --pretrained openai {DATA}",
        ["--pretrained", "openai", "path of a checkpoint"],
    ),
    "missing checkpoint": (
        f"evaluate --model fastheads-demo --pretrained W/gone.pt {DATA}",
        ["--pretrained", "W/gone.pt", "does not exist"],
    ),
    "a folder as checkpoint": (
        f"evaluate --model fastheads-demo --pretrained W/shapes {DATA}",
        ["--pretrained", "W/shapes", "not a file"],
    ),
    "a checkpoint that doesn't fit": (
        f"evaluate --model fastheads-demo --pretrained W/misfit.safetensors {DATA}",
        ["--pretrained", "W/misfit.safetensors", "does not fit fastheads-demo", "mismatch"],
    ),
    "a checkpoint that is none": (
        f"evaluate --model fastheads-demo --pretrained W/note.pt {DATA}",
        ["--pretrained", "W/note.pt", "does not fit"],
    ),
    "missing data": (f"evaluate {BASE} --data W/gone", ["W/gone", "not found"]),
    "missing data in training": (f"train {BASE} --data W/gone", ["W/gone", "not found"]),
    "a file as data": (f"evaluate {BASE} --data W/note.pt", ["W/note.pt", "not a directory"]),
    "no domain": (f"evaluate {BASE} --data W/empty", ["W/empty", "no domain"]),
    "one domain only": (f"train {BASE} --data W/one", ["W/one", "one domain only"]),
    "an empty class": (
        f"train {BASE} --data W/hollow",
        ["--data", "W/hollow", "no image of class 'white_square' in domain 'night'"],
    ),
    "a corrupt image": (
        f"evaluate {BASE} --data W/corrupt --workers 0 --domain night day",
        ["W/corrupt/night/white_square/1.png", "not readable"],
    ),
    "a corrupt image in a worker": (
        f"evaluate {BASE} --data W/corrupt --workers 1 --domain night",
        ["W/corrupt/night/white_square/1.png", "not readable"],
    ),
    "unknown target": (f"{TRAIN} --target dusk", ["--target", "'dusk'", "day, night, sepia"]),
    "unknown method": (f"{TRAIN} --method hap hop", ["--method", "'hop'", "ha-lora"]),
    "unknown domain": (f"{EVALUATE} --domain day dusk", ["--domain", "'dusk'", "day, night, sepia"]),
    "a prompt without a place": (f"{EVALUATE} --prompt photo", ["--prompt", "'photo'", "{}"]),
    "a prompt without a place in training": (f"{TRAIN} --prompt photo", ["--prompt", "'photo'", "{}"]),
    "a prompt with another place": (f"{EVALUATE} --prompt {{}}_{{name}}", ["--prompt", "'{}_{name}'"]),
    "no steps": (f"{TRAIN} --steps 0", ["--steps", "0"]),
    "no images": (f"{TRAIN} --per-domain 0", ["--per-domain", "0"]),
    "lr nan": (f"{TRAIN} --lr nan", ["--lr", "nan", "> 0"]),
    "gate-lr 0": (f"{TRAIN} --gate-lr 0", ["--gate-lr", "0"]),
    "weight-decay inf": (f"{TRAIN} --weight-decay inf", ["--weight-decay", "inf"]),
    "mmd-weight negative": (f"{TRAIN} --mmd-weight -1", ["--mmd-weight", "-1"]),
    "context-weight negative": (f"{TRAIN} --context-weight -0.5", ["--context-weight", "-0.5"]),
    "evaluate-every 0": (f"{TRAIN} --evaluate-every 0", ["--evaluate-every", "0"]),
    "save-every negative": (f"{TRAIN} --save-every -3", ["--save-every", "-3"]),
    "unknown kernel": (f"{TRAIN} --mmd-kernel laplace", ["--mmd-kernel", "laplace", "domainbed"]),
    "unknown features": (f"{TRAIN} --mmd-features tokens", ["--mmd-features", "tokens", "embedding"]),
    "unknown precision": (f"{TRAIN} --precision fp8", ["--precision", "fp8", "bf16"]),
    "negative workers": (f"train {BASE} --data W/shapes --workers -1", ["--workers", "-1"]),
    "negative workers in evaluation": (f"evaluate {BASE} --data W/shapes --workers -1", ["--workers", "-1"]),
    "batch size 0": (f"{EVALUATE} --batch-size 0", ["--batch-size", "0"]),
    "batch size 0 in training": (f"{TRAIN} --batch-size 0", ["--batch-size", "0"]),
    "negative seed": (f"{TRAIN} --seed 0 -1", ["--seed", "-1"]),
    "missing adapter": (f"{EVALUATE} --adapter W/gone", ["W/gone", "does not exist"]),
    "an empty folder as adapter": (f"{EVALUATE} --adapter W/empty", ["W/empty", "adapter_model.safetensors"]),
    "corrupt adapter": (f"{EVALUATE} --adapter W/broken", ["W/broken", "corrupt"]),
    "PEFT adapter": (f"{EVALUATE} --adapter W/peft", ["W/peft", "PEFT"]),
    "foreign adapter": (f"{EVALUATE} --adapter W/foreign", ["W/foreign", "not written by fastheads"]),
    "adapter of another base": (
        f"evaluate --model fastheads-demo --pretrained W/other.safetensors {DATA} --adapter ADAPTER",
        ["--adapter", "ADAPTER", "another base", "weights", "--any-base"],
    ),
    "merge: adapter of another base": (
        "merge --model fastheads-demo --pretrained W/other.safetensors --adapter ADAPTER --out W/merged.safetensors",
        ["--adapter", "ADAPTER", "another base", "weights", "--any-base"],
    ),
    "merge: missing adapter": (f"{MERGE} --adapter W/gone", ["W/gone", "does not exist"]),
    "merge: corrupt adapter": (f"{MERGE} --adapter W/broken", ["W/broken", "corrupt"]),
    "merge: another suffix": (f"merge {BASE} --adapter ADAPTER --out W/merged.pt", ["--out", "W/merged.pt"]),
    "merge: no suffix": (f"merge {BASE} --adapter ADAPTER --out W/merged", ["--out", "W/merged", ".safetensors"]),
    "inspect: no adapter": ("inspect --adapter W/empty", ["W/empty", "adapter_model.safetensors"]),
    "inspect: missing": ("inspect --adapter W/gone", ["W/gone", "does not exist"]),
    "inspect: a file": ("inspect --adapter W/note.pt", ["W/note.pt"]),
    "inspect: PEFT": ("inspect --adapter W/peft", ["W/peft", "PEFT"]),
    "inspect: ResNet": ("inspect --model RN50", ["ResNet"]),
    "demo: unknown target": ("demo --target dusk", ["--target", "'dusk'", "sketch"]),
    "demo: target beside full": ("demo --target art --full", ["--target", "--full"]),
    "demo: no steps": ("demo --steps 0", ["--steps", "0"]),
    "no command": ("", ["demo", "evaluate"]),
    "unknown command": ("trian", ["trian", "train"]),
    "unknown option": (f"{TRAIN} --learning-rate 1", ["--learning-rate"]),
    "no data": (f"evaluate {BASE}", ["--data"]),
    "no adapter to merge": (f"merge {BASE} --out W/merged.safetensors", ["--adapter"]),
    "steps that are no number": (f"{TRAIN} --steps many", ["--steps", "many"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(case, world, tmp_path, monkeypatch, caplog):
    line, fragments = BAD[case]

    def filled(text):
        return re.sub(r"\bW/", f"{world.root}/", text.replace("ADAPTER", str(world.adapter)))

    monkeypatch.chdir(tmp_path)  # the defaults of --out are relative
    monkeypatch.setattr("fastheads.demo.run.set_up", lambda *_: pytest.fail("the demo was set up first"))
    before = listing(world.root)
    code, out, err = run(*(filled(part) for part in line.split()))
    assert code == 2, (code, err)
    assert len(err.splitlines()) == 1 and err.endswith("\n"), err
    assert err.startswith("fastheads")
    for fragment in fragments:
        assert filled(fragment) in err
    assert out == ""
    assert "check_base" not in err  # a function's argument, no option
    assert "Traceback" not in err and not caplog.records  # root's logger would print, outside of pytest
    assert listing(world.root) == before
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("error", [OSError, RuntimeError, ConnectionError])
def test_weights_that_cannot_be_downloaded_ask_for_a_local_checkpoint(world, tmp_path, monkeypatch, error):
    def offline(*_, **__):
        raise error("We couldn't connect to the Hub.\nCheck your connection.")

    monkeypatch.setattr(open_clip, "create_model", offline)
    monkeypatch.chdir(tmp_path)
    for command in (
        ("evaluate", *data(world.root)),
        ("train", *data(world.root)),
        ("inspect", "--pretrained", "openai"),
    ):
        code, out, err = run(*command, "--model", "ViT-B-32")
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert "--pretrained" in err and "'openai'" in err and "ViT-B-32" in err
        assert "couldn't connect" in err and "path of a checkpoint" in err
    assert listing(tmp_path) == {}


def test_a_corrupt_image_stops_training_without_a_result(world, tmp_path):
    command = ("train", *base(world.root), "--data", world.root / "corrupt", "--target", "night")
    code, out, err = run(*command, "--method", "zero-shot", *SHORT, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert str(world.root / "corrupt/night/white_square/1.png") in err.splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


TOWERS = {
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "ConvNeXt": {"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"},
}


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_that_patch_refuses_is_told_before_images_are_listed(world, tmp_path, monkeypatch, tower):
    config = json.loads(CONFIG.read_text()) | {"vision_cfg": TOWERS[tower]}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "odd", config)
    monkeypatch.setattr("fastheads.train.data.domains.read_domains", lambda *_, **__: pytest.fail("listed"))
    monkeypatch.chdir(tmp_path)
    for methods in (["hap"], ["ha-lora"], ["dig"], ["lora"], ["zero-shot", "fine-tune", "lora"]):
        code, out, err = run("train", "--model", "odd", "--pretrained", "", *data(world.root), "--method", *methods)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1
        assert "its visual tower" in err and tower in err
    assert listing(tmp_path) == {}
