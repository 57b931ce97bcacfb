"""A killed run ends where one that was never killed ends, and goes on from no other run's state."""

import argparse
import copy
import dataclasses
import errno
import json
import os
import shutil
import signal

import pytest
import torch
from processes import start
from ranks import train_until_killed
from standins import relative, same
from training import ONE_STEP, RECIPE, stopped_at, weights

import fastheads
from fastheads.cli.arguments import parser
from fastheads.model import head_modules
from fastheads.train import state
from fastheads.train.earlier import differences, run_key
from fastheads.train.loop import fit
from fastheads.train.methods import METHODS
from fastheads.train.recipe import Recipe


@pytest.mark.parametrize(("method", "model"), [("hap", "base"), ("car-ft", "base"), ("hap", "vit")])
def test_a_stopped_run_resumes_to_the_same_weights(request, tmp_path, method, model):
    """Stopped by an exception in step 6, after the state of step 3 was saved (with LoRA dropout's and torch's RNG)."""
    names = {"base": "problem", "vit": "vit_problem"}
    base, problem = (request.getfixturevalue(name) for name in (model, names[model]))
    recipe = dataclasses.replace(RECIPE, context_weight=0.5 if model == "base" else 0.0)
    whole = copy.deepcopy(base)
    run = fit(whole, METHODS[method], problem, recipe)

    with pytest.raises(InterruptedError):
        fit(copy.deepcopy(base), METHODS[method], problem, recipe, out=tmp_path, report=stopped_at(6))
    torch.manual_seed(99)
    resumed = copy.deepcopy(base)
    steps = []
    again = fit(
        resumed, METHODS[method], problem, recipe, out=tmp_path, report=lambda values: steps.append(values["step"])
    )
    assert steps == [4, 5, 6, 7, 8]
    assert same(weights(resumed), weights(whole))
    assert again["history"]["loss"] == run["history"]["loss"]
    assert again["gates"] == run["gates"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_killed_or_asked_to_end_resumes_to_the_same_weights(folders, tmp_path, number):
    """In the middle of a step, in a process of its own; then the same run again, in another."""

    def run(out, kill):
        (tmp_path / out).mkdir(exist_ok=True)
        process = start(train_until_killed, str(folders.root), str(tmp_path / out), kill, number)
        process.join(250)
        return process.exitcode

    assert run("whole", -1) == 0
    assert run("killed", 5) == (-number if number == signal.SIGKILL else 0)
    assert not (tmp_path / "killed/final.pt").exists()
    asked = json.loads((tmp_path / "killed/state/checksums.json").read_text())
    assert "trained.safetensors" in asked
    assert run("killed", -1) == 0
    assert same(torch.load(tmp_path / "whole/final.pt"), torch.load(tmp_path / "killed/final.pt"))


@pytest.mark.parametrize("file", ["run.json", "optimizer.bin", "trained.safetensors"])
def test_a_damaged_state_leaves_the_one_before_it_to_go_on_from(base, problem, tmp_path, file):
    """One bit of a tensor that loads all the same, or half a file."""
    whole = copy.deepcopy(base)
    fit(whole, METHODS["dig"], problem, RECIPE)

    with pytest.raises(InterruptedError):
        fit(copy.deepcopy(base), METHODS["dig"], problem, RECIPE, out=tmp_path, report=stopped_at(8))
    path = tmp_path / "state" / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content[:9] if file == "run.json" else content)
    steps = []
    with pytest.warns(UserWarning, match=f"{path} is corrupt .*: goes on from the state before it, of step 3"):
        fit(base, METHODS["dig"], problem, RECIPE, out=tmp_path, report=lambda values: steps.append(values["step"]))
    assert steps == [4, 5, 6, 7, 8] and same(weights(base), weights(whole))


def test_a_full_disk_is_one_line_and_keeps_the_last_state(base, problem, tmp_path, monkeypatch):
    written, write = [], state.save_file

    def full(tensors, path):
        write(tensors, path)
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError) as caught:
        fit(copy.deepcopy(base), METHODS["dig"], problem, RECIPE, out=tmp_path)
    assert "the state of step 6 can't be written" in str(caught.value) and "No space left" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    monkeypatch.undo()
    steps = []
    fit(base, METHODS["dig"], problem, RECIPE, out=tmp_path, report=lambda values: steps.append(values["step"]))
    assert steps[0] == 4


def test_a_kill_while_the_state_is_replaced_leaves_one_to_resume_from(base, problem, tmp_path, monkeypatch):
    """Between taking the old state away and putting the new one in its place."""
    replace, calls = os.replace, []

    def die(source, target):
        calls.append(str(target))
        if str(target).endswith("/state") and len([c for c in calls if c.endswith("/state")]) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(base), METHODS["hap"], problem, RECIPE, out=tmp_path)
    monkeypatch.undo()
    resumed, whole = copy.deepcopy(base), copy.deepcopy(base)
    fit(resumed, METHODS["hap"], problem, RECIPE, out=tmp_path)
    fit(whole, METHODS["hap"], problem, RECIPE)
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("change", ["weights", "prompts", "class names", "lr", "images"])
def test_a_state_of_another_run_is_refused_and_says_what_differs(base, problem, tmp_path, monkeypatch, change):
    fit(copy.deepcopy(base), METHODS["dig"], problem, ONE_STEP, out=tmp_path)
    recipe, told = ONE_STEP, "the base's weights differ"
    if change == "weights":
        base.visual.conv1.weight.data.mul_(2)
    elif change == "prompts":
        told = "--prompt: was ['a {} square.'], now ['{}']"
        problem = dataclasses.replace(problem, prompts=("{}",))
    elif change == "class names":
        told = f"--class-names: was {list(problem.folders.class_names)}, now ['a', 'b']"
        problem = dataclasses.replace(problem, folders=dataclasses.replace(problem.folders, class_names=("a", "b")))
    elif change == "lr":
        told = "--lr: was 0.005, now 1.0; --gate-lr: was 0.05, now 0.5"
        recipe = dataclasses.replace(ONE_STEP, lr=1.0, gate_lr=0.5)
    elif change == "images":
        told = "the images differ (blue: was 20, now 19)"
        files = (problem.folders.files[0][1:], *problem.folders.files[1:])
        problem = dataclasses.replace(problem, folders=dataclasses.replace(problem.folders, files=files))
    with pytest.raises(ValueError) as caught:
        fit(copy.deepcopy(base), METHODS["dig"], problem, recipe, out=tmp_path)
    wanted = f"out: {tmp_path / 'state'} holds the state of another run ({told}); name another --out, or remove it"
    assert str(caught.value) == wanted


def test_a_state_of_an_older_fastheads_is_gone_on_from(base, problem, tmp_path):
    """A setting that it doesn't have yet counts as the recipe's default, and nothing else is asked of it."""
    fit(copy.deepcopy(base), METHODS["dig"], problem, ONE_STEP, out=tmp_path)
    path = tmp_path / "state/run.json"
    key = json.loads(path.read_text())
    del key["image_counts"], key["recipe"]["weight_decay"]
    path.write_text(json.dumps(key))
    assert ONE_STEP.weight_decay == Recipe().weight_decay
    fit(copy.deepcopy(base), METHODS["dig"], problem, ONE_STEP, out=tmp_path)
    del key["recipe"]["lr"]
    path.write_text(json.dumps(key))
    with pytest.raises(ValueError, match=r"--lr: was 0.0002, now 0.005\)"):
        fit(copy.deepcopy(base), METHODS["dig"], problem, ONE_STEP, out=tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:9])


CORRUPT = {
    "truncated": ("run.json", truncate),
    "binary": ("run.json", lambda path: path.write_bytes(b"\xff\xfe")),
    "empty": ("run.json", lambda path: path.write_text("")),
    "missing": ("run.json", lambda path: path.unlink()),
    "a list": ("run.json", lambda path: path.write_text("[1]")),
    "no settings": ("run.json", lambda path: path.write_text('{"recipe": 3}')),
    "tensors": ("trained.safetensors", truncate),
    "tensors missing": ("trained.safetensors", lambda path: path.unlink()),
    "optimizer": ("optimizer.bin", truncate),
    "progress": ("custom_checkpoint_0.pkl", truncate),
}


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    return {"out": tmp_path_factory.mktemp("one-step")}


@pytest.mark.parametrize(("file", "spoil"), CORRUPT.values(), ids=CORRUPT)
def test_a_damaged_state_is_told_in_our_words(one_step, base, problem, tmp_path, file, spoil):
    if not (one_step["out"] / "state").exists():
        fit(copy.deepcopy(base), METHODS["dig"], problem, ONE_STEP, out=one_step["out"])
    shutil.copytree(one_step["out"] / "state", tmp_path / "state")
    spoil(tmp_path / "state" / file)
    with pytest.raises(ValueError) as caught:
        fit(base, METHODS["dig"], problem, ONE_STEP, out=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"out: {tmp_path / 'state'}") and "is corrupt" in message and "--out" in message
    assert "\n" not in message and (file != "run.json" or f"state/{file}" in message)


def test_every_number_of_a_recipe_is_told_by_an_option_there_is(problem):
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = commands.choices["train"]._option_string_actions
    key = run_key({}, METHODS["hap"], problem, Recipe(), "no")
    assert [name for name in key["recipe"] if f"--{name.replace('_', '-')}" not in options] == []


def test_a_row_of_another_method_by_the_same_name_is_another_run(problem):
    keys = [run_key({}, dataclasses.replace(METHODS[m], id="mine"), problem, Recipe(), "no") for m in ("lora", "hap")]
    assert differences(keys[0], keys[1], Recipe())[0].startswith("--method: was ")


def test_settings_that_change_no_result_do_not_keep_a_run_from_resuming(base, problem, tmp_path):
    fit(copy.deepcopy(base), METHODS["dig"], problem, RECIPE, out=tmp_path)
    other = dataclasses.replace(RECIPE, cache=False, batch_size=7, recompute=2, checkpointing=True, save_every=4)
    fit(base, METHODS["dig"], problem, other, out=tmp_path)


def test_what_is_computed_again_changes_no_result(base, problem, monkeypatch):
    seen, results = [], []
    checkpointed = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("open_clip.transformer.checkpoint", lambda *a, **k: seen.append(1) or checkpointed(*a, **k))
    for own in ({}, {"recompute": 2}, {"checkpointing": True}):
        targets = ("q", "v", "o", "mlp")
        model, recipe = copy.deepcopy(base), dataclasses.replace(ONE_STEP, steps=2, targets=targets, **own)
        seen.clear()
        fit(model, METHODS["hap"], problem, recipe)
        assert bool(seen) == ("checkpointing" in own)
        again = [layer.recompute for layer in head_modules(model)]
        assert again == [bool(own.get("recompute")) and i % 2 == 0 for i in range(len(again))]
        results.append(fastheads.adapter_state_dict(model))
        assert {key.split(".")[-3] for key in results[-1]} == {"attn", "out_proj", "c_fc", "c_proj"}
    for other in results[1:]:
        assert all(relative(other[name], results[0][name]) < 1e-5 for name in other)


def test_a_resnet_that_was_stopped_resumes_with_its_running_statistics(resnet, tmp_path):
    """They are no parameters."""
    base, problem = resnet
    recipe = dataclasses.replace(ONE_STEP, steps=2, lr=1e-3)
    whole = copy.deepcopy(base)
    fit(whole, METHODS["fine-tune"], problem, recipe)

    with pytest.raises(InterruptedError):
        fit(copy.deepcopy(base), METHODS["fine-tune"], problem, recipe, out=tmp_path, report=stopped_at(2))
    fit(base, METHODS["fine-tune"], problem, recipe, out=tmp_path)
    assert same(whole.state_dict(), base.state_dict())
