"""Losses wait for no GPU and copy nothing to it; so ids that nobody could look at count nowhere, on every path.

There is no GPU here: fake CUDA tensors have no values to wait for, and a mode looks at every operation. Whole steps are
in tests/test_cuda_graphs.py.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from graphs import DEVICE, NoHostTrips, as_on_a_gpu, captured
from mmd_cases import close, leaf
from mmd_formulas import labels, mmd_loops, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastheads import mmd, reference
from fastheads.losses.samples import gather_rows
from fastheads.ops import dispatch, kernel_sums, mmd_fused, mmd_small


@pytest.fixture
def unseen(monkeypatch):
    as_on_a_gpu(monkeypatch)


OPTIONS = {
    "adaptive": {},
    "dan": {"kernel": "dan"},
    "domainbed": {"kernel": "domainbed"},
    "numbers": {"kernel": [0.1, 0.5], "estimator": "unbiased"},
    "pairs": {"reduction": "none"},
    "weighted": {"pair_weights": "given"},
    "sparse ids": {"num_domains": 5000},
}


def loss_of(x, domains, options, impl):
    options = {"num_domains": 3, "impl": impl} | options
    if "pair_weights" in options:
        options["pair_weights"] = 1 - torch.eye(3, device=x.device)
    return mmd(x, domains, **options).nansum()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("n", [12, 140])  # one launch, and panels
@pytest.mark.parametrize("name", OPTIONS)
def test_no_loss_waits_for_a_gpu_or_copies_to_it(name, n, impl, unseen):
    with FakeTensorMode():
        x, domains = torch.empty(2, n, 8, device="cuda", requires_grad=True), torch.empty(n, device="cuda").long()
        with NoHostTrips("cuda"):
            loss_of(x, domains, OPTIONS[name], impl)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("name", ["adaptive", "domainbed", "pairs"])
def test_nor_does_what_runs_inside_the_operators_or_their_gradients(name, impl, unseen):
    x, domains = leaf(randn(1, 140, 8, dtype=torch.float32).to(DEVICE)), labels(50, 90).to(DEVICE)
    with captured() as asked:
        loss_of(x, domains, OPTIONS[name], impl).backward()
    assert ("mmd_tile_kernel" in {name for name, *_ in asked.seen}) == (impl == "triton")


def test_sizes_of_batches_spread_over_processes_are_told_on_the_cpu(monkeypatch):
    """Two processes with a backend for each device, and samples on a device that cannot be read."""

    def gather(found, own, group):
        for one in found:
            one.copy_(own)

    two = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, all_gather=gather)
    two.get_world_size, two.get_rank = (lambda group: 2), (lambda group: 1)
    two.get_backend_config = lambda group: "cpu:gloo,cuda:nccl"
    monkeypatch.setattr("fastheads.losses.samples.dist", two)
    rows = gather_rows(torch.empty(2, 12, 8, device="meta"), torch.zeros(12, device="meta").long(), "both")
    assert (rows.all.shape, rows.all_domains.shape, rows.offset) == ((2, 24, 8), (24,), 12)


# ------------------------------------------------------------------------------------------ ids out of range

OTHERS = (-1, 3, 10_000, 2**32, 2**40 + 1)  # the last two are 0 and 1 in 32 bits


def with_strangers(x, domains):
    """x and domains with a stranger before, between and after them, who holds nothing that could be added up."""
    at = torch.linspace(0, x.shape[1], len(OTHERS)).long()
    rows, ids, first = [], [], 0
    for stranger, end in zip(OTHERS, at.tolist(), strict=True):
        rows += [x[:, first:end], torch.full_like(x[:, :1], float("nan"))]
        ids += [domains[first:end], torch.tensor([stranger])]
        first = end
    return torch.cat(rows, 1), torch.cat(ids)


WAYS = [(name, n) for name in ("adaptive", "dan", "domainbed") for n in (12, 140)]


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("name, n", [*WAYS, ("numbers", 12), ("weighted", 140), ("pairs", 140)])
def test_ids_out_of_range_count_nowhere(name, n, impl, unseen):
    dtype = torch.float32 if impl == "triton" else torch.float64
    x, domains = randn(2, n, 8, dtype=dtype), labels(n // 2, n // 4, n - n // 2 - n // 4)
    options = {"num_domains": 3, "impl": impl} | OPTIONS[name]
    if "pair_weights" in options:
        options["pair_weights"] = 1 - torch.eye(3, dtype=torch.float64)

    def run(x, domains):
        x = leaf(x)
        loss = mmd(x, domains, **options)
        return loss.detach(), *torch.autograd.grad(loss.nansum(), x)

    together, ids = with_strangers(x, domains)
    loss, gradient = run(together, ids)
    expected, expected_gradient = run(x, domains)
    member = (ids >= 0) & (ids < 3)
    assert not gradient[:, ~member].any()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if impl == "triton" else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(loss, expected, **tolerance, equal_nan=name == "pairs")
    torch.testing.assert_close(gradient[:, member], expected_gradient, **tolerance)


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
def test_the_operators_leave_out_ids_out_of_range_on_both_sides(impl):
    dtype = torch.float32 if impl == "triton" else torch.float64
    x, y = randn(1, 9, 4, dtype=dtype), randn(1, 7, 4, seed=1, dtype=dtype)
    dom_x, dom_y = labels(5, 4), labels(3, 4)
    gammas = torch.tensor([[0.1, 0.3]], dtype=dtype)
    (X, ids_x), (Y, ids_y) = with_strangers(x, dom_x + 1), with_strangers(y, dom_y + 1)  # 1, 2 and, of OTHERS, 3
    got = kernel_sums(X, ids_x, Y, ids_y, 3, gammas, impl=impl)
    close(got[:, 1:, 1:], kernel_sums(x, dom_x, y, dom_y, 2, gammas, impl=impl), 1e-5 if impl == "triton" else 1e-12)
    assert not got[:, 0].any() and not got[:, :, 0].any()
    fused = mmd_fused(X, ids_x, gammas, torch.eye(3, dtype=dtype), y=Y, dom_y=ids_y, impl=impl)
    close(fused, got.diagonal(dim1=1, dim2=2).sum(-1), 1e-5)


def test_one_launch_leaves_out_ids_out_of_range_in_the_gates_gradient():
    x, domains = randn(2, 12, 8, dtype=torch.float32), labels(4, 5, 3)
    gate = leaf(torch.rand(2, 4, generator=torch.Generator().manual_seed(0)) + 0.5)
    options = {"num_domains": 3, "preset": "adaptive", "estimator": "unbiased"}
    together, ids = with_strangers(x, domains)
    found = []
    for features, dom in ((together, ids), (x, domains)):
        loss = mmd_small(features.to(DEVICE), dom.to(DEVICE), gate=gate.to(DEVICE), **options)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), gate)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_on_a_cpu_an_id_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"domains: got ids from 0 to 3; takes 0 … 2"):
        mmd(randn(4, 3), torch.tensor([0, 1, 2, 3]), num_domains=3)


@pytest.mark.parametrize("kernel", ["adaptive", "dan"])
def test_bandwidths_are_those_of_the_samples_that_count(kernel):
    x, domains = randn(2, 9, 5), labels(5, 4)
    together, ids = with_strangers(x, domains)
    counted = reference.is_counted(ids, 2)
    got = reference.kernel_gammas(together, kernel, counted)
    torch.testing.assert_close(got, reference.kernel_gammas(x, kernel), rtol=1e-12, atol=0)
    nobody = reference.kernel_gammas(together, kernel, torch.zeros_like(counted))
    assert nobody.isfinite().all()


# ------------------------------------------------------------------------------------------------ sparse ids


class Largest(TorchDispatchMode):
    """The elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.fixture(params=["seen", "unseen"])
def seen_or_not(request):
    if request.param == "unseen":
        request.getfixturevalue("unseen")


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_sparse_ids_cost_what_their_samples_cost(estimator, seen_or_not):
    x, dense = randn(30, 4), labels(10, 12, 8)
    sparse = torch.tensor([17, 123_456, 9_999_999])[dense]
    started = time.perf_counter()
    with Largest() as made:
        got = mmd(x, sparse, num_domains=10_000_000, estimator=estimator)
        also = mmd(x, sparse, estimator=estimator)
    assert time.perf_counter() - started < 2 and made.elements <= 10_000
    expected = mmd_loops(x, dense, "adaptive", estimator)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(also, expected, rtol=1e-10, atol=1e-12)


def test_sparse_ids_keep_their_pair_weights(seen_or_not):
    x, dense, ids = randn(30, 4), labels(10, 12, 8), torch.tensor([3, 70, 99])
    few = torch.tensor([[0.0, 1, 2], [1, 0, 5], [2, 5, 0]], dtype=torch.float64)
    many = torch.zeros(100, 100, dtype=torch.float64)
    many[ids[:, None], ids] = few
    got = mmd(x, ids[dense], num_domains=100, pair_weights=many)
    torch.testing.assert_close(got, mmd(x, dense, pair_weights=few), rtol=1e-12, atol=1e-14)


def test_more_domains_than_samples_have_no_pairs():
    with pytest.raises(ValueError, match=r"num_domains: got 10000 for 3 samples; .*none.* at most as many"):
        mmd(randn(3, 4), torch.tensor([0, 5, 9_999]), reduction="none", estimator="biased")


def test_the_kernels_know_as_many_domains_as_the_operator_says():
    from fastheads.kernels.mmd import MAX_DOMAINS

    assert MAX_DOMAINS == dispatch.MAX_DOMAINS
