"""The MMD of a small batch in one launch against `losses.mmd` and autograd: value, kernel sums, gradient."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import BACKWARD, FORWARD, assert_right

from fastheads.kernels.mmd_small import mmd_small
from fastheads.losses import mmd
from fastheads.reference import kernel_gammas, kernel_sums

ESTIMATORS = pytest.mark.parametrize("estimator", ["biased", "unbiased"])
KERNELS = pytest.mark.parametrize("kernel", ["adaptive", "dan", (0.002, 0.02, 0.3)], ids=str)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel doesn't write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*sizes):
    """Domain ids, `sizes[s]` of domain s, shuffled."""
    dom = torch.cat([torch.full((n,), s, dtype=torch.int64) for s, n in enumerate(sizes)])
    return dom[torch.randperm(len(dom), generator=torch.Generator().manual_seed(7))]


def gated(x, gate):
    return x if gate is None else (x.unflatten(-1, (gate.shape[1], -1)) * gate[:, None, :, None]).flatten(2)


def formula(x, dom, S, kernel, estimator, gate, dtype):
    """Losses [L], kernel sums, gradient in x or the gate, layer by layer, by `losses.mmd` in dtype."""
    x = x.to(dtype).requires_grad_(gate is None)
    gate = None if gate is None else gate.to(dtype).requires_grad_()
    y = gated(x, gate)
    kernel = kernel if isinstance(kernel, str) else list(kernel)
    losses = torch.stack([mmd(f, dom, num_domains=S, kernel=kernel, estimator=estimator, impl="reference") for f in y])
    (grad,) = torch.autograd.grad(losses.sum(), x if gate is None else gate)
    with torch.no_grad():
        K = kernel_sums(y, dom, y, dom, S, kernel_gammas(y, kernel), row_offset=0)
    return losses.detach(), K, grad


def run(x, dom, S, kernel, estimator, gate=None, **more):
    if isinstance(kernel, str):
        return mmd_small(x, dom, num_domains=S, preset=kernel, estimator=estimator, gate=gate, **more)
    gammas = torch.tensor([kernel]).repeat(len(x), 1)
    powers = (0,) * len(kernel)
    given = dict(num_domains=S, preset=None, gammas=gammas, powers=powers, estimator=estimator, gate=gate)
    return mmd_small(x, dom, **given, **more)


def check(x, dom, S, kernel="adaptive", estimator="biased", gate=None, what=""):
    got = run(x, dom, S, kernel, estimator, gate)
    plain, exact = (formula(x, dom, S, kernel, estimator, gate, dtype) for dtype in (torch.float32, torch.float64))
    # The loss is a difference of means of kernels, each at most U: there its rounding comes from.
    U = 5 if isinstance(kernel, str) else len(kernel)
    assert bool(((got[0] - exact[0]).abs() <= 1e-6 * U + 2 * (plain[0] - exact[0]).abs()).all()), what
    assert_right(got[1], plain[1], exact[1], FORWARD, f"{what} kernel sums")
    assert_right(got[2].float(), plain[2], exact[2], BACKWARD, f"{what} gradient")
    return got


@ESTIMATORS
@KERNELS
@pytest.mark.parametrize("gates", [False, True])
def test_the_papers_batch(kernel, estimator, gates):
    """36 samples of three domains, heads; S and sizes as in a leave-one-out run."""
    x = draw(2, 36, 48) + labels(12, 12, 12)[:, None] * 0.3
    gate = 1 + 0.5 * draw(2, 3, seed=3) if gates else None
    check(x, labels(12, 12, 12), 3, kernel, estimator, gate)


@ESTIMATORS
@pytest.mark.parametrize(
    "L,sizes,S,D",
    [
        (1, (5, 9), 2, 33),
        (2, (1, 2, 14), 3, 7),
        (1, (2,) * 20, 20, 70),
        (1, (50, 3, 47), 3, 130),
        (1, (64, 64), 2, 16),
        (1, (3, 0, 4, 0, 2), 7, 20),
        (3, (2, 2), 64, 1),
    ],
    ids=str,
)
def test_sizes_and_absent_domains(L, sizes, S, D, estimator):
    if estimator == "unbiased" and 1 in sizes:
        sizes = tuple(n + (n == 1) for n in sizes)
    check(draw(L, sum(sizes), D), labels(*sizes), S, "adaptive", estimator)


@pytest.mark.parametrize("H,dh", [(1, 40), (3, 5), (2, 72), (5, 64), (2, 130)])
def test_gate_gradient_per_head(H, dh):
    gate = 1 + 0.3 * draw(2, H, seed=5)
    loss, _, dgate = check(draw(2, 20, H * dh), labels(9, 11), 2, gate=gate)
    assert dgate.shape == (2, H) and dgate.dtype == torch.float32


def test_lone_samples_drop_out_of_the_unbiased_mean():
    """On a GPU nobody can look at the counts first: a domain of one sample counts as absent."""
    x, dom = draw(1, 12, 20), labels(1, 5, 6)
    loss, _, dx = run(x, dom, 3, (0.1,), "unbiased")
    kept = dom > 0
    alone = run(x[:, kept], dom[kept], 3, (0.1,), "unbiased")
    torch.testing.assert_close(loss, alone[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx[:, kept], alone[2], rtol=1e-4, atol=1e-6)
    assert not dx[:, ~kept].any()


@ESTIMATORS
@pytest.mark.parametrize("N", [1, 2, 17])
def test_one_domain_is_zero(N, estimator):
    x = draw(2, N, 9)
    for dom in (torch.zeros(N, dtype=torch.int64), torch.full((N,), 2)):
        loss, K, dx = run(x, dom, 3, "adaptive", estimator)
        assert torch.equal(loss, torch.zeros(2)) and torch.equal(dx, torch.zeros_like(x))
        assert bool(torch.isfinite(K).all())


@pytest.mark.parametrize("kernel", ["adaptive", "dan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_identical_points_are_finite(kernel, dtype):
    loss, K, dx = run(torch.full((1, 20, 24), 3.0, dtype=dtype), labels(8, 12), 2, kernel, "unbiased")
    assert abs(float(loss)) < 1e-5 and torch.equal(dx, torch.zeros_like(dx))
    assert torch.equal(K[0], 5.0 * torch.tensor([[64.0, 96.0], [96.0, 144.0]]))


@pytest.mark.parametrize("kernel", ["adaptive", (0.1, 1.0)], ids=str)
def test_far_from_the_origin(kernel):
    check(0.3 * draw(2, 36, 48) + 1e3, labels(12, 24), 2, kernel)


def test_far_from_the_origin_with_gates():
    check(0.3 * draw(1, 36, 48) + 1e2, labels(12, 24), 2, gate=1 + 0.3 * draw(1, 3, seed=5))


def test_the_floor_of_the_bandwidth():
    """Rows that differ by less than the features' own rounding resolves: the reference's floor, reached."""
    x = torch.full((1, 12, 8), 1e3)
    x[0, 0, 0] += 6.1035e-05
    K = run(x, labels(6, 6), 2, "adaptive", "biased")[1]
    expected = kernel_sums(x, labels(6, 6), x, labels(6, 6), 2, kernel_gammas(x, "adaptive"), row_offset=0)
    torch.testing.assert_close(K, expected)


def test_nearly_equal_points():
    x = draw(1, 20, 32)
    x = torch.cat((x, x + 1e-3 * draw(1, 20, 32, seed=3)), 1)
    check(x, labels(20, 20), 2, (0.01, 0.1, 1.0))


def test_given_gammas_may_be_powers():
    x, dom = draw(2, 30, 16), labels(10, 20)
    gammas = torch.tensor([[0.01, 0.1, 0.2], [0.003, 0.03, 0.06]])
    given = dict(num_domains=2, preset=None, gammas=gammas, estimator="biased")
    again = mmd_small(x, dom, powers=(0, 10, 2), **given)
    for a, b in zip(mmd_small(x, dom, powers=(0, 0, 0), **given), again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_half_precision_features():
    """Computed in float32; dx stays in it, for whoever scales the loss to round once."""
    x, dom = draw(2, 36, 48).half(), labels(12, 24)
    loss, K, dx = run(x, dom, 2, "adaptive", "biased")
    wide = run(x.float(), dom, 2, "adaptive", "biased")
    assert dx.dtype == torch.float32
    assert torch.equal(loss, wide[0]) and torch.equal(K, wide[1]) and torch.equal(dx, wide[2])


@pytest.mark.parametrize("rows", [True, False])
def test_strides_and_inputs_stay(rows):
    x = draw(40, 2, 40).transpose(0, 1)[..., 2:35] if rows else draw(2, 33, 40).mT
    dom = torch.stack((labels(15, 25), torch.full((40,), 99)), 1)[:, 0]
    gate = draw(2, 9, seed=4)[:, 1:4]
    before = [t.clone() for t in (x, dom, gate)]
    for g in (None, gate):
        got = run(x, dom, 2, "adaptive", "biased", g)
        same = run(x.contiguous(), dom.contiguous(), 2, "adaptive", "biased", None if g is None else g.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, dom, gate), strict=True))
    loss, K, nothing = run(x, dom, 2, "adaptive", "biased", backward=False)
    assert nothing is None and torch.equal(loss, run(x, dom, 2, "adaptive", "biased")[0])


def test_repeats_bit_for_bit():
    x, dom, gate = draw(2, 70, 30), labels(15, 55), draw(2, 3, seed=2)
    for g in (None, gate):
        first, second = (run(x, dom, 2, "adaptive", "unbiased", g) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_not_a_number_is_not_hidden():
    x = draw(1, 20, 8)
    x[0, 3, 2] = math.nan
    for kernel in ("adaptive", (0.1,)):
        loss, K, dx = run(x, labels(10, 10), 2, kernel, "biased")
        assert bool(torch.isnan(loss).all() and torch.isnan(K).any() and torch.isnan(dx).any())


def test_what_it_refuses():
    x, dom = draw(1, 129, 4), labels(64, 65)
    with pytest.raises(ValueError, match="129 samples"):
        run(x, dom, 2, "adaptive", "biased")
    with pytest.raises(ValueError, match="65 domains"):
        run(x[:, :9], dom[:9], 65, "adaptive", "biased")
    with pytest.raises(ValueError, match="estimator"):
        run(x[:, :9], dom[:9], 2, "adaptive", "linear")
