"""A batch spread over processes (gloo, CPU) and micro-batches is one batch: same losses, same adapters."""

import copy
import dataclasses
import json
import os
from types import SimpleNamespace

import accelerate
import pytest
import torch
from processes import free_port, on_ranks
from ranks import score_on_rank, train_on_rank
from training import stopped_at, weights

from fastheads.train.loop import fit
from fastheads.train.methods import METHODS
from fastheads.train.ranks import join
from fastheads.train.recipe import Recipe

STEPS = int(os.environ.get("FASTHEADS_RANKS", 5))  # `make ranks` takes 200, and 4 processes
RECIPE = Recipe(
    steps=STEPS,
    per_domain=4,
    lr=5e-4,
    gate_lr=5e-3,
    mmd_weight=0.1,
    context_weight=0.5,
    evaluate_every=STEPS,
    save_every=STEPS,
    cache=True,
)
SPLITS = {"2 processes, 2 parts": (2, 2, False), "2 processes, sharded": (2, 1, True)}
if "FASTHEADS_RANKS" in os.environ:
    SPLITS |= {"2 processes": (2, 1, False), "4 processes": (4, 1, False), "3 parts": (1, 3, False)}


@pytest.fixture(scope="module")
def one_process():
    return {}


def test_processes_that_do_not_find_each_other_are_told(monkeypatch):
    """As accelerate counts on a GPU without LOCAL_RANK: each for itself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", lambda **options: SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match="WORLD_SIZE: says 2 processes, but 1 found each other"):
        join()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "accumulate", "fsdp"), SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("features", ["heads", "embedding"])
def test_a_split_batch_trains_as_the_whole(base, problem, tmp_path, one_process, features, processes, accumulate, fsdp):
    recipe = dataclasses.replace(RECIPE, mmd_features=features)
    if features not in one_process:
        model = copy.deepcopy(base)
        alone = dataclasses.replace(problem, loaders={})
        one_process[features] = fit(model, METHODS["hap"], alone, recipe)["history"], weights(model)
    history, whole = one_process[features]
    recipe = dataclasses.replace(recipe, accumulate=accumulate, fsdp=fsdp)
    if processes > 1:
        on_ranks(train_on_rank, processes, processes, free_port(), base, problem, recipe, tmp_path)
        found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(processes)]
    else:
        run = fit(base, METHODS["hap"], problem, recipe)
        found = [{"history": run["history"], "weights": weights(base)}]
    for each in found:
        for name in ("loss", "cross_entropy", "mmd", "context_kl"):
            assert each["history"][name] == pytest.approx(history[name], rel=1e-4, abs=1e-6)
        assert max(float((each["weights"][name] - whole[name]).abs().max()) for name in whole) < 1e-5
        assert all(torch.equal(each["weights"][name], found[0]["weights"][name]) for name in whole)


@pytest.mark.slow
def test_shards_of_a_whole_encoder_go_on_from_one_process_and_one_process_from_them(base, problem, tmp_path):
    """With a moving average. Adam amplifies the rounding of gradients near zero (keys' biases have none else), so it is
    the sum of differences that is held to how far the weights went: it is 1e-6 of that; without the average, 0.07."""
    recipe = dataclasses.replace(RECIPE, steps=6, lr=1e-5, evaluate_every=2, save_every=2, ema=0.5, fsdp=True)
    start, whole, alone = copy.deepcopy(base), copy.deepcopy(base), dataclasses.replace(problem, loaders={})
    history = fit(whole, METHODS["car-ft"], alone, recipe)["history"]
    with pytest.raises(InterruptedError):
        fit(copy.deepcopy(base), METHODS["car-ft"], alone, recipe, out=tmp_path, report=stopped_at(3))
    sharded = copy.deepcopy(base), problem, recipe, tmp_path, "car-ft", 5
    on_ranks(train_on_rank, 2, 2, free_port(), *sharded)
    run = fit(base, METHODS["car-ft"], alone, recipe, out=tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [3, 4]
    assert run["history"]["loss"] == pytest.approx(history["loss"], rel=1e-4)
    assert run["history"]["validation"] == history["validation"]
    first, ours, theirs = weights(start), weights(base), weights(whole)
    off, went = (sum(float((a[n] - b[n]).abs().sum()) for n in theirs) for a, b in ((ours, theirs), (first, theirs)))
    assert off < 1e-3 * went


@pytest.mark.slow
def test_processes_share_out_an_evaluation_and_know_every_bit_of_it(base, problem, tmp_path):
    """20 images in batches of 3 on 2 processes: seven batches, and one of them twice."""
    on_ranks(score_on_rank, 2, 2, free_port(), base, problem, dataclasses.replace(RECIPE, batch_size=3), tmp_path)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found == [{"images": 11, "same": True}, {"images": 11, "same": True}]
