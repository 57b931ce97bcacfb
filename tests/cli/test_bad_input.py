"""The command line: what it prints, what it writes, and the one line it says of bad input."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import open_clip
import pytest
import torch
from commands import checkpoint, done, run
from PIL import Image
from safetensors.torch import load_file, save_file

import fastheads
from fastheads.cli import arguments
from fastheads.cli import commands as cli
from fastheads.demo.pretrain import CONFIG, MODEL, register

DOMAINS, CLASSES = ("day", "night", "sepia"), ("black_square", "white_square")
COMMANDS = ("demo", "check", "train", "evaluate", "merge", "inspect")
SHORT = ("--steps", "3", "--per-domain", "3", "--lr", "0.01", "--gate-lr", "0.3", "--workers", "0")


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


def base(world, file="demo.safetensors"):
    return ("--model", MODEL, "--pretrained", world / file)


def data(world):
    return ("--data", world / "shapes", "--workers", "0")


@pytest.fixture(scope="module")
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


def listing(root):
    """Every path below root with its size and time of change."""
    entries = {}
    for path in sorted(root.rglob("*")):
        stat = path.stat()
        entries[str(path.relative_to(root))] = None if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return entries


def accuracies(text):
    """Domain → (accuracy, images) of `evaluate`'s lines; nothing else may be printed."""
    found = {}
    for line in text.strip().splitlines():
        match = re.fullmatch(r"(\S+) +([\d.]+) % +of (\d+) images", line)
        assert match, line
        found[match[1]] = float(match[2]), int(match[3])
    return found


# ------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_of_every_option(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert all(len(line) <= 100 for line in out.splitlines())
    (commands,) = (a for a in arguments.parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = commands.choices[command]._actions
    assert len(options) > 1
    flat = " ".join(out.split())
    for option in options:
        assert option.help and len(option.help.split()) > 1 or option.dest == "help", option.dest
        shown = option.help % vars(option) if "%" in option.help else option.help
        assert (option.option_strings or [option.metavar])[0] in out
        assert " ".join(shown.split()) in flat, option.dest


def test_the_module_runs_and_names_every_command():
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastheads.cli", "--help"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(len(line) <= 100 for line in ran.stdout.splitlines())
    for name in COMMANDS:
        assert re.search(rf"^ +{name} +\w+", ran.stdout, re.MULTILINE)


# -------------------------------------------------------------------------------------------------- bad input

BASE = "--model fastheads-demo --pretrained W/demo.safetensors"
DATA = "--data W/shapes --workers 0"
EVALUATE, TRAIN = f"evaluate {BASE} {DATA}", f"train {BASE} {DATA}"
MERGE = f"merge {BASE} --out W/merged.safetensors"

BAD = {
    # what is wrong: the command line, and what the line on stderr must have
    "unknown model": (f"evaluate --model ViT-B16 {DATA}", ["--model", "'ViT-B16'", "ViT-B-16"]),
    "unknown model in small letters": ("inspect --model vit-b-16", ["--model", "'vit-b-16'", " ViT-B-16,"]),
    "unknown model like none": ("inspect --model frobnicate", ["--model", "'frobnicate'"]),
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
    "demo: target beside full": ("demo --target ink --full", ["--target", "--full"]),
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
    monkeypatch.setattr("fastheads.demo.run.pretrain", lambda *_, **__: pytest.fail("the demo was pretrained first"))
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


def test_an_interruption_says_how_to_go_on(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "inspect", interrupt)
    code, out, err = run("inspect")
    assert (code, out) == (130, "")
    assert len(err.splitlines()) == 1 and "goes on" in err


def test_a_traceback_comes_where_it_is_asked_for(world, monkeypatch):
    monkeypatch.setenv("FASTHEADS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="gone"):
        cli.main(["evaluate", *map(str, base(world.root)), "--data", str(world.root / "gone")])


def test_warnings_are_one_line_and_shown_as_before_afterwards(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "inspect", lambda args: warnings.warn("rounded away", stacklevel=1))
    shown = warnings.showwarning
    code, out, err = run("inspect")
    assert (code, out, err) == (0, "", "fastheads: note: rounded away\n")
    assert warnings.showwarning is shown


# ------------------------------------------------------------------------------------------------ train, again


def test_training_writes_results_report_and_adapter(world):
    folder = world.root / "run"
    assert [run["method"] for run in world.results["runs"]] == ["zero-shot", "hap"]
    assert all(run["target"] == "sepia" and run["sources"] == ["day", "night"] for run in world.results["runs"])
    assert world.results["runs"][1]["steps"] == 3
    page = (folder / "report.html").read_text()
    assert "Zero-shot CLIP" in page and "HA-LoRA + DIG + MMD" in page
    assert {path.name for path in world.adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert f"report: {folder / 'report.html'}" in world.trained
    for run_ in world.results["runs"]:
        assert f"{100 * run_['accuracy']['sepia']:.1f}" in world.trained
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.name == "state"]


def test_the_recorded_command_is_the_one_that_ran(world):
    command = world.results["command"]
    assert command.startswith("fastheads train --model fastheads-demo")
    assert str(world.root / "shapes") in command and "--method zero-shot hap" in command


def test_the_same_command_again_reuses_the_results(world, monkeypatch):
    monkeypatch.setattr("fastheads.train.experiment.fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("fastheads.train.experiment.score", lambda *_, **__: pytest.fail("scored again"))
    out = done(*world.train, "--out", world.root / "run")
    again = json.loads((world.root / "run/results.json").read_text())
    assert again["runs"] == world.results["runs"]
    assert out == world.trained


OTHERWISE = {
    # what is changed, and what is said of it
    "lr": (["--lr", "0.5"], "--lr: was 0.01, now 0.5"),
    "two numbers": (["--steps", "4", "--gate-lr", "0.1"], "--steps: was 3, now 4; --gate-lr: was 0.3, now 0.1"),
    "precision": (["--precision", "bf16"], "--precision: was 'no', now 'bf16'"),
    "prompt": (["--prompt", "a drawing of a {}."], "--prompt: was ['a photo of a {}.'], now ['a drawing of a {}.']"),
    "data": (["--data", "FEWER"], "the images differ (sepia: was 12, now 11)"),
    "weights": (["--pretrained", "OTHER"], "the base's weights differ"),
}


@pytest.mark.parametrize(("options", "told"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_result_of_other_settings_is_kept_and_refused(world, tmp_path, monkeypatch, options, told):
    for name in ("fit", "score"):
        monkeypatch.setattr(f"fastheads.train.experiment.{name}", lambda *_, **__: pytest.fail("begun"))
    fewer, other = tmp_path / "shapes", tmp_path / "demo.safetensors"
    shutil.copytree(world.root / "shapes", fewer)
    (fewer / "sepia/white_square/0.png").unlink()
    shutil.copy(world.root / "other.safetensors", other)
    places = {"FEWER": fewer, "OTHER": other}
    before = listing(world.root / "run")
    code, out, err = run(*world.train, "--out", world.root / "run", *(places.get(o, o) for o in options))
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert told in err and f"{world.root / 'run'}" in err and "name another --out" in err
    assert listing(world.root / "run") == before


def test_a_damaged_result_is_one_line_with_the_name_of_the_file(world, tmp_path):
    shutil.copytree(world.root / "run", tmp_path / "run")
    path = tmp_path / "run/sepia/seed0/hap/result.json"
    path.write_text(path.read_text()[:50])
    code, out, err = run(*world.train, "--out", tmp_path / "run")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert f"{path} is corrupt" in err and "--out" in err


TOWERS = {
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "timm": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
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
        assert "its visual tower is a" in err and tower in err
    assert listing(tmp_path) == {}


def test_a_method_named_twice_runs_once(world):
    twice = [*world.train[: world.train.index("zero-shot")], "zero-shot", "hap", "hap", *SHORT, "--seed", "0", "0"]
    done(*twice, "--out", world.root / "run")
    assert len(json.loads((world.root / "run/results.json").read_text())["runs"]) == 2
    done(*world.train, "--out", world.root / "run")


# -------------------------------------------------------------------------------------------- evaluate, merge


@pytest.fixture(scope="module")
def merged(world):
    path = world.root / "merged/model.safetensors"
    text = done("merge", *base(world.root), "--adapter", world.adapter, "--out", path)
    return argparse.Namespace(path=path, text=text)


def evaluated(world, *options, file="demo.safetensors"):
    return accuracies(done("evaluate", *base(world.root, file), *data(world.root), *options))


def test_evaluate_agrees_with_the_results_of_training(world):
    zero_shot, hap = (run["accuracy"]["sepia"] for run in world.results["runs"])
    without, with_adapter = evaluated(world), evaluated(world, "--adapter", world.adapter)
    assert set(without) == set(with_adapter) == set(DOMAINS)
    assert without["sepia"] == (pytest.approx(100 * zero_shot, abs=0.051), 12)
    assert with_adapter["sepia"] == (pytest.approx(100 * hap, abs=0.051), 12)
    assert without != with_adapter  # three steps at a high rate do change it


def test_evaluate_takes_some_domains_and_several_prompts(world):
    whole = evaluated(world)
    assert evaluated(world, "--domain", "night") == {"night": whole["night"]}
    ensemble = evaluated(world, "--prompt", "a {} here", "--prompt", "one {}", "--batch-size", "5")
    assert list(ensemble) == list(DOMAINS)


def test_the_merged_checkpoint_scores_as_the_adapter_does(world, merged):
    with_adapter = evaluated(world, "--adapter", world.adapter)
    assert evaluated(world, file="merged/model.safetensors") == with_adapter


def test_the_merged_checkpoint_is_a_stock_one(world, merged):
    stock = load_file(world.root / "demo.safetensors")
    tensors = load_file(merged.path)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in stock.items()}
    changed = {name for name in stock if not torch.equal(stock[name], tensors[name])}
    assert changed and all(name.endswith(("attn.in_proj_weight", "attn.out_proj.weight")) for name in changed)
    assert f"open_clip.create_model({MODEL!r}, pretrained={str(merged.path)!r})" in merged.text

    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded = open_clip.create_model(MODEL, pretrained=str(merged.path)).eval()
    tuned = open_clip.create_model(MODEL, pretrained=str(world.root / "demo.safetensors")).eval()
    with torch.no_grad():
        before = tuned.encode_image(images)
        fastheads.load_adapter(tuned, world.adapter)
        wanted = tuned.encode_image(images)
        assert torch.allclose(loaded.encode_image(images), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert (wanted - before).abs().max() > 1e-2 * wanted.abs().max()


def test_an_adapter_is_taken_on_any_base_where_asked(world, tmp_path):
    out = tmp_path / "merged.safetensors"
    other = ("--adapter", world.adapter, "--any-base")
    for command in (("evaluate", *data(world.root)), ("merge", "--out", out)):
        code, _, err = run(*command, *base(world.root, "other.safetensors"), *other)
        assert code == 0 and "note: the adapter" in err and "another base" in err
    assert evaluated(world, *other, file="other.safetensors") == evaluated(world, file=str(out))
    code, _, err = run("evaluate", *data(world.root), *base(world.root), *other)
    assert (code, err) == (0, "")  # its own base: nothing to say


def test_inspect_tells_what_was_trained_beside_the_adapter(world, tmp_path):
    model = open_clip.create_model(MODEL, pretrained=str(world.root / "demo.safetensors"))
    fastheads.load_adapter(model, world.adapter)
    for p in (model.visual.ln_post.weight, model.logit_scale):
        p.data.add_(1.0)
    with pytest.warns(UserWarning, match="logit_scale"):
        fastheads.save_adapter(model, tmp_path, modules_to_save=["ln_post.weight"])
    lines = done("inspect", "--adapter", tmp_path).splitlines()
    assert "with     visual.ln_post.weight, trained beside the adapter" in lines
    assert "without  logit_scale, trained beside the adapter" in lines


def test_weights_trained_with_quickgelu_get_the_model_that_has_it(world, tmp_path, monkeypatch):
    """OpenCLIP only warns that "ViT-B-16" lacks the activation of "openai"; it has a "…-quickgelu" for each."""
    config = json.loads(CONFIG.read_text())
    for name, quick in (("small", False), ("small-quickgelu", True)):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**config, "quick_gelu": quick})
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"web": {"url": "x", "quick_gelu": True}})
    file = str(world.root / "demo.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: file)
    out, adapter = tmp_path / "merged.safetensors", tmp_path / "adapter"
    model = open_clip.create_model("small-quickgelu", pretrained=file)
    fastheads.patch(model)
    for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model):
        torch.nn.init.normal_(p, std=0.1)
    fastheads.save_adapter(model, adapter)
    text = done("merge", "--model", "small", "--pretrained", "web", "--adapter", adapter, "--out", out)
    name = re.search(r"create_model\('([^']+)'", text)[1]

    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, other = (
            fastheads.load_adapter(open_clip.create_model(n, pretrained=file), adapter, check_base=n != "small")
            .eval()
            .encode_image(images)
            for n in ("small-quickgelu", "small")
        )
        got = open_clip.create_model(name, pretrained=str(out)).eval().encode_image(images)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (wanted - other).abs().max() > 1e-3 * wanted.abs().max()


def test_the_default_base_is_loaded_with_quickgelu(world, monkeypatch):
    names = []

    def create(name, **options):
        names.append((name, options["pretrained"]))
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", create)
    run("evaluate", *data(world.root))
    assert names == [("ViT-B-16-quickgelu", "openai")]


# ---------------------------------------------------------------------------------------------------- inspect


def test_inspect_prints_base_sizes_and_gates_of_an_adapter(world):
    out = done("inspect", "--adapter", world.adapter)
    model = open_clip.create_model(MODEL, pretrained=str(world.root / "demo.safetensors"))
    fastheads.load_adapter(model, world.adapter)
    lora, gate = (sum(p.numel() for p in f(model)) for f in (fastheads.lora_parameters, fastheads.gate_parameters))
    size = sum(path.stat().st_size for path in world.adapter.iterdir())
    assert f"{lora:,} LoRA and {gate:,} gate parameters, {size:,} bytes" in out
    assert MODEL in out and "rank=[2, 2, 8, 8]" in out
    rows = [line.split()[2:] for line in out.splitlines() if line.startswith("gates")]
    assert rows == [[f"{g:.2f}" for g in row] for row in fastheads.gates(model).tolist()]
    assert any(cell != "1.00" for row in rows for cell in row)


def test_inspect_prints_a_line_per_layer_of_a_model_without_a_download(monkeypatch, caplog):
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: pytest.fail("downloaded"))
    code, out, err = run("inspect", "--model", "ViT-B-32")
    assert (code, err) == (0, "") and not caplog.records
    lines = out.splitlines()
    assert lines[0].startswith("12 attention layers adapted: 718,848 LoRA and 144 gate parameters")
    for layer in range(12):
        assert re.match(rf"  visual\.{layer} .*12 heads × 64, rank {8 if layer > 9 else 2} ", lines[1 + layer])
    assert all(len(line) <= 100 for line in lines)
