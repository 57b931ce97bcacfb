"""The MMD of features of every dtype, size and place: compared in float32 or better, and finite."""

import pytest
import torch
from mmd_formulas import KERNELS, gammas_loops, labels, mmd_loops, randn

from fastheads.losses import mmd
from fastheads.reference import kernel_gammas


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equal_features_give_zero_loss_and_finite_gradients(name, offset):
    x = torch.full((2, 8, 4), offset + 0.1, dtype=torch.float32)
    x[1] = randn(8, 4, dtype=torch.float32)  # the other layer is ordinary
    x.requires_grad_()
    assert torch.isfinite(kernel_gammas(x.detach(), KERNELS[name])).all()
    pairs = mmd(x, labels(4, 4), kernel=KERNELS[name], reduction="none")
    assert torch.isfinite(pairs).all()
    assert abs(pairs[0, 0, 1].item()) < 1e-5  # sums of up to 7 kernels that are all one, in float32
    assert abs(pairs[1, 0, 1].item()) > 1e-5
    pairs[:, 0, 1].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0] == 0).all() or x.grad[0].abs().max() < 1e-5
    assert (x.grad[1] != 0).any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_features_are_compared_in_float32(dtype, name):
    low = randn(12, 6).to(dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    domains = labels(5, 7)
    a, b = (mmd(x, domains, kernel=KERNELS[name]) for x in (low, full))
    assert a.dtype == torch.float32
    assert torch.equal(a, b)
    a.backward()
    b.backward()
    assert low.grad.dtype == dtype
    # once rounded, or twice (x stands on both sides of the kernel): one unit, and for float16 one step
    # of its subnormal numbers
    torch.testing.assert_close(low.grad.float(), full.grad, rtol=torch.finfo(dtype).eps, atol=2.0**-24)


def test_float16_features_whose_squares_overflow():
    x, domains = (randn(12, 6) * 1000).half(), labels(5, 7)  # 65504 is float16's largest number
    want = mmd_loops(x.double(), domains, "adaptive", "unbiased")
    # float32 sums over at most 49 kernel values of up to 5
    torch.testing.assert_close(mmd(x, domains).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("preset", ["adaptive", "dan"])
def test_data_bandwidths_make_the_loss_independent_of_scale(preset, factor):
    x, domains = randn(12, 6, dtype=torch.float32), labels(5, 7)
    # float32 distances and up to five kernels near one: a few units of 6e-8, tenfold margin
    torch.testing.assert_close(
        mmd(x * factor, domains, kernel=preset), mmd(x, domains, kernel=preset), rtol=0, atol=5e-6
    )


def test_autocast_does_not_lower_the_precision():
    x, domains = randn(12, 6, dtype=torch.float32), labels(5, 7)
    want = mmd(x, domains)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mmd(x, domains)
    assert torch.equal(got, want)


def test_float64_stays_float64():
    assert mmd(randn(12, 6), labels(5, 7)).dtype == torch.float64


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", KERNELS)
def test_float32_error_is_that_of_plain_pytorch(name, impl):
    """Loss within 2 x, gradient within 3 x, of DomainBed's Gram-matrix computation (design.md)."""
    x, domains = randn(90, 32, dtype=torch.float32) / 4, labels(40, 50)

    def plain(x):
        a, b = x[domains == 0], x[domains == 1]
        gammas = gammas_loops(x.detach().double(), KERNELS[name])

        def k(u, v):
            norms = u.square().sum(-1)[:, None] + v.square().sum(-1)[None]
            d2 = (norms - 2 * u @ v.T).clamp_min(1e-30)
            return sum(torch.exp(-g * d2) for g in gammas)

        return k(a, a).mean() + k(b, b).mean() - 2 * k(a, b).mean()

    results = []
    for f, cast in (
        (lambda x: mmd(x, domains, kernel=KERNELS[name], estimator="biased", impl=impl), x),
        (plain, x),
        (plain, x.double()),
    ):
        leaf = cast.clone().requires_grad_()
        loss = f(leaf)
        loss.backward()
        results.append((loss.detach()[None], leaf.grad))
    for which, factor in ((0, 2), (1, 3)):
        ours, theirs, exact = (r[which].double() for r in results)
        for size in (
            lambda e: e.abs().max(),
            lambda e: e.square().mean().sqrt(),
        ):
            # a loss is a difference of sums of U kernels: its scale, for the slack, is U, not
            # itself
            scale = len(gammas_loops(x[:3], KERNELS[name])) if which == 0 else exact.abs().max()
            assert size(ours - exact) <= factor * size(theirs - exact) + 1e-6 * scale
