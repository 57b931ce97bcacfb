"""save_adapter, load_adapter: bit for bit, refused in words, and never half written."""

import json
import os
import shutil
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from standins import (
    BOTH,
    CONFIGS,
    MODELS,
    UNGATED,
    assert_unchanged,
    clip,
    default_config,
    features,
    fill_adapters,
    patched,
    snapshot,
)

import fastheads
from fastheads import HeadConfig

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def values(model):
    return {k: v.clone() for k, v in fastheads.adapter_state_dict(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


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
    assert about["text"] == {"dtype": "float32", "activation": "GELU", "position embedding": "12 × 32", "layers": "2"}
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


# ---------------------------------------------------------------------------------------- what is not an adapter


def rewrite(folder, *, tensors=lambda t: t, about=lambda a: a):
    """The tensor file again, with its tensors or its description changed."""
    from safetensors import safe_open

    with safe_open(folder / TENSORS, framework="pt") as f:
        metadata = json.loads(f.metadata()["fastheads"])
    save_file(tensors(load_file(folder / TENSORS)), folder / TENSORS, {"fastheads": json.dumps(about(metadata))})


def peft(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / TENSORS)


def truncated(folder):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


def renamed(tensors):
    return {k.replace("resblocks.2", "resblocks.3"): v for k, v in tensors.items()}


def reshaped(tensors):
    return {k: v[..., :1].contiguous() for k, v in tensors.items()}


def short(tensors):
    return dict(list(tensors.items())[1:])


BROKEN = [
    ("folder missing", shutil.rmtree, FileNotFoundError, ["directory", "does not exist"]),
    ("folder empty", lambda f: [p.unlink() for p in f.iterdir()], FileNotFoundError, ["directory", TENSORS]),
    ("tensors missing", lambda f: (f / TENSORS).unlink(), FileNotFoundError, ["directory", TENSORS]),
    ("only a half-written file", lambda f: os.rename(f / TENSORS, f / f".{TENSORS}.1.tmp"), FileNotFoundError, []),
    ("PEFT", peft, ValueError, ["PEFT", "LORA"]),
    ("JSON corrupt", lambda f: (f / CONFIG).write_text('{"format": "fast'), ValueError, [CONFIG, "corrupt"]),
    ("JSON binary", lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), ValueError, [CONFIG, "corrupt"]),
    ("tensors truncated", truncated, ValueError, [TENSORS, "corrupt"]),
    ("tensors empty", lambda f: (f / TENSORS).write_bytes(b""), ValueError, [TENSORS, "corrupt"]),
    ("tensors garbage", lambda f: (f / TENSORS).write_bytes(b"\x00" * 999), ValueError, [TENSORS, "corrupt"]),
    ("foreign tensors", lambda f: save_file({"a": torch.zeros(1)}, f / TENSORS), ValueError, ["not written by"]),
    ("newer format", lambda f: rewrite(f, about=lambda a: a | {"format_version": 2}), ValueError, ["format 2"]),
    ("tensor missing", lambda f: rewrite(f, tensors=short), ValueError, ["directory", "tensors"]),
    ("tensor names", lambda f: rewrite(f, tensors=renamed), ValueError, ["directory", "tensors"]),
    ("tensor shapes", lambda f: rewrite(f, tensors=reshaped), ValueError, ["directory", "tensors"]),
    ("config key", lambda f: rewrite(f, about=lambda a: a | {"config": {"ranks": 1}}), ValueError, ["ranks"]),
    ("config value", lambda f: rewrite(f, about=lambda a: a | {"config": {"rank": -1}}), ValueError, ["rank"]),
    ("config a list", lambda f: rewrite(f, about=lambda a: a | {"config": [1]}), ValueError, ["config"]),
    ("layers", lambda f: rewrite(f, about=lambda a: a | {"config": {"layers": [9]}}), ValueError, ["layers", "9"]),
]
UNDESCRIBED = [
    ("no config", lambda f: rewrite(f, about=lambda a: {"format_version": 1, "base_sha256": "0"})),
    ("no hash", lambda f: rewrite(f, about=lambda a: {"format_version": 1, "config": a["config"]})),
    ("a list", lambda f: rewrite(f, about=lambda a: [])),
    ("names no list", lambda f: rewrite(f, about=lambda a: a | {"modules_to_save": "ln_1"})),
    ("names no texts", lambda f: rewrite(f, about=lambda a: a | {"trained_beside": [1]})),
    ("base no object", lambda f: rewrite(f, about=lambda a: a | {"base": []})),
    ("base of numbers", lambda f: rewrite(f, about=lambda a: a | {"base": {"visual": 3}})),
    ("a module not there", lambda f: rewrite(f, about=lambda a: a | {"modules_to_save": ["visual.proj"]})),
    ("a module of another model", lambda f: rewrite(f, tensors=lambda t: t | {"a.b": torch.ones(1)})),
    ("JSON a number", lambda f: (f / CONFIG).write_text("5")),
    ("not finite", lambda f: rewrite(f, tensors=lambda t: {k: v * float("nan") for k, v in t.items()})),
]
ROWS = [pytest.param(*row[1:], id=row[0]) for row in BROKEN]
ROWS += [pytest.param(row[1], ValueError, [], id=row[0]) for row in UNDESCRIBED]


@pytest.mark.parametrize("state", ["unpatched", "patched"])
@pytest.mark.parametrize(("spoil", "error", "words"), ROWS)
def test_a_failed_load_leaves_the_model_as_it_was(saved, spoil, error, words, state):
    model = clip() if state == "unpatched" else patched("clip", HeadConfig(), size=0.3)
    spoil(saved)
    before = snapshot(model)
    with pytest.raises(error) as caught:
        fastheads.load_adapter(model, saved)
    assert_unchanged(model, before)
    assert fastheads.is_patched(model) == (state == "patched")
    for word in words:
        assert word in str(caught.value)


def test_a_model_patched_otherwise_is_left_alone(saved):
    model = patched("clip", HeadConfig(rank=3))
    before = snapshot(model)
    with pytest.raises(ValueError, match="config.*unpatch"):
        fastheads.load_adapter(model, saved)
    assert_unchanged(model, before)


def test_what_patch_refuses_load_refuses(saved):
    model = clip()
    before = snapshot(model)
    with pytest.raises(ValueError, match="impl"):
        fastheads.load_adapter(model, saved, impl="cuda")
    assert_unchanged(model, before)
    other = clip(layers=2)
    with pytest.raises(ValueError, match="another base"):
        fastheads.load_adapter(other, saved)
    name = UNGATED[0]
    with pytest.warns(UserWarning), pytest.raises(TypeError, match="ln_inner"):
        fastheads.load_adapter(MODELS[name](), saved, check_base=False)


def test_an_adapter_that_is_not_finite_is_not_saved(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    for value in (float("nan"), float("inf")):
        model = patched("clip", default_config("clip"))
        with torch.no_grad():
            fastheads.gate_parameters(model)[1][0] = value
        with pytest.raises(ValueError, match="not finite.*resblocks.1.attn.heads.theta"):
            fastheads.save_adapter(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


# ----------------------------------------------------------------------------------------------- interruptions

STEPS = [(name, n, moment) for name in ("fsync", "replace") for n in (1, 2) for moment in ("before", "after")]


def interrupt(monkeypatch, name, n, moment, stop):
    """The n-th call of os.`name` never returns: `stop()` before it runs, or after."""
    real, calls = getattr(os, name), []

    def stopped(*args):
        calls.append(args)
        if len(calls) < n:
            return real(*args)
        if moment == "after":
            real(*args)
        return stop()

    monkeypatch.setattr(os, name, stopped)


def new_or_old(folder):
    """Which adapter a reader finds: complete in either case."""
    found = values(fastheads.load_adapter(clip(), folder))
    (which,) = [rank for rank in (2, 5) if same(found, values(patched("clip", HeadConfig(rank=rank))))]
    return which


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step)))
def test_killed_while_saving(saved, step, monkeypatch):
    model = patched("clip", HeadConfig(rank=5))
    child = os.fork()
    if child == 0:  # dies as by SIGKILL: no cleanup, no flush
        try:
            interrupt(monkeypatch, *step, stop=lambda: os._exit(9))
            fastheads.save_adapter(model, saved)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    replaced = step[1] == 2 or step == ("replace", 1, "after")
    assert new_or_old(saved) == (5 if replaced else 2)
    fastheads.save_adapter(patched("clip", HeadConfig(rank=5)), saved)  # and saving goes on working
    assert new_or_old(saved) == 5


@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step)))
def test_disk_full_while_saving(saved, step, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patcher:
        interrupt(patcher, *step, stop=full)
        with pytest.raises(OSError, match="No space"):
            fastheads.save_adapter(patched("clip", HeadConfig(rank=5)), saved)
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, TENSORS]  # nothing left behind
    assert new_or_old(saved) in (2, 5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_the_first_adapter_is_complete(tmp_path, monkeypatch):
    model = patched("clip", HeadConfig())
    child = os.fork()
    if child == 0:
        try:
            interrupt(monkeypatch, "replace", 1, "before", stop=lambda: os._exit(9))
            fastheads.save_adapter(model, tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 1  # the half-written file, which nobody takes for an adapter
    with pytest.raises(FileNotFoundError):
        fastheads.load_adapter(clip(), tmp_path)
