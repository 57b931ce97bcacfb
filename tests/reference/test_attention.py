"""The head attention of `fastheads.reference`, against one written by hand, which shares no code with it."""

import pytest
import torch
import torch.nn.functional as F
from dense_heads import EXACT, adapted_weight, check_all, dense_attention, make, random_mask

from fastheads.reference import head_attention

TARGETS = [("q", "v"), ("q",), ("k", "v"), ("q", "k", "v")]


# ---- the formula --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("shared", [False, True], ids=["own_A", "shared_A"])
@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("targets", TARGETS, ids="".join)
def test_adapted_heads_equal_the_dense_formula(targets, r, shared, bias):
    p = make(targets=targets, r=r, shared=shared, bias=bias)
    w = adapted_weight(p["w_in"], p["lora_A"], p["lora_B"], targets, 0.7)
    want = dense_attention(p["x"], w, p["b_in"], 3, p["gate"], pool=0)
    got = head_attention(**p, num_heads=3, targets=targets, scale=0.7, pool=0)
    check_all(got, want, **EXACT)


@pytest.mark.parametrize("H", [1, 2, 4])
def test_any_number_of_heads_and_a_single_token(H):
    p = make(B=3, N=1, D=8, H=H)
    w = adapted_weight(p["w_in"], p["lora_A"], p["lora_B"], ("q", "v"), 1.0)
    check_all(
        head_attention(**p, num_heads=H, pool=0),
        dense_attention(p["x"], w, p["b_in"], H, p["gate"], pool=0),
        **EXACT,
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_gates_and_lora_are_each_optional(adapted, gated):
    p = make()
    w = p["w_in"]
    if adapted:
        w = adapted_weight(w, p["lora_A"], p["lora_B"], ("q", "v"), 1.0)
    else:
        p["lora_A"] = p["lora_B"] = None
    if not gated:
        p["gate"] = None
    want = dense_attention(p["x"], w, p["b_in"], 3, p["gate"])
    check_all(head_attention(**p, num_heads=3), want, **EXACT)


def test_slices_of_lora_follow_the_order_of_targets():
    p = make(targets=("v", "q"))
    w = adapted_weight(p["w_in"], p["lora_A"], p["lora_B"], ("v", "q"), 1.0)
    want = dense_attention(p["x"], w, p["b_in"], 3, p["gate"])
    try:
        got = head_attention(**p, num_heads=3, targets=("v", "q"))
    except ValueError as refusal:  # refusing the order is honest too; silently swapping q and v is not
        assert "targets" in str(refusal)
        return
    check_all(got, want, **EXACT)


def test_strided_inputs_give_the_same_answer():
    p = make()
    want = head_attention(**p, num_heads=3, pool=0)
    p["x"] = p["x"].transpose(0, 1).contiguous().transpose(0, 1)
    p["w_in"] = p["w_in"].T.contiguous().T
    assert not p["x"].is_contiguous() and not p["w_in"].is_contiguous()
    check_all(head_attention(**p, num_heads=3, pool=0), tuple(want), **EXACT)


# ---- masks --------------------------------------------------------------------------------------

MASK_SHAPES = [
    (5,),
    (5, 5),
    (1, 5),
    (3, 5, 5),
    (3, 1, 5),
    (1, 1, 5, 5),
    (2, 1, 1, 5),
    (2, 1, 5, 5),
    (1, 3, 5, 5),
    (1, 3, 1, 5),
    (2, 3, 1, 5),
    (2, 3, 5, 5),
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["bool", "additive", "additive_inf"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_masks_of_every_broadcast_shape(shape, kind, causal):
    p = make()
    mask = random_mask(kind, shape)
    w = adapted_weight(p["w_in"], p["lora_A"], p["lora_B"], ("q", "v"), 1.0)
    want = dense_attention(p["x"], w, p["b_in"], 3, p["gate"], causal, mask, pool=4)
    got = head_attention(**p, num_heads=3, causal=causal, mask=mask, pool=4)
    check_all(got, want, **EXACT)


def test_causal_token_does_not_see_later_ones():
    p = make()
    before = head_attention(**p, num_heads=3, causal=True)
    p["x"][:, 3:] += 10.0
    after = head_attention(**p, num_heads=3, causal=True)
    assert torch.equal(before.o[:, :3], after.o[:, :3])
    assert not torch.allclose(before.o[:, 3:], after.o[:, 3:])


def test_expanded_and_float32_masks_are_read_as_they_are():
    p = make()
    row = random_mask("additive", (5, 5)).float()
    want = head_attention(**p, num_heads=3, mask=row.double())
    expanded = row.expand(2, 3, 5, 5)
    check_all(head_attention(**p, num_heads=3, mask=expanded), tuple(want), **EXACT)
    check_all(head_attention(**p, num_heads=3, mask=row), tuple(want), **EXACT)


# ---- the pooled token ---------------------------------------------------------------------------

POOLS = [None, 0, 3, torch.tensor([4, 1]), "mean", slice(2, None)]


@pytest.mark.parametrize("pool", POOLS, ids=["none", "first", "third", "per_sample", "mean", "mean_from"])
def test_pooled_heads_are_ungated(pool):
    p = make()
    w = adapted_weight(p["w_in"], p["lora_A"], p["lora_B"], ("q", "v"), 1.0)
    want = dense_attention(p["x"], w, p["b_in"], 3, p["gate"], pool=pool)
    got = head_attention(**p, num_heads=3, pool=pool)
    check_all(got, want, **EXACT)
    p["gate"] = p["gate"] * 3
    if pool is not None:
        assert torch.equal(head_attention(**p, num_heads=3, pool=pool).cls, got.cls)


# ---- what head-aware means ----------------------------------------------------------------------


def value_delta(lora_A, lora_B, H, D):
    """The delta of W_v [D, D], read off by sending the identity through single-token attention."""
    p = make(B=1, N=1, D=D, H=H)
    x = torch.eye(D, dtype=torch.float64)[:, None]
    args = dict(num_heads=H, targets=("v",))
    with_lora = head_attention(x, p["w_in"], p["b_in"], lora_A, lora_B, **args).o
    return (with_lora - head_attention(x, p["w_in"], p["b_in"], **args).o)[:, 0].T


@pytest.mark.parametrize("r", [1, 2, 3])
def test_shared_down_projection_is_plain_lora(r):
    H, D = 3, 12
    p = make(r=r, shared=True)
    B_full = torch.cat([p["lora_B"][0, h] for h in range(H)])  # [D, r]
    delta = value_delta(p["lora_A"][:1], p["lora_B"][:1], H, D)
    torch.testing.assert_close(delta, B_full @ p["lora_A"][0, 0], **EXACT)
    # singular values of the delta are of order one; what is left of the others is rounding
    assert torch.linalg.matrix_rank(delta, rtol=1e-8) == r

    w = p["w_in"].clone()
    for t, rows in enumerate((slice(0, D), slice(2 * D, 3 * D))):
        w[rows] += torch.cat([p["lora_B"][t, h] for h in range(H)]) @ p["lora_A"][t, 0]
    want = dense_attention(p["x"], w, p["b_in"], H, p["gate"])
    check_all(head_attention(**p, num_heads=H), want, **EXACT)


def test_own_down_projections_leave_plain_lora_behind():
    H, D, r = 3, 12, 2
    p = make(r=r)
    delta = value_delta(p["lora_A"][:1], p["lora_B"][:1], H, D)
    assert torch.linalg.matrix_rank(delta, rtol=1e-8) == H * r
    for h in range(H):  # and yet each head's own delta has rank r
        assert torch.linalg.matrix_rank(delta[h * 4 : h * 4 + 4], rtol=1e-8) == r


def test_equal_down_projections_equal_the_shared_one():
    p = make(shared=True)
    shared = head_attention(**p, num_heads=3)
    p["lora_A"] = p["lora_A"].repeat(1, 3, 1, 1)
    check_all(head_attention(**p, num_heads=3), tuple(shared), **EXACT)


# ---- training starts at the stock model ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_up_projection_and_unit_gates_are_the_unadapted_attention(dtype):
    p = make(B=2, N=9, D=24)
    params = torch.float64 if dtype == torch.float64 else torch.float32  # adapters stay float32
    base = [p[name].to(dtype) for name in ("x", "w_in", "b_in")]
    lora = (p["lora_A"].to(params), torch.zeros_like(p["lora_B"], dtype=params))
    start = head_attention(*base, *lora, num_heads=3, gate=torch.ones(3, dtype=params), pool=0)
    stock = head_attention(*base, num_heads=3, pool=0)
    # Adding exact zeros is exact. In 16 bits the zeros may stand in the columns of a wider product,
    # which may sum in another order and so round now and then to the other neighbour: one unit.
    exact = dtype in (torch.float64, torch.float32)
    unit = 0.0 if exact else torch.finfo(dtype).eps
    check_all(start, tuple(stock), rtol=unit, atol=unit)


def test_start_equals_the_dense_stock_formula():
    p = make()
    want = dense_attention(p["x"], p["w_in"], p["b_in"], 3, pool=0)
    p["lora_B"].zero_()
    p["gate"].fill_(1.0)
    check_all(head_attention(**p, num_heads=3, pool=0), want, **EXACT)


@pytest.mark.parametrize("kind", [None, "bool", "additive", "causal"])
@pytest.mark.parametrize("bias", [True, False])
def test_start_equals_torch_multihead_attention(bias, kind):
    D, H, N = 12, 3, 5
    p = make(bias=bias)
    p["lora_B"].zero_()
    p["gate"].fill_(1.0)
    mha = torch.nn.MultiheadAttention(D, H, bias=bias, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        mha.in_proj_weight.copy_(p["w_in"])
        if bias:
            mha.in_proj_bias.copy_(p["b_in"])
            mha.out_proj.bias.normal_()
    if kind == "causal":
        theirs, ours = torch.ones(N, N, dtype=torch.bool).triu(1), dict(causal=True)
    elif kind is None:
        theirs, ours = None, {}
    else:
        theirs = random_mask(kind, (N, N))  # True = masked in both
        ours = dict(mask=theirs)
    o = head_attention(**p, num_heads=H, **ours).o
    want = mha(p["x"], p["x"], p["x"], need_weights=False, attn_mask=theirs)[0]
    torch.testing.assert_close(F.linear(o, mha.out_proj.weight, mha.out_proj.bias), want, **EXACT)

    eye = torch.eye(D, dtype=torch.float64)
    seq = p["x"].transpose(0, 1)
    functional, _ = F.multi_head_attention_forward(
        *(seq, seq, seq, D, H, p["w_in"], p["b_in"], None, None, False, 0.0, eye, None),
        need_weights=False,
        attn_mask=theirs,
    )
    torch.testing.assert_close(o, functional.transpose(0, 1), **EXACT)
