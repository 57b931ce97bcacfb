"""The command line as such: its help, interruptions, warnings, tracebacks."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import open_clip
import pytest
from commands import CLASSES, DOMAINS, base, data, run

import fastheads
from fastheads.cli import arguments
from fastheads.cli import commands as cli

COMMANDS = (
    *("demo", "check", "shards", "bench-data", "plan", "train", "sweep", "report", "heads", "evaluate", "inspect"),
    "merge",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_of_every_option(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert all(len(line) <= 100 for line in out.splitlines())
    (commands,) = (a for a in arguments.parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = commands.choices[command]._actions
    assert len(options) > 1
    flat = " ".join(out.split())
    for option in options:
        assert option.help and len(option.help.split()) > 1 or option.dest == "help", option.dest
        shown = option.help % vars(option) if "%" in option.help else option.help
        assert (option.option_strings or [option.metavar])[0] in out
        assert " ".join(shown.split()) in flat, option.dest


def test_the_module_runs_and_names_every_command():
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastheads", "--help"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(len(line) <= 100 for line in ran.stdout.splitlines())
    listed, examples = ran.stdout.split("examples, in the order of a day:\n")
    assert re.findall(r"^ {4}([a-z-]+)\s+\w+", listed, re.MULTILINE) == list(COMMANDS)
    lines = [shlex.split(line) for line in examples.splitlines()]
    assert [line[:2] for line in lines] == [["fastheads", name] for name in COMMANDS]
    assert [arguments.parser().parse_args(line[1:]).command for line in lines] == list(COMMANDS)


def test_shells_complete_paths_as_shtab_has_it():
    (commands,) = (a for a in arguments.parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {
        option
        for action in commands.choices["merge"]._actions
        if hasattr(action, "complete")
        for option in action.option_strings
    }
    assert options == {"--adapter", "--out"}


def test_an_interruption_says_how_to_go_on(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "inspect", interrupt)
    code, out, err = run("inspect")
    assert (code, out) == (130, "")
    assert len(err.splitlines()) == 1 and "goes on" in err


def test_a_traceback_comes_where_it_is_asked_for(world, monkeypatch):
    monkeypatch.setenv("FASTHEADS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="gone"):
        cli.main(["evaluate", *map(str, base(world.root)), "--data", str(world.root / "gone")])


def test_warnings_are_one_line_and_shown_as_before_afterwards(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "inspect", lambda args: warnings.warn("rounded away", stacklevel=1) or ({}, 0))
    shown = warnings.showwarning
    code, out, err = run("inspect")
    assert (code, out, err) == (0, "", "fastheads: note: rounded away\n")
    assert warnings.showwarning is shown


# ------------------------------------------------------------------------------------------------------ --json


def told(*argv, code=0):
    """The one object that a command prints with --json."""
    found, out, err = run(*argv, "--json")
    assert found == code, err
    return json.loads(out)


def test_json_of_what_is_trained_says_where_it_is(world, tmp_path):
    found = told(*world.train, "--out", world.root / "run")  # done before
    assert json.loads(Path(found["results"]).read_text())["runs"] == world.results["runs"]
    assert "HAP" in Path(found["report"]).read_text()
    found = told("report", world.root / "run", "--csv", "--out", tmp_path / "report")
    assert {name: Path(path).name for name, path in found.items()} == {"report": "report.html", "csv": "report.csv"}


def test_json_of_images_counts_them_and_names_what_cannot_be_read(world):
    six = dict.fromkeys(CLASSES, 6)
    assert told("check", world.root / "shapes") == {
        "domains": dict.fromkeys(DOMAINS, six),
        "skipped": "",
        "unreadable": [],
    }
    (bad,) = told("check", world.root / "corrupt", code=1)["unreadable"]
    assert bad["file"] == "night/white_square/1.png" and bad["reason"]


def test_json_of_an_adapter_has_scores_and_gates(world, tmp_path):
    adapter = ("--adapter", world.adapter)
    found = told("evaluate", *base(world.root), *data(world.root), *adapter)
    hap = world.results["runs"][1]["accuracy"]["sepia"]
    of = found["domains"]["sepia"]
    assert (of["accuracy"], of["images"]) == (pytest.approx(hap), 12) and of["loss"] > 0
    assert list(found["domains"]) == list(DOMAINS) and found["adapter"] == str(world.adapter)
    model = open_clip.create_model(found["model"], pretrained=found["pretrained"])
    held = told("inspect", *adapter)
    fastheads.load_adapter(model, world.adapter)
    gates = fastheads.gates(model).tolist()
    assert list(held["gates"].values()) == [pytest.approx(row) for row in gates]
    assert held["bytes"] == sum(path.stat().st_size for path in world.adapter.iterdir())
    path = told("merge", *base(world.root), *adapter, "--out", tmp_path / "merged.safetensors")["merged"]
    assert Path(path).is_file()


def test_json_of_a_model_has_each_layers_path(world):
    found = told("inspect", *base(world.root))
    assert [layer["choice"]["name"] for layer in found["layers"]] == ["cpu"] * 6
    assert all("stacked" in layer["choice"]["refused"] for layer in found["layers"])


def test_what_is_wrong_is_a_line_with_json_too(world):
    code, out, err = run("evaluate", *base(world.root), "--data", world.root / "gone", "--json")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "gone" in err
