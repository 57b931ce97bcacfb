"""The tile search: it may choose what is right and faster, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import tune
from fastheads.kernels.tiles import BACKWARD, OPEN_BACKWARD, row_for

ROOT = Path(__file__).resolve().parents[2]


def fake(outputs, monkeypatch):
    """A kernel whose candidates give what `outputs` says; an exception is raised."""

    def run(candidate):
        found = outputs[candidate]
        if isinstance(found, Exception):
            raise found
        return [torch.tensor([1.0, found])]

    monkeypatch.setattr(tune, "run_of", lambda problem: run)
    times = {"default": 3.0, "'right'": 2.0, "'wrong'": 1.0}
    monkeypatch.setattr(tune, "compare", lambda runs, *_, **__: {n: {"median": times[n]} for n in runs})


def test_a_candidate_that_is_wrong_or_breaks_is_not_timed(monkeypatch):
    broken = {"big": RuntimeError("out of resource: shared memory"), "nan": float("nan")}
    fake({None: 1.0, "right": 1.001, "wrong": 1.1, **broken}, monkeypatch)
    (problem, *_) = tune.problems(rehearse=True)
    found = tune.search(problem, ["right", "wrong", "big", "nan"], float("inf"))
    assert found["best"] == found["winner"] == "'right'" and found["gain"] == 1.5
    assert found["ratios"]["'right'"] == pytest.approx(2 / 3)
    assert found["refused"]["'wrong'"].startswith("wrong: off by 0.1")
    assert "shared memory" in found["refused"]["'big'"]
    assert "wrong" in found["refused"]["'nan'"]


def test_what_no_time_is_left_for_is_named(monkeypatch):
    fake({None: 1.0, "right": 1.0}, monkeypatch)
    found = tune.search(tune.problems(rehearse=True)[0], ["right"], until=0.0)
    assert found["best"] == "default" and found["refused"] == {"'right'": "no time left"}


def test_the_towers_are_searched_at_the_lengths_asked_for():
    names = [p.name for p in tune.problems(rehearse=False)]
    assert len(set(names)) == len(names) == 3 * 4 * 2 * 2
    assert "backward, H/14, head 80, N 577, delta" in names


@pytest.mark.parametrize(("arch", "rows"), [(80, (3, 2)), (87, (3, 2)), (90, (3, 2)), (89, ())])
def test_rows_left_open_meet_the_tables_at_the_headline_shapes(arch, rows):
    found = tune.left_open(arch)
    assert [p.name for p in found] == [
        f"backward, {tower}, head 64, N {n}, stacked" for n, tower in ((197, "B/16"), (257, "L/14")) if rows
    ]
    assert tuple(len(own) for own in found.values()) == rows  # of L/14 one less: it is the table's own, or too short


def test_no_row_is_left_open_against_itself():
    for family, rows in OPEN_BACKWARD.items():
        table = row_for(BACKWARD, family, 64, 197, torch.bfloat16).tiles(197)
        assert len({table, *(row.tiles(197) for row in rows)}) == 1 + len(rows)


def test_a_row_is_told_as_a_table_has_it():
    assert repr(OPEN_BACKWARD[80][1]) == (
        "Row(block_m=128, block_n=64, key=(32, 128), one_launch=True, warps=8, spread=False)"
    )


@pytest.mark.slow
def test_every_candidate_runs_through_the_kernels_it_is_for(tmp_path):
    """In the interpreter."""
    command = [sys.executable, "-m", "bench.tune", "--out", str(tmp_path), "--seconds", "100", "--rehearse"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "tune.result.json").read_text())
    assert len(found) == 2 and all(len(f["times"]) == 3 and not f["refused"] for f in found.values()), found
