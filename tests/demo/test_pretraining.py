"""How the base model is made: every stage learns, a killed run goes on to the same weights, the log is the recipe's."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastheads.demo import drawings, icons, pretraining
from fastheads.demo.pretraining import Recipe, Run, pretrain

LOG = Path(__file__).parents[2] / "docs/results/demo-pretraining.jsonl"
SHORT = Recipe(small_steps=2, full_steps=2, text_steps=2, matched_steps=2, batch=8)


@pytest.fixture
def few(monkeypatch):
    """Codicon's drawings alone, and no domain to be like."""
    monkeypatch.setattr(drawings, "FAMILIES", ("codicon",))
    monkeypatch.setattr(icons, "near_copies", lambda masks: np.zeros(len(masks), bool))
    monkeypatch.setattr(pretraining, "EVERY", 1)


def test_every_stage_learns_what_it_should(few):
    pretraining.register()
    run = Run(SHORT, drawings.Drawings())
    seen = []
    while run.step < SHORT.steps:
        if run.step % 2 == 0:
            run.advance()  # a stage's first step begins with what the last one learned
        stage, model = run.stage, run.model
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        values = run.advance()
        changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        seen.append((stage, "visual" in changed, "token_embedding" in changed))
        assert np.isfinite(values["loss"]) and 0 <= values["accuracy"] <= 1
    image, text = (True, False), (False, True)
    assert seen == [("small", *image), ("full", *image), ("text", *text), ("matched", *text)]


@pytest.mark.parametrize("stop", [1, 2, 5, 7])
def test_a_killed_run_goes_on_to_the_same_weights(few, tmp_path, stop):
    whole = load_file(pretrain(tmp_path / "whole", SHORT))
    pretrain(tmp_path / "killed", SHORT, save_every=1, until=stop)
    again = load_file(pretrain(tmp_path / "killed", SHORT))
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    lines = [json.loads(line) for line in (tmp_path / "killed/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_another_recipe_in_the_same_folder_is_refused(few, tmp_path):
    pretrain(tmp_path, SHORT, save_every=1, until=1)
    with pytest.raises(ValueError, match="another recipe"):
        pretrain(tmp_path, dataclasses.replace(SHORT, seed=1))


def test_the_committed_log_is_of_the_whole_recipe():
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(50, Recipe().steps + 1, 50))
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages == list(Recipe().stages)


@pytest.mark.slow
@pytest.mark.skipif("FASTHEADS_REPEAT" not in os.environ, reason="minutes: make demo-repeat")
def test_the_recipes_first_steps_repeat_the_committed_log(tmp_path):
    pretrain(tmp_path, Recipe(), save_every=200, until=200)
    mine, theirs = (
        [json.loads(line) for line in path.read_text().splitlines()[:4]] for path in (tmp_path / "log.jsonl", LOG)
    )
    assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in theirs], abs=1e-3)
