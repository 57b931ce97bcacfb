"""fastheads evaluate, merge, inspect: what they make of an adapter and its base."""

import argparse
import json
import re

import open_clip
import pytest
import torch
from commands import DOMAINS, base, data, done, run
from safetensors.torch import load_file

import fastheads
from fastheads.cli.training import base_of_adapter
from fastheads.demo.base import CONFIG, MODEL


def accuracies(text):
    """Domain → (accuracy, images) of `evaluate`'s lines; nothing else may be printed."""
    found = {}
    for line in text.strip().splitlines():
        match = re.fullmatch(r"(\S+) +([\d.]+) % +of (\d+) images", line)
        assert match, line
        found[match[1]] = float(match[2]), int(match[3])
    return found


# -------------------------------------------------------------------------------------------- evaluate, merge


@pytest.fixture(scope="module")
def merged(world):
    path = world.root / "merged/model.safetensors"
    text = done("merge", "--adapter", world.adapter, "--out", path)  # of the adapter's own base
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


def test_model_and_weights_named_nowhere_are_the_adapters(world):
    own = done("evaluate", *data(world.root), "--adapter", world.adapter, "--domain", "night")
    assert accuracies(own) == evaluated(world, "--adapter", world.adapter, "--domain", "night")


@pytest.mark.parametrize(
    ("base", "wanted"),
    [("RN50 openai", ("RN50", "openai")), ("demo as it was drawn", ("demo", None)), ("CLIP", ("ViT-B-16", None))],
)
def test_of_a_base_in_words_the_name_alone_is_taken(base, wanted, monkeypatch):
    monkeypatch.setattr("fastheads.adapters.read_adapter", lambda folder: ({"base_model": base}, {}))
    args = argparse.Namespace(model=None, pretrained=None, adapter="adapter")
    base_of_adapter(args)
    assert (args.model, args.pretrained) == wanted


def test_the_merged_checkpoint_is_a_stock_one(world, merged):
    stock = load_file(world.root / "demo.safetensors")
    tensors = load_file(merged.path)
    (beside := merged.path.with_name("beside")).touch()
    assert merged.path.stat().st_mode == beside.stat().st_mode
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in stock.items()}
    changed = {name for name in stock if not torch.equal(stock[name], tensors[name])}
    assert changed and all(name.endswith(("attn.in_proj_weight", "attn.out_proj.weight")) for name in changed)
    assert f"open_clip.create_model({MODEL!r}, pretrained={str(merged.path)!r})" in merged.text

    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
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

    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
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
    assert MODEL in out and "rank=[2, 2, 2, 2, 8, 8]" in out
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
