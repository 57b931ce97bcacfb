"""Compiled kernels that are started directly: the same ones, with the same arguments, that Triton itself would start.

The checks stand in direct_starts.py, and run in one process without the interpreter, on a GPU that is not there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKS = Path(__file__).with_name("direct_starts.py")
NAMES = re.findall(r"^def (\w+)\(gpu\):", CHECKS.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def said():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, CHECKS, *NAMES], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_direct(said, name):
    assert not said[name], said[name]
