"""The demo's run: every method, two seeds of the adapters, one report; and the search behind its settings."""

import json

import open_clip
import pytest
import torch
from commands import listing

from fastheads.cli import commands as cli
from fastheads.demo import base as demo_base
from fastheads.demo import icons
from fastheads.demo import run as demo
from fastheads.train import experiment
from fastheads.train.data.domains import read_domains
from fastheads.train.methods import METHODS


@pytest.fixture
def small_demo(monkeypatch):
    """A random model instead of the pretrained one, three classes of two drawings."""
    found = icons.drawings()
    few = {domain: {name: by_class[name][:2] for name in list(by_class)[:3]} for domain, by_class in found.items()}
    monkeypatch.setattr(icons, "drawings", lambda: few)
    demo_base.register()
    torch.manual_seed(0)
    base = open_clip.create_model(demo_base.MODEL).eval()
    monkeypatch.setattr(demo, "load", lambda: base)


def test_the_demo_with_other_steps_in_the_same_folder_is_refused(small_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "METHODS", {"dig": METHODS["dig"]})
    monkeypatch.setattr(demo, "write_report", lambda *_, **__: None)
    monkeypatch.setattr(demo, "beside_plain", lambda *_: [])
    demo.run_demo(tmp_path, steps=1)
    before = listing(tmp_path)
    assert cli.main(["demo", "--steps", "2", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path / demo.TARGET}" in line and "--steps: was 1, now 2" in line and "name another --out" in line
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_the_demo_runs_every_method_and_reports_each(small_demo, tmp_path):
    """Two steps of each; two seeds of the adapters."""
    result, page = demo.run_demo(tmp_path / "out", steps=2)
    seeds = {name: [run["seed"] for run in result["runs"] if run["method"] == name] for name in METHODS}
    assert seeds == {name: [0, 1] if method.trains == "adapter" else [0] for name, method in METHODS.items()}
    assert all(run["target"] == demo.TARGET for run in result["runs"])
    folders = read_domains(tmp_path / "out/data")
    assert folders.domains == icons.DOMAINS and len(folders.classes) == 3
    text = page.read_text()
    assert page == tmp_path / "out/report.html"
    for name, method in METHODS.items():
        assert method.label.replace("&", "&amp;") in text, name
    assert json.loads((tmp_path / "out/results.json").read_text()) == result
    assert result["limits"] and result["tuning"]["note"]
    assert result["dataset"]["errors"] == "class" and set(result["captions"]) == set(icons.DOMAINS)
    for told in result["captions"].values():
        assert 0 <= told["plain"] <= 1 and all(
            sum(words.values()) == pytest.approx(1) for words in told["words"].values()
        )
    plain = result["beside_plain"][0]
    assert plain["method"] == "hap" and min(plain["seconds"], plain["plain_seconds"]) > 0
    assert 0 < plain["memory_mb"] < plain["plain_memory_mb"]
    table = experiment.table(result)
    assert all(method.label in table for method in METHODS.values())


def test_the_search_takes_the_best_on_source_validation_and_never_scores_the_target(small_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "GRID", {"ha-lora": {"lr": (1e-3, 3e-2)}, "hap": {"gate_lr": (1e-2,), "mmd_weight": (0.1,)}}
    )
    scored = []
    run_method = demo.run_method

    def watched(base, method, problem, *args, **options):
        run = run_method(base, method, problem, *args, **options)
        scored.append((problem.target, set(run["accuracy"])))
        return run

    monkeypatch.setattr(demo, "run_method", watched)
    result = demo.tune_demo(tmp_path, targets=["neon"], steps=2)
    assert len(scored) == 4 and all(target != "neon" and "neon" not in parts for target, parts in scored)
    rows = [row for row in result["rows"] if row["method"] == "ha-lora"]
    best = max(rows, key=lambda row: (round(row["validation"], 6), -row["validation_loss"]))
    assert result["chosen"]["neon"] == {
        "ha-lora": {"lr": best["lr"]},
        "hap": {"lr": best["lr"], "gate_lr": 1e-2, "mmd_weight": 0.1},
    }
    assert json.loads((tmp_path / "tuning.json").read_text())["chosen"] == result["chosen"]
    again = demo.tune_demo(tmp_path, targets=["neon"], steps=2)  # from the runs that are there
    assert again["rows"] == result["rows"]


@pytest.mark.parametrize("target", icons.DOMAINS)
def test_the_settings_are_those_of_the_committed_search(target):
    """Each the best of its rows; learning rates lie inside their grids."""
    found = json.loads((demo_base.CONFIG.parents[2] / demo.TUNING_RESULT).read_text())
    for method, settings in found["chosen"][target].items():
        recipe = demo.recipe_of(method, target)
        assert {name: getattr(recipe, name) for name in settings} == settings
        for option, values in demo.GRID[method].items():
            rows = [r for r in found["rows"] if (r["target"], r["method"], r["option"]) == (target, method, option)]
            assert [row[option] for row in rows] == list(values)
            best = max(rows, key=lambda row: (round(row["validation"], 6), -row["validation_loss"]))
            assert settings[option] == best[option]
            assert option != "lr" or min(values) < settings["lr"] < max(values)
    assert demo.recipe_of("car-ft", target).context_weight > 0 == demo.recipe_of("fine-tune", target).context_weight
