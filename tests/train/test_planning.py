"""plan: which batch fits, by a count of each; what it says, and that the model given is left as it was."""

import copy
import functools
import json
from dataclasses import replace

import open_clip
import pytest
import torch
from commands import run
from standins import EMBED, vit, with_timm

import fastheads
from fastheads.train import models, sizing
from fastheads.train.methods import METHODS
from fastheads.train.planning import CONTEXT, GPUS, Step, plan
from fastheads.train.recipe import Recipe
from fastheads.train.sizing import that_fits


@functools.cache
def small():
    """A CLIP with two layers of 128 in its image tower, and a vocabulary that an A100 holds some thousand images of."""
    vision = open_clip.CLIPVisionCfg(2, 128, 32, patch_size=8, image_size=64)
    return open_clip.CLIP(16, vision, open_clip.CLIPTextCfg(8, 64, 32, 2, 1))


@pytest.mark.parametrize("options", [{"recompute": True, "precision": "bf16"}, {"method": "lora", "captions": True}])
def test_the_largest_batch_fits_and_one_more_does_not(options):
    step, room = Step(small(), **options), 10**9
    batch = step.largest(room, 64)
    assert batch > 100
    assert step.total(batch) <= room < step.total(batch + 1)


def test_nothing_fits_where_one_image_is_too_many():
    step = Step(small())
    assert step.largest(sum(step.model_bytes.values()), 64) == 0


def test_recompute_holds_less_and_an_image_of_captions_more():
    totals = [Step(small(), precision="bf16", **options).total(512) for options in ({}, {"recompute": True})]
    assert totals[1] < 0.9 * totals[0]
    both = fastheads.HeadConfig(rank=2, towers=("visual", "text"))
    of_text = Step(small(), config=both, captions=True).ledger(512).saved["text tower"]
    assert of_text > 512 * 8 * 32 * 4


def test_the_model_holds_both_towers_and_the_optimisers_states_of_what_is_trained():
    model = small()
    found = Step(model, precision="fp32")
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert found.model_bytes["weights"] == weights
    assert found.model_bytes["AdamW's states"] == 2 * found.model_bytes["adapters"] == 2 * found.gradient_bytes
    free = Step(model, method="car-ft", precision="fp32")
    own = sum(p.numel() * p.element_size() for p in model.visual.parameters())
    assert free.gradient_bytes == own
    assert free.model_bytes["AdamW's states"] == 2 * own
    assert free.model_bytes["teacher"] >= own


def test_a_plan_says_what_it_knows_and_what_not(monkeypatch):
    monkeypatch.setitem(GPUS, "H100", CONTEXT + 10**9)
    model = copy.deepcopy(small())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = plan(model, batch=100, gpu="H100", method="ha-lora", precision="bf16", rank=4)
    assert found.fits and 100 < found.largest["plain"] < found.largest["recompute"] < found.largest["checkpointing"]
    assert found.impl == "delta" and found.total == json.loads(json.dumps(found.as_dict()))["total"]
    said = str(found)
    assert "not yet held against a GPU" in said and "assumption" in said
    assert f"largest batch {found.largest['plain']:,}, with recompute {found.largest['recompute']:,}, with" in said
    assert replace(found, room=found.total).fits and not replace(found, room=found.total - 1).fits
    assert not fastheads.is_patched(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("captions", [False, True])
def test_a_timm_tower_is_counted_by_the_parts_of_its_blocks(captions):
    step = Step(with_timm(), captions=captions)
    few, many = (step.ledger(batch) for batch in (256, 512))
    assert {"images", "ends of the tower", "attention", "residual stream", "MLP"} <= set(few.saved)
    assert ("text tower" in few.peak) == captions
    assert many.saved["MLP"] == pytest.approx(2 * few.saved["MLP"], rel=0.05)
    assert few.saved["residual stream"] < few.saved["attention"] + few.saved["MLP"]
    assert step.objective.classifier.shape[1] == EMBED


def test_a_vision_model_is_counted_with_its_head():
    step = Step(vit(), method="ha-lora", precision="fp32")
    head = 4 * (EMBED * 64 + EMBED)
    assert step.gradient_bytes == step.model_bytes["adapters"] + head and "class weights" not in step.model_bytes
    saved = step.ledger(64).saved
    assert {"images", "ends of the tower", "attention", "residual stream", "MLP"} <= set(
        saved
    ) and "text tower" not in saved
    for option, name in (({"captions": True}, "captions"), ({"method": "car-ft"}, "text tower")):
        with pytest.raises(ValueError, match=name):
            Step(vit(), **option)


def test_a_cpus_step_has_no_gpu_to_fit_into():
    found = plan(small(), batch=6, impl="cpu", precision="fp32")
    assert (found.impl, found.room, found.largest, found.fits) == ("cpu", None, None, None)
    assert "GPU" not in str(found)


def test_the_command_prints_the_plan(monkeypatch):
    monkeypatch.setattr(models, "build", lambda name, classes: small())
    monkeypatch.setattr(Step, "largest", lambda self, room, start: start)
    code, out, err = run(
        "plan", "small", "--batch", "64", "--gpu", "A100-40", "--method", "lora", "--rank", "2", "4", "--json"
    )
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["model"] == "small" and said["fits"] and said["gpu"] == "A100-40"
    assert said["room"] == GPUS["A100-40"] - CONTEXT
    code, out, err = run("plan", "small", "--batch", "64", "--recompute", "2", "--checkpointing", "--impl", "cpu")
    assert (code, err) == (0, "")
    assert "hap, 345 classes, amp-bf16, cpu, recompute 2, checkpointing" in out


def test_a_batch_that_runs_out_of_memory_falls_back_by_a_quarter():
    tried = []

    def attempt(batch):
        tried.append(batch)
        if batch > 50:
            raise torch.cuda.OutOfMemoryError

    assert (that_fits(100, attempt), tried) == (42, [100, 75, 56, 42])
    assert that_fits(1, lambda batch: attempt(99)) == 0


def test_as_many_images_as_a_cpu_has_room_for_by_the_ledger(monkeypatch):
    """What the model itself takes is there already; one image more is too many."""
    model, size = small(), 400_000_000
    monkeypatch.setattr(sizing, "room", lambda: size)
    batch = sizing.largest_batch(model, METHODS["hap"], Recipe(), "no")
    step = Step(model, precision="fp32", impl="cpu")
    kept = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert 0 < step.total(batch) <= size + kept < step.total(batch + 1)
    wide = sizing.largest_batch(model, METHODS["hap"], Recipe(rank=(16,)), "no")
    assert 0 < wide < batch  # of the run's own rank
