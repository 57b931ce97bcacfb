"""The MMD against re-implementations written from the papers, with explicit double loops; what it is invariant to, and
what it measures."""

import pytest
import torch
from mmd_formulas import (
    EXACT,
    EXPLICIT,
    KERNELS,
    OWN_ESTIMATOR,
    dan_snippet,
    domainbed_mmd,
    gammas_loops,
    labels,
    mmd_loops,
    pair_loops,
    randn,
    tllib_mk_mmd,
)
from torch.autograd import gradcheck

from fastheads.losses import mmd
from fastheads.reference import Preset, kernel_gammas

# ---- the presets against the codebases they are named after -------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("D", [1, 6])
@pytest.mark.parametrize("preset", ["domainbed", "adaptive", "dan"])
def test_two_domains_agree_with_the_published_code(preset, D, impl):
    a, b = randn(7, D), randn(7, D, seed=1) + 0.5
    domains = labels(7, 7)
    x = torch.empty(14, D, dtype=torch.float64)
    x[domains == 0], x[domains == 1] = a, b
    a, b, x = (t.requires_grad_() for t in (a, b, x))
    published = {
        "domainbed": lambda: domainbed_mmd([a, b]),
        "adaptive": lambda: tllib_mk_mmd(a, b),
        "dan": lambda: dan_snippet(a, b),
    }[preset]()
    ours = mmd(x, domains, kernel=preset, impl=impl)
    assert ours.shape == ()
    torch.testing.assert_close(ours, published, **EXACT)
    ours.backward()
    published.backward()
    largest = max(a.grad.abs().max(), b.grad.abs().max())
    assert (x.grad[domains == 0] - a.grad).abs().max() <= 1e-10 * largest
    assert (x.grad[domains == 1] - b.grad).abs().max() <= 1e-10 * largest


def test_domainbed_penalty_over_many_domains_of_unequal_size():
    domains, x = labels(5, 2, 9, 4), randn(20, 6)
    want = domainbed_mmd([x[domains == s] for s in range(4)])
    torch.testing.assert_close(mmd(x, domains, kernel="domainbed"), want, **EXACT)


def test_default_preset_is_adaptive_and_unbiased():
    x, domains = randn(12, 4), labels(5, 7)
    want = mmd(x, domains, kernel="adaptive", estimator="unbiased")
    assert torch.equal(mmd(x, domains), want)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [(3, 5), (4, 2, 3), (2, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("estimator", [None, "biased", "unbiased"])
@pytest.mark.parametrize("name", KERNELS)
def test_unequal_domains_equal_the_double_loop(name, estimator, sizes, impl):
    domains = labels(*sizes)
    x = randn(len(domains), 4) * 0.6 + domains[:, None] * 0.3
    want = mmd_loops(x, domains, KERNELS[name], estimator or OWN_ESTIMATOR[name])
    got = mmd(x, domains, kernel=KERNELS[name], estimator=estimator, impl=impl)
    torch.testing.assert_close(got, want, **EXACT)


# ---- invariances and reductions -----------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_order_of_samples_does_not_matter(name):
    domains = labels(4, 6, 3)
    x = randn(2, 13, 5)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        mmd(x[:, order], domains[order], kernel=KERNELS[name], reduction="none"),
        mmd(x, domains, kernel=KERNELS[name], reduction="none"),
        **EXACT,
    )


def test_relabelling_domains_permutes_the_pairs_and_keeps_the_mean():
    domains, x = labels(4, 6, 3), randn(13, 5)
    new = torch.tensor([2, 0, 1])  # domain s is now called new[s]
    before = mmd(x, domains, reduction="none")
    after = mmd(x, new[domains], reduction="none")
    torch.testing.assert_close(after[:, new][:, :, new], before, **EXACT)
    torch.testing.assert_close(mmd(x, new[domains]), mmd(x, domains), **EXACT)


@pytest.mark.parametrize("name", KERNELS)
def test_layers_are_independent_and_averaged(name):
    domains = labels(4, 3, 5)
    x = randn(3, 12, 4) * torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    single = torch.stack([mmd(layer, domains, kernel=KERNELS[name]) for layer in x])
    torch.testing.assert_close(mmd(x, domains, kernel=KERNELS[name]), single.mean(), **EXACT)
    rows = torch.cat([mmd(layer, domains, kernel=KERNELS[name], reduction="none") for layer in x])
    stacked = mmd(x, domains, kernel=KERNELS[name], reduction="none")
    torch.testing.assert_close(stacked, rows, **EXACT)


def test_pair_matrix_is_symmetric_and_its_upper_mean_is_the_loss():
    domains, x = labels(4, 3, 5, 2), randn(2, 14, 4)
    pairs = mmd(x, domains, reduction="none")
    assert pairs.shape == (2, 4, 4)
    torch.testing.assert_close(pairs, pairs.transpose(1, 2), rtol=0, atol=0)
    assert (pairs.diagonal(dim1=1, dim2=2) == 0).all()
    upper = torch.ones(4, 4, dtype=torch.bool).triu(1)
    torch.testing.assert_close(mmd(x, domains), pairs[:, upper].mean(), **EXACT)
    gammas = kernel_gammas(x, "adaptive")
    for layer in range(2):
        for a in range(4):
            for b in range(a + 1, 4):
                f = x[layer]
                want = pair_loops(f[domains == a], f[domains == b], gammas[layer].double(), "unbiased")
                torch.testing.assert_close(pairs[layer, a, b], want, **EXACT)


def test_two_dimensional_features_are_one_layer():
    domains, x = labels(4, 5), randn(9, 4)
    flat = mmd(x, domains, reduction="none")
    assert flat.shape == (1, 2, 2)
    assert torch.equal(flat, mmd(x[None], domains, reduction="none"))
    assert torch.equal(mmd(x, domains), mmd(x[None], domains))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_absent_domains_drop_out(estimator):
    domains, x = labels(4, 3, 5), randn(12, 4).requires_grad_()
    spread = torch.tensor([1, 2, 5])[domains]  # of eight domains, three are in this batch
    want = mmd(x, domains, estimator=estimator)
    (want_grad,) = torch.autograd.grad(want, x)
    for num_domains in (6, 8):
        got = mmd(x, spread, num_domains=num_domains, estimator=estimator)
        torch.testing.assert_close(got, want, **EXACT)
        (got_grad,) = torch.autograd.grad(got, x)  # nothing of the absent pairs' NaN leaks
        torch.testing.assert_close(got_grad, want_grad, **EXACT)
    torch.testing.assert_close(mmd(x, spread, estimator=estimator), want, **EXACT)

    pairs = mmd(x, spread, num_domains=8, estimator=estimator, reduction="none")
    assert pairs.shape == (1, 8, 8)
    for a in range(8):
        for b in range(8):
            if a != b:
                assert pairs[0, a, b].isfinite() == (a in (1, 2, 5) and b in (1, 2, 5))


@pytest.mark.parametrize("N, estimator", [(1, "biased"), (6, "biased"), (6, "unbiased")])
@pytest.mark.parametrize("name", KERNELS)
def test_a_single_domain_is_zero_that_backpropagates(name, N, estimator):
    for num_domains in (1, 3):
        x = randn(N, 4, dtype=torch.float32).requires_grad_()
        loss = mmd(
            x,
            torch.zeros(N, dtype=torch.int64),
            num_domains=num_domains,
            kernel=KERNELS[name],
            estimator=estimator,
        )
        assert loss.item() == 0 and loss.shape == ()
        loss.backward()
        assert x.grad is not None and (x.grad == 0).all()


def test_one_sample_domain_is_refused_only_by_the_unbiased_estimator():
    domains, x = labels(4, 1, 3), randn(8, 4)
    want = mmd_loops(x, domains, "adaptive", "biased")
    torch.testing.assert_close(mmd(x, domains, estimator="biased"), want, **EXACT)
    for kernel in KERNELS.values():
        with pytest.raises(ValueError, match="(?i)unbiased|domain"):
            mmd(x, domains, kernel=kernel, estimator="unbiased")
    with pytest.raises(ValueError, match="(?i)unbiased|domain"):
        mmd(x, domains)  # adaptive's own estimator


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("kernel", ["domainbed", EXPLICIT], ids=["domainbed", "explicit"])
@pytest.mark.parametrize("shape", [(7, 3), (2, 7, 3)], ids=str)
def test_gradient_is_the_derivative(shape, kernel, estimator):
    x, domains = randn(*shape).requires_grad_(), labels(3, 2, 2)
    assert gradcheck(lambda x: mmd(x, domains, kernel=kernel, estimator=estimator), [x])


def test_pair_matrix_gradient_is_the_derivative():
    x, domains = randn(2, 7, 3).requires_grad_(), labels(3, 2, 2)
    assert gradcheck(lambda x: mmd(x, domains, kernel=EXPLICIT, reduction="none"), [x])


@pytest.mark.parametrize("preset", ["adaptive", "dan"])
def test_gradient_takes_the_bandwidth_as_a_constant(preset):
    x, domains = randn(9, 3).requires_grad_(), labels(4, 2, 3)
    gammas = gammas_loops(x.detach(), preset)
    (got,) = torch.autograd.grad(mmd(x, domains, kernel=preset, estimator="biased"), x)
    (want,) = torch.autograd.grad(mmd(x, domains, kernel=gammas, estimator="biased"), x)
    torch.testing.assert_close(got, want, **EXACT)


# ---- what it measures ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_samples_in_both_domains_are_zero_when_biased(name):
    half = randn(8, 5)
    domains = torch.arange(16) // 8
    loss = mmd(half.repeat(2, 1), domains, kernel=KERNELS[name], estimator="biased")
    assert abs(loss.item()) < 1e-9  # gamma 1000 x distances of zero that a Gram matrix puts at 1e-14


def test_unbiased_mean_is_zero_for_one_distribution_and_the_biased_one_is_not():
    draws = 300  # one layer each; a fixed kernel, for which the estimator is unbiased exactly
    x, domains = randn(draws, 24, 3), labels(10, 14)
    for estimator in ("biased", "unbiased"):
        values = mmd(x, domains, kernel=[0.2], estimator=estimator, reduction="none")[:, 0, 1]
        error = values.std() / draws**0.5
        if estimator == "unbiased":
            assert abs(values.mean()) < 4 * error  # four standard errors; the seed is fixed
            assert (values < 0).any()
        else:
            assert values.mean() > 4 * error
            assert (values >= 0).all()


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("preset", ["adaptive", "dan", "domainbed"])
def test_distance_grows_with_a_shift(preset, estimator):
    x, domains = randn(60, 4), labels(30, 30)
    shifted = [
        mmd(x + s * domains[:, None], domains, kernel=preset, estimator=estimator).item() for s in (0.0, 1.0, 2.0)
    ]
    assert shifted[0] < shifted[1] < shifted[2]
    assert shifted[1] > 0


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("of", "median"), ("estimator", "unbaised"), ("powers", (0, 0)), ("powers", (0, 2, 0)), ("powers", (2, 0, 0))],
)
def test_a_preset_whose_parts_do_not_fit_is_refused(name, wrong):
    right = dict(of="mean square", numbers=(4.0, 1.0, 0.5), estimator="biased", powers=(0, 0, 2))
    Preset(**right)
    with pytest.raises(ValueError, match=f"^{name}: got "):
        Preset(**right | {name: wrong})
