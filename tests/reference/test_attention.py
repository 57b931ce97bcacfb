"""The head attention and CAR-FT formulas of `fastheads.reference`, against ones written by hand.

Nothing below shares code with the library: weights, heads, masks and softmaxes are built head by
head in float64. Tolerances in float64 are 1e-12: a few hundred additions of numbers near one,
2.2e-16 each, with a wide margin.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from fastheads.reference import context_kl, head_attention

EXACT = dict(rtol=1e-12, atol=1e-12)
ROW_OF = {"q": 0, "k": 1, "v": 2}  # which D rows of w_in [3D, D]
TARGETS = [("q", "v"), ("q",), ("k", "v"), ("q", "k", "v")]


def make(B=2, N=5, D=12, H=3, r=2, targets=("q", "v"), shared=False, bias=True, seed=0):
    """Float64 inputs with every term of order one, gates included."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    T, heads_A = len(targets), 1 if shared else H
    return dict(
        x=rand(B, N, D),
        w_in=rand(3 * D, D) / D**0.5,
        b_in=rand(3 * D) if bias else None,
        lora_A=rand(T, heads_A, r, D) / D**0.5,
        lora_B=rand(T, H, D // H, r) / r**0.5,
        gate=torch.rand(H, generator=g, dtype=torch.float64) + 0.5,
    )


def adapted_weight(w_in, lora_A, lora_B, targets, scale):
    """W + s * Delta, one head and one target at a time: w_in [3D, D] -> [3D, D]."""
    w = w_in.clone()
    D = w.shape[1]
    for t, target in enumerate(targets):
        T, H, dh, r = lora_B.shape
        for h in range(H):
            down = lora_A[t, h if lora_A.shape[1] == H else 0]
            first = ROW_OF[target] * D + h * dh
            w[first : first + dh] = w[first : first + dh] + scale * (lora_B[t, h] @ down)
    return w


def dense_attention(x, w, b_in, num_heads, gate=None, causal=False, mask=None, pool=None):
    """Loops over images and heads; mask as in head_attention. Returns o, lse, cls."""
    B, N, D = x.shape
    dh = D // num_heads
    b = torch.zeros(3 * D, dtype=x.dtype) if b_in is None else b_in
    blocked = torch.zeros(B, num_heads, N, N, dtype=torch.bool)
    added = torch.zeros(B, num_heads, N, N, dtype=x.dtype)
    if mask is not None and mask.dtype == torch.bool:
        blocked = blocked | mask
    elif mask is not None:
        added = added + mask
    if causal:
        for i in range(N):
            blocked[:, :, i, i + 1 :] = True
    o, lse, cls = [], [], []
    for n in range(B):
        o_n, lse_n, cls_n = [], [], []
        for h in range(num_heads):
            rows = [slice(s * D + h * dh, s * D + (h + 1) * dh) for s in range(3)]
            q, k, v = (x[n] @ w[s].T + b[s] for s in rows)
            logits = q @ k.T / math.sqrt(dh) + added[n, h]
            logits = logits.masked_fill(blocked[n, h], -math.inf)
            o_h = torch.softmax(logits, dim=-1) @ v
            lse_n.append(torch.logsumexp(logits, dim=-1))
            o_n.append(o_h if gate is None else gate[h] * o_h)
            if isinstance(pool, torch.Tensor):
                cls_n.append(o_h[int(pool[n])])
            elif isinstance(pool, int):
                cls_n.append(o_h[pool])
            elif pool == "mean":
                cls_n.append(sum(o_h[i] for i in range(1, N)) / (N - 1))
        o.append(torch.cat(o_n, dim=-1))
        lse.append(torch.stack(lse_n))
        if pool is not None:
            cls.append(torch.stack(cls_n))
    return torch.stack(o), torch.stack(lse), torch.stack(cls) if cls else None


def check_all(actual, expected, **tolerance):
    for name, want in zip(("o", "lse", "cls"), expected, strict=True):
        got = getattr(actual, name)
        if want is None:
            assert got is None, name
        else:
            torch.testing.assert_close(got, want, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


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


def random_mask(kind, shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.rand(*shape, generator=g) < 0.4
    hidden[..., 0] = False  # every query sees token 0, so no row is empty, causal or not
    if kind == "bool":
        return hidden
    added = torch.randn(*shape, generator=g, dtype=torch.float64)
    return added.masked_fill(hidden, -math.inf) if kind == "additive_inf" else added


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

POOLS = [None, 0, 3, torch.tensor([4, 1]), "mean"]


@pytest.mark.parametrize("pool", POOLS, ids=["none", "first", "third", "per_sample", "mean"])
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


# ---- precision (design.md, "Numerics") ----------------------------------------------------------


def randn_like(t, seed):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=t.dtype)


LOW = [torch.float32, torch.bfloat16, torch.float16]


def assert_error_within(factor, draws, what):
    """Max and RMS error at most `factor` x that of plain PyTorch, + 1e-6 of the largest value.

    draws: (ours, plain, exact) triples. The maximum is averaged over the draws: a single one hangs
    on how the few values of the largest binade happen to round, and is off by a factor of two in
    one draw of a hundred.
    """

    def rms(error):
        return error.square().mean().sqrt()

    slack = 1e-6 * max(exact.abs().max() for _, _, exact in draws)
    for name, size in (("max", torch.max), ("rms", rms)):
        ours, plain = (sum(size((draw[i].double() - draw[2]).abs()) for draw in draws) / len(draws) for i in range(2))
        assert ours <= factor * plain + slack, f"{what}: {name} error {ours:.3e}, plain PyTorch {plain:.3e}"


def plain_attention(x, w_in, b_in, lora_A, lora_B, gate, H, targets, causal):
    """Ordinary PyTorch in x's dtype: merged weights, F.linear, scaled_dot_product_attention."""
    B, N, D = x.shape
    w = adapted_weight(w_in.float(), lora_A, lora_B, targets, 1.0).to(x.dtype)
    qkv = F.linear(x, w, b_in).reshape(B, N, 3, H, D // H).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(*qkv, is_causal=causal)
    return (o * gate.to(x.dtype)[:, None, None]).transpose(1, 2).reshape(B, N, D)


def plain_lse(p, H, targets, causal):
    """Log-sum-exp in float32 of logits formed in x's dtype from merged weights."""
    B, N, D = p["x"].shape
    w = adapted_weight(p["w_in"].float(), p["lora_A"], p["lora_B"], targets, 1.0)
    y = F.linear(p["x"], w.to(p["x"].dtype), p["b_in"])
    q, k, _ = y.reshape(B, N, 3, H, D // H).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT).float() / (D // H) ** 0.5
    if causal:
        logits = logits.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf)
    return logits.logsumexp(-1)


def lowered(p, dtype):
    """The tensors as a user holds them: x and the base in `dtype`, adapters and gates in float32."""
    return {n: v.to(dtype if n in ("x", "w_in", "b_in") else torch.float32) for n, v in p.items()}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_error_is_that_of_plain_pytorch_in_the_same_dtype(dtype, causal):
    B, N, D, H, targets = 4, 17, 64, 4, ("q", "v")
    draws = {}
    for seed in range(4):
        low = lowered(make(B=B, N=N, D=D, H=H, seed=seed), dtype)
        # float64 starts from the rounded inputs: only the computation is judged
        leaves = [
            {n: cast(v).detach().requires_grad_() for n, v in low.items()}
            for cast in (torch.clone, torch.clone, torch.Tensor.double)
        ]
        ours, plain, exact = leaves
        out = head_attention(**ours, num_heads=H, targets=targets, causal=causal, pool=0)
        o_plain = plain_attention(**plain, H=H, targets=targets, causal=causal)
        w = adapted_weight(exact["w_in"], exact["lora_A"], exact["lora_B"], targets, 1.0)
        o, lse, cls = dense_attention(exact["x"], w, exact["b_in"], H, exact["gate"], causal, pool=0)
        assert out.o.dtype == dtype
        do = randn_like(o, seed=99).to(dtype)
        for y in (out.o, o_plain, o):
            y.backward(do.to(y.dtype))
        draws.setdefault("o", []).append((out.o, o_plain, o))
        for n in low:
            assert ours[n].grad.dtype == low[n].dtype
            draws.setdefault(n, []).append([leaf[n].grad for leaf in leaves])

        ungated = {**low, "gate": torch.ones(H)}
        cls_plain = plain_attention(**ungated, H=H, targets=targets, causal=causal)[:, 0]
        draws.setdefault("cls", []).append((out.cls, cls_plain.reshape(B, H, D // H), cls))
        draws.setdefault("lse", []).append((out.lse, plain_lse(low, H, targets, causal), lse))

    for name, triples in draws.items():
        triples = [[t.detach() for t in triple] for triple in triples]
        if name in ("o", "cls", "lse"):
            assert_error_within(2, triples, name)
        else:
            assert_error_within(3, triples, f"gradient of {name}")  # 3 x for gradients


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_small_deltas_survive_low_precision(dtype, size):
    # Rounding o to bf16 costs about 1e-3 |o| per element against a delta of 1e-3 |o|: the gain over
    # n elements is then uncertain by about 1.6 / sqrt(n), 0.5 % for the 98,304 here; the rule
    # allows 5 %.
    B, N, D, H, targets = 8, 48, 256, 4, ("q", "v")
    p = make(B=B, N=N, D=D, H=H)
    low = lowered(p, dtype)
    del low["gate"]
    w64, A64 = low["w_in"].double(), low["lora_A"].double()
    for t, rows in enumerate((slice(0, D), slice(2 * D, 3 * D))):  # ||Delta|| = size * ||W||, per target
        only = adapted_weight(torch.zeros_like(w64), A64[t : t + 1], p["lora_B"][t : t + 1], (targets[t],), 1.0)
        p["lora_B"][t] *= size * w64[rows].norm() / only.norm()
    low["lora_B"] = p["lora_B"].float()

    exact = {n: v.double() for n, v in low.items()}

    def effect(q):
        stock = head_attention(q["x"], q["w_in"], q["b_in"], num_heads=H).o
        return (head_attention(**q, num_heads=H, targets=targets).o.double() - stock.double()).ravel()

    dy, dy64 = effect(low), effect(exact)  # float64 is held to the dense formula above
    gain = torch.dot(dy, dy64) / dy64.square().sum()
    assert abs(gain - 1) < 0.05, f"gain {gain:.4f}"


def test_float16_logits_beyond_its_range_stay_finite():
    # q k = 65536 > 65504, the largest float16: logits are formed in float32, or they overflow
    # before the softmax
    D = 64
    x = torch.ones(1, 3, D, dtype=torch.float16)
    x[0, 1] = -1
    w_in = torch.cat([torch.eye(D).mul(32), torch.eye(D).mul(32), torch.eye(D)]).half()
    out = head_attention(x, w_in, num_heads=1)
    want = dense_attention(x.double(), w_in.double(), None, 1)
    torch.testing.assert_close(out.o.double(), want[0], rtol=1e-3, atol=1e-3)  # one float16 rounding
    torch.testing.assert_close(out.lse.double(), want[1], rtol=1e-3, atol=0)


# ---- CAR-FT -------------------------------------------------------------------------------------


def unit_rows(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def context_kl_loops(features, teacher, weights, logit_scale):
    """mean over images of sum_t p(t) (log p(t) - log q(t)), p the teacher's, every term by hand."""
    total = 0.0
    for f_student, f_teacher in zip(features, teacher, strict=True):
        logs = []
        for f in (f_teacher, f_student):
            f = f / f.square().sum().sqrt()
            logits = [float(logit_scale) * (f * w).sum() for w in weights]
            top = max(float(z) for z in logits)
            log_sum = top + sum((z - top).exp() for z in logits).log()
            logs.append([z - log_sum for z in logits])
        total = total + sum(p.exp() * (p - q) for p, q in zip(*logs, strict=True))
    return total / len(features)


@pytest.fixture
def car_ft():
    teacher = unit_rows(6, 512, seed=0)
    student = teacher + 0.5 * unit_rows(6, 512, seed=1)
    return student * 3.0, teacher * 5.0, unit_rows(9, 512, seed=2)


@pytest.mark.parametrize("logit_scale", [1.0, 14.3, 100.0])
def test_context_kl_equals_the_formula_image_by_image(car_ft, logit_scale):
    want = context_kl_loops(*car_ft, logit_scale)
    got = context_kl(*car_ft, logit_scale)
    assert got.shape == ()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)  # differences of logs near 1
    as_tensor = context_kl(*car_ft, torch.tensor(logit_scale, dtype=torch.float64))
    torch.testing.assert_close(as_tensor, want, rtol=1e-10, atol=1e-13)


def test_context_kl_is_teacher_relative_to_student_not_the_reverse(car_ft):
    student, teacher, w = car_ft
    forward, reverse = (context_kl_loops(*pair, w, 100.0) for pair in ((student, teacher), (teacher, student)))
    assert abs(forward - reverse) > 0.05 * forward  # the two directions are told apart here
    torch.testing.assert_close(context_kl(student, teacher, w, 100.0), forward, rtol=1e-10, atol=0)


def test_context_kl_is_averaged_over_the_batch(car_ft):
    student, teacher, w = car_ft
    once = context_kl(student, teacher, w, 100.0)
    twice = context_kl(student.repeat(2, 1), teacher.repeat(2, 1), w, 100.0)
    torch.testing.assert_close(twice, once, **EXACT)


def test_context_kl_is_zero_and_flat_for_equal_features(car_ft):
    student, _, w = car_ft
    student.requires_grad_()
    loss = context_kl(student, student.detach().clone(), w, 100.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_context_kl_sends_no_gradient_to_the_teacher(car_ft):
    student, teacher, w = (t.requires_grad_() for t in car_ft)
    context_kl(student, teacher, w.detach(), 100.0).backward()
    assert teacher.grad is None or (teacher.grad == 0).all()
    assert (student.grad != 0).any()


def test_context_kl_gradient_is_the_derivative():
    student, teacher, w = unit_rows(3, 8, seed=0), unit_rows(3, 8, seed=1), unit_rows(4, 8, seed=2)
    assert gradcheck(lambda s: context_kl(s, teacher, w, 10.0), [student.requires_grad_()])


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_context_kl_ignores_the_length_of_features(car_ft, which):
    student, teacher, w = car_ft
    want = context_kl(student, teacher, w, 100.0)
    factor = torch.linspace(0.1, 40.0, 6, dtype=torch.float64)[:, None]
    if which == "student":
        student = student * factor
    else:
        teacher = teacher * factor
    torch.testing.assert_close(context_kl(student, teacher, w, 100.0), want, rtol=1e-10, atol=0)


def test_context_kl_without_the_logit_scale_would_vanish(car_ft):
    # The documented trap: cosines of 1/sqrt(512) leave a near uniform softmax, and KL grows with
    # the scale's square.
    assert context_kl(*car_ft, 1.0) < 1e-3 * context_kl(*car_ft, 100.0)


def test_context_kl_stays_finite_for_saturated_softmaxes(car_ft):
    student, teacher, w = (t.float() for t in car_ft)
    student.requires_grad_()
    loss = context_kl(student, teacher, w, 1e4)  # probabilities underflow to 0; 0 log 0 is 0
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_context_kl_of_16_bit_features_is_computed_in_float32(car_ft, dtype):
    low = [t.to(dtype) for t in car_ft]
    want = context_kl_loops(*(t.double() for t in low), 100.0)
    got = context_kl(*low, 100.0)
    # float32 logits of size 100 carry errors of about 1e-5; bfloat16 ones would carry 0.4
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
