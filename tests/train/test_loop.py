"""Training: it learns, it is repeatable, and a killed run ends where one that was never killed ends."""

import contextlib
import copy
import dataclasses
import os
import signal

import pytest
import torch
from processes import start
from ranks import train_until_killed

import fastheads
from fastheads.train.evaluation import Score, fit_probe, score, source_splits
from fastheads.train.loop import Recipe, check_run, fit, trainable
from fastheads.train.objectives import METHODS

RECIPE = Recipe(
    steps=8, per_domain=2, lr=5e-3, gate_lr=5e-2, mmd_weight=0.1, evaluate_every=4, save_every=3, cache=True
)


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
    from fastheads.train import data

    opened = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda path: opened.append(path) or decode(path))
    fit(base, METHODS["hap"], problem, RECIPE)
    assert {path.parts[-3] for path in opened} == {"blue", "green"}


def test_gates_have_no_weight_decay(base, problem):
    from fastheads.train.loop import _groups, prepare

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


def test_a_state_of_another_run_is_refused(base, problem, tmp_path):
    fit(copy.deepcopy(base), METHODS["dig"], problem, RECIPE, out=tmp_path)
    other = dataclasses.replace(RECIPE, gate_lr=1e-3)
    with pytest.raises(ValueError, match="state of another run"):
        fit(copy.deepcopy(base), METHODS["dig"], problem, other, out=tmp_path)


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


@pytest.mark.parametrize("change", ["weights", "prompts", "class names", "lr"])
def test_a_state_is_not_resumed_on_another_base_or_other_prompts(base, problem, tmp_path, change):
    fit(copy.deepcopy(base), METHODS["dig"], problem, RECIPE, out=tmp_path)
    recipe = RECIPE
    if change == "weights":
        base.visual.conv1.weight.data.mul_(2)
    elif change == "prompts":
        problem = dataclasses.replace(problem, prompts=("{}",))
    elif change == "class names":
        problem = dataclasses.replace(problem, folders=dataclasses.replace(problem.folders, class_names=("a", "b")))
    else:
        recipe = dataclasses.replace(RECIPE, lr=1.0)
    with pytest.raises(ValueError, match="state of another run"):
        fit(copy.deepcopy(base), METHODS["dig"], problem, recipe, out=tmp_path)


def test_loader_settings_do_not_keep_a_run_from_resuming(base, problem, tmp_path):
    fit(copy.deepcopy(base), METHODS["dig"], problem, RECIPE, out=tmp_path)
    fit(base, METHODS["dig"], problem, dataclasses.replace(RECIPE, cache=False, batch_size=7), out=tmp_path)
