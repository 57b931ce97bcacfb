"""`kernel_sums` and `mmd_fused` on the CPU, with csrc/ and with the PyTorch tile, against others' formulas.

float64 is held to 1e-12 of the largest value: both sides take distances from inner products of centred samples, and
only the order of sums differs.
"""

import functools
import itertools

import pytest
import torch
from mmd_cases import F64, PANELS, close, gammas_of, leaf
from mmd_formulas import dan_snippet, domainbed_mmd, labels, randn, tllib_mk_mmd

from fastheads import reference
from fastheads.losses import mmd
from fastheads.ops import kernel_sums, mmd_fused, mmd_panels

# ---- against the reference, float64 -------------------------------------------------------------

SIZES = [(4, 7, 3), (1, 0, 5), (0, 0, 6), (60, 0, 81), (33, 66, 34)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("L", [1, 3])
def test_a_sample_set_with_itself_equals_the_reference(L, sizes, backend, panels):
    dom = labels(*sizes)
    x = randn(L, len(dom), 5)
    gammas, dK = gammas_of(L), randn(L, 4, 4, seed=1)  # S = 4: the last domain is always absent
    ours, theirs = leaf(x), leaf(x)
    K = kernel_sums(ours, dom, None, None, 4, gammas, impl="cpu")
    want = reference.kernel_sums(theirs, dom, theirs, dom, 4, gammas, 0)
    close(K, want, what="K")
    (K * dK).sum().backward()
    (want * dK).sum().backward()
    close(ours.grad, theirs.grad, what="dx")
    assert torch.equal(K[:, 3], torch.zeros(L, 4, dtype=F64))


RECTANGLES = [  # rows, columns, row_offset
    (5, 9, None),
    (5, 9, 0),
    (5, 9, 4),
    (9, 5, -4),  # columns are the last of the rows
    (6, 4, 2),  # they overlap only in part
    (6, 4, 40),  # and not at all
    (1, 1, 0),
    (70, 131, 61),
    (131, 70, None),
]


@pytest.mark.parametrize("rows, columns, offset", RECTANGLES)
def test_rectangles_equal_the_reference(rows, columns, offset, backend, panels):
    S, L = 3, 2
    g = torch.Generator().manual_seed(3)
    y, dom_y = randn(L, columns, 6), torch.randint(0, S, (columns,), generator=g)
    x, dom_x = randn(L, rows, 6, seed=1), torch.randint(0, S, (rows,), generator=g)
    if offset is not None:
        for i in range(rows):
            if 0 <= i + offset < columns:
                x[:, i], dom_x[i] = y[:, i + offset], dom_y[i + offset]
    gammas, dK = gammas_of(L), randn(L, S, S, seed=2)
    found = []
    for run in (functools.partial(kernel_sums, impl="cpu"), reference.kernel_sums):
        a, b = leaf(x), leaf(y)
        K = run(a, dom_x, b, dom_y, S, gammas, offset)
        (K * dK).sum().backward()
        found.append((K, a.grad, b.grad))
    for name, got, want in zip(("K", "dx", "dy"), *found, strict=True):
        close(got, want, what=name)


@pytest.mark.parametrize("needed", ["x", "y"])
def test_only_one_side_of_a_rectangle_may_need_a_gradient(needed, backend):
    x, y = randn(1, 5, 4), randn(1, 7, 4, seed=1)
    (x if needed == "x" else y).requires_grad_()
    dx, dy = labels(2, 3), labels(3, 4)
    kernel_sums(x, dx, y, dy, 2, gammas_of(1), impl="cpu").sum().backward()
    got = (x.grad, y.grad)
    x.grad = y.grad = None
    kernel_sums(x, dx, y, dy, 2, gammas_of(1), impl="reference").sum().backward()
    for a, b in zip(got, (x.grad, y.grad), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


@pytest.mark.parametrize("offset", ["itself", None, 3])
@pytest.mark.parametrize("per_layer", [False, True])
def test_mmd_fused_equals_the_weighted_reference(per_layer, offset, backend, panels):
    S, L, N = 3, 2, 140
    y, dom_y = randn(L, N, 5), torch.randint(0, S, (N,), generator=torch.Generator().manual_seed(1))
    coeff = randn(*((L,) if per_layer else ()), S, S, seed=4)
    coeff = coeff + coeff.mT
    x, dom_x, more = y, dom_y, {}
    if offset != "itself":
        x, dom_x = (y, dom_y) if offset is None else (y[:, offset : offset + 80], dom_y[offset : offset + 80])
        more = dict(y=y, dom_y=dom_y, row_offset=offset)
    found = []
    for impl in ("cpu", "reference"):
        a = leaf(x)
        loss = mmd_fused(a, dom_x, gammas_of(L), coeff, impl=impl, **more)
        assert loss.shape == (L,)
        (loss * torch.tensor([1.0, -2.0], dtype=F64)).sum().backward()
        found.append((loss, a.grad))
    close(found[0][0], found[1][0], what="loss")
    close(found[0][1], found[1][1], what="dx")


@pytest.mark.parametrize("panel", PANELS)
def test_shares_of_rows_add_up_to_the_whole(panel, backend, monkeypatch):
    monkeypatch.setattr(mmd_panels, "WORKSPACE", panel)
    S, L, N = 3, 2, 150
    dom = torch.randint(0, S, (N,), generator=torch.Generator().manual_seed(1))
    coeff, x = torch.eye(S, dtype=F64) - 0.3, leaf(randn(L, N, 5))
    whole = mmd_fused(x, dom, gammas_of(L), coeff)
    whole.sum().backward()
    total, grads = 0, []
    for a, b in ((0, 70), (70, 70), (70, 71), (71, 150)):
        part = leaf(x[:, a:b])
        more = dict(y=x.detach(), dom_y=dom, row_offset=a)
        share = mmd_fused(part, dom[a:b], gammas_of(L), coeff, **more)
        share.sum().backward()
        total, grads = total + share.detach(), [*grads, part.grad]
    close(total, whole)
    close(torch.cat(grads, 1), x.grad)


# ---- outside definitions ------------------------------------------------------------------------


def test_domainbed_value_and_gradient(backend, panels):
    dom = labels(40, 71, 33)
    x = leaf(randn(144, 6) * 0.7 + dom[:, None] * 0.2)
    got, want = mmd(x, dom, kernel="domainbed"), domainbed_mmd([x[dom == s] for s in range(3)])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    close(*(torch.autograd.grad(v, x)[0] for v in (got, want)), 1e-10)


@pytest.mark.parametrize(
    "preset, estimator, definition", [("adaptive", None, tllib_mk_mmd), ("dan", None, dan_snippet)]
)
def test_two_domain_definitions_value_and_gradient(preset, estimator, definition, backend, panels):
    dom = labels(70, 70)
    x = leaf(randn(140, 6) + dom[:, None] * 0.4)
    got = mmd(x, dom, kernel=preset, estimator=estimator)
    want = definition(x[dom == 0], x[dom == 1])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    close(*(torch.autograd.grad(v, x)[0] for v in (got, want)), 1e-10)


# ---- sizes at the edge --------------------------------------------------------------------------


def test_no_samples(backend):
    none = torch.zeros(0, dtype=torch.int64)
    x, y, dom = leaf(randn(2, 0, 3)), leaf(randn(2, 4, 3)), labels(2, 2)
    for args in ((x, none, None, None), (x, none, y, dom), (y, dom, x, none)):
        K = kernel_sums(*args, 2, gammas_of(2), impl="cpu")
        assert torch.equal(K, torch.zeros(2, 2, 2, dtype=F64))
        K.sum().backward()
    assert (y.grad == 0).all() and x.grad.shape == (2, 0, 3)
    loss = mmd_fused(leaf(x), none, gammas_of(2), torch.eye(2))
    assert torch.equal(loss.detach(), torch.zeros(2, dtype=F64))
    assert mmd(x, none, num_domains=2).item() == 0


def test_no_layers(backend):
    K = kernel_sums(randn(0, 4, 3), labels(2, 2), None, None, 2, gammas_of(1)[:0], impl="cpu")
    assert K.shape == (0, 2, 2)


def test_one_sample_is_its_own_only_neighbour(backend):
    x = leaf(randn(2, 1, 3))
    K = kernel_sums(x, torch.tensor([1]), None, None, 3, gammas_of(2), impl="cpu")
    want = torch.zeros(2, 3, 3, dtype=F64)
    want[:, 1, 1] = 3
    assert torch.equal(K.detach(), want)
    K.sum().backward()
    assert (x.grad == 0).all()


def test_one_feature_and_many_domains(backend, panels):
    dom = torch.arange(200) % 100
    x = randn(1, 200, 1)
    got = kernel_sums(x, dom, None, None, 100, gammas_of(1), impl="cpu")
    close(got, reference.kernel_sums(x, dom, x, dom, 100, gammas_of(1), 0))


@pytest.mark.parametrize("N", [255, 256, 257, 513])
def test_sizes_around_the_chunk_of_columns(N, backend):
    x, dom = randn(1, N, 3), torch.zeros(N, dtype=torch.int64)
    got = kernel_sums(x, dom, None, None, 1, gammas_of(1), impl="cpu")
    close(got, reference.kernel_sums(x, dom, x, dom, 1, gammas_of(1), 0))


# ---- weights of pairs ---------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_pair_weights_are_a_weighted_mean_over_pairs(impl, estimator):
    S, dom = 4, labels(5, 4, 0, 6)  # domain 2 is absent: its weights drop out of the sum below, too
    x = leaf(randn(2, 15, 4))
    w = randn(S, S, seed=3).abs()
    w = (w + w.mT).fill_diagonal_(7.0)  # of a domain with itself: counts for nothing
    pairs = mmd(x, dom, num_domains=S, estimator=estimator, reduction="none", impl=impl)
    present = [(a, b) for a, b in itertools.combinations(range(S), 2) if 2 not in (a, b)]
    want = sum(w[a, b] * pairs[:, a, b] for a, b in present) / sum(w[a, b] for a, b in present)
    options = dict(num_domains=S, estimator=estimator, impl=impl)
    got = mmd(x, dom, pair_weights=w, **options)
    torch.testing.assert_close(got, want.mean(), rtol=1e-11, atol=1e-13)
    close(*(torch.autograd.grad(v, x, retain_graph=True)[0] for v in (got, want.mean())), 1e-11)
    torch.testing.assert_close(mmd(x, dom, pair_weights=5 * w, **options), got, rtol=1e-12, atol=1e-14)
    alike = mmd(x, dom, pair_weights=torch.ones(S, S), **options)
    torch.testing.assert_close(alike, mmd(x, dom, **options), rtol=1e-12, atol=1e-14)


def test_one_pair_of_weights_is_that_pair():
    x, dom, w = randn(12, 3), labels(3, 4, 5), torch.zeros(3, 3)
    w[0, 2] = w[2, 0] = 0.3
    want = mmd(x, dom, reduction="none")[0, 0, 2]
    torch.testing.assert_close(mmd(x, dom, pair_weights=w), want, rtol=1e-12, atol=1e-14)


def test_no_pair_of_any_weight_is_zero_that_backpropagates():
    x, dom = leaf(randn(12, 3)), labels(3, 4, 5)
    loss = mmd(x, dom, pair_weights=torch.zeros(3, 3))
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


@pytest.mark.parametrize(
    "weights, error",
    [
        (torch.ones(2, 2), ValueError),
        (torch.ones(3), ValueError),
        (torch.ones(3, 3).long(), TypeError),
        ([[1.0] * 3] * 3, TypeError),
        (-torch.ones(3, 3), ValueError),
        (torch.arange(9.0).view(3, 3), ValueError),
        (torch.full((3, 3), float("nan")), ValueError),
        (torch.full((3, 3), float("inf")), ValueError),
        (torch.ones(3, 3).requires_grad_(), ValueError),
    ],
)
def test_bad_pair_weights_are_refused_by_name(weights, error):
    with pytest.raises(error, match="pair_weights"):
        mmd(randn(12, 3), labels(3, 4, 5), pair_weights=weights)
