"""Kernel sums, bandwidths and estimators of `fastheads.reference`, against double loops over all pairs."""

import math

import pytest
import torch
from mmd_formulas import EXACT, EXPLICIT, KERNELS, gammas_loops, labels, pair_loops, randn, squared
from torch.autograd import gradcheck

from fastheads.reference import kernel_gammas, kernel_sums, mmd_from_sums

# ---- kernel sums --------------------------------------------------------------------------------


def kernel_sums_loops(x, dom_x, y, dom_y, S, gammas, row_offset):
    K = torch.zeros(x.shape[0], S, S, dtype=torch.float64)
    for layer in range(x.shape[0]):
        for i in range(x.shape[1]):
            for j in range(y.shape[1]):
                d2 = float((x[layer, i].double() - y[layer, j].double()).square().sum())
                if row_offset is not None and j == row_offset + i:
                    d2 = 0.0
                for g in gammas[layer].tolist():
                    K[layer, dom_x[i], dom_y[j]] += math.exp(-g * d2)
    return K


@pytest.mark.parametrize("row_offset", [None, 0, 3])
def test_kernel_sums_equal_the_double_loop(row_offset):
    y, dom_y = randn(2, 9, 4), labels(4, 2, 0, 3)  # domain 2 is absent
    if row_offset is None:
        x, dom_x = randn(2, 6, 4, seed=1), labels(1, 3, 0, 2)
    else:
        x, dom_x = y[:, row_offset : row_offset + 6], dom_y[row_offset : row_offset + 6]
    gammas = torch.tensor([[0.1, 1.0, 0.02], [0.3, 0.5, 0.7]], dtype=torch.float64)
    got = kernel_sums(x, dom_x, y, dom_y, 4, gammas, row_offset)
    want = kernel_sums_loops(x, dom_x, y, dom_y, 4, gammas, row_offset)
    assert got.shape == (2, 4, 4)
    assert (got[:, 2] == 0).all() and (got[:, :, 2] == 0).all()
    torch.testing.assert_close(got, want, **EXACT)


def test_kernel_sums_by_rows_add_up_to_the_whole():
    x, dom = randn(2, 11, 5), labels(5, 6)
    gammas = torch.tensor([[0.2, 2.0]] * 2, dtype=torch.float64)
    whole = kernel_sums(x, dom, x, dom, 2, gammas, 0)
    parts = [kernel_sums(x[:, a:b], dom[a:b], x, dom, 2, gammas, a) for a, b in ((0, 4), (4, 5), (5, 11))]
    torch.testing.assert_close(sum(parts), whole, **EXACT)
    torch.testing.assert_close(whole, whole.transpose(1, 2), **EXACT)


@pytest.mark.parametrize("first", [0, 3])
def test_own_row_is_exactly_zero_distance_far_from_the_origin(first):
    # a thousand standard deviations out, float32 squared norms of 6e7 leave errors of several units
    # in d^2; with gamma = 1000 only a distance of exactly zero counts, and the count is then an
    # exact integer
    y, dom = randn(2, 12, 64, dtype=torch.float32) + 1000.0, labels(5, 4, 3)
    x, dom_x = y[:, first : first + 8], dom[first : first + 8]
    K = kernel_sums(x, dom_x, y, dom, 3, torch.full((2, 1), 1000.0), first)
    counts = torch.bincount(dom_x, minlength=3).float()
    assert torch.equal(K, torch.diag(counts).expand(2, 3, 3).to(K.dtype))


def test_float32_kernel_sums_survive_an_offset():
    x, dom = randn(1, 40, 64, dtype=torch.float32) + 1000.0, labels(25, 15)
    gammas = torch.tensor([[0.002, 0.01]])
    got = kernel_sums(x, dom, x, dom, 2, gammas, 0)
    d2 = squared(x[0].double(), x[0].double())
    kernel = sum((-g * d2).exp() for g in gammas[0].double())
    want = torch.stack(
        [torch.stack([kernel[dom == a][:, dom == b].sum().detach() for b in range(2)]) for a in range(2)]
    )[None]
    # gamma d^2 is about one, so float32 distances good to 1e-6 give sums good to 1e-6; ten times
    # that is allowed
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("row_offset", [None, 0])
def test_kernel_sums_gradient_is_the_derivative(row_offset):
    x, dom = randn(2, 5, 3).requires_grad_(), labels(2, 3)
    y = randn(2, 5, 3, seed=1).requires_grad_()
    gammas = torch.tensor([[0.1, 0.5]] * 2, dtype=torch.float64)
    if row_offset is None:
        assert gradcheck(lambda x, y: kernel_sums(x, dom, y, dom, 2, gammas, None), [x, y])
    else:
        assert gradcheck(lambda x: kernel_sums(x, dom, x, dom, 2, gammas, 0), [x])


# ---- bandwidths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_gammas_equal_the_double_loop(name):
    x = randn(3, 7, 4) * torch.tensor([1.0, 0.1, 30.0], dtype=torch.float64)[:, None, None]
    want = torch.tensor([gammas_loops(layer, KERNELS[name]) for layer in x], dtype=torch.float64)
    got = kernel_gammas(x, KERNELS[name])
    assert got.shape == want.shape
    torch.testing.assert_close(  # the set of kernels; their order is the library's own
        got.double().sort(-1).values, want.sort(-1).values, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kernel", [tuple(EXPLICIT), torch.tensor(EXPLICIT)], ids=["tuple", "tensor"])
def test_explicit_gammas_of_any_sequence_type(kernel):
    got = kernel_gammas(randn(2, 5, 3), kernel)
    assert got.shape == (2, 2)
    torch.testing.assert_close(  # float32 input tensors round 0.05 to 6e-8
        got.double(), torch.tensor([EXPLICIT] * 2, dtype=torch.float64), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("kernel", ["domainbed", "adaptive", "dan"])
def test_gammas_carry_no_gradient(kernel):
    assert not kernel_gammas(randn(2, 6, 3).requires_grad_(), kernel).requires_grad


@pytest.mark.parametrize("kernel", ["adaptive", "dan"])
def test_float32_bandwidth_survives_an_offset_of_a_thousand_standard_deviations(kernel):
    x = randn(1, 200, 64, dtype=torch.float32) + 1000.0
    total = squared(x[0].double(), x[0].double()).sum()
    n = 200
    if kernel == "adaptive":
        want = [float(1 / (2 * 2.0**a * total / n**2)) for a in (-3, -2, -1, 0, 1)]
    else:
        want = [float(1 / (total / (n**2 - n) / 4 * 2**i)) for i in range(5)]
    got = kernel_gammas(x, kernel)[0].double().sort().values
    want = torch.tensor(want, dtype=torch.float64).sort().values
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # the uncentred closed form is off by 2 %


# ---- from sums to estimators --------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_pair_matrix_from_sums(estimator):
    x, dom, gammas = randn(2, 9, 3), labels(4, 0, 2, 3), [0.1, 0.7]
    rows = torch.tensor([gammas] * 2, dtype=torch.float64)
    K = kernel_sums_loops(x, dom, x, dom, 4, rows, 0)
    got = mmd_from_sums(K, torch.bincount(dom, minlength=4), len(gammas), estimator)
    assert got.shape == (2, 4, 4)
    torch.testing.assert_close(got, got.transpose(1, 2), rtol=0, atol=0, equal_nan=True)
    others = [0, 2, 3]
    for a in others:
        assert (got[:, a, a] == 0).all()
        assert got[:, a, 1].isnan().all() and got[:, 1, a].isnan().all()
        for b in others:
            if a < b:
                want = [pair_loops(f[dom == a], f[dom == b], gammas, estimator) for f in x]
                torch.testing.assert_close(got[:, a, b], torch.stack(want), **EXACT)
