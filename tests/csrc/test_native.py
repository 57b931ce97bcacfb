"""The C interface of csrc/ itself, by ctypes, on every instruction set of this machine."""

import math

import numpy as np
import pytest
import torch
from mmd_cases import needs_library

from fastheads.ops import native

LIBRARY = native.library()


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
