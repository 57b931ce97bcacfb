"""Experiments: what a run records and saves, and that a killed one goes on."""

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import standins
import torch
from safetensors.torch import load_file

import fastheads
from fastheads.demo.base import MODEL
from fastheads.train import experiment, loop
from fastheads.train.earlier import hashes
from fastheads.train.methods import METHODS
from fastheads.train.models import save
from fastheads.train.recipe import Recipe
from fastheads.train.report.page import write_report

RECIPE = Recipe(steps=2, per_domain=2, lr=5e-3, gate_lr=5e-2, evaluate_every=2, save_every=1, cache=True)
TIMES = {"seconds", "images_per_second", "peak_memory_mb"}
KEYS = {
    *("method", "target", "seed", "sources", "accuracy", "selected_step", "steps", "seconds", "images_per_second"),
    *("peak_memory_mb", "trainable_parameters", "saved_bytes", "merge_max_difference", "history", "gates"),
}


def recipe_of(method):
    return dataclasses.replace(RECIPE, mmd_weight=0.1, context_weight=float(METHODS[method].context))


def run_all(base, problem, out, *, methods=("dig", "hap"), seeds=(0, 1), recipes=recipe_of, **options):
    return experiment.run_experiment(
        base,
        lambda target, seed: problem,
        problem.folders,
        methods=methods,
        targets=["red"],
        seeds=lambda method: seeds,
        recipes=lambda method, target: recipes(method),
        out=out,
        title="Squares",
        command="fastheads train",
        base_name=f"{MODEL} at random",
        dataset_name="squares",
        **options,
    )


def repeatable(run):
    return {key: value for key, value in run.items() if key not in TIMES}


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The experiment of two methods and two seeds, run once for all tests that only look at it."""
    return {"out": tmp_path_factory.mktemp("once")}


@pytest.fixture
def whole(once, base, problem, monkeypatch):
    if "result" not in once:
        once["watched"], once["hashed"] = [], []
        for module in (experiment, loop):
            monkeypatch.setattr(module, "hashes", lambda *of: once["hashed"].append(of) or hashes(*of))
        watch = lambda name: once["watched"].append(name)  # noqa: E731
        once["result"] = run_all(base, problem, once["out"], watch=watch)
    return once


def test_every_run_is_recorded_with_what_the_report_reads(whole, base):
    result = whole["result"]
    assert [(r["method"], r["target"], r["seed"]) for r in result["runs"]] == [
        ("dig", "red", 0),
        ("hap", "red", 0),
        ("dig", "red", 1),
        ("hap", "red", 1),
    ]
    for run in result["runs"]:
        assert set(run) >= KEYS
        assert run["sources"] == ["blue", "green"] and set(run["accuracy"]) == {"blue", "green", "red"}
        assert all(0 <= value <= 1 for value in run["accuracy"].values())
        assert run["steps"] == run["selected_step"] == 2
        assert run["seconds"] > 0 and run["images_per_second"] > 0
        assert len(run["history"]["loss"]) == len(run["history"]["mmd"]) == 2
        assert [step for step, _ in run["history"]["validation"]] == [2]
        assert torch.tensor(run["gates"]["values"][-1]).shape == (6, 4)
        images, right = run["by_class"]["images"], run["by_class"]["right"]
        assert images == [10, 10] and sum(right) == round(20 * run["accuracy"]["red"])
        assert sum(count for _, _, count in run["confusions"]) == 20 - sum(right)
        assert sum(run["calibration"]["images"]) == 20 and run["calibration"]["right"] != images
    assert [run["trainable_parameters"] for run in result["runs"][:2]] == [24, 30_744]
    assert [entry["id"] for entry in result["methods"]] == ["dig", "hap"]
    assert result["methods"][0]["lr"] is None and result["methods"][1]["lr"] == 5e-3
    assert result["methods"][0]["mmd_weight"] == 0.1 and result["methods"][0]["context_weight"] is None
    assert result["dataset"]["images"] == {"blue": 20, "green": 20, "red": 20}
    assert result["model"]["name"] == MODEL and result["model"]["pretrained"] == "at random"
    assert result["model"]["parameters"] == sum(p.numel() for p in base.parameters())
    assert (result["model"]["layers"], result["model"]["heads"]) == (6, 4)
    assert result["wall_seconds"] > 0 and torch.__version__.startswith(result["versions"]["torch"])
    assert [name.count("· red ·") for name in whole["watched"]] == [1] * 4


def test_the_record_on_disk_is_the_one_returned_and_makes_a_report(whole, tmp_path):
    assert json.loads((whole["out"] / "results.json").read_text()) == whole["result"]
    page = write_report(whole["result"], tmp_path).read_text()
    assert "Squares" in page and METHODS["dig"].label in page and METHODS["hap"].label in page


def test_images_and_weights_are_hashed_once(whole):
    assert len(whole["hashed"]) == 1


def test_merging_keeps_the_features_and_memory_is_measured(whole):
    for run in whole["result"]["runs"]:
        assert 0 <= run["merge_max_difference"] < 1e-5
        assert run["peak_memory_mb"] > 50  # a process with torch in it
    assert whole["result"]["peak_memory_mb"] == max(run["peak_memory_mb"] for run in whole["result"]["runs"])


def test_merge_difference_would_show_a_wrong_merge(base, problem, tmp_path, monkeypatch):
    """So that the small one above means something: a merge that forgets the deltas and gates."""
    monkeypatch.setattr(experiment, "merge", fastheads.unpatch)
    result = run_all(base, problem, tmp_path, methods=["hap"], seeds=[0])
    assert result["runs"][0]["merge_max_difference"] > 1e-3


def test_an_adapter_is_saved_per_run_and_no_state_is_left(whole, base):
    for run in whole["result"]["runs"]:
        folder = whole["out"] / "red" / f"seed{run['seed']}" / run["method"]
        assert sorted(path.name for path in folder.iterdir()) == ["adapter", "answers.json", "result.json"]
        assert run["saved_bytes"] == sum(path.stat().st_size for path in (folder / "adapter").iterdir())
    folder = whole["out"] / "red/seed1/hap/adapter"
    fastheads.load_adapter(base, folder)
    now = fastheads.gates(base)
    assert now.tolist() == whole["result"]["runs"][3]["gates"]["values"][-1]  # of the last step, the one kept
    assert (now - 1).abs().max() > 1e-3


def test_the_table_has_a_mean_and_an_error_per_method_and_target(whole):
    lines = experiment.table(whole["result"]).splitlines()
    assert len(lines) == 3 and "red" in lines[0] and lines[0].endswith("mean")
    for line, method in zip(lines[1:], ("dig", "hap"), strict=True):
        values = [100 * run["accuracy"]["red"] for run in whole["result"]["runs"] if run["method"] == method]
        mean, error = sum(values) / 2, abs(values[0] - values[1]) / 2  # standard error of two: half their distance
        assert line.startswith(METHODS[method].label)
        assert line.split()[-4:] == [f"{mean:.1f}", "±", f"{error:.1f}", f"{mean:.1f}"]
    assert len({len(line) for line in lines}) == 1


def test_the_table_of_known_numbers():
    runs = [("a", "x", 0.5), ("a", "x", 0.7), ("a", "y", 0.25), ("a", "y", 0.25)]
    record = {
        "runs": [{"method": m, "target": t, "accuracy": {t: value}} for m, t, value in runs],
        "methods": [{"id": "a", "label": "A"}],
    }
    head, row = experiment.table(record).splitlines()
    assert head.split()[-3:] == ["x", "y", "mean"]
    assert row.split() == ["A", "60.0", "±", "10.0", "25.0", "±", "0.0", "42.5"]


def test_done_runs_are_not_repeated(whole, base, problem, monkeypatch):
    for name in ("fit", "score", "merge"):
        monkeypatch.setattr(experiment, name, lambda *_, **__: pytest.fail("done again"))
    again = run_all(base, problem, whole["out"])
    assert again["runs"] == whole["result"]["runs"]
    assert again["wall_seconds"] >= sum(run["seconds"] for run in again["runs"])  # not of the reading alone


def test_a_killed_experiment_goes_on_where_it_was(whole, base, problem, tmp_path, monkeypatch):
    """An exception in the second step of the third run: two runs are done, the third goes on from its first step."""

    class Kill(BaseException):
        pass

    started = []

    def watch(name):
        started.append(name)

        def report(values):
            if len(started) == 3 and values["step"] == 2:
                raise Kill

        return report

    with pytest.raises(Kill):
        run_all(base, problem, tmp_path, watch=watch)
    assert not (tmp_path / "results.json").exists()
    done = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("result.json"))
    assert done == ["red/seed0/dig", "red/seed0/hap"]
    stamps = {name: (tmp_path / name / "result.json").stat().st_mtime_ns for name in done}

    fit, fitted, steps = experiment.fit, [], []

    def spy(model, method, problem, recipe, **options):
        fitted.append((method.id, recipe.seed))
        return fit(model, method, problem, recipe, **options)

    monkeypatch.setattr(experiment, "fit", spy)
    resumed = run_all(base, problem, tmp_path, watch=lambda name: lambda values: steps.append(values["step"]))
    assert fitted == [("dig", 1), ("hap", 1)]
    assert steps == [2, 1, 2]
    assert stamps == {name: (tmp_path / name / "result.json").stat().st_mtime_ns for name in done}
    assert [repeatable(run) for run in resumed["runs"]] == [repeatable(run) for run in whole["result"]["runs"]]


@pytest.mark.parametrize("changed", ["seed", "weights", "prompts", "precision", "name"])
def test_a_result_of_another_run_is_kept_and_refused(base, problem, tmp_path, monkeypatch, changed):
    run = lambda base, problem, recipe=RECIPE, **options: experiment.run_method(  # noqa: E731
        base, METHODS["zero-shot"], problem, recipe, tmp_path, **{"base_name": "a", "precision": "no"} | options
    )
    first = run(base, problem)
    content = (tmp_path / "result.json").read_bytes()
    monkeypatch.setattr(experiment, "score", lambda *_: pytest.fail("scored again"))
    assert run(base, problem) == first
    assert run(base, problem, dataclasses.replace(RECIPE, lr=1.0, steps=9)) == first  # nothing was trained
    if changed == "seed":
        told, call = "--seed: was 0, now 1", lambda: run(base, problem, dataclasses.replace(RECIPE, seed=1))
    elif changed == "precision":
        told, call = "--precision: was 'no', now 'bf16'", lambda: run(base, problem, precision="bf16")
    elif changed == "name":
        told, call = "--model, --pretrained: was 'a', now 'b'", lambda: run(base, problem, base_name="b")
    elif changed == "weights":
        base.visual.proj.data.mul_(1.5)
        told, call = "the base's weights differ", lambda: run(base, problem)
    else:
        told = "--prompt: was ['a {} square.'], now ['one {} box.']"
        call = lambda: run(base, dataclasses.replace(problem, prompts=("one {} box.",)))  # noqa: E731
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == (
        f"out: {tmp_path} holds the result of another run ({told}); name another --out, or remove it"
    )
    assert (tmp_path / "result.json").read_bytes() == content


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_recipe_overwrites_no_adapter_and_is_refused_before_anything_runs(whole, base, problem, monkeypatch):
    """Also where other runs would come first."""
    before = contents(whole["out"])
    for name in ("fit", "score"):
        monkeypatch.setattr(experiment, name, lambda *_, **__: pytest.fail("begun"))
    changed = lambda method: dataclasses.replace(recipe_of(method), lr=0.1)  # noqa: E731
    for methods in (["dig", "hap"], ["zero-shot", "hap"]):
        with pytest.raises(ValueError, match=r"holds the result of another run \(--lr: was 0.005, now 0.1\)"):
            run_all(base, problem, whole["out"], methods=methods, recipes=changed)
    assert contents(whole["out"]) == before


DAMAGED = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "no run": lambda text: json.dumps({"key": json.loads(text)["key"]}),
    "no key": lambda text: json.dumps({"run": json.loads(text)["run"]}),
    "half a run": lambda text: json.dumps(json.loads(text) | {"run": {"method": "hap"}}),
}


@pytest.mark.parametrize("spoil", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_result_is_told_in_our_words(whole, base, problem, tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(experiment, "fit", lambda *_, **__: pytest.fail("trained again"))
    folder = tmp_path / "red/seed1/hap"
    shutil.copytree(whole["out"] / "red/seed1/hap", folder)
    path = folder / "result.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError) as caught:
        run_all(base, problem, tmp_path)
    assert str(caught.value).startswith(f"out: {path} is corrupt (") and "--out" in str(caught.value)


def test_zero_shot_and_probe_save_nothing_and_train_no_tensor(base, problem, tmp_path):
    before = {name: p.clone() for name, p in base.state_dict().items()}
    result = run_all(base, problem, tmp_path, methods=["zero-shot", "linear-probe"], seeds=[0])
    for run in result["runs"]:
        folder = tmp_path / "red/seed0" / run["method"]
        assert sorted(path.name for path in folder.iterdir()) == ["answers.json", "result.json"]
        assert run["saved_bytes"] is run["merge_max_difference"] is run["history"] is run["gates"] is None
        assert run["selected_step"] is None and run["peak_memory_mb"] > 0
    zero_shot, probe = result["runs"]
    assert zero_shot["trainable_parameters"] == 0 and zero_shot["seconds"] is None
    assert probe["trainable_parameters"] == 2 * 129 and probe["seconds"] > 0
    assert all(torch.equal(before[name], p) for name, p in base.state_dict().items())


def test_fine_tuning_saves_a_checkpoint_that_open_clip_loads(base, problem, tmp_path):
    recipe = dataclasses.replace(RECIPE, wise_ft=(0, 1))
    result = run_all(base, problem, tmp_path, methods=["fine-tune"], seeds=[0], recipes=lambda _: recipe)
    path = tmp_path / "red/seed0/fine-tune/model.safetensors"
    assert result["runs"][0]["saved_bytes"] == path.stat().st_size
    assert sorted(p.name for p in path.parent.iterdir()) == ["answers.json", "model.safetensors", "result.json"]
    assert load_file(path).keys() == base.state_dict().keys()
    tuned = open_clip.create_model(MODEL, pretrained=str(path)).eval()
    changed = {name for name, p in tuned.state_dict().items() if not torch.equal(p, base.state_dict()[name])}
    assert changed and all(name.startswith("visual.") for name in changed)
    again = experiment.score(tuned, problem, "red", "all", RECIPE).accuracy
    assert again == result["runs"][0]["accuracy"]["red"]
    assert len(experiment.table(result).splitlines()) == 3  # with the average of both encoders
    assert "WiSE-FT" in experiment.table(result)
    original, half, whole = (each["accuracy"] for each in result["runs"][0]["wise_ft"])
    assert original["red"] == experiment.score(base, problem, "red", "all", RECIPE).accuracy
    assert whole == result["runs"][0]["accuracy"] and half == result["runs"][0]["wise_ft_accuracy"]


def test_a_kill_while_results_are_replaced_leaves_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "results.json"
    experiment.write_json(path, {"old": 1})

    def die(source, target):
        assert json.loads(Path(source).read_text()) == {"new": 2}  # whole, before it takes the old one's place
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        experiment.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    monkeypatch.undo()
    experiment.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}


def test_results_and_checkpoints_are_written_beside_and_renamed(whole, base, problem, tmp_path, monkeypatch):
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replaced.append((str(a), Path(b).name)) or replace(a, b))
    run_all(base, problem, whole["out"])
    save(base, tmp_path / "model.safetensors")
    assert {name for _, name in replaced} == {"results.json", "model.safetensors"}
    assert all(source.endswith(".tmp") for source, _ in replaced)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_other_towers_are_scored_trained_whole_and_described_without_layers(other_base, other_problem, tmp_path):
    before = copy.deepcopy(other_base.state_dict())
    recipe = lambda method: dataclasses.replace(recipe_of(method), steps=1, lr=1e-4)  # noqa: E731
    options = {"methods": ["zero-shot", "car-ft"], "seeds": [0], "recipes": recipe}
    result = run_all(other_base, other_problem, tmp_path, **options)
    assert result["model"]["layers"] is None and result["model"]["heads"] is None
    assert write_report(result, tmp_path).is_file()
    tuned = load_file(tmp_path / "red/seed0/car-ft/model.safetensors")
    changed = {name for name in before if not torch.equal(tuned[name], before[name])}
    assert changed and all(name.startswith("visual.") for name in changed)


def test_a_timm_tower_is_adapted(timm_base, timm_problem, tmp_path):
    again = copy.deepcopy(timm_base)
    recipe = lambda method: dataclasses.replace(recipe_of(method), steps=1, lr=1e-4)  # noqa: E731
    result = run_all(timm_base, timm_problem, tmp_path, methods=["hap"], seeds=[0], recipes=recipe)
    assert (result["model"]["layers"], result["model"]["heads"]) == (6, 2)
    assert write_report(result, tmp_path).is_file()
    fastheads.load_adapter(again, tmp_path / "red/seed0/hap/adapter")
    assert any(p.count_nonzero() for p in fastheads.gate_parameters(again))


def test_a_tower_without_attention_is_described_without_layers():
    model = standins.clip()
    del model.visual.transformer.resblocks[0].attn
    about = experiment._about(model, "tiny at random")
    assert about["layers"] is about["heads"] is None
