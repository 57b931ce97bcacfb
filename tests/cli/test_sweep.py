"""fastheads sweep: what a file may say, that a killed sweep goes on, and that its rows are train's runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import submitit
from commands import MODEL, done, run
from records import unpainted

from fastheads.train.jobs import run_jobs

HEAD = """
model = "{model}"
pretrained = "{root}/demo.safetensors"
data = "{root}/shapes"
target = "sepia"
seed = [0, 1]
steps = 1
per-domain = 2
lr = 0.01
gate-lr = 0.3
workers = 0
"""
ROWS = """
[methods.zero-shot]

[methods.hap.search]
lr = [0.01, 0.02]

[methods.gates]
method = "hap"
like = "hap"
mmd-weight = 0

[methods.lora-dig]
method = "hap"
shared = true
wise-ft = [0.25]
target-curve = true

[submit]
cluster = "debug"
threads = 1
"""


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Reports without pictures."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        unpainted(monkeypatch)
        yield


@pytest.fixture
def write(world, tmp_path):
    def written(rows, head=HEAD):
        path = tmp_path / "table.toml"
        path.write_text((head + rows).format(model=MODEL, root=world.root))
        return path

    return written


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A sweep in this process."""
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "table.toml"
    path.write_text((HEAD + ROWS).format(model=MODEL, root=world.root))
    return folder / "out", done("sweep", path, "--out", folder / "out"), path


def results(out):
    return json.loads((out / "results.json").read_text())


def repeatable(runs):
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "peak_memory_mb")} for r in runs]


def test_every_row_is_run_with_every_seed_and_reported(whole):
    out, printed, _ = whole
    found = results(out)
    rows = ["zero-shot", "hap", "gates", "lora-dig"]
    assert [(r["method"], r["seed"]) for r in found["runs"]] == [(name, seed) for seed in (0, 1) for name in rows]
    assert [m["label"] for m in found["methods"]][2:] == ["gates", "lora-dig"]
    assert "mmd-weight 0" in found["methods"][2]["description"]
    assert "lora-dig" in printed and f"report: {out / 'report.html'}" in printed
    of_seed = {r["method"]: r for r in found["runs"] if r["seed"] == 1}
    assert "mmd" in of_seed["hap"]["history"] and "mmd" not in of_seed["gates"]["history"]
    assert [each["alpha"] for each in of_seed["lora-dig"]["wise_ft"]] == [0.25, 0.5] and "wise_ft" not in of_seed["hap"]
    assert [step for step, _ in of_seed["lora-dig"]["history"]["target"]] == [1]
    assert of_seed["lora-dig"]["trainable_parameters"] == of_seed["hap"]["trainable_parameters"]


def test_settings_are_chosen_on_the_sources_with_the_first_seed_and_taken_by_the_others(whole):
    out, _, _ = whole
    chosen = json.loads((out / "sepia/chosen.json").read_text())
    trials = {trial["point"]["lr"]: trial for trial in chosen["hap"]["trials"]}
    assert list(trials) == [0.01, 0.02]
    for lr, trial in trials.items():
        tried = json.loads((out / f"sepia/seed0/search/hap,lr={lr}/result.json").read_text())["run"]
        assert trial["sources"] == pytest.approx((tried["accuracy"]["day"] + tried["accuracy"]["night"]) / 2, abs=1e-6)
    best = max(trials.values(), key=lambda trial: (trial["sources"], -trial["loss"]))["point"]["lr"]
    assert chosen["hap"]["chosen"] == chosen["gates"]["chosen"] == {"lr": best}
    for name in ("hap", "gates"):
        for seed in (0, 1):
            key = json.loads((out / f"sepia/seed{seed}/{name}/result.json").read_text())["key"]
            assert key["recipe"]["lr"] == best and key["recipe"]["seed"] == seed


def test_the_same_command_again_does_nothing(whole, monkeypatch):
    out, printed, path = whole
    for name in ("fit", "score"):
        monkeypatch.setattr(f"fastheads.train.experiment.{name}", lambda *_, **__: pytest.fail("done again"))
    before = results(out)["runs"]
    again = done("sweep", path, "--out", out)
    assert results(out)["runs"] == before and printed.endswith(again.split("accuracy on")[1])


def test_a_killed_sweep_goes_on(whole, write, tmp_path):
    """Killed once a first run is done; the same command does what is left, with the same numbers."""
    rows = '[methods.zero-shot]\n[methods.hap]\nlr = 0.02\nsteps = 20\n[submit]\ncluster = "debug"\nthreads = 1'
    head = HEAD.replace("seed = [0, 1]", "seed = 1")
    path, out = write(rows, head), tmp_path / "out"
    command = [sys.executable, "-m", "fastheads", "sweep", str(path), "--out", str(out)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    began = time.monotonic()
    with subprocess.Popen(command, **options) as first:
        while not list(out.rglob("result.json")) and time.monotonic() < began + 200:
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert len(kept) == 1 and not (out / "results.json").exists()
    done("sweep", path, "--out", out)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    done("sweep", path, "--out", tmp_path / "at once")
    assert repeatable(results(out)["runs"]) == repeatable(results(tmp_path / "at once")["runs"])


def test_jobs_are_processes_of_their_own_and_say_how_they_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)  # how long the result of one killed is waited for

    def work(what):
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"done": None, "wrong": "no domain"}[what]

    said, calls = [], {name: (name,) for name in ("done", "wrong", "failing", "killed")}
    failed = run_jobs(work, calls, tmp_path, processes=4, say=said.append)
    assert set(failed) == {"wrong", "failing", "killed"} and failed["wrong"] == "no domain"
    assert failed["failing"].startswith("KeyError: 'failing'; the log is ") and "killed" in failed["killed"]
    assert "done: done" in said and len(said) == 4


WRONG = {
    "a key": (HEAD + "stpes = 4\n", ROWS, "there is no key 'stpes'; did you mean 'steps'?"),
    "a key of a row": (HEAD, "[methods.hap]\nmmd-wieght = 1", "methods.hap: there is no key 'mmd-wieght'"),
    "the data in a row": (HEAD, '[methods.hap]\ndata = "x"', "methods.hap: there is no key 'data'"),
    "a value": (HEAD, '[methods.hap]\nlr = "fast"', "methods.hap: lr: got 'fast'; takes a finite number > 0"),
    "a mixture": (HEAD, "[methods.hap]\nwise-ft = [0.5, 2]", "methods.hap: wise-ft: got (0.5, 2.0); takes numbers"),
    "a method": (HEAD, "[methods.hpa]", "methods.hpa: got the method 'hpa'; takes zero-shot"),
    "settings that don't go together": (HEAD, '[methods.hap]\nmmd-to = "lora"', "methods.hap: mmd-to: got 'lora'"),
    "no rows": (HEAD, "", "methods: got none"),
    "no TOML": (HEAD, "[methods", "no TOML: "),
    "a search": (HEAD, "[methods.hap.search]\nlr = 3", "methods.hap: search: got 3 for 'lr'; takes a list"),
    "a range of words": (
        HEAD,
        '[methods.hap.search]\ntrials = 2\nlr = {{low = "a", high = 3}}',
        "search: got {'low': 'a'",
    ),
    "a search in no table": (HEAD, "[methods.hap]\nsearch = 3", "methods.hap: takes a table for search"),
    "a search of what learns nothing": (
        HEAD,
        "[methods.zero-shot.search]\nlr = [1, 2]",
        "zero-shot has nothing to choose",
    ),
    "a batch that fits": (HEAD, '[methods.hap]\nper-domain = "auto"', "per-domain: got 'auto'; a sweep takes a number"),
    "layers that there are not": (HEAD, "[methods.hap]\nmmd-layers = [1, 1]", "--mmd-layers: got 2 numbers; takes"),
    "a log of a row": (HEAD, '[methods.hap]\nlog = ["jsonl"]', "methods.hap: there is no key 'log'"),
    "submit": ("submit = 3\n" + HEAD, "[methods.hap]", "submit: got 3; takes a table"),
    "a choice of nobody": (HEAD, '[methods.hap]\nlike = "lora"', "methods.hap: got like = 'lora'"),
    "processes": (HEAD, "[methods.hap]\n[submit]\nprocesses = 0", "submit: got 0 for 'processes'"),
    "a cluster": (HEAD, '[methods.hap]\n[submit]\ncluster = "cloud"', "submit: "),
    "a target": (HEAD.replace("sepia", "noon"), "[methods.hap]", "no domain 'noon'"),
}


@pytest.mark.parametrize(("head", "rows", "told"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_before_anything_runs(world, write, tmp_path, head, rows, told):
    code, out, err = run("sweep", write(rows, head), "--out", tmp_path / "out")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and told in err
    assert not list(tmp_path.rglob("result.json"))


def test_a_job_that_fails_is_named_and_the_others_are_done(world, write, tmp_path):
    out = tmp_path / "out"
    (out / "sepia/seed0/hap").mkdir(parents=True)
    (out / "sepia/seed0/hap/result.json").write_text("{")
    code, printed, err = run("sweep", write("[methods.hap]\n[submit]\ncluster = 'debug'"), "--out", out)
    assert code == 1 and "seed0/hap/result.json is corrupt" in err.splitlines()[-1]
    assert "sepia · 1: done" in printed and (out / "sepia/seed1/hap/result.json").exists()


def test_random_search_draws_the_same_points_in_the_range(world, write, tmp_path):
    from fastheads.cli.sweep import read

    text = write("[methods.hap.search]\ntrials = 5\nlr = {{low = 1e-4, high = 1e-1}}\nsteps = [3, 4]").read_text()
    points = read(text).rows["hap"].points
    assert points == read(text).rows["hap"].points and len({p["lr"] for p in points}) == 5
    assert all(1e-4 <= p["lr"] <= 1e-1 and p["steps"] in (3, 4) for p in points)


def test_keys_are_trains_options_by_any_of_their_names(write):
    from fastheads.cli.sweep import read

    for told, kept in (("cache-images = true", True), ("cache-images = false", False), ("", None)):
        args = read(write("[methods.hap]", f'log = ["jsonl"]\n{told}\n' + HEAD).read_text()).args
        assert (args.log, args.cache_images) == (["jsonl"], kept)


def test_the_studies_can_be_read(world):
    from pathlib import Path

    from fastheads.cli.sweep import read

    files = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
    assert files
    for path in files:
        sweep = read(path.read_text())
        for row in sweep.rows.values():
            sweep.recipe(row, "sketch", {})
