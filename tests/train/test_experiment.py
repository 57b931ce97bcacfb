"""Experiments: what a run records and saves, and that a killed one goes on."""

import dataclasses
import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastheads
from fastheads.demo import digits
from fastheads.demo import run as demo
from fastheads.demo.pretrain import CONFIG, MODEL
from fastheads.train import experiment
from fastheads.train.data import clip_transforms
from fastheads.train.domains import read_domains
from fastheads.train.evaluation import make_problem
from fastheads.train.loop import Recipe
from fastheads.train.objectives import METHODS
from fastheads.train.report import write_report

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
        seeds=seeds,
        recipes=recipes,
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
def whole(once, base, problem):
    if "result" not in once:
        once["watched"] = []
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
        assert torch.tensor(run["gates"]["values"][-1]).shape == (4, 4)
    assert [run["trainable_parameters"] for run in result["runs"][:2]] == [16, 25_616]
    assert [entry["id"] for entry in result["methods"]] == ["dig", "hap"]
    assert result["methods"][0]["lr"] is None and result["methods"][1]["lr"] == 5e-3
    assert result["methods"][0]["mmd_weight"] == 0.1 and result["methods"][0]["context_weight"] is None
    assert result["dataset"]["images"] == {"blue": 20, "green": 20, "red": 20}
    assert result["model"]["name"] == MODEL and result["model"]["pretrained"] == "at random"
    assert result["model"]["parameters"] == sum(p.numel() for p in base.parameters())
    assert (result["model"]["layers"], result["model"]["heads"]) == (4, 4)
    assert result["wall_seconds"] > 0 and torch.__version__.startswith(result["versions"]["torch"])
    assert [name.count("· red ·") for name in whole["watched"]] == [1] * 4


def test_the_record_on_disk_is_the_one_returned_and_makes_a_report(whole, tmp_path):
    assert json.loads((whole["out"] / "results.json").read_text()) == whole["result"]
    page = write_report(whole["result"], tmp_path).read_text()
    assert "Squares" in page and METHODS["dig"].label in page and METHODS["hap"].label in page


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
        assert sorted(path.name for path in folder.iterdir()) == ["adapter", "result.json"]
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


@pytest.mark.parametrize("changed", ["recipe", "weights", "prompts", "precision", "name"])
def test_what_a_result_depends_on_is_run_again_when_it_changes(base, folders, problem, tmp_path, monkeypatch, changed):
    scored = []
    score = experiment.score
    monkeypatch.setattr(experiment, "score", lambda *args: scored.append(1) or score(*args))

    def run(base, problem, recipe=RECIPE, precision="no", base_name="a"):
        before = len(scored)
        options = {"base_name": base_name, "precision": precision}
        experiment.run_method(base, METHODS["zero-shot"], problem, recipe, tmp_path / "run", **options)
        return len(scored) > before

    assert run(base, problem)
    assert not run(base, problem)
    if changed == "recipe":
        assert run(base, problem, dataclasses.replace(RECIPE, steps=3))
    elif changed == "precision":
        assert run(base, problem, precision="bf16")
    elif changed == "name":
        assert run(base, problem, base_name="b")
    elif changed == "weights":
        with torch.no_grad():
            base.visual.proj.mul_(1.5)
        assert run(base, problem)
    else:
        tokenizer = open_clip.get_tokenizer(MODEL)
        asked = ("one {} box.",)
        assert run(base, make_problem(base, tokenizer, folders, "red", problem.transforms, prompts=asked))


def test_a_changed_recipe_trains_again(base, problem, tmp_path):
    first = run_all(base, problem, tmp_path, methods=["dig"], seeds=[0])
    changed = lambda method: dataclasses.replace(recipe_of(method), gate_lr=0.5)  # noqa: E731
    again = run_all(base, problem, tmp_path, methods=["dig"], seeds=[0], recipes=changed)
    assert first["runs"][0]["gates"]["values"][-1] != again["runs"][0]["gates"]["values"][-1]
    assert again["methods"][0]["gate_lr"] == 0.5


def test_zero_shot_and_probe_save_nothing_and_train_no_tensor(base, problem, tmp_path):
    before = {name: p.clone() for name, p in base.state_dict().items()}
    result = run_all(base, problem, tmp_path, methods=["zero-shot", "linear-probe"], seeds=[0])
    for run in result["runs"]:
        folder = tmp_path / "red/seed0" / run["method"]
        assert [path.name for path in folder.iterdir()] == ["result.json"]
        assert run["saved_bytes"] is run["merge_max_difference"] is run["history"] is run["gates"] is None
        assert run["selected_step"] is None and run["peak_memory_mb"] > 0
    zero_shot, probe = result["runs"]
    assert zero_shot["trainable_parameters"] == 0 and zero_shot["seconds"] is None
    assert probe["trainable_parameters"] == 65 and probe["seconds"] > 0
    assert all(torch.equal(before[name], p) for name, p in base.state_dict().items())


def test_fine_tuning_saves_a_checkpoint_that_open_clip_loads(base, problem, tmp_path):
    result = run_all(base, problem, tmp_path, methods=["fine-tune"], seeds=[0])
    path = tmp_path / "red/seed0/fine-tune/model.safetensors"
    assert result["runs"][0]["saved_bytes"] == path.stat().st_size
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.safetensors", "result.json"]
    assert load_file(path).keys() == base.state_dict().keys()
    tuned = open_clip.create_model(MODEL, pretrained=str(path)).eval()
    changed = {name for name, p in tuned.state_dict().items() if not torch.equal(p, base.state_dict()[name])}
    assert changed and all(name.startswith("visual.") for name in changed)
    again = experiment.score(tuned, problem, "red", "all", RECIPE).accuracy
    assert again == result["runs"][0]["accuracy"]["red"]
    assert len(experiment.table(result).splitlines()) == 3  # with the average of both encoders
    assert "WiSE-FT" in experiment.table(result)


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
    experiment.save_stock(base, tmp_path / "model.safetensors")
    assert {name for _, name in replaced} == {"results.json", "model.safetensors"}
    assert all(source.endswith(".tmp") for source, _ in replaced)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_resnet_is_scored_and_described_without_layers(folders, tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    text = json.loads(CONFIG.read_text())["text_cfg"]
    torch.manual_seed(0)
    base = open_clip.CLIP(32, vision, text).eval()
    transforms = clip_transforms(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip=False)
    problem = make_problem(base, open_clip.get_tokenizer(MODEL), folders, "red", transforms, with_contexts=False)
    result = run_all(base, problem, tmp_path, methods=["zero-shot"], seeds=[0])
    assert result["model"]["layers"] is None and result["model"]["heads"] is None
    assert write_report(result, tmp_path).is_file()


# ------------------------------------------------------------------------------------------------------- demo


@pytest.mark.slow
def test_the_demo_runs_every_method_and_reports_each(base, tmp_path, monkeypatch):
    """With a random model instead of the pretrained one, a tenth of the digits, two steps."""
    monkeypatch.setattr(digits, "PER_CLASS", 3)

    def pretend(cache, *, progress):
        cache.mkdir(parents=True)
        save_file(base.state_dict(), cache / "random.safetensors")
        progress(1, 1, 0.0)
        return cache / "random.safetensors"

    monkeypatch.setattr(demo, "pretrain", pretend)
    result, page = demo.run_demo(tmp_path / "out", tmp_path / "cache", steps=2)
    assert [run["method"] for run in result["runs"]] == list(METHODS)
    assert all(run["target"] == demo.TARGET for run in result["runs"])
    assert read_domains(tmp_path / "out/data").domains == digits.DOMAINS
    text = page.read_text()
    assert page == tmp_path / "out/report.html"
    for name, method in METHODS.items():
        assert method.label.replace("&", "&amp;") in text, name
    assert json.loads((tmp_path / "out/results.json").read_text()) == result
    assert result["limits"] and result["tuning"]["note"]
    table = experiment.table(result)
    assert all(method.label in table for method in METHODS.values())
