"""Where the MMD's numbers could go wrong on the CPU: 16 bits, loss scales, cancellation, powers of one exponential."""

import pytest
import torch
from mmd_cases import BF16, F16, F32, F64, GAMMAS, close, gammas_of, leaf, needs_library
from mmd_formulas import labels, randn
from numerics import BACKWARD, FORWARD, assert_right

from fastheads import reference
from fastheads.losses import mmd
from fastheads.losses.samples import bandwidths
from fastheads.ops import kernel_sums, mmd_cpu, native

# ---- lower precision ----------------------------------------------------------------------------


def plain_sums(x, dom_x, y, dom_y, S, gammas, same):
    """As one writes it in PyTorch, everything in x's dtype: norms and inner products, a kernel matrix each."""
    d2 = (x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT).clamp_min(0)
    if same:
        d2 = d2 * (1 - torch.eye(x.shape[1], dtype=x.dtype))
    k = sum(torch.exp(-g.to(x.dtype).view(-1, 1, 1) * d2) for g in gammas.unbind(-1))
    a, b = (torch.nn.functional.one_hot(d, S).to(x.dtype) for d in (dom_x, dom_y))
    return a.T @ k @ b


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("itself", [True, False])
def test_numerics_of_kernel_sums(itself, dtype, backend, panels):
    L, S = 2, 3
    dom, other = labels(50, 40, 45), labels(20, 30, 25)
    low, low_y = (randn(L, 135, 24) / 3).to(dtype), (randn(L, 75, 24, seed=1) / 3 + 0.1).to(dtype)
    dK, gammas = randn(L, S, S, seed=2), gammas_of(L, (0.01, 0.1, 1.0))

    def run(f, cast):
        x, y = leaf(low.to(cast)), leaf(low_y.to(cast))
        K = f(x, None if itself else y, gammas.to(torch.promote_types(cast, F32)))
        (K * dK.to(K.dtype)).sum().backward()
        return K, x.grad, None if itself else y.grad

    def ours(x, y, gammas):
        return kernel_sums(x, dom, y, None if itself else other, S, gammas, impl="cpu")

    def plain(x, y, gammas):
        return plain_sums(x, dom, x if itself else y, dom if itself else other, S, gammas, itself)

    got, theirs, exact = run(ours, dtype), run(plain, dtype), run(plain, F64)
    assert got[0].dtype == F32 and got[1].dtype == dtype
    for name, a, b, c, factor in zip(("K", "dx", "dy"), got, theirs, exact, (FORWARD, BACKWARD, BACKWARD), strict=True):
        if a is not None:
            assert_right(a, b, c, factor, name)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", ["domainbed", "adaptive", "dan"])
def test_numerics_of_the_loss(kernel, dtype, backend, panels):
    dom = labels(70, 50, 20)
    low = (randn(140, 32) / 4 + dom[:, None] * 0.1).to(dtype)

    def plain(x):
        gammas = reference.kernel_gammas(low.double()[None], kernel)
        K = plain_sums(x[None], dom, x[None], dom, 3, gammas, True)
        return reference.mmd_from_sums(K, torch.bincount(dom), gammas.shape[1], "biased")[0].triu(1).sum() / 3

    found = []
    for f, cast in ((lambda x: mmd(x, dom, kernel=kernel, estimator="biased"), dtype), (plain, dtype), (plain, F64)):
        x = leaf(low.to(cast))
        loss = f(x)
        loss.backward()
        found.append((loss[None], x.grad))
    # The loss is a difference of means of U kernels: its error is theirs, not its own.
    scale = 5.0
    assert_right(*(torch.cat((v[0].double(), torch.tensor([scale]))) for v in found), FORWARD, "loss")
    assert_right(*(v[1] for v in found), BACKWARD, "dx")


def test_a_loss_scale_beyond_float16_reaches_the_features():
    x, dom = (randn(60, 8) / 4).half(), labels(30, 30)
    grads = []
    for impl in ("cpu", "reference"):
        a = leaf(x)
        (mmd(a, dom, kernel="domainbed", impl=impl) * 2.0**16).backward()
        grads.append(a.grad)
    assert torch.isfinite(grads[0]).all()
    # each rounded to float16 once, from float32 gradients that agree to 1e-6
    torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-4)


def test_small_float16_gradients_are_saved_by_the_loss_scale():
    """Rounded before it is scaled, a gradient under 6e-8 would be lost: a loss scale exists to save it."""
    x, dom = (randn(400, 8) * 20).half(), labels(200, 200)
    grads = []
    for impl in ("cpu", "reference"):
        a = leaf(x)
        (mmd(a, dom, impl=impl, kernel=[1e-3]) * 2.0**14).backward()
        grads.append(a.grad.float())
    assert (grads[1].abs() / 2**14).median() < 1e-6
    close(grads[0], grads[1], 1e-3)


@pytest.mark.parametrize("kernel", ["domainbed", "adaptive", [0.1]], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_give_no_finite_loss(bad, kernel, backend):
    x, dom = randn(12, 6, dtype=F32), labels(5, 7)
    x[3, 2] = bad
    x.requires_grad_()
    loss = mmd(x, dom, kernel=kernel)
    assert not torch.isfinite(loss)
    loss.backward()
    assert not torch.isfinite(x.grad).all()


def test_more_than_64_kernels(backend):
    x, dom, gammas = randn(12, 6), labels(5, 7), torch.linspace(0.01, 2, 100).tolist()
    close(mmd(x, dom, kernel=gammas), mmd(x, dom, kernel=gammas, impl="reference"))


# ---- hard numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_float32_far_from_the_origin_is_as_good_as_near_it(offset, backend, panels):
    x, dom = randn(150, 16, dtype=F32) + offset, labels(70, 80)
    gammas = torch.tensor([[0.01, 0.05]])
    a, b = leaf(x), leaf(x.double())
    got = kernel_sums(a[None], dom, None, None, 2, gammas)
    want = reference.kernel_sums(b[None], dom, b[None], dom, 2, gammas.double(), 0)
    dK = randn(1, 2, 2, seed=5)
    (got * dK.to(F32)).sum().backward()
    (want * dK).sum().backward()
    close(got, want, 1e-6, "K")
    close(a.grad, b.grad, 3e-6, "dx")


def test_nearly_equal_points_keep_their_distance(backend):
    # Spread 1e-3 around a point 30 away: the distances, 1e-6, are a billionth of the squared norms.
    x, dom = (30 + 1e-3 * randn(60, 16)).float(), labels(25, 35)
    gammas = torch.tensor([[3e4]])
    a, b = leaf(x), leaf(x.double())
    got = kernel_sums(a[None], dom, None, None, 2, gammas)
    want = reference.kernel_sums(b[None], dom, b[None], dom, 2, gammas.double(), 0)
    close(got, want, 1e-6, "K")
    got.sum().backward()
    want.sum().backward()
    close(a.grad, b.grad, 1e-5, "dx")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_identical_points_pull_on_each_other_by_exactly_nothing(dtype, backend, panels):
    x, dom = leaf(torch.full((1, 130, 5), 1234.5).to(dtype)), labels(50, 80)
    K = kernel_sums(x, dom, None, None, 2, gammas_of(1, dtype=F32))
    counts = torch.bincount(dom).float()
    assert torch.equal(K.detach()[0], 3 * counts[:, None] * counts)
    K.sum().backward()
    assert (x.grad == 0).all()


def test_duplicates_within_a_batch(backend, panels):
    dom = labels(70, 70)
    x = randn(70, 5)[torch.arange(140) % 70]
    a, b = leaf(x), leaf(x)
    got, want = (mmd(v, dom, kernel=[0.5, 5.0], impl=i) for v, i in ((a, "cpu"), (b, "reference")))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    close(torch.autograd.grad(got, a)[0], torch.autograd.grad(want, b)[0])


# ---- powers instead of exponentials -------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype, tolerance", [(F32, 3e-6), (F64, 1e-14)], ids=str)
@pytest.mark.parametrize("preset", ["domainbed", "adaptive", "dan"])
def test_powers_do_not_drift_from_exponentials(preset, dtype, tolerance):
    """Each distance alone, from 1e-5 to 1e5 times 1 / gamma: sums and weights, of every kernel that is not over 1e-30.

    A power of ten multiplies an exponential's relative error by ten, 6e-7 in float32; a chain of seven powers of ten
    (one exponential, then nothing but powers) would be 4 % off.
    """
    gammas, powers = bandwidths(randn(1, 30, 4).to(dtype) * 0.7, preset)
    d2 = torch.logspace(-5, 5, 2001, dtype=F64).to(dtype)
    R = len(d2)

    def sums_and_weights(powers):
        return native.mmd_tile(
            gram := torch.zeros(1, R, 1, dtype=dtype),
            d2[None].clone(),
            torch.zeros(1, 1, dtype=dtype),
            torch.tensor([0, 1]),
            torch.zeros(R, dtype=torch.int64),
            gammas,
            torch.tensor(powers, dtype=torch.int32),
            torch.ones(1, 1, 1, dtype=dtype),
            torch.full((R,), -1),
        ).flatten(), gram.flatten().double()

    chained, separate = sums_and_weights(powers), sums_and_weights((0,) * len(powers))
    e = torch.exp(-gammas[0].double() * d2.double()[:, None])
    exact = e.sum(-1), (gammas[0].double() * e).sum(-1)
    large = exact[0] > 1e-3  # below, float32's rounding of gamma d² alone is amplified by the exponent
    for name, a, b, c in zip(("sums", "weights"), chained, separate, exact, strict=True):
        assert ((a - c) / c)[large].abs().max() < tolerance, name
        assert ((b - c) / c)[large].abs().max() < tolerance, name
        assert ((a - c).abs() / c.max()).max() < tolerance, name


@pytest.mark.parametrize("preset", ["domainbed", "adaptive", "dan"])
def test_chains_are_the_powers_they_say(preset):
    gammas, powers = bandwidths(randn(3, 30, 4) * 0.7, preset)
    assert powers[0] == 0 and len(powers) == gammas.shape[1]
    for u, power in enumerate(powers):
        if power:
            torch.testing.assert_close(gammas[:, u], power * gammas[:, u - 1], rtol=1e-15, atol=0)
    run, longest = 1, 1
    for power in powers:
        run = run * power if power else 1
        longest = max(longest, run)
    assert longest <= 10


# ---- the tile, native and in PyTorch -------------------------------------------------------------


def tile(R=50, C=70, L=2, S=3, U=3, dtype=F32, coeff=True, powers=None, gammas=None):
    """Arguments of `native.mmd_tile`: centred samples, columns in order of domains."""
    x, y = randn(L, R, 8, dtype=dtype), randn(L, C, 8, seed=1, dtype=dtype)
    ends = torch.randint(0, C + 1, (S - 1,), generator=torch.Generator().manual_seed(2)).sort().values
    segments = torch.cat((torch.tensor([0]), ends, torch.tensor([C])))
    self = torch.arange(R) - 10
    return dict(
        gram=x @ y.mT,
        x2=x.square().sum(-1),
        y2=y.square().sum(-1),
        segments=segments,
        domains=torch.randint(0, S, (R,), generator=torch.Generator().manual_seed(3)),
        gammas=gammas_of(L, GAMMAS[:U] if gammas is None else gammas, dtype),
        powers=torch.tensor(powers or [0] * U, dtype=torch.int32),
        coeff=randn(L, S, S, seed=4, dtype=dtype) if coeff else None,
        self=self,
    )


def run_tile(arguments):
    """Sums and weights; the arguments stay as they are."""
    own = {**arguments, "gram": arguments["gram"].clone()}
    return native.mmd_tile(**own), own["gram"]


@needs_library
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_native_tile_is_the_same_on_any_number_of_threads(dtype, threads):
    arguments, found = tile(dtype=dtype), []
    for n in (1, 2, 3, 7):
        threads(n)
        found.append(run_tile(arguments))
    for sums, weights in found[1:]:
        assert torch.equal(sums, found[0][0]) and torch.equal(weights, found[0][1])


@needs_library
@pytest.mark.parametrize("coeff", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_tiles_agree(dtype, coeff):
    arguments = tile(dtype=dtype, coeff=coeff)
    sums, weights = run_tile(arguments)
    own = {**arguments, "gram": arguments["gram"].clone()}
    want = mmd_cpu.torch_tile(**own)
    tolerance = 1e-6 if dtype == F32 else 1e-13
    close(sums, want, tolerance)
    if coeff:
        close(weights, own["gram"], 3 * tolerance)
        here = (arguments["self"] >= 0) & (arguments["self"] < weights.shape[-1])
        assert here.any() and (weights[:, here, arguments["self"][here]] == 0).all()
