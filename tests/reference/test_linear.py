"""A linear layer with a low-rank delta per head, in `fastheads.reference`, against one written out head by head."""

import pytest
import torch
from dense_heads import EXACT
from torch.autograd import gradcheck

from fastheads.reference import head_linear


def make(heads, D=12, O=7, r=2, dtype=torch.float64, size=1.0):  # noqa: E741
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 5, D), "weight": (O, D), "bias": (O,), "lora_A": (heads, r, D // heads), "lora_B": (heads, O, r)}
    p = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    p["lora_B"] *= size
    return {
        name: t.to(dtype if name in ("x", "weight", "bias") else torch.promote_types(dtype, torch.float32))
        for name, t in p.items()
    }


def dense(x, weight, bias, lora_A, lora_B, scale=1.0):
    w, width = weight.double().clone(), lora_A.shape[2]
    for h in range(len(lora_A)):
        w[:, h * width : (h + 1) * width] += scale * lora_B[h].double() @ lora_A[h].double()
    return x.double() @ w.T + bias.double()


@pytest.mark.parametrize("heads", [1, 3])
def test_it_equals_the_dense_formula_and_has_its_gradients(heads):
    p = make(heads)
    torch.testing.assert_close(head_linear(**p, scale=0.7), dense(**p, scale=0.7), **EXACT)
    leaves = [t.requires_grad_() for t in p.values()]
    assert gradcheck(lambda *t: head_linear(*t, scale=0.7), leaves)
    got, want = (torch.autograd.grad(f(**p, scale=0.7).square().sum(), leaves) for f in (head_linear, dense))
    torch.testing.assert_close(got, want, **EXACT)


def test_a_zero_head_adds_exactly_nothing():
    p = make(3)
    p["x"][..., 4:8] = 0
    other = {**p, "lora_A": p["lora_A"].clone(), "lora_B": p["lora_B"].clone()}
    other["lora_A"][1], other["lora_B"][1] = 9.0, -9.0
    assert torch.equal(head_linear(**p), head_linear(**other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_deltas_are_not_rounded_away_beside_16_bit_weights(dtype):
    """Half a unit in the last place of these weights is 2e-3 of them, and more than the delta is."""
    p = make(4, D=256, O=64, dtype=dtype, size=1e-3)
    without = {**p, "lora_B": torch.zeros_like(p["lora_B"])}
    want = dense(**p) - dense(**without)
    got = head_linear(**p).double() - dense(**without)
    gain = float((got * want).sum() / want.square().sum())
    assert abs(gain - 1) < 0.05
    assert torch.equal(head_linear(**without), torch.nn.functional.linear(p["x"], p["weight"], p["bias"]))


@pytest.mark.parametrize("trained", ["", "weight", "bias"])
def test_16_bit_gradients_beside_a_frozen_weight_and_a_trained_one(trained):
    """Against the dense formula in float64, of the same rounded inputs; tolerance: bfloat16's rounding of sums."""
    p = make(3, dtype=torch.bfloat16)
    names = ["x", "lora_A", "lora_B", *([trained] if trained else [])]
    results = []
    for f in (head_linear, dense):
        leaves = {name: t.clone().requires_grad_(name in names) for name, t in p.items()}
        results.append(torch.autograd.grad(f(**leaves, scale=0.7).double().square().sum(), [leaves[n] for n in names]))
    for name, got, want in zip(names, *results, strict=True):
        assert got.dtype == p[name].dtype
        assert float((got.double() - want.double()).abs().max() / want.double().abs().max()) < 2e-2, name


def test_a_frozen_weights_gradient_is_not_formed():
    p = make(1, dtype=torch.bfloat16)
    for name in ("x", "lora_A", "lora_B"):
        p[name].requires_grad_()
    shapes = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend([tuple(out.shape)] if func is torch.ops.aten.mm.default else [])
            return out

    y = head_linear(**p)
    with Products():
        y.sum().backward()
    assert [shape for shape in shapes if shape[0] == 7] == [(7, 2)]  # up's
