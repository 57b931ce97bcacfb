"""Several processes that end: killed at random, silent, or of two minds. The others end with them, and two go on."""

import copy
import dataclasses
import json
import os
import random
import signal
import time

import pytest
import torch
from processes import free_port, on_ranks, start
from ranks import fail_on_rank, fall_silent_on_rank, train_on_rank
from training import ONE_STEP, weights

from fastheads.train.loop import fit
from fastheads.train.methods import METHODS

KILLS = int(os.environ.get("FASTHEADS_KILLS", 1))  # `make kills` takes 20
RECIPE = dataclasses.replace(ONE_STEP, steps=12, per_domain=4, lr=5e-4, gate_lr=5e-3, evaluate_every=6, save_every=2)
WAYS = ("kill one", "ask one to end", "kill all")


def logged(out):
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_four_processes_killed_at_a_random_time_are_gone_on_from_by_two(base, problem, tmp_path):
    whole = copy.deepcopy(base)
    alone = dataclasses.replace(problem, loaders={})
    losses = fit(whole, METHODS["hap"], alone, RECIPE)["history"]["loss"]
    for kill in range(KILLS):
        chance, way, out = random.Random(kill), WAYS[kill % len(WAYS)], tmp_path / str(kill)
        out.mkdir()
        port = free_port()
        four = [start(train_on_rank, rank, 4, port, base, problem, RECIPE, out) for rank in range(4)]
        at = chance.randrange(1, RECIPE.steps - 1)
        while len(logged(out)) < at and all(process.exitcode is None for process in four):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        struck = four if way == "kill all" else [chance.choice(four)]
        for process in struck:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGTERM if way == "ask one to end" else signal.SIGKILL)
        for process in four:
            process.join(240)
        assert all(process.exitcode is not None for process in four)  # none is left behind
        if way == "ask one to end":
            assert [process.exitcode for process in four] == [0] * 4
        on_ranks(train_on_rank, 2, 2, free_port(), base, problem, RECIPE, out)
        lines = logged(out)
        assert [line["step"] for line in lines] == list(range(1, RECIPE.steps + 1))
        assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
        found = torch.load(out / "rank0.pt")["weights"]
        assert max(float((found[name] - own).abs().max()) for name, own in weights(whole).items()) < 1e-5


@pytest.mark.slow
def test_what_fails_on_one_process_is_told_alike_by_all(base, problem, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=4, save_every=1)
    on_ranks(fail_on_rank, 2, 2, free_port(), base, problem, recipe, tmp_path)
    told, other = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1))
    assert told == other and all(everywhere for _, everywhere in told.values())
    wanted = {
        "settings": "processes disagree: --lr: process 0 has 0.0005, process 1 0.001; start all with",
        "images": "processes disagree: the images differ (blue: process 0 has 20, process 1 19); start all with",
        "loss": "loss: is nan at step 2; lower the learning rate",
        "disk": "out: the state of step 2 can't be written",
    }
    assert {name: text.startswith(wanted[name]) for name, (text, _) in told.items()} == dict.fromkeys(wanted, True)
    assert "No space left on device" in told["disk"][0]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["state"]


@pytest.mark.slow
def test_a_process_that_falls_silent_ends_the_others(base, problem, tmp_path):
    port = free_port()
    two = [start(fall_silent_on_rank, rank, 2, port, base, problem, RECIPE, tmp_path) for rank in range(2)]
    two[0].join(120)
    two[1].kill()
    assert two[0].exitcode == 0 and (tmp_path / "lost0").read_text() == "True"
