"""What a run writes of its steps, and its moving average."""

import copy
import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from standins import same
from training import RECIPE, stopped_at, weights

from fastheads.train.logs import peak_memory_mb
from fastheads.train.loop import fit
from fastheads.train.methods import METHODS


@pytest.fixture
def events(monkeypatch):
    """In place of TensorBoard, which the tests don't install: what each writer was given."""
    found = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            found.append({"purged from": purge_step})

        def add_scalar(self, name, value, step):
            found[-1][name, step] = value

        def close(self):
            found[-1]["closed"] = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    return found


def test_a_log_has_each_step_once_also_after_a_kill(base, problem, tmp_path, events):
    """Killed in step 6 after the state of step 3: lines 4 and 5, and a torn one, are written anew."""

    kinds = ["jsonl", "tensorboard"]
    with pytest.raises(InterruptedError):
        fit(copy.deepcopy(base), METHODS["hap"], problem, RECIPE, out=tmp_path, report=stopped_at(6), log=kinds)
    path = tmp_path / "log.jsonl"
    with open(path, "a") as f:
        f.write('{"step": 6, "lo')
    run = fit(base, METHODS["hap"], problem, RECIPE, out=tmp_path, log=kinds)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == run["history"]["step"] == list(range(1, 9))
    assert [line["loss"] for line in lines] == run["history"]["loss"]
    always = {"step", "loss", "cross_entropy", "mmd", "lr", "images_per_second", "waited_seconds", "memory_mb"}
    evaluated = [line for line in lines if set(line) - always]
    assert [line["step"] for line in evaluated] == [4, 8] and all(always <= set(line) for line in lines)
    assert all(set(line["accuracy"]) == {"blue", "green"} for line in evaluated)
    assert lines[-1]["gates"] == run["gates"]["values"][-1]
    # Between two domains the MMD of the step is its layers' mean.
    for line in evaluated:
        pairs = line["mmd_of_pairs"]
        assert len(pairs) == 6 and all(set(layer) == {"blue green"} for layer in pairs)
        assert sum(layer["blue green"] for layer in pairs) / 6 == pytest.approx(line["mmd"], rel=1e-3)
    assert [writer["purged from"] for writer in events] == [1, 4] and all(writer["closed"] for writer in events)
    assert events[1]["loss", 8] == lines[-1]["loss"] and events[1]["gates/2/3", 8] == lines[-1]["gates"][2][3]
    assert events[1]["mmd_of_pairs/5/blue green", 4] == lines[3]["mmd_of_pairs"][5]["blue green"]


def test_a_moving_average_is_evaluated_and_kept_also_after_a_kill(base, problem, tmp_path, monkeypatch):
    """By its formula from the weights after every step, of a run without one: averaging changes no step."""
    from fastheads.train import loop

    recipe = dataclasses.replace(RECIPE, evaluate_every=8, ema=0.75)
    seen, plain = [], copy.deepcopy(base)
    record = lambda values, model: seen.append(weights(model))  # noqa: E731
    fit(plain, METHODS["hap"], problem, dataclasses.replace(recipe, ema=0.0), report=lambda v: record(v, plain))
    wanted = {name: tensor.double() for name, tensor in seen[0].items()}
    for step in seen[1:]:
        wanted = {name: 0.75 * old + 0.25 * step[name].double() for name, old in wanted.items()}

    with pytest.raises(InterruptedError):
        fit(copy.deepcopy(base), METHODS["hap"], problem, recipe, out=tmp_path, report=stopped_at(5))
    scored, score = [], loop.score
    monkeypatch.setattr(loop, "score", lambda model, *args: scored.append(weights(model)) or score(model, *args))
    fit(base, METHODS["hap"], problem, recipe, out=tmp_path)
    assert same(scored[0], weights(base))
    assert not any(torch.equal(tensor, seen[-1][name]) for name, tensor in weights(base).items())
    for name, tensor in weights(base).items():
        assert torch.allclose(tensor.double(), wanted[name], atol=1e-6)


def test_the_mmd_of_pairs_is_the_sources_alone(base, problem, tmp_path):
    """One image of each of two sources is less than an image of each of the three domains there are."""
    recipe = dataclasses.replace(RECIPE, per_domain=1, mmd_kernel="dan", steps=1, evaluate_every=1)
    fit(base, METHODS["hap"], problem, recipe, out=tmp_path, log=["jsonl"])
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(layer["blue green"] for layer in line["mmd_of_pairs"]) / 6 == pytest.approx(line["mmd"], rel=1e-3)


def test_memory_is_told_where_there_is_no_proc(monkeypatch):
    here = peak_memory_mb()

    def refuse(path, *args, **options):
        raise OSError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert 0.1 * here < peak_memory_mb() < 1.5 * here
