"""save_adapter, load_adapter: bit for bit, and only on the base that was adapted."""

import json
import warnings

import open_clip
import pytest
import torch
from adapter_files import CONFIG, TENSORS, rewrite, values
from safetensors.torch import load_file
from standins import BOTH, CONFIGS, MODELS, assert_unchanged, clip, features, fill_adapters, patched, same, snapshot

import fastheads
from fastheads import HeadConfig


@pytest.fixture
def saved(tmp_path):
    """A folder with the adapter of a patched `clip()`."""
    return fastheads.save_adapter(patched("clip", HeadConfig()), tmp_path / "adapter", base="tiny clip")


# ------------------------------------------------------------------------------------------------- roundtrip


@pytest.mark.parametrize("name", MODELS)
def test_roundtrip(name, tmp_path):
    model = patched(name)
    before = snapshot(model)
    folder = fastheads.save_adapter(model, tmp_path / "a" / "b")
    assert_unchanged(model, before)
    assert folder == tmp_path / "a" / "b"
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]
    fresh = MODELS[name]()
    assert fastheads.load_adapter(fresh, str(folder)) is fresh
    assert same(values(fresh), values(model))
    with torch.no_grad():
        assert all(torch.equal(features(fresh, t), features(model, t)) for t in BOTH)
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    fastheads.unpatch(fresh)
    assert all(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_roundtrip_of_every_config(config, tmp_path):
    model = patched("clip", config)
    fastheads.save_adapter(model, tmp_path)
    fresh = fastheads.load_adapter(clip(), tmp_path)
    assert same(values(fresh), values(model))
    again = fill_adapters(patched("clip", config), seed=6)
    assert not same(values(again), values(model))
    assert fastheads.load_adapter(again, tmp_path) is again  # over a model patched alike
    assert same(values(again), values(model))
    with torch.no_grad():
        assert torch.equal(features(again), features(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_roundtrip_of_other_base_dtypes(dtype, tmp_path):
    model = patched("clip", HeadConfig(), dtype=dtype)
    fastheads.save_adapter(model, tmp_path)
    fresh = fastheads.load_adapter(clip().to(dtype), tmp_path)
    assert same(values(fresh), values(model))


def test_what_the_files_hold(saved):
    model = patched("clip", HeadConfig())
    assert same(load_file(saved / TENSORS), values(model))
    about = json.loads((saved / CONFIG).read_text())
    assert about["format"] == "fastheads" and about["base_model"] == "tiny clip"
    assert about["host"] == "nn.MultiheadAttention" and len(about["base_sha256"]) == 64
    assert HeadConfig.from_dict(about["config"]) == HeadConfig()
    report = fastheads.explain(model)
    assert about["lora_parameters"] == report.lora_parameters and about["gate_parameters"] == 12
    size = 4 * (report.lora_parameters + report.gate_parameters)
    assert size < (saved / TENSORS).stat().st_size < size + 4096


def test_only_the_adapter_decides_over_the_file_names(saved):
    """The tensor file carries the config too: alone it is enough."""
    (saved / CONFIG).unlink()
    assert same(values(fastheads.load_adapter(clip(), saved)), values(patched("clip", HeadConfig())))


@pytest.mark.slow
def test_the_published_adapter_of_vit_b_16_is_small(tmp_path):
    model = open_clip.create_model("ViT-B-16")
    fastheads.patch(model)
    folder = fastheads.save_adapter(model, tmp_path)
    assert 718_992 * 4 < sum(p.stat().st_size for p in folder.iterdir()) < 3_500_000


def test_saving_over_an_older_adapter(saved):
    model = patched("clip", HeadConfig(rank=5, towers=("text",)))
    fastheads.save_adapter(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, TENSORS]
    assert same(values(fastheads.load_adapter(clip(), saved)), values(model))
    assert json.loads((saved / CONFIG).read_text())["config"]["rank"] == 5


def test_saving_through_a_wrapper(tmp_path):
    model = patched("clip", HeadConfig())
    fastheads.save_adapter(torch.nn.DataParallel(model), tmp_path)
    wrapped = torch.nn.DataParallel(patched("clip", HeadConfig(), size=0.3))
    assert fastheads.load_adapter(wrapped, tmp_path) is wrapped
    assert same(values(wrapped.module), values(model))


# ---------------------------------------------------------------------------------------------- the base model


def test_another_base_is_refused(saved):
    model = clip(seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="another base.*tiny clip.*check_base=False"):
        fastheads.load_adapter(model, saved)
    assert_unchanged(model, before)
    with pytest.warns(UserWarning, match="another base"):
        fastheads.load_adapter(model, saved, check_base=False)
    assert same(values(model), values(patched("clip", HeadConfig())))


def test_one_changed_weight_is_another_base(saved):
    model = clip()
    with torch.no_grad():
        model.visual.conv1.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="another base"):
        fastheads.load_adapter(model, saved)
    with pytest.warns(UserWarning, match="another base"):
        fastheads.load_adapter(clip().half(), saved, check_base=False)


def quick(model):
    """The same weights with the activation that OpenCLIP gives "…-quickgelu"."""
    for block in model.visual.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    return model


def resized(model):
    other = clip(vision={"image_size": 48})
    weights = {k: v for k, v in model.state_dict().items() if k != "visual.positional_embedding"}
    other.load_state_dict(weights, strict=False)
    return other


DIFFERENT = {
    # a base that differs: what is named, and what is not
    "dtype": (lambda m: m.bfloat16(), ["visual dtype float32, here bfloat16"], ["activation", "size", "weights"]),
    "activation": (quick, ["visual activation GELU, here QuickGELU"], ["dtype", "size", "weights"]),
    "image size": (
        resized,
        ["visual image size 32 × 32, here 48 × 48", "position embedding 17 × 64, here 37 × 64"],
        ["dtype", "activation", "weights"],
    ),
    "two": (lambda m: quick(m.half()), ["here float16", "here QuickGELU"], ["size", "weights"]),
    "depth": (lambda m: clip(layers=2), ["visual layers 3, here 2"], ["dtype", "weights"]),
    "weights": (lambda m: clip(seed=1), ["this model's weights are not"], ["dtype", "activation", "size"]),
}


@pytest.mark.parametrize(("change", "named", "others"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_of_the_base_is_named(saved, change, named, others):
    model = change(clip())
    before = snapshot(model)
    with pytest.raises(ValueError, match="another base") as caught:
        fastheads.load_adapter(model, saved)
    assert_unchanged(model, before)
    message = str(caught.value).split("(tiny clip): ")[1]  # after the folder's name
    assert all(words in message for words in named) and not any(word in message for word in others), message


def test_both_adapted_towers_are_described(tmp_path):
    fastheads.save_adapter(patched("clip", HeadConfig(towers=BOTH)), tmp_path)
    about = json.loads((tmp_path / CONFIG).read_text())["base"]
    assert about["text"] == {"dtype": "float32", "activation": "GELU", "position embedding": "12 × 32"} | {
        "layers": "2",
        "heads": "2",
    }
    assert about["visual"]["image size"] == "32 × 32" and about["visual"]["layers"] == "3"


def test_an_adapter_of_an_older_fastheads_loads(saved):
    """It described no base and no tensors beside the adapters."""
    new = ("base", "modules_to_save", "trained_beside")
    rewrite(saved, about=lambda a: {k: v for k, v in a.items() if k not in new})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(values(fastheads.load_adapter(clip(), saved)), values(patched("clip", HeadConfig())))
    with pytest.raises(ValueError, match="another base.*weights"):
        fastheads.load_adapter(clip().half(), saved)


def test_a_tower_that_is_not_adapted_may_differ(saved):
    model = clip()
    with torch.no_grad():
        model.token_embedding.weight.add_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastheads.load_adapter(model, saved)


@pytest.mark.parametrize("name", ["clip", "custom_text"])
def test_adapters_of_the_text_tower(name, tmp_path):
    model = patched(name, HeadConfig(towers=("text",)))
    fastheads.save_adapter(model, tmp_path)
    fresh = MODELS[name]()
    with torch.no_grad():
        fresh.visual.conv1.weight.add_(1.0)  # the image tower is no part of its base
    fastheads.load_adapter(fresh, tmp_path)
    assert same(values(fresh), values(model))
    with torch.no_grad():
        assert torch.equal(features(fresh, "text"), features(model, "text"))
        fresh = MODELS[name]()
        next(iter(fastheads.hosts.find_tower(fresh, "text").attentions)).in_proj_bias.add_(1.0)
    with pytest.raises(ValueError, match="another base"):
        fastheads.load_adapter(fresh, tmp_path)


def test_the_hash_does_not_see_the_adapter(saved):
    before = json.loads((saved / CONFIG).read_text())["base_sha256"]
    fastheads.save_adapter(patched("clip", HeadConfig(rank=7, gate=None)), saved)
    assert json.loads((saved / CONFIG).read_text())["base_sha256"] == before
