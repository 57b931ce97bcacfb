"""Training: it learns, it is repeatable, and a killed run ends where one that was never killed ends."""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import shutil
import signal

import pytest
import standins
import torch
from processes import start
from ranks import train_until_killed

import fastheads
from fastheads.cli.arguments import parser
from fastheads.train.earlier import run_key
from fastheads.train.evaluation import Score, fit_probe, score, source_splits
from fastheads.train.loop import fit, prepare, trainable
from fastheads.train.objectives import METHODS
from fastheads.train.recipe import Recipe, check_run

RECIPE = Recipe(
    steps=8, per_domain=2, lr=5e-3, gate_lr=5e-2, mmd_weight=0.1, evaluate_every=4, save_every=3, cache=True
)


ONE_STEP = dataclasses.replace(RECIPE, steps=1, evaluate_every=1, save_every=1)


def weights(model):
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_lowers_the_loss_and_reports_each_step(base, problem):
    seen = []
    recipe = dataclasses.replace(RECIPE, steps=30, evaluate_every=30, lr=1e-3)
    run = fit(base, METHODS["fine-tune"], problem, recipe, report=seen.append)
    assert [values["step"] for values in seen] == list(range(1, 31))
    assert {"loss", "cross_entropy", "images_per_second", "steps"} <= set(seen[0])
    assert sum(v["loss"] for v in seen[-5:]) < 0.7 * sum(v["loss"] for v in seen[:5])
    assert run["selected_step"] == 30 and len(run["history"]["validation"]) == 1


def test_histories_hold_losses_and_gates_over_time(base, problem):
    run = fit(base, METHODS["hap"], problem, RECIPE)
    assert run["history"]["step"] == list(range(1, 9))
    assert len(run["history"]["mmd"]) == len(run["history"]["loss"]) == 8
    assert run["gates"]["step"][0] == 0 and torch.tensor(run["gates"]["values"][0]).eq(1).all()
    assert torch.tensor(run["gates"]["values"][-1]).shape == (4, 4)
    assert not torch.tensor(run["gates"]["values"][-1]).eq(1).any()


def test_the_best_weights_on_source_validation_are_kept(base, problem, monkeypatch):
    from fastheads.train import loop

    accuracies = iter([0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.4, 0.4])  # two sources, four evaluations; ties: lower loss
    losses = iter([1.0, 1.0, 0.5, 0.5, 0.6, 0.6, 0.1, 0.1])
    seen = []

    def pretend(model, *_):
        seen.append(weights(model))
        return Score(next(accuracies), next(losses), 4)

    monkeypatch.setattr(loop, "score", pretend)
    run = fit(base, METHODS["hap"], problem, dataclasses.replace(RECIPE, evaluate_every=2))
    assert run["selected_step"] == 4
    assert same(weights(base), seen[2])


def test_the_target_is_never_loaded_in_training(base, problem, monkeypatch):
    from fastheads.train.data import batches as data

    opened = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda path: opened.append(path) or decode(path))
    fit(base, METHODS["hap"], problem, RECIPE)
    assert {path.parts[-3] for path in opened} == {"blue", "green"}


def test_gates_have_no_weight_decay(base, problem):
    from fastheads.train.loop import _groups

    prepare(base, METHODS["hap"])
    decay = {id(p): group["weight_decay"] for group in _groups(base, RECIPE) for p in group["params"]}
    assert all(decay[id(p)] == 0 for p in fastheads.gate_parameters(base))
    assert all(decay[id(p)] == RECIPE.weight_decay for p in fastheads.lora_parameters(base))


@pytest.mark.parametrize("method", ["hap", "car-ft"])
def test_a_stopped_run_resumes_to_the_same_weights(base, problem, tmp_path, method):
    """Stopped by an exception in step 6, after the state of step 3 was saved (with LoRA dropout's and torch's RNG)."""
    recipe = dataclasses.replace(RECIPE, context_weight=0.5)
    whole = copy.deepcopy(base)
    run = fit(whole, METHODS[method], problem, recipe)

    class StopError(Exception):
        pass

    def stop(values):
        if values["step"] == 6:
            raise StopError

    with pytest.raises(StopError):
        fit(copy.deepcopy(base), METHODS[method], problem, recipe, out=tmp_path, report=stop)
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


def test_a_run_killed_by_the_system_resumes_to_the_same_weights(folders, tmp_path):
    """SIGKILL in the middle of a step, in a process of its own; then the same run again, in another."""

    def run(out, kill):
        (tmp_path / out).mkdir(exist_ok=True)
        process = start(train_until_killed, str(folders.root), str(tmp_path / out), kill)
        process.join(250)
        return process.exitcode

    assert run("whole", -1) == 0
    assert run("killed", 5) == -signal.SIGKILL
    assert not (tmp_path / "killed/final.pt").exists()
    assert run("killed", -1) == 0
    assert same(torch.load(tmp_path / "whole/final.pt"), torch.load(tmp_path / "killed/final.pt"))


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


def test_bf16_mixed_precision_trains(base, problem):
    run = fit(base, METHODS["hap"], problem, dataclasses.replace(RECIPE, steps=2), precision="bf16")
    assert all(torch.isfinite(torch.tensor(run["history"]["loss"])))
    assert all(p.dtype == torch.float32 for p in trainable(base).values())


def test_linear_probe_learns_the_sources(base, problem):
    probe = fit_probe(base, problem, RECIPE)
    assert probe.parameters == problem.classifier.shape[1] + 1  # two classes: one row of weights and a bias
    assert probe.score(base, problem, "blue", "training", RECIPE).accuracy > 0.9
    assert score(base, problem, "red", "all", RECIPE).images == 20


def test_a_probe_refuses_sources_without_a_class(base, folders, problem):
    dark = {name: [i for i in indices if folders.files[folders.index(name)][i][1] == 0]
            for name, indices in problem.training.items()}  # fmt: skip
    with pytest.raises(ValueError, match=r"no image of class 'light'.*\(blue: 8, green: 7\)"):
        fit_probe(base, dataclasses.replace(problem, training=dark), RECIPE)


@pytest.mark.parametrize(
    ("sources", "message"),
    [([], "sources"), ("blue", "sources"), (["red"], "the target 'red'"), (["blue", "mauve"], "no domain 'mauve'")],
)
def test_sources_must_be_other_domains(folders, sources, message):
    with pytest.raises(ValueError, match=message):
        source_splits(folders, "red", sources)


def test_sources_are_all_but_the_target_or_those_named_split_alike(folders):
    whole = source_splits(folders, "red", seed=3)
    assert list(whole) == ["blue", "green"]
    assert source_splits(folders, "red", ["green"], seed=3) == {"green": whole["green"]}
    assert list(source_splits(folders, "red", ["green", "blue"])) == ["blue", "green"]


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("per_domain", 1.5), ("lr", 0.0), ("gate_lr", float("nan")), ("mmd_weight", -1)]
)
def test_a_recipe_refuses_bad_numbers(option, value):
    with pytest.raises(ValueError, match=option):
        Recipe(**{option: value})


def test_a_loss_that_is_not_finite_stops_the_run(base, problem):
    with pytest.raises(FloatingPointError, match="step"):
        fit(base, METHODS["fine-tune"], problem, dataclasses.replace(RECIPE, lr=1e30))


@pytest.mark.parametrize("method", ["fine-tune", "ha-lora"])
def test_a_context_weight_works_with_any_trained_method(base, problem, method):
    run = fit(base, METHODS[method], problem, dataclasses.replace(RECIPE, steps=3, context_weight=0.5))
    assert run["history"]["context_kl"][0] == pytest.approx(0, abs=1e-6) and run["history"]["context_kl"][-1] > 0


def test_fp16_with_the_inner_gradient_of_the_embedding_mmd_is_refused(base, problem):
    recipe = dataclasses.replace(RECIPE, mmd_features="embedding")
    with pytest.raises(ValueError, match="precision"):
        fit(base, METHODS["hap"], problem, recipe, precision="fp16")


@pytest.mark.parametrize(
    ("method", "changes", "fits"),
    [
        ("hap", {}, False),
        ("dig", {}, False),
        ("ha-lora", {}, True),
        ("hap", {"mmd_kernel": "domainbed"}, True),
        ("hap", {"mmd_kernel": "dan"}, True),
        ("hap", {"mmd_weight": 0.0}, True),
        ("hap", {"per_domain": 2}, True),
    ],
)
def test_an_mmd_of_one_image_a_domain_is_refused_before_anything_is_changed(base, problem, method, changes, fits):
    recipe = dataclasses.replace(RECIPE, **{"per_domain": 1, "steps": 1, **changes})
    check = contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r"per_domain: got 1.*mmd_kernel")
    with check:
        check_run(METHODS[method], recipe)
    if not fits:
        before = list(base.state_dict())
        with pytest.raises(ValueError, match="per_domain"):
            fit(base, METHODS[method], problem, recipe)
        assert list(base.state_dict()) == before


@pytest.mark.parametrize("change", ["weights", "prompts", "class names", "lr", "processes", "images"])
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
    else:
        told = "the number of processes: was 2, now 1"
        path = tmp_path / "state/run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
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


def test_loader_settings_do_not_keep_a_run_from_resuming(base, problem, tmp_path):
    fit(copy.deepcopy(base), METHODS["dig"], problem, RECIPE, out=tmp_path)
    fit(base, METHODS["dig"], problem, dataclasses.replace(RECIPE, cache=False, batch_size=7), out=tmp_path)


# ------------------------------------------------------------------------------ towers that are not patched


def other_attention():
    model = standins.clip()
    model.visual.transformer.resblocks[0].attn = torch.nn.Linear(2, 2)
    return model


def no_attention():
    model = standins.clip()
    del model.visual.transformer.resblocks[1].attn
    return model


def no_layers():
    model = standins.clip()
    model.visual.transformer.resblocks = torch.nn.ModuleList()
    return model


ODD = {"another attention": other_attention, "no attention": no_attention, "no layers": no_layers}


def assert_refused(model, method):
    """In the words of patch, with nothing changed."""
    before = standins.snapshot(model)
    with pytest.raises(TypeError, match="model: ") as wanted:
        fastheads.patch(model)
    with pytest.raises(TypeError) as told:
        prepare(model, METHODS[method])
    assert str(told.value) == str(wanted.value)
    standins.assert_unchanged(model, before)


ADAPTERS = [method.id for method in METHODS.values() if method.trains == "adapter"]


@pytest.mark.parametrize("method", ADAPTERS)
def test_methods_with_adapters_refuse_other_towers(other_base, method):
    assert_refused(other_base, method)


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("build", ODD.values(), ids=ODD)
def test_methods_with_adapters_refuse_odd_towers(build, method):
    assert_refused(build(), method)


def test_a_resnet_that_was_stopped_resumes_with_its_running_statistics(resnet, tmp_path):
    """They are no parameters."""
    base, problem = resnet
    recipe = dataclasses.replace(ONE_STEP, steps=2, lr=1e-3)
    whole = copy.deepcopy(base)
    fit(whole, METHODS["fine-tune"], problem, recipe)

    def stop(values):
        if values["step"] == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(copy.deepcopy(base), METHODS["fine-tune"], problem, recipe, out=tmp_path, report=stop)
    fit(base, METHODS["fine-tune"], problem, recipe, out=tmp_path)
    assert same(whole.state_dict(), base.state_dict())


def test_the_best_weights_come_with_their_running_statistics(resnet, monkeypatch):
    from fastheads.train import loop

    base, problem = resnet
    scores = iter([0.9] * 2 + [0.1] * 4)  # two sources, three evaluations
    monkeypatch.setattr(loop, "score", lambda *_: Score(next(scores), 1.0, 4))
    recipe = dataclasses.replace(ONE_STEP, steps=3, evaluate_every=1)
    assert fit(base, METHODS["fine-tune"], problem, recipe)["selected_step"] == 1
    assert base.visual.bn1.num_batches_tracked == 1
