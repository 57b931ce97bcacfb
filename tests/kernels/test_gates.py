"""Gates that the kernels make of theta, and theta's gradient, by `reference.GATES`' formulas in float64."""

import pytest
import torch
from numerics import BACKWARD, FORWARD, assert_right

from fastheads.kernels.attention_bwd import attention_bwd
from fastheads.kernels.attention_fwd import attention_fwd
from fastheads.kernels.one_pass import one_pass_fwd
from fastheads.kernels.sums import sums
from fastheads.reference import GATES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = (1, 2, 6, 12, 20)
FORM = pytest.mark.parametrize("form", GATES)
SHIFT = {"zero": 0.0, "small": 1.0, "large": 30.0, "huge": 1e4}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def theta_of(H, kind):
    return SHIFT[kind] * draw(H, seed=3)


@FORM
@pytest.mark.parametrize("H", HEADS)
def test_a_theta_of_zero_is_no_gate_at_all(H, form):
    qkv = draw(1, 3, 3 * 16 * H)
    gated = attention_fwd(qkv, num_heads=H, gate=theta_of(H, "zero"), gate_form=form)[0]
    assert torch.equal(gated, attention_fwd(qkv, num_heads=H)[0])


@FORM
@pytest.mark.parametrize("kind", SHIFT)
@pytest.mark.parametrize("H", HEADS)
def test_gates_of_theta(H, kind, form):
    """Values that are all alike come out as they are, gated: what is read off is the gate."""
    qkv, theta = torch.ones(1, 1, 3 * 16 * H, device=DEVICE), theta_of(H, kind)
    got = attention_fwd(qkv, num_heads=H, gate=theta, gate_form=form)[0].view(H, 16)[:, 0]
    assert_right(got, GATES[form](theta), GATES[form](theta.double()), FORWARD)


@FORM
def test_one_pass_makes_the_same_gates(form):
    H = 3
    x, w, theta = draw(1, 5, 16 * H), draw(48 * H, 16 * H, seed=1), theta_of(H, "small")
    got = one_pass_fwd(x, w, None, None, None, num_heads=H, gate=theta, gate_form=form)[0]
    gates = GATES[form](theta)
    assert torch.allclose(got, one_pass_fwd(x, w, None, None, None, num_heads=H, gate=gates)[0], rtol=3e-7, atol=0)


@FORM
@pytest.mark.parametrize("kind", SHIFT)
@pytest.mark.parametrize("H", HEADS)
def test_the_gradient_of_theta(H, kind, form):
    theta, gates = theta_of(H, kind), draw(40, H, seed=4)
    got, _ = sums(gates, None, gate=theta, gate_form=form)

    def gradient(dtype):
        own = theta.to(dtype).requires_grad_()
        return torch.autograd.grad(GATES[form](own), own, gates.to(dtype).sum(0))[0]

    # Of one gate, or where one has all, it is 0, of terms that cancel: what is off is measured by them.
    size = (GATES[form](theta.double()) * gates.double().sum(0).abs()).max()
    allowed = 3 * (gradient(torch.float32).double() - gradient(torch.float64)).abs().max() + 1e-6 * size
    assert got.dtype == torch.float32
    assert float((got.double() - gradient(torch.float64)).abs().max()) <= float(allowed)


@FORM
def test_attention_backward_takes_theta_for_the_gates_it_makes(form):
    H, theta = 3, theta_of(3, "small")
    qkv, do = draw(2, 7, 48 * H), draw(2, 7, 16 * H, seed=1)
    lse = attention_fwd(qkv, num_heads=H)[1]
    dqkv, parts = attention_bwd(do, qkv, lse, num_heads=H, gate=theta, gate_form=form)
    same, same_parts = attention_bwd(do, qkv, lse, num_heads=H, gate=GATES[form](theta))
    assert_right(dqkv, same, same.double(), BACKWARD)
    assert torch.equal(parts, same_parts)


@FORM
def test_theta_of_any_layout(form):
    theta = torch.stack((theta_of(6, "small"), draw(6)), 1)[:, 0]
    qkv, parts = draw(1, 3, 48 * 6), draw(5, 6)
    for run in (
        lambda t: attention_fwd(qkv, num_heads=6, gate=t, gate_form=form)[0],
        lambda t: sums(parts, None, gate=t, gate_form=form)[0],
    ):
        assert torch.equal(run(theta), run(theta.contiguous()))
