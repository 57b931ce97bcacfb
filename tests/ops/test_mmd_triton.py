"""`mmd` and `head_mmd` on Triton's kernels (in the interpreter where there is no GPU), by the path a user takes."""

import pytest
import torch
from numerics import BACKWARD, FORWARD, assert_right
from standins import MODELS, images

import fastheads
from fastheads.kernels.launch import launching
from fastheads.ops import mmd as operator

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
    monkeypatch.setattr(operator, "WORKSPACE", 128 * 150)  # two panels, a layer at a time
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


def test_what_triton_cannot_compute_is_refused_in_words():
    x, domains = samples(12)
    with pytest.raises(ValueError, match="float64"):
        fastheads.mmd(x.double(), domains, impl="triton")
    with pytest.raises(ValueError, match="64 domains"):
        fastheads.mmd(x, domains, num_domains=65, impl="triton", estimator="biased")


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
