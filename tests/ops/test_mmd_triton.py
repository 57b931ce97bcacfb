"""`mmd` and `head_mmd` on Triton's kernels (in the interpreter where there is no GPU), by the path a user takes."""

import pytest
import torch
from mmd_formulas import dan_snippet, domainbed_mmd, labels, tllib_mk_mmd
from numerics import BACKWARD, FORWARD, assert_right
from standins import MODELS, images

import fastheads
from fastheads import reference
from fastheads.capture import CapturedHeads
from fastheads.kernels.launch import launching
from fastheads.losses.mmd_loss import _mmd
from fastheads.ops import kernel_sums, mmd_fused, mmd_panels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ["adaptive", "dan", "domainbed", [0.01, 0.1]]


def samples(n, layers=2, dim=40):
    torch.manual_seed(0)
    return torch.randn(layers, n, dim, device=DEVICE), torch.arange(n, device=DEVICE) % 3


def loss_and_gradient(x, domains, dtype=torch.float32, **options):
    x = x.to(dtype).requires_grad_()
    loss = fastheads.mmd(x, domains, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("n", [17, 150])  # one launch, and panels
def test_loss_and_gradient_meet_the_numerics_rule(kernel, estimator, n, monkeypatch):
    monkeypatch.setattr(mmd_panels, "WORKSPACE", 128 * 150)  # two panels, a layer at a time
    x, domains = samples(n)
    options = {"kernel": kernel, "estimator": estimator, "num_domains": 3}
    got = loss_and_gradient(x, domains, impl="triton", **options)
    plain = loss_and_gradient(x, domains, impl="reference", **options)
    exact = loss_and_gradient(x, domains, torch.float64, impl="reference", **options)
    # a single number may be exact by luck in PyTorch: the loss is allowed float32's rounding of the terms it is made of
    assert (got[0] - exact[0]).abs() <= FORWARD * (plain[0] - exact[0]).abs() + 1e-6
    assert_right(got[1], plain[1], exact[1], BACKWARD, "gradient")


def test_pairs_have_a_gradient_of_their_own():
    x, domains = samples(20)
    weights = torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]], device=DEVICE)

    def gradient(impl):
        own = x.clone().requires_grad_()
        pairs = fastheads.mmd(own, domains, reduction="none", impl=impl)
        return torch.autograd.grad((pairs * weights).sum(), own)[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate", [None, 4])
def test_opcheck_of_the_one_launch(gate):
    x, domains = samples(17)
    gates = None if gate is None else torch.rand(2, gate, device=DEVICE).requires_grad_()
    x = x.requires_grad_() if gate is None else x
    arguments = (x, domains, 3, "adaptive", None, [], "biased", gates, True)
    torch.library.opcheck(torch.ops.fastheads.mmd_small.default, arguments)


@pytest.mark.parametrize("gated", [False, True])
def test_a_preset_of_which_the_one_launch_knows_nothing(gated, monkeypatch):
    """A line in PRESETS is all that a preset needs, on a GPU too."""
    monkeypatch.setitem(
        reference.PRESETS, "three", reference.Preset("mean square", (3.0, 1.5, 0.4), "biased", (0, 2, 0))
    )
    x, domains = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)), labels(5, 7)
    gate = torch.tensor([[0.5, 1.5], [2.0, 1.0]]) if gated else None
    got, right = (
        _mmd(t, domains, gate, num_domains=2, kernel="three", impl=impl)
        for t, impl in ((x, "triton"), (x.double(), "reference"))
    )
    assert float(got) == pytest.approx(float(right), rel=1e-5)


def test_what_triton_cannot_compute_is_refused_in_words():
    x, domains = samples(12)
    with pytest.raises(ValueError, match="float64"):
        fastheads.mmd(x.double(), domains, impl="triton")
    with pytest.raises(ValueError, match="64 domains"):
        fastheads.mmd(torch.cat((x,) * 6, 1), torch.arange(72, device=DEVICE), impl="triton", estimator="biased")


def test_heads_take_one_launch_and_give_the_gates_gradient():
    model = MODELS["clip"]().to(DEVICE)
    fastheads.patch(model)
    domains = torch.arange(6, device=DEVICE) % 2
    with fastheads.capture_heads(model) as heads:
        model.encode_image(images(6).to(DEVICE))
    thetas = fastheads.gate_parameters(model)
    launched = []

    def run(kernel, grid, *args, **meta):
        launched.append(kernel)
        kernel[grid](*args, **meta)

    with launching(run):
        fused = fastheads.head_mmd(heads, domains, impl="triton")
        found = torch.autograd.grad(fused, thetas)
    plain = fastheads.head_mmd(heads, domains, impl="reference")
    assert len(launched) == 1
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    for got, expected in zip(found, torch.autograd.grad(plain, thetas), strict=True):
        # the adaptive bandwidths' float32 against float32: errors of sums that nearly cancel at gates of 1
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


class PaperHeads(CapturedHeads):
    """What a capture of ViT-B/16 on the paper's batch holds: 12 layers, 36 images, 12 heads of 64."""

    def __init__(self):
        self._thetas = [torch.zeros(12, device=DEVICE, requires_grad=True) for _ in range(12)]
        self._features = torch.randn(12, 36, 12, 64, device=DEVICE)

    features = property(lambda self: self._features)
    thetas = property(lambda self: self._thetas)
    gates = property(lambda self: reference.softmax_gate(torch.stack(self._thetas)))


@pytest.mark.parametrize("kernel", ["adaptive", "domainbed"])
@pytest.mark.parametrize("way", ["mmd", "head_mmd"])
def test_the_papers_batch_takes_one_launch_for_loss_and_gradient(way, kernel):
    """12 × 36 × 768, forward and backward; at most three are allowed. The kernel is counted, not run."""
    heads, domains, launched = PaperHeads(), torch.arange(36, device=DEVICE) % 3, []
    trained = heads.thetas if way == "head_mmd" else [heads.features.flatten(2).requires_grad_()]

    def count(kernel, grid, *args, **meta):
        launched.append((kernel.__name__, grid))
        gate, gradient = args[3], args[6]
        assert gradient is not None and (gate is not None) == (way == "head_mmd")

    with launching(count):
        if way == "mmd":
            loss = fastheads.mmd(trained[0], domains, num_domains=3, kernel=kernel, impl="triton")
        else:
            loss = fastheads.head_mmd(heads, domains, num_domains=3, kernel=kernel, impl="triton")
        found = torch.autograd.grad(loss, trained)
    assert [name for name, _ in launched] == ["mmd_small_kernel"]
    assert [g.shape for g in found] == [t.shape for t in trained]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("kernel", ["domainbed", "adaptive", "dan"])
def test_outside_definitions_within_the_numerics_rule(kernel, impl, dtype):
    """Two domains of one size, as TLlib's and DAN's take them; the definition in the same dtype may be as far off."""
    if impl == "cpu" and DEVICE == "cuda":
        pytest.skip("impl='cpu' is for tensors on a CPU")
    definition = {"domainbed": lambda a, b: domainbed_mmd([a, b]), "adaptive": tllib_mk_mmd, "dan": dan_snippet}[kernel]
    domains = labels(15, 15).to(DEVICE)
    low = (torch.randn(30, 24, generator=torch.Generator().manual_seed(0)) / 4).to(DEVICE, dtype)
    results = []
    for run, cast in (
        (lambda x: fastheads.mmd(x, domains, kernel=kernel, impl=impl), dtype),
        (lambda x: definition(x[domains == 0], x[domains == 1]), dtype),
        (lambda x: definition(x[domains == 0], x[domains == 1]), torch.float64),
    ):
        x = low.to(cast, copy=True).requires_grad_()
        loss = run(x)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    got, plain, exact = results
    # a loss is a difference of means of kernels, whose rounding it has: U of them, each at most one
    U = 7 if kernel == "domainbed" else 5
    assert (got[0] - exact[0]).abs() <= FORWARD * (plain[0] - exact[0]).abs() + 1e-6 * U
    assert_right(got[1], plain[1], exact[1], BACKWARD, "gradient")


SHARES = [(0, 50), (50, 50), (50, 51), (51, 170)]  # rows of four processes: one has none, one has one


@pytest.mark.parametrize("panel", [2**22, 128 * 170])
def test_processes_rows_add_up_to_the_whole(panel, monkeypatch):
    """What `group=` computes on each process of its rows against all columns, by the same kernel, in panels or not."""
    monkeypatch.setattr(mmd_panels, "WORKSPACE", panel)
    x, domains = samples(170)
    gammas, coeff = torch.tensor([[0.01, 0.1], [0.02, 0.05]], device=DEVICE), torch.eye(3, device=DEVICE) - 0.3
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        whole, total, grads = x.to(dtype), 0.0, []
        for a, b in SHARES:
            own = whole[:, a:b].clone().requires_grad_()
            more = dict(y=whole, dom_y=domains, row_offset=a, impl=impl)
            share = mmd_fused(own, domains[a:b], gammas.to(dtype), coeff.to(dtype), **more)
            total, grads = total + share.detach(), [*grads, torch.autograd.grad(share.sum(), own)[0]]
        results.append((total, torch.cat(grads, 1)))
    for i, (factor, what) in enumerate(((FORWARD, "sum"), (BACKWARD, "gradient"))):
        assert_right(*(r[i] for r in results), factor, what)
    whole = x.clone().requires_grad_()
    loss = mmd_fused(whole, domains, gammas, coeff, impl="triton")
    torch.testing.assert_close(loss.detach(), results[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), whole)[0], results[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offset", [None, 30])
def test_kernel_sums_of_two_sample_sets_differentiate_both(offset):
    x, domains = samples(70)
    y = torch.randn(2, 90, 40, device=DEVICE)
    y[:, 30:70] = x[:, :40]
    dom_y = torch.cat((domains[:30], domains[:40], domains[:20]))
    gammas, dK = torch.tensor([[0.01, 0.1], [0.02, 0.05]], device=DEVICE), torch.randn(2, 3, 3, device=DEVICE)
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        a, b = (v.to(dtype, copy=True).requires_grad_() for v in (x, y))
        K = kernel_sums(a, domains, b, dom_y, 3, gammas.to(dtype), offset, impl=impl)
        results.append((K, *torch.autograd.grad((K * dK.to(dtype)).sum(), (a, b))))
    for i, what in enumerate(("K", "dx", "dy")):
        assert_right(*(r[i] for r in results), BACKWARD if i else FORWARD, what)


@pytest.mark.parametrize("n", [20, 140])  # one launch, and panels
def test_absent_domains_pair_weights_and_pairs_are_the_references(n):
    x, domains = samples(n, dim=8)
    domains = 2 * domains  # 0, 2, 4 of six
    weights = torch.rand(6, 6, device=DEVICE)
    weights = weights + weights.mT
    for options in ({}, {"pair_weights": weights}, {"reduction": "none"}, {"estimator": "biased", "kernel": "dan"}):
        got, want = (
            loss_and_gradient_of_sum(x, domains, num_domains=6, impl=impl, **options)
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-6)


def loss_and_gradient_of_sum(x, domains, **options):
    x = x.clone().requires_grad_()
    loss = fastheads.mmd(x, domains, **options)
    return loss.detach(), torch.autograd.grad(loss.nansum(), x)[0]


@pytest.mark.parametrize("n", [20, 140])
def test_layouts_16_bits_and_autocast(n):
    x, domains = samples(n, dim=8)
    options = {"kernel": [0.01, 0.1], "impl": "triton"}  # bandwidths of the data are PyTorch's sums, in any order
    want = loss_and_gradient(x, domains, **options)
    for view in (x.transpose(1, 2).contiguous().transpose(1, 2), x.repeat_interleave(2, -1)[..., ::2]):
        before = view.clone()
        for got, expected in zip(loss_and_gradient(view, domains, **options), want, strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(view, before)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(fastheads.mmd(x, domains, **options), want[0])
    low = x.half()
    loss, gradient = loss_and_gradient(low, domains, torch.float16, **options)
    wide = loss_and_gradient(low.float(), domains, **options)
    assert torch.equal(loss, wide[0])
    # where float16 has its eleven bits; what is smaller was rounded before, in the gradient's own unit
    fine = wide[1].abs() >= torch.finfo(torch.float16).tiny
    assert bool(fine.any()) and torch.equal(gradient[fine], wide[1].half()[fine])
    assert float((gradient - wide[1]).abs().max()) <= 2.0**-11 * float(wide[1].abs().max())


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("scale", [2.0**16, 1e-4])
@pytest.mark.parametrize("dtype, step", [(torch.float16, 2.0**-24), (torch.bfloat16, 0.0)], ids=["fp16", "bf16"])
@pytest.mark.parametrize("n", [24, 150])
def test_a_loss_scale_reaches_gradients_kept_in_16_bits(n, dtype, step, scale, impl):
    """Elementwise: two roundings, of the gradient and of what the scale makes of it, and float32's own error."""
    if impl == "cpu" and DEVICE == "cuda":
        pytest.skip("impl='cpu' is for tensors on a CPU")
    x, domains = samples(n, dim=24)
    x = (x / 4).to(dtype)
    got, exact = (
        torch.autograd.grad(fastheads.mmd(own, domains, kernel=[0.5, 4.0], impl=how) * scale, own)[0].double()
        for own, how in ((x.clone().requires_grad_(), impl), (x.double().requires_grad_(), "reference"))
    )
    assert bool(torch.isfinite(got).all())
    # Triton's interpreter cuts off what a GPU rounds to bfloat16.
    roundings = 1.51 if dtype == torch.bfloat16 and impl == "triton" and DEVICE == "cpu" else 1.01
    most = roundings * torch.finfo(dtype).eps * exact.abs() + step + 1e-5 * exact.abs().max()
    assert bool(((got - exact).abs() <= most).all())


@pytest.mark.parametrize("n", [12, 140])
def test_compiles_in_one_graph(n):
    x, domains = samples(n, dim=8)

    def loss(x):
        return fastheads.mmd(x, domains, num_domains=3, impl="triton")

    torch._dynamo.reset()
    own = x.clone().requires_grad_()
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(own), loss(own)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, own)[0] for v in (got, want)))


@pytest.mark.parametrize("n", [1, 12, 140])
def test_one_domain_or_no_sample_is_zero_that_backpropagates(n):
    x, domains = samples(n)
    for own, ids in ((x, 0 * domains), (x[:, :0], domains[:0])):
        loss, gradient = loss_and_gradient(own, ids, num_domains=3, estimator="biased", impl="triton")
        assert loss.item() == 0 and gradient.shape == own.shape and not gradient.any()
    if n > 1:
        alone = torch.cat((torch.ones_like(domains[:1]), 0 * domains[1:]))
        assert torch.isfinite(loss_and_gradient(x, alone, estimator="biased", impl="triton")[1]).all()
        if DEVICE == "cpu":  # where values may be looked at
            with pytest.raises(ValueError, match="one sample"):
                fastheads.mmd(x, alone, estimator="unbiased", impl="triton")


def test_tf32_rounds_the_features_once(monkeypatch):
    """What a GPU that may multiply in TF32 sees; the interpreter multiplies in full."""
    x, domains = samples(150)
    x = x + 100  # uncentred, TF32 would keep 0.1 of it
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    exact = loss_and_gradient(x, domains, torch.float64, impl="reference")
    full = loss_and_gradient(x, domains, impl="triton")
    try:
        matmul.fp32_precision = "tf32"
        rounded = loss_and_gradient(x, domains, impl="triton")
    finally:
        matmul.fp32_precision = before
    assert not torch.equal(rounded[1], full[1])
    # eleven bits of features of size one: 2**-12 of them at random
    assert ((rounded[1] - exact[1]).norm() / exact[1].norm()).item() < 2e-3
