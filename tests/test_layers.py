"""Who may import whom: the rule of pyproject.toml holds, and it goes red where a layer, kernels/ too, breaks it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT = Path(sys.executable).with_name("lint-imports")

# One line in a file of each layer that reaches up, or beside it.
PLANTED = {
    "fastheads/cli/arguments.py": "import bench.base.tables",
    "fastheads/demo/__init__.py": "from fastheads.cli import arguments",
    "fastheads/train/progress.py": "def late():\n    from fastheads.demo import run",
    "fastheads/ledger.py": "from fastheads.train import planning",
    "fastheads/folding.py": "from fastheads.train import recipe",
    "fastheads/losses/samples.py": "from fastheads.train.loop import fit",
    "fastheads/model/patched.py": "import fastheads.adapters",
    "fastheads/hosts/towers.py": "from fastheads.model import base",
    "fastheads/nn/lora.py": "from fastheads.hosts import towers",
    "fastheads/ops/native.py": "from fastheads.nn import lora",
    "fastheads/kernels/launch.py": "from fastheads.ops import dispatch",
    "fastheads/reference/precision.py": "from fastheads.kernels import launch",
    "fastheads/config.py": "from fastheads.reference import attention",
}


@pytest.fixture
def tree(tmp_path):
    """The sources laid out as they are installed."""
    for name in ("fastheads", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "fastheads/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def lint(tree):
    command = [LINT, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=tree, env={"PYTHONPATH": str(tree)}, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def plant(file, line):
    with open(file, "a") as f:
        f.write(f"\n\n{line}\n")


def test_the_sources_keep_the_rule(tree):
    code, said = lint(tree)
    assert code == 0 and "2 kept, 0 broken" in said, said


def test_a_line_that_breaks_it_is_named_in_every_layer(tree):
    for file, line in PLANTED.items():
        plant(tree / file, line)
    code, said = lint(tree)
    assert code == 1 and "0 kept, 2 broken" in said
    for file in PLANTED:
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        assert f"{module} -> " in said, module


def test_a_circle_inside_a_folder_is_named(tree):
    plant(tree / "fastheads/train/report/record.py", "from fastheads.train.report import sections")
    code, said = lint(tree)
    assert code == 1 and "1 kept, 1 broken" in said and "fastheads.train.report" in said.split("No circles")[-1]
