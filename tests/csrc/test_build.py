"""How csrc/ builds, with which compilers; and what is said where it was not built."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmd_cases import needs_library

import fastheads
from fastheads.ops import native

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = [c for c in ("g++", "clang++") if shutil.which(c)]
SOURCES = [str(ROOT / "csrc" / "mmd.cpp")]
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler (g++ or clang++) on this machine")


# ---- building -----------------------------------------------------------------------------------


def flags():
    """The compiler's flags in setup.py."""
    found = re.search(r"extra_compile_args=\[(.*?)\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL)
    return re.findall(r'"([^"]+)"', found.group(1))


def run(*command, **options):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=250, **options)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_compiles_in_seconds_and_without_a_warning(compiler, tmp_path):
    if compiler not in COMPILERS:
        pytest.skip(f"no {compiler} on this machine")
    started = time.monotonic()
    done = run(compiler, *flags(), *STRICT, "-fPIC", "-shared", *SOURCES, "-o", tmp_path / "lib.so")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert time.monotonic() - started < 60  # two seconds of an idle core


@pytest.mark.slow
def test_exponentials_become_vector_code(tmp_path):
    """Each instruction set's own width: computed one at a time, they cost six times as much, and no number shows it."""
    if "g++" not in COMPILERS:
        pytest.skip("no g++ on this machine, whose report this reads")
    done = run("g++", *flags(), "-fopt-info-vec-optimized", "-c", *SOURCES, "-o", tmp_path / "mmd.o")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the widths are those of x86")
    lines = Path(SOURCES[0]).read_text(encoding="utf-8").splitlines()
    (at,) = (i for i, line in enumerate(lines, 1) if "e[j] = exp_of(" in line)
    found = set(re.findall(rf"mmd\.cpp:{at}:.*vectorized using (\d+) byte", done.stderr))
    assert {"16", "32", "64"} <= found, f"line {at}: {found}"


@pytest.mark.slow
@needs_compiler
def test_the_header_is_plain_c(tmp_path):
    source = tmp_path / "c.c"
    source.write_text('#include "mmd.h"\nint main(void) { return fastheads_isa() == 0; }\n')
    c = shutil.which("gcc") or shutil.which("clang")
    if c is None:
        pytest.skip("no C compiler on this machine")
    done = run(
        c,
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-I",
        ROOT / "csrc",
        "-c",
        source,
        "-o",
        tmp_path / "c.o",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_clean_under_the_sanitizers(tmp_path):
    """What `make sanitize` runs."""
    if not COMPILERS:
        pytest.skip("no C++ compiler (g++ or clang++) on this machine")
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    done = run("make", "-s", "sanitize", f"CXX={COMPILERS[0]}", f"SANITIZED={tmp_path / 'sanitize'}", cwd=ROOT)
    if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
        pytest.skip(f"{COMPILERS[0]} has no sanitizers here")
    assert done.returncode == 0 and "runtime error" not in done.stderr, done.stdout + done.stderr
    assert "portable: clean" in done.stdout


# -S and -s below: the package is built where it stands in the repository, into a folder of its own.
def build(tmp_path, cxx):
    environment = {**os.environ, "CXX": cxx, "CC": cxx, "LDSHARED": f"{cxx} -shared", "LDCXXSHARED": f"{cxx} -shared"}
    command = ["setup.py", "--quiet", "build", "--build-base", tmp_path / "base", "--build-lib", tmp_path / "lib"]
    return run(sys.executable, *command, cwd=ROOT, env=environment)


@pytest.mark.slow
@needs_compiler
def test_a_source_distribution_has_all_that_the_native_kernels_need(tmp_path):
    """An isolated build has nothing but that: no repository around it."""
    (egg := tmp_path / "egg").mkdir()
    command = ["setup.py", "--quiet", "egg_info", "--egg-base", egg, "sdist", "--dist-dir", tmp_path]
    done = run(sys.executable, *command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = (p for p in tmp_path.iterdir() if p.is_dir() and p != egg)
    started = time.monotonic()
    done = run(sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path / "lib", cwd=unpacked)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "lib" / "fastheads").glob("libfastheads*")), done.stderr
    assert time.monotonic() - started < 60  # some three seconds of an idle core


SAY = """
import torch, fastheads
from fastheads.ops import native
from torch import nn
dom = torch.arange(40) % 3
x = torch.randn(40, 5, requires_grad=True)
loss = fastheads.mmd(x, dom)
loss.backward()
want = fastheads.mmd(x, dom, impl="reference")
assert abs(loss - want) < 1e-5
print(fastheads.__file__)
print(native.describe())
"""


@pytest.mark.slow
@pytest.mark.parametrize("cxx, said", [("false", "not built"), (COMPILERS[0] if COMPILERS else None, "avx|portable")])
def test_an_install_with_and_without_a_compiler(cxx, said, tmp_path):
    if cxx is None:
        pytest.skip("no C++ compiler (g++ or clang++) on this machine")
    done = build(tmp_path, cxx)
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "lib" / "fastheads").glob("libfastheads*"))
    assert bool(built) == (cxx != "false")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "OMP_NUM_THREADS": "1"}
    done = run(sys.executable, "-c", SAY, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    where, which = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path), where
    assert re.search(said, which), which


# ---- who says so --------------------------------------------------------------------------------


def report():
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    del layer
    return fastheads.patching.PatchReport((), 10, 2, 1000)


@needs_library
def test_the_report_names_the_instructions():
    assert str(report()).splitlines()[-1] == f"  native CPU kernels: {native.library().fastheads_isa().decode()}"


def test_the_report_says_that_there_are_none(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert str(report()).splitlines()[-1].startswith("  native CPU kernels: not built (")


OPENMP_LOADED = """
import re
import torch
from fastheads.ops import native
before = set(re.findall(r"/\\S*lib(?:gomp|omp|iomp5)[^/\\s]*[.]so\\S*", open("/proc/self/maps").read()))
assert native.library()
after = set(re.findall(r"/\\S*lib(?:gomp|omp|iomp5)[^/\\s]*[.]so\\S*", open("/proc/self/maps").read()))
print(sorted(after - before), bool(before))
"""


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps on this system")
def test_torch_and_our_library_share_one_openmp():
    """Two of them would be two pools of threads on one machine's cores. In a process of its own: scikit-learn, which
    other tests load, brings another."""
    ours = run("ldd", next((ROOT / "fastheads").glob("libfastheads*"), "/nothing"))
    if ours.returncode or "gomp" not in ours.stdout:
        pytest.skip("not an editable install built with g++")
    result = run(sys.executable, "-c", OPENMP_LOADED)
    assert result.stdout.strip() == "[] True", result.stdout + result.stderr


def test_the_library_is_looked_up_once():
    assert native.library() is native.library()
    assert isinstance(native.library(), (ctypes.CDLL, type(None)))
