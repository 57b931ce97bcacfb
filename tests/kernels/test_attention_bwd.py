"""The attention backward against float64 autograd of the formula, and at most 3 x as far from it as plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import BACKWARD, assert_right, assert_within, far
from summed import attention_bwd

from fastheads.kernels.low_rank import LowRank
from fastheads.kernels.tiles import Row, pieces_of
from fastheads.reference import attend, gate_heads

# The forms, with blocks so small that a short input needs several: all keys on chip at once; both sweeps in one
# program; a program per block.
ONCE = Row(32, chunk=32, tail=True)
WHOLE, LONG = Row(32, 16, (16, 32), one_launch=True), Row(32, 16, (16, 32))
FORMS = pytest.mark.parametrize("row", [ONCE, WHOLE, LONG], ids=["at once", "whole", "long"])


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel doesn't write is NaN."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)


def inputs(B, N, H, dh, dtype=torch.float32, gate=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    D = H * dh
    qkv = torch.randn(B, N, 3 * D + 8, generator=g).to(dtype)[..., : 3 * D]  # a view, as beside the low-rank columns
    do = torch.randn(B, N, D, generator=g).to(dtype)
    return qkv, do, (torch.rand(H, generator=g) + 0.5 if gate else None)


def heads_of(y, H):
    B, N, _ = y.shape
    return y.view(B, N, 3, H, -1).permute(2, 0, 3, 1, 4)


def exact(do, y, H, gate=None, mask=None, causal=False):
    """Float64: the gradients of y and gate, and the log-sum-exp."""
    y = y.detach().double().requires_grad_()
    gate = None if gate is None else gate.double().requires_grad_()
    heads, lse, _ = attend(*heads_of(y, H), mask=mask, causal=causal)
    o = gate_heads(heads, gate, torch.float64)
    grads = torch.autograd.grad(o, [y] if gate is None else [y, gate], do.double())
    return grads[0], grads[1] if len(grads) > 1 else None, lse.detach().float()


def plain(do, y, H, gate=None, mask=None, causal=False):
    """The same in plain PyTorch, in y's dtype."""
    y = y.detach().clone().requires_grad_()
    gate = None if gate is None else gate.to(y.dtype).requires_grad_()
    N = y.shape[1]
    if mask is not None:
        mask = ~mask if mask.dtype == torch.bool else mask.to(y.dtype)
    if causal:
        keep = torch.ones(N, N, dtype=torch.bool).tril()
        mask = keep if mask is None else mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -math.inf)
    o = F.scaled_dot_product_attention(*heads_of(y, H), attn_mask=mask)
    o = (o if gate is None else o * gate.view(1, -1, 1, 1)).transpose(1, 2).flatten(2)
    grads = torch.autograd.grad(o, [y] if gate is None else [y, gate], do)
    return grads[0], grads[1] if len(grads) > 1 else None


def check(do, qkv, H, *, gate=None, row=None, effective=None, delta=None, out=None, **options):
    """effective: q, k, v with their delta, in float64 and as plain PyTorch adds it."""
    y64, y_plain = (qkv, qkv) if effective is None else effective
    dy64, dgate64, lse = exact(do, y64, H, gate, **options)
    dy_plain, dgate_plain = plain(do.to(qkv.dtype), y_plain, H, gate, **options)
    before = qkv.clone(), do.clone()
    dy, dgate = attention_bwd(do, qkv, lse, num_heads=H, gate=gate, delta=delta, out=out, _row=row, **options)
    assert torch.equal(before[0], qkv) and torch.equal(before[1], do)
    assert dy.dtype == qkv.dtype
    for part, name in enumerate(("dq", "dk", "dv")):
        assert_right(*(heads_of(d, H)[part] for d in (dy, dy_plain, dy64)), BACKWARD, name)
    if gate is None:
        assert dgate is None
    else:
        assert dgate.dtype == torch.float32
        # One number per head, and plain PyTorch's error in it may be small by luck: with three more dO it is typical
        errors = [dgate_plain.double() - dgate64]
        for shift in (1, 2, 3):
            other = do.roll(shift, -1)
            dgate_plain = plain(other.to(qkv.dtype), y_plain, H, gate, **options)[1]
            errors.append(dgate_plain.double() - exact(other, y64, H, gate, **options)[1])
        assert_within(dgate, torch.stack(errors), dgate64, BACKWARD, "dgate")
    return dy, dgate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("N", [1, 5, 17, 50, 65, 130])
def test_lengths(N, dtype):
    qkv, do, gate = inputs(1, N, 2, 16, dtype)
    check(do, qkv, 2, gate=gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dh", [16, 40, 64, 72, 80, 104])
def test_head_sizes(dh, dtype):
    for row in (ONCE, LONG):
        qkv, do, gate = inputs(1, 33, 1, dh, dtype)
        check(do, qkv, 1, gate=gate, row=row)


def test_the_pieces_of_a_head_cover_it_once():
    for dh in range(1, 257):
        pieces, at = pieces_of(dh), 0
        for first, width in pieces:
            assert first == at and width >= 16 and width & (width - 1) == 0
            at += width
        assert at - pieces[-1][1] < dh <= at < dh + 16 or at == 32 * math.ceil(dh / 32)
    assert pieces_of(80) == ((0, 64), (64, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_long_forms(whole, causal, dtype):
    """Several blocks of keys, the last of which is short."""
    qkv, do, gate = inputs(1, 100, 1, 16, dtype)
    check(do, qkv, 1, gate=gate, causal=causal, row=WHOLE if whole else LONG)
    qkv, do, gate = inputs(1, 73, 1, 40, dtype)
    check(do, qkv, 1, gate=gate, causal=causal, row=Row(32, 16, (32, 32), one_launch=whole))


def masks(B, N, H):
    g = torch.Generator().manual_seed(3)
    drop = torch.rand(B, H, N, N, generator=g) < 0.3
    drop[..., 0] = False  # every query sees something
    bias = torch.randn(B, H, N, N, generator=g)
    return {
        "bool": drop,
        "bool keys": drop[:, :1, :1],
        "bool shared": drop[0, 0],
        "bool transposed": drop.transpose(0, 1).contiguous().transpose(0, 1),
        "additive": bias,
        "additive heads": bias[:1],
        "additive half": bias[0, 0].half(),
        "additive with -inf": bias.masked_fill(drop, -math.inf),
    }


@pytest.mark.parametrize("row,causal", [(ONCE, True), (WHOLE, True), (LONG, False)], ids=["at once", "whole", "long"])
@pytest.mark.parametrize("kind", list(masks(1, 2, 1)))
def test_masks(kind, causal, row):
    qkv, do, gate = inputs(2, 21, 2, 16)
    check(do, qkv, 2, gate=gate, mask=masks(2, 21, 2)[kind], causal=causal, row=row)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing_have_no_gradient(additive, dtype, row):
    qkv, do, gate = inputs(1, 37, 2, 16, dtype)
    mask = torch.zeros(37, 37, dtype=torch.bool)
    mask[[0, 20, 36]] = True
    seen = ~mask.any(1)
    # Those rows' dO can't reach anything, so the formula with dO zeroed there, and the mask lifted, is the truth
    dy64, dgate64, lse = exact(do * seen[:, None], qkv, 2, gate)
    dy_plain, dgate_plain = plain(do * seen[:, None], qkv, 2, gate)
    lse[..., ~seen] = -math.inf
    if additive:
        mask = torch.zeros(37, 37).masked_fill(mask, -math.inf)
    dy, dgate = attention_bwd(do, qkv, lse, num_heads=2, gate=gate, mask=mask, _row=row)
    assert_right(dy, dy_plain, dy64, BACKWARD)
    assert_right(dgate, dgate_plain, dgate64, BACKWARD)
    assert not heads_of(dy, 2)[0][:, :, ~seen].any()


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("masked", [-1e4, -1e6, -2e6, -5e6, -8e6])
def test_rows_whose_keys_are_all_masked_by_a_large_number(masked, dtype, row):
    """Their scores and log-sum-exp are rounded to 0.06 … 0.5, but what P is divided by is what it sums to: dV of all
    keys together is dO of all queries."""
    qkv, do, gate = inputs(1, 37, 2, 16, dtype)
    seen = torch.ones(37, dtype=torch.bool)
    seen[[0, 20, 36]] = False
    do = do * ~seen[:, None]  # only they have a gradient, for the others would hide it
    mask = torch.zeros(37, 37).masked_fill(~seen[:, None], masked)
    _, _, lse = exact(do, qkv, 2, gate, mask=mask)
    dy, _ = attention_bwd(do, qkv, lse, num_heads=2, gate=gate, mask=mask, _row=row)
    dv, want = heads_of(dy, 2)[2].double().sum(-2), gate[:, None] * do.view(1, 37, 2, 16).double().sum(1)
    assert (dv - want).abs().max() < (1e-5 if dtype == torch.float32 else 5e-3)
    if dtype == torch.float32:  # a 16-bit mask, which plain PyTorch would need, is -inf
        check(do, qkv, 2, gate=gate, mask=mask, row=row)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("parts,shared", [((0, 2), False), ((1,), False), ((0, 1, 2), True)])
def test_delta(parts, shared, dtype, row):
    B, N, H, dh, r = 1, 21, 2, 24, 5
    qkv, do, gate = inputs(B, N, H, dh, dtype)
    T, heads = len(parts), 1 if shared else H
    low = torch.randn(B, N, T * heads * r + 3).to(dtype)
    up = 0.3 * torch.randn(T, H, dh, r)
    delta = LowRank(low, up, parts, 0.5, shared)
    effective = []
    for wide in (torch.float64, dtype):
        columns = low[..., : T * heads * r].to(wide).view(B, N, T, heads, r).expand(B, N, T, H, r)
        y = qkv.to(wide).view(B, N, 3, H, dh).clone()
        y[:, :, list(parts)] += 0.5 * torch.einsum("bnthr,thdr->bnthd", columns, up.to(wide))
        effective.append(y.flatten(2))
    check(do, qkv, H, gate=gate, effective=effective, delta=delta, row=row)


def test_the_gate_has_its_gradient_at_zero():
    for row in (ONCE, WHOLE, LONG):
        qkv, do, _ = inputs(1, 37, 3, 16)
        gate = torch.tensor([0.0, 1.0, -2.0])
        dy, dgate = check(do, qkv, 3, gate=gate, row=row)
        assert dgate[0].abs() > 0.1
        assert not heads_of(dy, 3)[:, :, 0].any()
        check(do, qkv, 3, gate=None, row=row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_common_mean_of_the_values_does_not_cancel(dtype):
    """P's rows must sum to what delta was divided by: Σ P dP K - delta Σ P K would lose the digits here."""
    for row in (ONCE, WHOLE, LONG):
        qkv, do, gate = inputs(1, 45, 2, 16, dtype)
        qkv[..., 64:] += 30
        check(do, qkv, 2, gate=gate, row=row)


@pytest.mark.parametrize("kind", ["stride 0", "summed", "transposed", "float32", "float64"])
def test_strides_of_the_gradient(kind):
    qkv, do, gate = inputs(2, 21, 2, 16, torch.float16)
    do = {
        "stride 0": lambda: torch.ones((), dtype=do.dtype).expand_as(do),
        "summed": lambda: do[:, :1].expand_as(do),
        "transposed": lambda: do.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "float32": lambda: do.float(),
        "float64": lambda: do.double(),
    }[kind]()
    for row in (ONCE, WHOLE, LONG):
        check(do, qkv, 2, gate=gate, row=row)


def test_written_to_a_view_and_nowhere_else():
    for row in (ONCE, WHOLE, LONG):
        qkv, do, gate = inputs(2, 37, 2, 16)
        buffer = torch.full((2, 40, 110), 7.0)
        out = buffer[:, 1:38, 5:101]
        dy, _ = check(do, qkv, 2, gate=gate, out=out, row=row)
        assert dy is out
        out.fill_(7.0)
        assert bool((buffer == 7).all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the memory would be real")
def test_offsets_beyond_two_to_the_31():
    for row in (ONCE, WHOLE, LONG):
        qkv, do, gate = inputs(4, 5, 1, 16, torch.float16)
        lse = exact(do, qkv, 1)[2]
        low = LowRank(torch.randn(4, 5, 8).half(), torch.randn(2, 1, 16, 4), (0, 2), 1.0, False)
        mask = torch.randn(4, 1, 5, 5)
        options = {"num_heads": 1, "gate": gate, "_row": row}
        want = attention_bwd(do, qkv, lse, delta=low, mask=mask, **options)
        out = far(torch.zeros(4, 5, 48).half())
        distant = low._replace(low=far(low.low))
        got = attention_bwd(far(do), far(qkv), lse, delta=distant, mask=far(mask), out=out, **options)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_empty_batch():
    qkv, do, gate = inputs(0, 5, 2, 16)
    for row in (ONCE, WHOLE, LONG):
        dy, dgate = attention_bwd(do, qkv, torch.zeros(0, 2, 5), num_heads=2, gate=gate, _row=row)
        assert dy.shape == (0, 5, 96) and torch.equal(dgate, torch.zeros(2))


def test_the_same_bits_each_time():
    for row in (ONCE, WHOLE, LONG):
        qkv, do, gate = inputs(2, 37, 1, 16, torch.float16)
        lse = exact(do, qkv, 1)[2]
        a, b = (attention_bwd(do, qkv, lse, num_heads=1, gate=gate, _row=row) for _ in range(2))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
