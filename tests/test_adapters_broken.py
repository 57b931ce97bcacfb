"""load_adapter refuses what is no adapter, in words; save_adapter leaves none half written."""

import json
import os
import shutil

import pytest
import torch
from adapter_files import CONFIG, TENSORS, rewrite, values
from safetensors.torch import save_file
from standins import MODELS, UNGATED, assert_unchanged, clip, default_config, patched, same, snapshot

import fastheads
from fastheads import HeadConfig


@pytest.fixture
def saved(tmp_path):
    return fastheads.save_adapter(patched("clip", HeadConfig()), tmp_path / "adapter")


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
