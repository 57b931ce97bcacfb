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
