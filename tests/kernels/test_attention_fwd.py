"""The attention forward kernels, in Triton's interpreter where there is no GPU: against float64, in every form."""

import math

import pytest
import torch
from numerics import FORWARD, assert_right, far

from fastheads.kernels import attention_fwd as module
from fastheads.kernels.attention_fwd import attention_fwd
from fastheads.kernels.low_rank import LowRank
from fastheads.kernels.tiles import Row
from fastheads.reference import attend, pool_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
# Triton's interpreter keeps bfloat16 as integers, and its tl.dot on them is garbage.
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Outputs start as NaN: what a kernel doesn't write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", poisoned)


def inputs(B, N, H, dh, dtype, targets=(), rank=4, shared=False, delta=1.0, scale=1.0, seed=0):
    """qkv, a view with columns beside it, and the deltas: up of a size that makes the delta `delta` times qkv."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    columns = len(targets) * (1 if shared else H) * rank
    buffer = rand(B, N, 3 * H * dh + columns + 5).to(dtype).to(DEVICE)
    qkv, low = buffer[..., : 3 * H * dh], buffer[..., 3 * H * dh : 3 * H * dh + columns]
    if not targets:
        return qkv, None
    up = rand(len(targets), H, dh, rank).to(DEVICE) * (delta / math.sqrt(rank) / scale)
    return qkv, LowRank(low, up, tuple(targets), scale, shared)


def heads_of(qkv, H):
    B, N, width = qkv.shape
    return qkv.view(B, N, 3, H, width // 3 // H).permute(2, 0, 3, 1, 4).unbind(0)


def deltas_of(low, H, dtype):
    """Of each target, `[B, H, N, dh]`, in dtype."""
    B, N, _ = low.low.shape
    T, _, _, r = low.up.shape
    t = low.low.to(dtype).view(B, N, T, -1, r).permute(2, 0, 3, 1, 4)  # [T, B, H|1, N, r]
    return low.scale * (t @ low.up.to(dtype).unsqueeze(1).mT)


def exact(qkv, H, low=None, gate=None, **options):
    """Heads (gated and not) `[B, H, N, dh]` and log-sum-exp in float64; a row without keys is 0 and -inf."""
    parts = [p.double() for p in heads_of(qkv, H)]
    if low is not None:
        for part, y in zip(low.parts, deltas_of(low, H, torch.float64), strict=True):
            parts[part] = parts[part] + y
    heads, lse, _ = attend(*parts, **options)
    heads = heads.masked_fill(lse.isneginf().unsqueeze(-1), 0.0)
    return (heads if gate is None else heads * gate.double().view(1, -1, 1, 1)), heads, lse


def plain(qkv, H, low=None, gate=None, mask=None, causal=False):
    """The same as one would write it in PyTorch, in qkv's dtype."""
    parts = list(heads_of(qkv, H))
    if low is not None:
        for part, y in zip(low.parts, deltas_of(low, H, qkv.dtype), strict=True):
            parts[part] = parts[part] + y
    q, k, v = parts
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if causal:
        N = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    lse = scores.logsumexp(-1)
    heads = scores.softmax(-1).nan_to_num(0.0) @ v
    return (heads if gate is None else heads * gate.to(heads.dtype).view(1, -1, 1, 1)), heads, lse


def merged(heads):
    return heads.transpose(1, 2).flatten(2)


def check(qkv, H, low=None, gate=None, mask=None, causal=False, pool=None):
    """Runs the kernel and compares o, lse and cls by the numerics rule."""
    before = qkv.clone()
    o, lse, cls = attention_fwd(qkv, num_heads=H, gate=gate, mask=mask, causal=causal, delta=low, pool=pool)
    e, e_heads, e_lse = exact(qkv, H, low, gate, mask=mask, causal=causal)
    p, p_heads, p_lse = plain(qkv, H, low, gate, mask, causal)
    assert torch.equal(qkv, before)
    assert (o.dtype, lse.dtype) == (qkv.dtype, torch.float32)
    assert o.is_contiguous()
    assert_right(o, merged(p), merged(e), FORWARD, "o")
    seen = ~e_lse.isneginf()
    assert torch.equal(lse.isneginf(), ~seen)
    assert_right(lse[seen], p_lse[seen], e_lse[seen], FORWARD, "lse")
    if pool is None:
        assert cls is None
    else:
        assert cls is not None
        assert cls.dtype == torch.float32
        assert_right(cls, pool_heads(p_heads, pool), pool_heads(e_heads, pool), FORWARD, "cls")
    return o, lse, cls


def streamed(monkeypatch, block_m=32, block_n=16):
    monkeypatch.setattr(module, "row_for", lambda *_, **__: Row(block_m, block_n))


def kept_on_chip(monkeypatch, length, largest=128, tail=True):
    """A row of the tables for GPUs, which the interpreter's dtypes and its unknown chip don't get by themselves."""
    row = Row(64, chunk=largest, tail=tail)
    assert row.tiles(length).tail == (16 if tail and length > 64 and 0 < length % 64 <= 16 else 0)
    monkeypatch.setattr(module, "row_for", lambda *_, **__: row)


# ---------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "H", "dh"),
    [
        (1, 2, 64),
        (2, 3, 16),
        (5, 2, 24),
        (17, 2, 64),
        (31, 1, 40),
        (50, 2, 64),
        (65, 1, 80),
        (77, 1, 64),
        (130, 1, 72),
        (197, 1, 64),
        (257, 1, 16),
    ],
)
def test_keys_on_chip(N, H, dh, dtype, monkeypatch):
    kept_on_chip(monkeypatch, N)
    qkv, _ = inputs(1, N, H, dh, dtype)
    check(qkv, H, gate=torch.rand(H, device=DEVICE), pool=0)


@pytest.mark.parametrize("N", [64, 65, 197])
def test_rows_without_a_tail(N, monkeypatch):
    kept_on_chip(monkeypatch, N, largest=64, tail=False)
    qkv, _ = inputs(1, N, 1, 16, torch.float16)
    check(qkv, 1, causal=True, pool="mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("N", "dh"), [(1, 16), (16, 88), (45, 104), (70, 112)])
def test_keys_that_stream(N, dh, causal, dtype, monkeypatch):
    streamed(monkeypatch, 32, 32)
    qkv, _ = inputs(1, N, 1, dh, dtype)
    check(qkv, 1, causal=causal, pool=N // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 50, 130])
def test_the_row_of_this_machine(N, dtype):
    qkv, low = inputs(1, N, 1, 32, dtype, (0, 2), delta=0.3)
    check(qkv, 1, low, pool="mean" if N > 1 else 0)


# ------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 33), (2, 1, 1, 33), (1, 2, 33, 33), (2, 2, 33, 1), ()], ids=str)
@pytest.mark.parametrize(
    ("kind", "causal", "stream"),
    [
        ("bool", False, False),
        ("bool", True, True),
        ("float32", True, False),
        ("float32", False, True),
        ("half", False, True),
    ],
)
def test_masks_of_every_kind_and_shape(kind, shape, causal, stream, dtype, monkeypatch):
    streamed(monkeypatch, 32, 32) if stream else kept_on_chip(monkeypatch, 33)
    qkv, _ = inputs(2, 33, 2, 16, dtype)
    # A mask in the dtype of the scores: plain PyTorch then adds what the kernel adds.
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).half()
    mask = values > 0.6
    if kind != "bool":
        mask = values.masked_fill(mask, -math.inf).to(getattr(torch, kind))
    check(qkv, 2, mask=mask, causal=causal, pool=-1)


def test_a_strided_mask():
    qkv, _ = inputs(1, 21, 2, 16, torch.float32)
    mask = torch.randn(42, 21, 2, device=DEVICE)[::2].permute(2, 1, 0)
    check(qkv, 2, mask=mask)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_a_row_that_sees_no_key_is_zero(additive, stream, monkeypatch):
    streamed(monkeypatch) if stream else kept_on_chip(monkeypatch, 70)
    qkv, _ = inputs(1, 70, 2, 16, torch.float32)
    mask = torch.zeros(70, 70, dtype=torch.bool, device=DEVICE)
    mask[[0, 3, 69]] = True
    mask[:, 69] = True
    if additive:
        mask = torch.zeros(70, 70, device=DEVICE).masked_fill(mask, -math.inf)
    o, lse, cls = attention_fwd(qkv, num_heads=2, mask=mask, causal=True, pool=69)
    assert (o[:, [0, 3, 69]] == 0).all()
    assert lse[..., [0, 3, 69]].isneginf().all()
    assert (cls == 0).all()
    rest = [i for i in range(70) if i not in (0, 3, 69)]
    e, _, e_lse = exact(qkv, 2, mask=mask, causal=True)
    torch.testing.assert_close(o[:, rest], merged(e).float()[:, rest])
    torch.testing.assert_close(lse[..., rest], e_lse.float()[..., rest])


@pytest.mark.parametrize("least", [-1e9, torch.finfo(torch.float32).min])
def test_a_row_of_large_finite_masks_still_has_a_softmax(least):
    qkv, _ = inputs(1, 20, 1, 16, torch.float32)
    mask = torch.zeros(20, 20, device=DEVICE)
    mask[4] = least
    o, _, _ = attention_fwd(qkv, num_heads=1, mask=mask)
    v = heads_of(qkv, 1)[2][0, 0]
    # The scores drown in the mask: all keys weigh the same.
    torch.testing.assert_close(o[0, 4], v.mean(0))


# ----------------------------------------------------------------------------------------------------- deltas

TARGETS = [(0,), (1,), (2,), (2, 0), (0, 1), (0, 1, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_deltas_of_every_target(targets, dtype, monkeypatch):
    kept_on_chip(monkeypatch, 40)
    qkv, low = inputs(2, 40, 2, 24, dtype, targets, rank=3, delta=0.3, scale=0.5)
    check(qkv, 2, low, gate=torch.rand(2, device=DEVICE), pool=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_may_share_the_down_projection(dtype):
    qkv, low = inputs(2, 20, 3, 16, dtype, (0, 1, 2), rank=3, shared=True, delta=0.3)
    check(qkv, 3, low)


@pytest.mark.parametrize("targets", [(0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_deltas_where_keys_stream(targets, causal, monkeypatch):
    streamed(monkeypatch)
    qkv, low = inputs(1, 45, 1, 80, torch.float16, targets, rank=2, delta=0.3)
    check(qkv, 1, low, causal=causal, pool="mean")


@pytest.mark.parametrize("rank", [1, 16, 17, 64])
def test_ranks(rank, monkeypatch):
    kept_on_chip(monkeypatch, 77)
    qkv, low = inputs(1, 77, 1, 64, torch.float32, (0, 1, 2), rank=rank, delta=0.2)
    check(qkv, 1, low, causal=True)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 3e-4])
@pytest.mark.parametrize(("targets", "stream"), [((0, 2), False), ((0, 1, 2), False), ((1,), True), ((0, 2), True)])
def test_small_deltas_keep_their_size(targets, stream, size, monkeypatch):
    """In 16 bits the result is rounded too, so what counts is the mean effect: its projection on the exact one."""
    streamed(monkeypatch, 64, 64) if stream else kept_on_chip(monkeypatch, 64)
    qkv, low = inputs(1, 64, 4, 32, DTYPES[-1], targets, rank=4, delta=size)
    exact_effect = (merged(exact(qkv, 4, low)[0]) - merged(exact(qkv, 4)[0])).flatten()
    # The error of the base's own rounding is in both runs, so no part of the effect.
    effect = attention_fwd(qkv, num_heads=4, delta=low)[0].double() - attention_fwd(qkv, num_heads=4)[0].double()
    gain = float(effect.flatten() @ exact_effect / (exact_effect @ exact_effect))
    assert abs(gain - 1) < 0.05, gain


# ------------------------------------------------------------------------------------------------------- pool


@pytest.mark.parametrize(("N", "stream"), [(6, False), (70, False), (40, True)])
def test_pool_forms(stream, N, monkeypatch):
    streamed(monkeypatch, 32, 32) if stream else kept_on_chip(monkeypatch, N)
    qkv, _ = inputs(2, N, 1, 16, torch.float16)
    gate = torch.tensor([0.5], device=DEVICE)
    index = torch.tensor([N - 1, N // 2], device=DEVICE)
    for pool in (N - 2, -1, index, "mean", slice(0, None), slice(N - 2, None)):
        check(qkv, 1, gate=gate, pool=pool)


def test_a_gate_of_zero_leaves_the_pooled_token():
    qkv, _ = inputs(1, 9, 2, 16, torch.float32)
    o, _, cls = attention_fwd(qkv, num_heads=2, gate=torch.zeros(2, device=DEVICE), pool=0)
    assert (o == 0).all()
    assert (cls != 0).all()


# ----------------------------------------------------------------------------------------------------- memory


def test_any_row_and_batch_stride():
    qkv, _ = inputs(3, 19, 2, 16, torch.float32)
    want = attention_fwd(qkv, num_heads=2)[0]
    across = qkv.transpose(0, 1).contiguous().transpose(0, 1)  # batch and rows swapped in memory
    assert across.stride() != qkv.stride()
    assert torch.equal(attention_fwd(across, num_heads=2)[0], want)
    same = qkv[:1].expand(3, -1, -1)  # stride 0
    assert torch.equal(attention_fwd(same, num_heads=2)[0], want[:1].expand(3, -1, -1))


@pytest.mark.parametrize("pool", [None, 0, "mean"])
def test_an_empty_batch(pool):
    o, lse, cls = attention_fwd(torch.zeros(0, 5, 96, device=DEVICE), num_heads=2, pool=pool)
    assert o.shape == (0, 5, 32)
    assert lse.shape == (0, 2, 5)
    assert (cls is None) if pool is None else (cls.shape == (0, 2, 16))


@pytest.mark.parametrize("pool", [0, -1, "mean", torch.zeros(2, dtype=torch.int64, device=DEVICE)], ids=str)
def test_the_pooled_token_of_no_tokens_is_not_a_number(pool):
    o, lse, cls = attention_fwd(torch.zeros(2, 0, 96, device=DEVICE), num_heads=2, pool=pool)
    assert o.shape == (2, 0, 32) and lse.shape == (2, 2, 0)
    assert cls.shape == (2, 2, 16) and cls.isnan().all()


def test_the_same_bits_every_time():
    qkv, low = inputs(1, 40, 2, 16, torch.float16, (0, 1, 2))
    first = attention_fwd(qkv, num_heads=2, delta=low, pool="mean")
    again = attention_fwd(qkv, num_heads=2, delta=low, pool="mean")
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE == "cuda", reason="the memory would be real")
@pytest.mark.parametrize("stream", [False, True])
def test_offsets_beyond_two_to_the_31(stream, monkeypatch):
    streamed(monkeypatch) if stream else kept_on_chip(monkeypatch, 5)
    qkv, low = inputs(4, 5, 1, 16, torch.float16, (0, 2))
    mask = torch.randn(4, 1, 5, 5)
    want = attention_fwd(qkv, num_heads=1, delta=low, mask=mask)[0]
    low = low._replace(low=far(low.low))
    assert torch.equal(attention_fwd(far(qkv), num_heads=1, delta=low, mask=far(mask))[0], want)
