"""Shared by the compiler's tests: a process without the interpreter, and a made-up kernel. Not a test file."""

import os
import subprocess
import sys
from pathlib import Path

from bench.compile_report.offline import Compiled

ROOT = Path(__file__).resolve().parents[2]


def clean_environment() -> dict[str, str]:
    """Of a process of its own: no interpreter, and no pytest-xdist, beside which pytest-benchmark is off."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}


def without_interpreter(*command: str, **options) -> subprocess.CompletedProcess:
    env = clean_environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, **options)


def compiled(**values) -> Compiled:
    fields = {
        "kernel": "k",
        "arch": 80,
        "constexprs": {},
        "num_warps": 4,
        "num_stages": 1,
        "registers": 255,
        "stack": 0,
    }
    fields |= {"local": 0, "shared": 1024, "mma": 8, "wgmma": 0, "dots": True, "hash": ""}
    return Compiled(**{**fields, **values})
