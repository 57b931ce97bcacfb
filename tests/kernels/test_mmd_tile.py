"""The panel kernels of the multi-kernel MMD against `reference.kernel_sums` and its gradient by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import BACKWARD, FORWARD, assert_right

from fastheads import reference
from fastheads.kernels import mmd as kernels
from fastheads.kernels.mmd import Points, mmd_norms, mmd_pull, product_precision
from fastheads.reference import kernel_gammas, kernel_sums

DOMAINBED = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
DOUBLING = (0, 2, 2, 2, 2)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel doesn't write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(N, S, seed=1):
    return torch.randint(S, (N,), generator=torch.Generator().manual_seed(seed))


def symmetric(L, S, seed=2):
    c = draw(L, S, S, seed=seed)
    return c + c.mT


def doubling(x):
    """Adaptive bandwidths, ascending: each half the next."""
    return kernel_gammas(x, "adaptive").contiguous()


def centred(x):
    x = reference.centred(x)
    return x, x.square().sum(-1)


def mmd_tile(x, x2, dom, first, rows, *, start=None, own=None, **given):
    """The launcher on rows first … first+rows-1 against columns from start on (None: from first, of x with itself)."""

    def points(a, b):
        return Points(x[:, a:b], x2[:, a:b], dom[a:b])

    both = points(first, first + rows), points(first if start is None else start, None)
    return kernels.mmd_tile(*both, x.new_zeros(len(x), x.shape[2]), itself=start is None, own=own, **given)


def by_panels(x, dom, S, gammas, powers, coeff, panel):
    """`[L, S, S]` kernel sums and `[L, N, D]` gradient of Σ coeff ∘ K, put together as the kernel's caller does."""
    x, x2 = centred(x)
    L, N, _ = x.shape
    sums, dx = torch.zeros(L, S, S, dtype=torch.float64), torch.zeros_like(x)
    for i in range(0, N, panel):
        rows = min(panel, N - i)
        w = torch.full((L, rows, N - i), math.nan)
        sums += mmd_tile(x, x2, dom, i, rows, num_domains=S, gammas=gammas, powers=powers, coeff=coeff, out=w)
        own, right, nothing = x[:, i : i + rows], x[:, i + rows :], x.new_zeros(L, x.shape[2])
        mmd_pull(w, own, x[:, i:], nothing, dx[:, i : i + rows], add=True)
        if i + rows < N:
            mmd_pull(w[:, :, rows:].mT, right, own, nothing, dx[:, i + rows :], add=True)
    return sums, -4 * dx


def formula(x, dom, S, gammas, coeff, dtype):
    x = x.to(dtype).requires_grad_()
    K = kernel_sums(x, dom, x, dom, S, gammas.to(dtype), row_offset=0)
    (dx,) = torch.autograd.grad((K * coeff).sum(), x)
    return K.detach(), dx


def check(x, dom, S, gammas, powers, panel, what=""):
    coeff = symmetric(len(x), S)
    K, dx = by_panels(x, dom, S, gammas, powers, coeff, panel)
    plain, exact = (formula(x, dom, S, gammas, coeff, dtype) for dtype in (torch.float32, torch.float64))
    assert_right(K, plain[0], exact[0], FORWARD, f"{what} kernel sums")
    assert_right(dx, plain[1], exact[1], BACKWARD, f"{what} gradient")


@pytest.mark.parametrize(
    "L,N,D,S,panel",
    [(2, 50, 33, 3, 64), (1, 300, 40, 4, 130), (2, 129, 7, 1, 128), (1, 200, 64, 20, 90), (1, 70, 16, 64, 33)],
)
def test_sums_and_gradient(L, N, D, S, panel):
    x = draw(L, N, D)
    check(x, ids(N, S), S, doubling(x), DOUBLING, panel)


def test_bandwidths_of_their_own():
    gammas = torch.tensor([[0.3, 0.01, 0.05], [0.02, 0.9, 0.01]])
    check(draw(2, 90, 20), ids(90, 2), 2, gammas, (0, 0, 0), 64)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("powers", [(0,) * 7, (0, 10, 0, 10, 0, 10, 0)], ids=["own", "pairs"])
def test_domainbed_by_pairs_of_exponentials(powers, scale):
    """Every second bandwidth as the tenth power of the one before is as good as an exponential of its own."""
    check(draw(1, 80, 24) * scale, ids(80, 3), 3, torch.tensor([DOMAINBED]), powers, 64)


@pytest.mark.parametrize("scale", [0.1, 0.01])
def test_powers_of_ten_drift_unless_restarted(scale):
    """A trap: each tenth power makes the relative error ten times as large. A new exponential starts afresh."""
    x, dom, coeff, gammas = draw(1, 80, 24) * scale, ids(80, 3), symmetric(1, 3), torch.tensor([DOMAINBED])
    exact = formula(x, dom, 3, gammas, coeff, torch.float64)[1]
    chains = {(0, 10, 10, 10, 10, 10, 10): (5e-5, 1.0), (0, 10, 10, 10, 0, 10, 10): (0.0, 5e-5)}
    for powers, (least, most) in chains.items():
        dx = by_panels(x, dom, 3, gammas, powers, coeff, 80)[1]
        assert least < float((dx - exact).abs().max() / exact.abs().max()) < most, powers


def test_far_from_the_origin():
    """The caller centres; without that, distances of 1 beside norms of 1e3 would have no digits left."""
    x = draw(1, 80, 48) + 1e3
    check(x, ids(80, 3), 3, doubling(x), DOUBLING, 64)


def test_nearly_equal_points():
    x = draw(1, 40, 32)
    x = torch.cat((x, x + 1e-3 * draw(1, 40, 32, seed=3)), 1)
    check(x, ids(80, 2), 2, torch.tensor([[0.01, 0.1, 1.0, 10.0]]), (0, 10, 10, 10), 64)


def test_identical_points_are_finite():
    x = torch.ones(1, 40, 8)
    K, dx = by_panels(x, ids(40, 2), 2, doubling(x), DOUBLING, symmetric(1, 2), 32)
    counts = torch.bincount(ids(40, 2)).double()
    assert torch.equal(K[0], 5 * counts[:, None] * counts)
    assert torch.equal(dx, torch.zeros_like(dx))


def test_a_panel_by_itself():
    """Sums: the square block as it stands, the columns right of it twice. Weights: the diagonal is exactly zero."""
    x, S, i, rows = draw(2, 150, 12), 3, 40, 50
    dom, gammas, coeff = ids(150, S), doubling(x), symmetric(2, S)
    x, x2 = centred(x)
    w = torch.full((2, rows, 110), math.nan)
    given = dict(num_domains=S, gammas=gammas, powers=DOUBLING)
    K = mmd_tile(x, x2, dom, i, rows, coeff=coeff, out=w, **given)
    x64, g64 = x.double(), gammas.double()
    one = x64[:, i : i + rows], dom[i : i + rows]
    square = kernel_sums(*one, *one, S, g64, row_offset=0)
    right = kernel_sums(*one, x64[:, i + rows :], dom[i + rows :], S, g64)
    torch.testing.assert_close(K.double(), square + right + right.mT, rtol=1e-5, atol=0)
    assert torch.equal(K, K.mT)
    d2 = (x64[:, i : i + rows, None] - x64[:, None, i:]).square().sum(-1)
    expected = sum(g.view(-1, 1, 1) * (-g.view(-1, 1, 1) * d2).exp() for g in g64.unbind(-1))
    expected = expected * coeff.double()[:, dom[i : i + rows]][..., dom[i:]]
    expected.diagonal(dim1=1, dim2=2).zero_()
    torch.testing.assert_close(w.double(), expected, rtol=1e-4, atol=1e-7)
    assert not w.diagonal(dim1=1, dim2=2).any()
    # sums alone, and once more: bit for bit
    assert torch.equal(mmd_tile(x, x2, dom, i, rows, **given), K)
    again = torch.full_like(w, math.nan)
    mmd_tile(x, x2, dom, i, rows, coeff=coeff, out=again, **given)
    assert torch.equal(again, w)


def test_rounded_weights_need_their_own_row_sums():
    """A trap: weights in bf16 beside row sums in float32, the diagonal kept, spoil the gradient. With the diagonal zero
    and the sums those of the rounded weights, bf16 would do; ours are float32."""
    x, dom, gammas = 0.25 * draw(1, 96, 64), torch.arange(96) % 2, torch.ones(1, 1)
    coeff = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]) / 48**2
    y, x2 = centred(x)
    w = torch.empty(1, 96, 96)
    mmd_tile(y, x2, dom, 0, 96, num_domains=2, gammas=gammas, powers=(0,), coeff=coeff, out=w)
    assert not w.diagonal(dim1=1, dim2=2).any()
    kept = w.clone()
    kept.diagonal(dim1=1, dim2=2).fill_(1 / 48**2)

    def error(weights, sums):
        dx = 4 * (weights @ y - sums.sum(-1, keepdim=True) * y)
        return float((dx - exact).norm() / exact.norm())

    exact = formula(x, dom, 2, gammas, coeff, torch.float64)[1]
    rounded = w.bfloat16().float()
    assert error(kept.bfloat16().float(), kept) > 0.02
    assert error(rounded, rounded) < 0.005
    assert error(w, w) < 1e-5


def test_strides_and_inputs_stay():
    base = draw(60, 2, 40)
    x, _ = centred(base.transpose(0, 1)[..., 3:30])
    view = torch.empty(60, 2, 40).transpose(0, 1)[..., 3:30].copy_(x)
    x2 = torch.empty(60, 2).T.copy_(x.square().sum(-1))
    dom = torch.stack((ids(60, 3), torch.full((60,), 99)), 1)[:, 0]
    out = torch.full((2, 30, 100), 7.0)
    before = [t.clone() for t in (view, x2, dom)]
    given = dict(num_domains=3, gammas=doubling(x), powers=DOUBLING, coeff=symmetric(2, 3))
    K = mmd_tile(view, x2, dom, 20, 30, out=out[..., 5:45], **given)
    w = torch.empty(2, 30, 40)
    assert torch.equal(K, mmd_tile(x.contiguous(), x2.contiguous(), dom.contiguous(), 20, 30, out=w, **given))
    assert torch.equal(out[..., 5:45], w)
    assert bool((out[..., :5] == 7).all() and (out[..., 45:] == 7).all())
    assert all(torch.equal(a, b) for a, b in zip(before, (view, x2, dom), strict=True))


def test_not_a_number_is_not_hidden():
    x, x2 = centred(draw(1, 20, 8))
    x[0, 3, 2] = x2[0, 3] = math.nan
    K = mmd_tile(x, x2, ids(20, 2), 0, 20, num_domains=2, gammas=torch.ones(1, 1), powers=(0,))
    assert bool(torch.isnan(K).any())


def test_what_it_refuses():
    x, x2 = centred(draw(1, 20, 8))
    with pytest.raises(ValueError, match="num_domains: got 65"):
        mmd_tile(x, x2, ids(20, 2), 0, 20, num_domains=65, gammas=torch.ones(1, 1), powers=(0,))
    for powers in ((), (2,), (0, 3)):
        with pytest.raises(ValueError, match="powers"):
            mmd_tile(x, x2, ids(20, 2), 0, 20, num_domains=2, gammas=torch.ones(1, 2), powers=powers)


@pytest.fixture
def tf32_allowed(monkeypatch):
    """As after `torch.set_float32_matmul_precision("high")`."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


def test_tf32_only_where_torch_allows_it(tf32_allowed):
    assert product_precision() == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert product_precision() == "tf32x3"


def is_tf32(x):
    """Whether the last 13 bits of the mantissa are zero."""
    return not (x.view(torch.int32) & 0x1FFF).any()


def test_weights_are_rounded_to_what_a_product_in_tf32_would_make_of_them(tf32_allowed):
    """The trap above, in TF32: row sums of unrounded weights beside a product that rounds them. It shows in clusters,
    whose points are far from the mean and near each other."""
    x, dom, gammas = 0.02 * draw(1, 96, 64), torch.arange(96) % 2, torch.ones(1, 1)
    x += torch.where(torch.arange(96) < 48, 1.0, -1.0)[:, None]
    coeff = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]) / 48**2
    y = to_tf32(centred(x)[0])
    w = torch.empty(1, 96, 96)
    given = dict(num_domains=2, gammas=gammas, powers=(0,), coeff=coeff)
    mmd_tile(y, y.square().sum(-1), dom, 0, 96, out=w, **given)
    assert is_tf32(w) and bool((w != 0).any())
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    full = torch.empty(1, 96, 96)
    mmd_tile(y, y.square().sum(-1), dom, 0, 96, out=full, **given)
    assert not is_tf32(full)
    exact = formula(y, dom, 2, gammas, coeff, torch.float64)[1]

    def error(sums):
        dx = 4 * (w @ y - sums.sum(-1, keepdim=True) * y)  # y is TF32 already: this product is the GPU's
        return float((dx - exact).norm() / exact.norm())

    assert error(w) < 1e-3 and error(full) > 5e-3, (error(w), error(full))


def to_tf32(x):
    """The nearest with eleven bits, halves away from 0."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("N", [1, 300])
def test_rounding_to_tf32_keeps_eleven_bits_and_every_nan(N, tf32_allowed):
    """The square of eleven bits is exact."""
    x = draw(8, N, 1) * torch.logspace(-15, 15, 8).view(8, 1, 1)
    rounded, dom, nothing = to_tf32(x), torch.zeros(N, dtype=torch.int64), x.new_zeros(8, 1)
    assert is_tf32(rounded) and bool(((rounded - x).abs() <= 2.0**-11 * x.abs()).all())
    assert torch.equal(mmd_norms(x, dom, nothing, 1), rounded.square()[..., 0])
    gpus = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    assert bool(torch.isnan(mmd_norms(gpus.view(1, 3, 1), dom[:1].expand(3), nothing[:1], 1)).all())
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert torch.equal(mmd_norms(x, dom, nothing, 1), x.square()[..., 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns, spans", [(70, 300, 2), (33, 700, 4), (20, 90, 1)])
def test_pull_of_spans_into_any_dtype(rows, columns, spans, dtype, monkeypatch):
    """`Σ_j w_ij (x_i − y_j)` written and added, of 16-bit features as well; what is of no domain has weight 0."""
    monkeypatch.setattr(kernels, "SPAN", 150)
    x, y = draw(2, rows, 40).to(dtype) + 3, draw(2, columns, 40, seed=1).to(dtype) + 3
    w, c = draw(2, rows, columns, seed=2), torch.full((2, 40), 3.1)
    y[:, 5], w[:, :, 5] = math.nan, 0
    known = [j for j in range(columns) if j != 5]
    exact = w.double().sum(-1, keepdim=True) * x.double() - w.double()[..., known] @ y.double()[:, known]
    plain = w.sum(-1, keepdim=True) * (x - c[:, None]) - w[..., known] @ (y - c[:, None])[:, known]
    programs = 2 * -(-rows // 64)
    assert -(-columns // kernels.pull_span(columns, programs, 32)) == spans
    for out in (torch.full((2, rows, 50), math.nan, dtype=dtype), torch.full((2, rows, 50), math.nan)):
        mmd_pull(w, x, y, c, out[..., :40])
        assert_right(out[..., :40], plain.to(out.dtype), exact, FORWARD, "pull")
        assert bool(torch.isnan(out[..., 40:]).all())
    again = out[..., :40].clone()
    mmd_pull(w.mT.contiguous().mT, x, y, c, again, add=True)
    torch.testing.assert_close(again, 2 * out[..., :40])


def test_pull_hides_no_nan():
    w, x = torch.ones(1, 20, 20), draw(1, 20, 8)
    w[0, 3] = math.nan
    out = torch.empty(1, 20, 8)
    mmd_pull(w, x, x, x.new_zeros(1, 8), out)
    assert bool(torch.isnan(out[0, 3]).all()) and not torch.isnan(out[0, :3]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_features_are_centred_where_they_are_loaded(dtype):
    """As the centred copy in float32 would give, bit for bit; samples of no domain are not read."""
    x, dom = draw(1, 90, 24).to(dtype) + 7, ids(90, 3)
    c = reference.centre(x, dom >= 0)
    z = x.float() - c
    x[:, 4], dom[4], z[:, 4] = math.nan, 3, 0
    given = dict(num_domains=3, gammas=doubling(z), powers=DOUBLING, coeff=symmetric(1, 3), itself=True)
    found = []
    for features, at in ((x, c[:, 0]), (z, torch.zeros(1, 24))):
        points = Points(features, mmd_norms(features, dom, at, 3), dom)
        w = torch.full((1, 90, 90), math.nan)
        found.append((points.norms[:, dom < 3], kernels.mmd_tile(points, points, at, out=w, **given), w))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_not_a_number_is_not_hidden_by_the_rounding(tf32_allowed):
    x, x2 = centred(draw(1, 20, 8))
    bad = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x[0, 3, 2] = x2[0, 3] = bad
    w = torch.zeros(1, 20, 20)
    mmd_tile(
        x, x2, ids(20, 2), 0, 20, num_domains=2, gammas=torch.ones(1, 1), powers=(0,), coeff=symmetric(1, 2), out=w
    )
    assert bool(torch.isnan(w[0, 3, 4:]).all())


@pytest.mark.parametrize(
    "rows, columns, own", [(40, 70, None), (40, 70, 0), (40, 70, 25), (33, 150, -20), (40, 70, 10**9), (1, 1, 0)]
)
@pytest.mark.parametrize("S", [3, 20])
def test_rows_against_other_columns(rows, columns, own, S):
    """A process's rows against all processes' columns: each pair once, a row's own column at no distance and weight."""
    x, dom = draw(2, rows + columns, 12), ids(rows + columns, S)
    for i in range(rows) if own is not None else ():
        if 0 <= i + own < columns:
            x[:, rows + i + own], dom[rows + i + own] = x[:, i], dom[i]
    gammas, coeff = doubling(x), symmetric(2, S)
    x, x2 = centred(x)
    w = torch.full((2, rows, columns), math.nan)
    given = dict(num_domains=S, gammas=gammas, powers=DOUBLING, start=rows, own=own)
    K = mmd_tile(x, x2, dom, 0, rows, coeff=coeff, out=w, **given)
    x64, g64 = x.double(), gammas.double()
    a, b = (x64[:, :rows], dom[:rows]), (x64[:, rows:], dom[rows:])
    torch.testing.assert_close(K.double(), kernel_sums(*a, *b, S, g64, own), rtol=1e-5, atol=0)
    d2 = (a[0][:, :, None] - b[0][:, None]).square().sum(-1)
    expected = sum(g.view(-1, 1, 1) * (-g.view(-1, 1, 1) * d2).exp() for g in g64.unbind(-1))
    expected = expected * coeff.double()[:, a[1]][..., b[1]]
    for i in range(rows) if own is not None else ():
        if 0 <= i + own < columns:
            expected[:, i, i + own] = 0
    torch.testing.assert_close(w.double(), expected, rtol=1e-4, atol=1e-7)
    # the second half of the rows, as a panel by itself
    half = rows // 2
    if half:
        given["own"] = None if own is None else own + half
        part = torch.full((2, rows - half, columns), math.nan)
        mmd_tile(x, x2, dom, half, rows - half, coeff=coeff, out=part, **given)
        torch.testing.assert_close(part, w[:, half:])
