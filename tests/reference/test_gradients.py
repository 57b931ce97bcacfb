"""The head attention's derivatives in `fastheads.reference`, by differences and by hand; LoRA dropout."""

import pytest
import torch
from dense_heads import EXACT, adapted_weight, check_all, dense_attention, make, random_mask
from torch.autograd import gradcheck

from fastheads.reference import head_attention

# ---- gradients ----------------------------------------------------------------------------------

GRADCHECK_CASES = {
    "plain": (dict(), {}),
    "shared_A": (dict(shared=True), {}),
    "rank_3_q": (dict(r=3, targets=("q",)), dict(targets=("q",))),
    "k_v": (dict(targets=("k", "v")), dict(targets=("k", "v"), scale=0.5)),
    "q_k_v": (dict(targets=("q", "k", "v"), r=1), dict(targets=("q", "k", "v"))),
    "causal": (dict(), dict(causal=True)),
    "bool_mask": (dict(), dict(mask=random_mask("bool", (2, 1, 1, 3)))),
    "additive_mask": (dict(), dict(mask=random_mask("additive_inf", (3, 3)))),
}


@pytest.mark.parametrize("case", GRADCHECK_CASES)
def test_gradients_are_the_derivatives(case):
    shapes, options = GRADCHECK_CASES[case]
    p = make(N=3, D=4, H=2, **shapes)
    names = list(p)
    leaves = [p[n].requires_grad_() for n in names]

    def output(*values):
        return head_attention(**dict(zip(names, values, strict=True)), num_heads=2, **options).o

    assert gradcheck(output, leaves)


def test_gradients_under_dropout_are_the_derivatives_for_that_mask():
    p = make(N=3, D=4, H=2)
    names = list(p)

    def output(*values):
        torch.manual_seed(0)  # the same mask at every evaluation
        p = dict(zip(names, values, strict=True))
        return head_attention(**p, num_heads=2, dropout_p=0.5).o

    assert gradcheck(output, [p[n].requires_grad_() for n in names])


@pytest.mark.parametrize("absent", ["b_in", "gate"])
def test_gradients_without_the_optional_inputs(absent):
    p = make(N=3, D=4, H=2)
    p[absent] = None
    names = [n for n in p if n != absent]
    fixed = {absent: None}

    def output(*values):
        return head_attention(**dict(zip(names, values, strict=True)), **fixed, num_heads=2).o

    assert gradcheck(output, [p[n].requires_grad_() for n in names])


def test_zero_gate_silences_its_head_and_still_learns():
    H, dh = 3, 4
    p = make()
    p["gate"][1] = 0.0
    p["gate"].requires_grad_()
    o = head_attention(**p, num_heads=H).o
    assert (o[..., dh : 2 * dh] == 0).all()
    assert (o[..., :dh] != 0).any() and (o[..., 2 * dh :] != 0).any()

    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(3), dtype=o.dtype)
    o.backward(do)
    w = adapted_weight(p["w_in"], p["lora_A"], p["lora_B"], ("q", "v"), 1.0)
    ungated, _, _ = dense_attention(p["x"], w, p["b_in"], H)
    for h in range(H):
        cols = slice(h * dh, (h + 1) * dh)
        want = (do[..., cols] * ungated[..., cols]).sum()
        torch.testing.assert_close(p["gate"].grad[h], want, **EXACT)


def test_zero_up_projection_still_gets_a_gradient():
    p = make()
    p["lora_B"].zero_().requires_grad_()
    p["lora_A"].requires_grad_()
    head_attention(**p, num_heads=3).o.square().sum().backward()
    assert (p["lora_B"].grad.abs().amax((2, 3)) > 0).all()  # every target, every head
    assert (p["lora_A"].grad == 0).all()


# ---- LoRA dropout -------------------------------------------------------------------------------


def test_dropout_changes_the_output_and_follows_the_seed():
    p = make()

    def call(seed):
        torch.manual_seed(seed)
        return head_attention(**p, num_heads=3, dropout_p=0.5).o

    assert not torch.allclose(call(0), call(1))
    assert torch.equal(call(0), call(0))
    torch.manual_seed(0)
    first, second = (head_attention(**p, num_heads=3, dropout_p=0.5).o for _ in range(2))
    assert not torch.allclose(first, second)


def test_dropout_zero_is_no_dropout():
    p = make()
    assert torch.equal(head_attention(**p, num_heads=3, dropout_p=0.0).o, head_attention(**p, num_heads=3).o)


def test_dropout_leaves_the_base_path_alone():
    p = make()
    p["lora_B"].zero_()
    dropped = head_attention(**p, num_heads=3, dropout_p=0.5)
    check_all(dropped, tuple(head_attention(**p, num_heads=3)), rtol=0, atol=0)


@pytest.mark.parametrize("p_drop", [0.1, 0.5])
def test_dropout_is_unbiased_where_the_output_is_linear(p_drop):
    # one token: the softmax is 1, so o is linear in the low-rank input
    p = make(B=1, N=1, targets=("v",))
    want = head_attention(**p, num_heads=3, targets=("v",)).o[0, 0]
    p["x"] = p["x"].expand(2000, 1, 12)  # every row its own mask
    torch.manual_seed(0)
    runs = torch.cat([head_attention(**p, num_heads=3, targets=("v",), dropout_p=p_drop).o for _ in range(10)])[:, 0]
    error = (runs.mean(0) - want).abs()
    assert (runs.std(0) > 0.01).all()
    assert (error < 5 * runs.std(0) / len(runs) ** 0.5).all()  # five standard errors


def test_heads_and_targets_share_one_dropout_mask():
    # equal parameters in every head, for q and for v, with x and the mask in common: equal q and v
    # in every head. With one token o is v, and with a constant k = (2, 0, 0, 0) and head size 4,
    # lse = q k / sqrt(4) is the first entry of q.
    p = make(B=6, N=1)
    head, b_head = p["w_in"][:4], p["b_in"][:4]
    zero, one = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    one[0] = 2.0
    w_in = torch.cat([head.repeat(3, 1), zero, head.repeat(3, 1)])
    b_in = torch.cat([b_head.repeat(3), one.repeat(3), b_head.repeat(3)])
    lora_A = p["lora_A"][:1, :1].expand(2, 3, -1, -1)
    lora_B = p["lora_B"][:1, :1].expand(2, 3, -1, -1)
    out = head_attention(p["x"], w_in, b_in, lora_A, lora_B, num_heads=3, dropout_p=0.5)
    heads = out.o.reshape(6, 3, 4)
    undropped = head_attention(p["x"], w_in, b_in, lora_A, lora_B, num_heads=3)
    assert not torch.allclose(heads, undropped.o.reshape(6, 3, 4))
    torch.testing.assert_close(heads, heads[:, :1].expand_as(heads), **EXACT)
    torch.testing.assert_close(out.lse[..., 0], heads[..., 0], **EXACT)
