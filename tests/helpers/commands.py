"""The command line in this process, its options for the `world` of cli/conftest.py, checkpoints. Not a test file."""

import contextlib
import io
import json

import open_clip
import torch
from safetensors.torch import save_file

from fastheads.cli import commands as cli
from fastheads.demo.base import CONFIG, MODEL

DOMAINS = ("day", "night", "sepia")  # of the images below `world.root / "shapes"`
CLASSES = ("black_square", "white_square")
SHORT = ("--steps", "3", "--per-domain", "3", "--lr", "0.01", "--gate-lr", "0.3", "--workers", "0")


def run(*argv):
    """Exit code, stdout and stderr of one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def done(*argv):
    """Standard output of a command that must succeed."""
    code, out, err = run(*argv)
    assert code == 0, err
    return out


def checkpoint(path, seed, **changes):
    """Random weights of the demo's model (or of one with other words) as a checkpoint file."""
    config = json.loads(CONFIG.read_text())
    config["text_cfg"] |= changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(open_clip.CLIP(**config).state_dict(), path)
    return path


def base(root, file="demo.safetensors"):
    return ("--model", MODEL, "--pretrained", root / file)


def data(root):
    return ("--data", root / "shapes", "--workers", "0")


def listing(root):
    """Every path below root with its size and time of change."""
    entries = {}
    for path in sorted(root.rglob("*")):
        stat = path.stat()
        entries[str(path.relative_to(root))] = None if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return entries
