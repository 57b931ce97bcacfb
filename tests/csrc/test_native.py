"""The C interface of csrc/ itself, by ctypes; how it builds; and what is said where it was not built."""

import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastheads
from fastheads.ops import native

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = [c for c in ("g++", "clang++") if shutil.which(c)]
SOURCES = [str(ROOT / "csrc" / "mmd.cpp")]
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
LIBRARY = native.library()

needs_library = pytest.mark.skipif(LIBRARY is None, reason="csrc/ was not built: no C++ compiler at install")
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler (g++ or clang++) on this machine")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    if LIBRARY.fastheads_force_isa(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    LIBRARY.fastheads_force_isa(None)


def problem(L=2, R=6, C=300, S=3, dtype=np.float32, seed=0):
    """Arguments of a tile, by name, as arrays; gram has three columns too many, which are nobody's."""
    r = np.random.default_rng(seed)
    return dict(
        gram=(r.standard_normal((L, R, C + 3)) / 4).astype(dtype),
        x2=r.random((L, R)).astype(dtype) + 1,
        y2=r.random((L, C)).astype(dtype) + 1,
        segments=np.array([0, C // 3, C // 3, C][: S + 1] if S == 3 else [0, C], dtype=np.int64),
        domains=r.integers(0, S, R).astype(np.int64),
        gammas=(np.array([0.01, 0.1, 1.0, 2.0]) * np.arange(1, L + 1)[:, None]).astype(dtype),
        powers=np.array([0, 10, 10, 2], dtype=np.int32),
        coeff=r.standard_normal((L, S, S)).astype(dtype),
        self=np.arange(R, dtype=np.int64) - 2,
        sums=np.full((L, R, S), np.nan),
        threads=2,
    )


def call(p, **changes):
    """Calls the C function on `p`; `changes` replace scalars by name. Returns what it returns."""
    L, R, wide = p["gram"].shape
    scalars = dict(
        layers=L, rows=R, columns=wide - 3, S=len(p["segments"]) - 1, U=len(p["powers"]), threads=p["threads"]
    )
    n = {**scalars, **changes}

    def at(name):
        return None if p[name] is None else p[name].ctypes.data

    tile = LIBRARY.fastheads_mmd_tile_f32 if p["gram"].dtype == np.float32 else LIBRARY.fastheads_mmd_tile_f64
    return tile(
        *(at("gram"), R * wide, wide, n["layers"], n["rows"], n["columns"]),
        *(at("x2"), R, at("y2"), wide - 3),
        *(at("segments"), at("domains"), n["S"]),
        *(at("gammas"), at("powers"), n["U"]),
        *(at("coeff"), at("self"), at("sums"), n["threads"]),
    )


def expected(p):
    """Sums `[L, R, S]` and weights `[L, R, C]` in float64, by numpy's exp."""
    C = p["gram"].shape[2] - 3
    g, x2, y2, gammas = (p[k].astype(np.float64) for k in ("gram", "x2", "y2", "gammas"))
    d2 = np.maximum(x2[..., None] + y2[:, None] - 2 * g[..., :C], 0)
    for i, j in enumerate(p["self"]):
        if 0 <= j < C:
            d2[:, i, j] = 0
    e = np.exp(-gammas[:, None, None] * d2[..., None])  # [L, R, C, U]
    domain_of = np.repeat(np.arange(len(p["segments"]) - 1), np.diff(p["segments"]))
    sums = np.stack([e[:, :, domain_of == s].sum((2, 3)) for s in range(len(p["segments"]) - 1)], -1)
    if p["coeff"] is None:
        return sums, None
    weights = p["coeff"].astype(np.float64)[:, p["domains"]][:, :, domain_of] * (gammas[:, None, None] * e).sum(-1)
    for i, j in enumerate(p["self"]):
        if 0 <= j < C:
            weights[:, i, j] = 0
    return sums, weights


# ---- results ------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("coeff", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 3e-6), (np.float64, 1e-14)])
def test_each_instruction_set_computes_the_formula(isa, dtype, tolerance, coeff):
    p = problem(dtype=dtype)
    if not coeff:
        p["coeff"] = None
    C = p["gram"].shape[2] - 3
    beyond = p["gram"][..., C:].copy()
    # gammas of the header: each power is of the kernel before it
    p["gammas"][:, 1:] = p["gammas"][:, :1] * np.cumprod(p["powers"][1:]).astype(dtype)
    sums, weights = expected(p)
    assert call(p) == 0
    assert LIBRARY.fastheads_isa().decode() == isa
    np.testing.assert_allclose(p["sums"], sums, rtol=tolerance, atol=0)
    if coeff:
        size = np.abs(weights).max()
        np.testing.assert_allclose(p["gram"][..., :C], weights, rtol=0, atol=tolerance * size)
    assert np.array_equal(p["gram"][..., C:], beyond), "columns beyond the tile were written"


@needs_library
@pytest.mark.parametrize("ends", [[0, 0], [255, 256], [256, 257], [1, 2], [300, 300], [0, 300], [100, 256]], ids=str)
def test_domains_end_where_they_like(isa, ends):
    """In the middle of a vector, of a chunk of 256 columns, at its edge, or nowhere at all."""
    p = problem(S=3)
    p["segments"] = np.array([0, *ends, 300], dtype=np.int64)
    sums, weights = expected(p)
    p["powers"][:] = 0
    assert call(p) == 0
    np.testing.assert_allclose(p["sums"], sums, rtol=3e-6, atol=0)
    size = np.abs(weights).max()
    np.testing.assert_allclose(p["gram"][..., :300], weights, rtol=0, atol=3e-6 * size)


@needs_library
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_change_no_bit(isa, dtype):
    found = []
    for threads in (-1, 0, 1, 2, 3, 50):
        p = problem(dtype=dtype)
        assert call(p, threads=threads) == 0
        found.append((p["sums"], p["gram"]))
    for sums, gram in found[1:]:
        assert np.array_equal(sums, found[0][0]) and np.array_equal(gram, found[0][1])


@needs_library
def test_nan_stays_nan(isa):
    for dtype in (np.float32, np.float64):
        p = problem(dtype=dtype)
        p["gram"][1, 2, 7] = np.nan
        assert call(p) == 0
        assert np.isnan(p["sums"]).sum() == 1 and np.isnan(p["sums"][1, 2]).any()
        assert np.isnan(p["gram"]).sum() == 1 and np.isnan(p["gram"][1, 2, 7])


def native_exp(x):
    """exp(x), x <= 0, of the library: a tile of one row, gamma 1, no inner products."""
    C, dtype = len(x), x.dtype
    p = problem(1, 1, 1, 1, dtype)
    p.update(
        gram=np.zeros((1, 1, C + 3), dtype),
        x2=np.zeros((1, 1), dtype),
        y2=-x[None],
        segments=np.array([0, C], np.int64),
        domains=np.zeros(1, np.int64),
        gammas=np.ones((1, 1), dtype),
        powers=np.zeros(1, np.int32),
        coeff=np.ones((1, 1, 1), dtype),
        self=np.array([-1], np.int64),
        sums=np.full((1, 1, 1), np.nan),
    )
    assert call(p) == 0
    return p["gram"][0, 0, :C]


@needs_library
@pytest.mark.parametrize(
    "dtype, least, zero, ulps",
    # Units in the last place of libm's in the next wider type. float64 has none here, so libm's own half unit is in it.
    [(np.float32, -80.0, -80.001, 1.5), (np.float64, -700.0, -700.001, 2.5)],
)
def test_exp_is_right_to_the_last_place(isa, dtype, least, zero, ulps):
    r = np.random.default_rng(0)
    x = np.concatenate(
        [
            np.linspace(least, 0, 400_001),
            -np.exp(r.uniform(math.log(1e-30), math.log(-least), 200_000)),
            -math.log(2) * np.arange(0, int(-least / math.log(2))),  # where the power of two changes
            -math.log(2) * (np.arange(0, int(-least / math.log(2))) + 0.5),
            [0.0, -0.0, least],
        ]
    )
    x = np.clip(x, least, 0).astype(dtype)
    wide = np.longdouble if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps else np.float64
    exact = np.exp(x.astype(wide))
    got = native_exp(x)
    error = np.abs(got.astype(wide) - exact) / np.spacing(exact.astype(dtype)).astype(wide)
    assert error.max() <= ulps, f"{float(error.max()):.2f} units at {x[error.argmax()]!r}"
    assert (native_exp(np.array([0.0, -0.0], dtype)) == 1).all()
    beyond = np.array([zero, 1.1 * zero, 10 * zero, -1e30, -np.finfo(dtype).max, -np.inf], dtype)
    assert (native_exp(beyond) == 0).all()


@needs_library
def test_more_kernels_than_anyone_has(isa):
    p = problem()
    p["gammas"] = np.repeat(np.linspace(0.01, 1, 200, dtype=np.float32)[None], 2, 0)
    p["powers"] = np.zeros(200, np.int32)
    sums, _ = expected(p)
    assert call(p) == 0
    np.testing.assert_allclose(p["sums"], sums, rtol=3e-6)


# ---- bad arguments ------------------------------------------------------------------------------


def _set(name, value):
    def change(p):
        p[name] = np.array(value, p[name].dtype)

    return change


BAD = {
    "negative layers": dict(layers=-1),
    "negative rows": dict(rows=-1),
    "negative columns": dict(columns=-1),
    "no domains": dict(S=0),
    "no kernels": dict(U=0),
    "a power of nothing": _set("powers", [2, 0, 0, 0]),
    "an unknown power": _set("powers", [0, 10, 3, 0]),
    "a negative power": _set("powers", [0, -10, 0, 0]),
    "segments that start late": _set("segments", [1, 2, 3, 300]),
    "segments that end early": _set("segments", [0, 2, 3, 299]),
    "segments that end beyond": _set("segments", [0, 2, 3, 301]),
    "segments that run back": _set("segments", [0, 20, 10, 300]),
    "segments far beyond": _set("segments", [0, 2**62, 10, 300]),
    "a row of a negative domain": _set("domains", [0, 1, 2, -1, 0, 0]),
    "a row of no domain": _set("domains", [0, 1, 2, 3, 0, 0]),
}


@needs_library
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_return_1_and_write_nothing(case, dtype):
    p, change = problem(dtype=dtype), BAD[case]
    scalars = change if isinstance(change, dict) else change(p) or {}
    before = p["gram"].copy()
    assert call(p, **scalars) == 1
    assert np.array_equal(p["gram"], before) and np.isnan(p["sums"]).all()


@needs_library
@pytest.mark.parametrize("changes", [dict(layers=0), dict(rows=0)])
def test_nothing_to_do_writes_nothing(changes):
    p = problem()
    before = p["gram"].copy()
    assert call(p, **changes) == 0
    assert np.array_equal(p["gram"], before) and np.isnan(p["sums"]).all()


@needs_library
def test_the_python_side_says_where_to_look():
    p = {k: torch.from_numpy(v) for k, v in problem().items() if isinstance(v, np.ndarray) and k != "sums"}
    p["gram"] = p["gram"][..., :300]
    p["domains"] = p["domains"] + 3
    with pytest.raises(ValueError, match=r"mmd_tile.*csrc/mmd\.h"):
        native.mmd_tile(**p)


@needs_library
def test_unknown_instruction_sets_are_refused_and_change_nothing():
    best = LIBRARY.fastheads_isa()
    for name in (b"mmx", b"", b"AVX2", b"avx512 "):
        assert LIBRARY.fastheads_force_isa(name) == 1
        assert LIBRARY.fastheads_isa() == best
    assert LIBRARY.fastheads_force_isa(b"portable") == 0 and LIBRARY.fastheads_isa() == b"portable"
    assert LIBRARY.fastheads_force_isa(None) == 0 and LIBRARY.fastheads_isa() == best


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
    assert str(report()).splitlines()[-1] == f"  native CPU kernels: {LIBRARY.fastheads_isa().decode()}"


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
