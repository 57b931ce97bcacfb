"""fastheads train: what it writes, and the same command again."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import SHORT, done, listing, run
from processes import free_port
from safetensors.torch import load_file


def test_training_writes_results_report_and_adapter(world):
    folder = world.root / "run"
    assert [run["method"] for run in world.results["runs"]] == ["zero-shot", "hap"]
    assert all(run["target"] == "sepia" and run["sources"] == ["day", "night"] for run in world.results["runs"])
    assert world.results["runs"][1]["steps"] == 3
    page = (folder / "report.html").read_text()
    assert "Zero-shot CLIP" in page and "HA-LoRA + DIG + MMD" in page
    assert {path.name for path in world.adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert f"report: {folder / 'report.html'}" in world.trained
    for run_ in world.results["runs"]:
        assert f"{100 * run_['accuracy']['sepia']:.1f}" in world.trained
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.name == "state"]


def test_the_recorded_command_is_the_one_that_ran(world):
    command = world.results["command"]
    assert command.startswith("fastheads train --model fastheads-demo")
    assert str(world.root / "shapes") in command and "--method zero-shot hap" in command


def test_the_same_command_again_reuses_the_results(world, monkeypatch):
    monkeypatch.setattr("fastheads.train.experiment.fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("fastheads.train.experiment.score", lambda *_, **__: pytest.fail("scored again"))
    out = done(*world.train, "--out", world.root / "run")
    again = json.loads((world.root / "run/results.json").read_text())
    assert again["runs"] == world.results["runs"]
    assert out == world.trained


OTHERWISE = {
    # what is changed, and what is said of it
    "lr": (["--lr", "0.5"], "--lr: was 0.01, now 0.5"),
    "two numbers": (["--steps", "4", "--gate-lr", "0.1"], "--steps: was 3, now 4; --gate-lr: was 0.3, now 0.1"),
    "precision": (["--precision", "bf16"], "--precision: was 'no', now 'bf16'"),
    "prompt": (["--prompt", "a drawing of a {}."], "--prompt: was ['a photo of a {}.'], now ['a drawing of a {}.']"),
    "targets": (["--targets", "q", "mlp"], "--targets: was None, now ['q', 'fc1', 'fc2']"),
    "data": (["--data", "FEWER"], "the images differ (sepia: was 12, now 11)"),
    "weights": (["--pretrained", "OTHER"], "the base's weights differ"),
}


@pytest.mark.parametrize(("options", "told"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_result_of_other_settings_is_kept_and_refused(world, tmp_path, monkeypatch, options, told):
    for name in ("fit", "score"):
        monkeypatch.setattr(f"fastheads.train.experiment.{name}", lambda *_, **__: pytest.fail("begun"))
    fewer, other = tmp_path / "shapes", tmp_path / "demo.safetensors"
    shutil.copytree(world.root / "shapes", fewer)
    (fewer / "sepia/white_square/0.png").unlink()
    shutil.copy(world.root / "other.safetensors", other)
    places = {"FEWER": fewer, "OTHER": other}
    before = listing(world.root / "run")
    code, out, err = run(*world.train, "--out", world.root / "run", *(places.get(o, o) for o in options))
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert told in err and f"{world.root / 'run'}" in err and "name another --out" in err
    assert listing(world.root / "run") == before


def test_a_damaged_result_is_one_line_with_the_name_of_the_file(world, tmp_path):
    shutil.copytree(world.root / "run", tmp_path / "run")
    path = tmp_path / "run/sepia/seed0/hap/result.json"
    path.write_text(path.read_text()[:50])
    code, out, err = run(*world.train, "--out", tmp_path / "run")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert f"{path} is corrupt" in err and "--out" in err


def test_a_method_named_twice_runs_once(world):
    twice = [*world.train[: world.train.index("zero-shot")], "zero-shot", "hap", "hap", *SHORT, "--seed", "0", "0"]
    done(*twice, "--out", world.root / "run")
    assert len(json.loads((world.root / "run/results.json").read_text())["runs"]) == 2
    done(*world.train, "--out", world.root / "run")


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "--master-port"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "own"), [("torchrun", []), ("accelerate", ["--fsdp"])])
def test_launchers_train_print_and_write_as_one_process(world, tmp_path, launcher, own):
    """Two processes: what a single one learned, printed once."""
    launch = [sys.executable, "-m", *LAUNCHERS[launcher], free_port()]
    options = [*world.train[: world.train.index("zero-shot")], "hap", *SHORT, "--log-to", "jsonl", "--out", tmp_path]
    command = [str(part) for part in (*launch, "-m", "fastheads", *options, *own)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("accuracy on the domain held out") == ran.stderr.count("  3/3  loss") == 1
    found, alone = (
        load_file(out / "sepia/seed0/hap/adapter/adapter_model.safetensors") for out in (tmp_path, world.root / "run")
    )
    assert max(float((found[name] - alone[name]).abs().max()) for name in alone) < 1e-5
    assert len((tmp_path / "sepia/seed0/hap/log.jsonl").read_text().splitlines()) == 3
