"""The demo's run: every method, two seeds of the adapters, one report; and the search behind its settings."""

import json

import open_clip
import pytest
import torch
from commands import listing
from pictures import few_icons

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
    few_icons(monkeypatch)
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
    assert result["dataset"]["errors"] == "class" and list(result["captions"]) == [demo.TARGET]
    for told in result["captions"].values():
        assert 0 <= told["plain"] <= 1 and all(
            sum(words.values()) == pytest.approx(1) for words in told["words"].values()
        )
    plain = result["beside_plain"][0]
    assert plain["method"] == "hap" and min(plain["seconds"], plain["plain_seconds"]) > 0
    assert 0 < plain["memory_mb"] < plain["plain_memory_mb"]
    table = experiment.table(result)
    assert all(method.label in table for method in METHODS.values())


def by_merit(row):
    return round(row["mean"], 6), -row["loss"]


def test_the_search_takes_what_does_best_on_sources_held_out_in_turn(small_demo, tmp_path, monkeypatch):
    """And the domain that the settings are for has no say: its pictures could be anything."""
    grid = {"ha-lora": {"lr": (1e-3, 3e-2)}, "hap": {"gate_lr": (1e-2,), "mmd_weight": (0.1,)}}
    monkeypatch.setattr(demo, "GRID", grid)
    monkeypatch.setattr(demo, "MOST", 2)
    result = demo.tune_demo(tmp_path, targets=["neon"], steps=2)
    rows = [row for row in result["rows"] if row["method"] == "ha-lora"]
    assert [row["lr"] for row in rows] == [1e-3, 3e-2]
    assert all(row["accuracy"].keys() == {"art", "photo", "sketch"} for row in result["rows"])
    best = max(rows, key=by_merit)["lr"]
    assert result["chosen"]["neon"] == {
        "ha-lora": {"lr": best},
        "hap": {"lr": best, "gate_lr": 1e-2, "mmd_weight": 0.1},
    }
    assert json.loads((tmp_path / "tuning.json").read_text())["chosen"] == result["chosen"]

    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("a run that is there was done again"))
    assert demo.tune_demo(tmp_path, targets=["neon"], steps=2)["rows"] == result["rows"]
    for path in tmp_path.glob("tuning/*/*.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"scores": told["scores"] | {"neon": [0.5, 9.0]}}))
    assert demo.tune_demo(tmp_path, targets=["neon"], steps=2)["rows"] == result["rows"]


@pytest.mark.parametrize(
    "tried, best, then",
    [
        ([3e-4, 1e-3, 3e-3], 1e-3, ()),
        ([3e-4, 1e-3, 3e-3], 3e-4, (1e-4,)),
        ([3e-4, 1e-3, 3e-3], 3e-3, (1e-2,)),
        ([1e-2, 1e-1, 1.0], 1.0, (10.0,)),
        ([1e-2, 1e-1, 1.0], 1e-2, (1e-3,)),
        ([1e-4, 1e-3, 1e-2, 1e-1, 1.0], 1.0, ()),
    ],
)
def test_the_search_goes_on_past_the_end_where_the_best_is(tried, best, then):
    assert demo._beyond(tried, best) == then


@pytest.mark.parametrize("target", icons.DOMAINS)
def test_the_settings_are_those_of_the_committed_search(target):
    """Each the best of its rows, judged by the three others alone."""
    found = json.loads((demo_base.CONFIG.parents[2] / demo.TUNING_RESULT).read_text())
    for method, settings in found["chosen"][target].items():
        recipe = demo.recipe_of(method, target)
        assert {name: getattr(recipe, name) for name in settings} == settings
        for option, values in demo.GRID[method].items():
            rows = [r for r in found["rows"] if (r["target"], r["method"], r["option"]) == (target, method, option)]
            assert {row[option] for row in rows} >= set(values) and len(rows) <= demo.MOST
            assert all(row["accuracy"].keys() == set(icons.DOMAINS) - {target} for row in rows)
            assert settings[option] == max(rows, key=by_merit)[option]
    assert demo.recipe_of("car-ft", target).context_weight > 0 == demo.recipe_of("fine-tune", target).context_weight
