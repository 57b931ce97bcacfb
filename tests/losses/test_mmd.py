"""Multi-kernel MMD against re-implementations written from the papers, with explicit double loops.

Nothing below shares code with the library. Tolerances in float64 are 1e-10 relative: squared
distances by a Gram matrix lose a few of the 16 digits against the differences taken here, and gamma
(up to 1000) multiplies that loss.
"""

import math

import pytest
import torch
from torch.autograd import gradcheck

from fastheads.losses import mmd
from fastheads.reference import kernel_gammas, kernel_sums, mmd_from_sums

EXACT = dict(rtol=1e-10, atol=1e-12)
DOMAINBED = [0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]
EXPLICIT = [0.05, 0.4]
KERNELS = {"domainbed": "domainbed", "adaptive": "adaptive", "dan": "dan", "explicit": EXPLICIT}
OWN_ESTIMATOR = {
    "domainbed": "biased",
    "adaptive": "unbiased",
    "dan": "biased",
    "explicit": "biased",
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(*sizes):
    """Domain ids, `sizes[s]` of domain s, shuffled: rows of a domain are not adjacent."""
    ids = torch.cat([torch.full((n,), s, dtype=torch.int64) for s, n in enumerate(sizes)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(7))]


def squared(x, y):
    """All squared distances by differences, in x's dtype: [n, D], [m, D] -> [n, m]."""
    return (x[:, None] - y[None]).square().sum(-1)


# ---- independent formulas -----------------------------------------------------------------------


def gammas_loops(x, kernel):
    """Kernel factors for x [n, D] by a double loop over all pairs."""
    if kernel == "domainbed":
        return DOMAINBED
    if not isinstance(kernel, str):
        return [float(g) for g in kernel]
    n, total = len(x), 0.0
    for i in range(n):
        for j in range(n):
            total += float((x[i] - x[j]).square().sum())
    if kernel == "adaptive":
        mean = total / n**2  # over all pairs, the zero diagonal included
        return [1 / (2 * 2.0**a * mean) for a in (-3, -2, -1, 0, 1)]
    bandwidth = total / (n**2 - n) / 4
    return [1 / (bandwidth * 2**i) for i in range(5)]


def pair_loops(x, y, gammas, estimator):
    """One pair's MMD, sample pair by sample pair."""

    def k(u, v):
        d2 = (u - v).square().sum()
        return sum((-g * d2).exp() for g in gammas)

    n, m, unbiased = len(x), len(y), estimator == "unbiased"
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if not (unbiased and i == j))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if not (unbiased and i == j))
    xy = sum(k(x[i], y[j]) for i in range(n) for j in range(m))
    nn, mm = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    return xx / nn + yy / mm - 2 * xy / (n * m)


def mmd_loops(x, domains, kernel, estimator):
    """Mean over pairs a < b of the domains that are present; x [n, D]."""
    gammas = gammas_loops(x, kernel)
    present = sorted(set(domains.tolist()))
    values = [
        pair_loops(x[domains == a], x[domains == b], gammas, estimator)
        for i, a in enumerate(present)
        for b in present[i + 1 :]
    ]
    return sum(values) / len(values)


def domainbed_mmd(features_per_domain):
    """DomainBed's MMD penalty: fixed gammas, means over whole blocks, mean over all pairs."""
    penalty, count = 0.0, len(features_per_domain)
    for i in range(count):
        for j in range(i + 1, count):
            x, y = features_per_domain[i], features_per_domain[j]

            def gaussian(a, b):
                d2 = squared(a, b)
                return sum(torch.exp(-g * d2) for g in DOMAINBED)

            penalty = penalty + gaussian(x, x).mean() + gaussian(y, y).mean() - 2 * gaussian(x, y).mean()
    return penalty / (count * (count - 1) / 2)


def tllib_mk_mmd(source, target):
    """TLlib's MultipleKernelMaximumMeanDiscrepancy, less its constant 2 / (n - 1)."""
    n = len(source)
    d2 = squared(torch.cat([source, target]), torch.cat([source, target]))
    kernel = sum(torch.exp(-d2 / (2 * 2.0**a * d2.detach().mean())) for a in range(-3, 2))
    index = torch.zeros(2 * n, 2 * n, dtype=source.dtype)
    for i in range(n):
        for j in range(n):
            index[i, n + j] = index[n + i, j] = -1 / (n * n)
            if i != j:
                index[i, j] = index[n + i, n + j] = 1 / (n * (n - 1))
    return (kernel * index).sum()


def dan_snippet(source, target, kernel_mul=2.0, kernel_num=5):
    """The snippet that goes round as DAN's MMD: four blocks of one kernel matrix, equal sizes."""
    total = torch.cat([source, target])
    n, size = len(source), len(total)
    d2 = squared(total, total)
    bandwidth = d2.detach().sum() / (size**2 - size)
    bandwidth = bandwidth / kernel_mul ** (kernel_num // 2)
    kernels = sum(torch.exp(-d2 / (bandwidth * kernel_mul**i)) for i in range(kernel_num))
    return (kernels[:n, :n] + kernels[n:, n:] - kernels[:n, n:] - kernels[n:, :n]).mean()


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


# ---- dtypes -------------------------------------------------------------------------------------


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


# ---- bad input ----------------------------------------------------------------------------------

X, DOM = torch.zeros(8, 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
EITHER = (ValueError, TypeError)
BAD = {
    "features_1d": (dict(features=torch.zeros(8)), ValueError, "features"),
    "features_4d": (dict(features=torch.zeros(1, 1, 8, 4)), ValueError, "features"),
    "features_list": (dict(features=[[0.0] * 4] * 8), EITHER, "features"),
    "features_int": (dict(features=X.long()), EITHER, "features"),
    "features_uint8": (dict(features=X.to(torch.uint8)), EITHER, "features"),
    "features_bool": (dict(features=X.bool()), EITHER, "features"),
    "features_complex": (dict(features=X.to(torch.complex64)), EITHER, "features"),
    "domains_short": (dict(domains=DOM[:7]), ValueError, "domains"),
    "domains_long": (dict(domains=torch.cat([DOM, DOM])), ValueError, "domains"),
    "domains_2d": (dict(domains=DOM[None]), ValueError, "domains"),
    "domains_scalar": (dict(domains=torch.tensor(0)), ValueError, "domains"),
    "domains_float": (dict(domains=DOM.float()), EITHER, "domains"),
    "domains_bool": (dict(domains=DOM.bool()), EITHER, "domains"),
    "domains_none": (dict(domains=None), EITHER, "domains"),
    "domains_negative": (dict(domains=DOM - 1), ValueError, "domains"),
    "domains_negative_given_number": (
        dict(domains=DOM - 1, num_domains=3),
        ValueError,
        "domains",
    ),
    "domains_too_large": (dict(num_domains=2), ValueError, "domains"),
    "num_domains_zero": (dict(num_domains=0), ValueError, "num_domains"),
    "num_domains_negative": (dict(num_domains=-3), ValueError, "num_domains"),
    "num_domains_float": (dict(num_domains=3.5), EITHER, "num_domains"),
    "num_domains_text": (dict(num_domains="3"), EITHER, "num_domains"),
    "kernel_unknown": (dict(kernel="rbf"), ValueError, "kernel"),
    "kernel_none": (dict(kernel=None), EITHER, "kernel"),
    "kernel_empty": (dict(kernel=[]), EITHER, "kernel"),
    "kernel_text_items": (dict(kernel=["a"]), EITHER, "kernel"),
    "kernel_nan": (dict(kernel=[0.1, math.nan]), ValueError, "kernel"),
    "kernel_inf": (dict(kernel=[math.inf]), ValueError, "kernel"),
    "kernel_inf_tensor": (dict(kernel=torch.tensor([math.inf])), ValueError, "kernel"),
    "kernel_negative": (dict(kernel=[-1.0]), ValueError, "kernel"),
    "kernel_3d": (dict(kernel=torch.ones(1, 1, 2)), ValueError, "kernel"),
    "estimator_unknown": (dict(estimator="linear"), ValueError, "estimator"),
    "reduction_unknown": (dict(reduction="sum"), ValueError, "reduction"),
    "impl_unknown": (dict(impl="triton3000"), ValueError, "impl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    changes, error, word = BAD[case]
    with pytest.raises(error, match=word):
        mmd(**{**dict(features=X, domains=DOM), **changes})


def test_the_good_version_of_the_bad_input_table_passes():
    assert mmd(X, DOM).item() == pytest.approx(0, abs=1e-6)
    assert mmd(X, DOM.int()).item() == pytest.approx(0, abs=1e-6)  # any integer dtype names a domain
