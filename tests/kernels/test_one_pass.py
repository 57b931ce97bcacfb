"""Projection, attention and gates in one kernel, in Triton's interpreter where there is no GPU: against float64."""

import math

import pytest
import torch
from numerics import FORWARD, assert_right, far, plain_head_attention

from fastheads.kernels import one_pass as module
from fastheads.kernels.one_pass import one_pass_fwd
from fastheads.kernels.tiles import ONE_PASS, chunks_of, one_pass_fits, up_to_16
from fastheads.reference import TARGETS, head_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Outputs start as NaN: what a kernel doesn't write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", poisoned)


def inputs(B, N, H, dh, dtype, parts=(), rank=4, shared=False, size=1.0, bias=True):
    """x, w_in, b_in, lora_A, lora_B; the delta is about `size` times w_in."""
    generator = torch.Generator().manual_seed(0)
    D = H * dh

    def rand(*shape, by=1.0):
        return (torch.randn(*shape, generator=generator) * by).to(DEVICE)

    x, w = rand(B, N, D).to(dtype), rand(3 * D, D, by=D**-0.5).to(dtype)
    b = rand(3 * D).to(dtype) if bias else None
    if not parts:
        return x, w, b, None, None
    lora_A = rand(len(parts), 1 if shared else H, rank, D, by=D**-0.5).to(dtype)
    return x, w, b, lora_A, rand(len(parts), H, dh, rank, by=size * rank**-0.5)


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check(data, H, parts=(), scale=1.0, gate=None, pool=None, **options):
    x, w, b, A, up = data
    o, lse, cls = one_pass_fwd(x, w, b, A, up, num_heads=H, parts=parts, scale=scale, gate=gate, pool=pool, **options)
    targets = [TARGETS[part] for part in parts]
    e = head_attention(
        *wide(*data), num_heads=H, targets=targets, scale=scale, gate=wide(gate)[0], pool=pool, **options
    )
    p = plain_head_attention(*data, num_heads=H, targets=targets, scale=scale, gate=gate, **options)
    assert o.dtype == x.dtype
    assert_right(o, p, e.o, FORWARD, "o")
    # What plain PyTorch in x's dtype would make of these: the reference on inputs of that dtype.
    r = head_attention(*data, num_heads=H, targets=targets, scale=scale, gate=gate, pool=pool, **options)
    assert_right(lse, r.lse, e.lse, FORWARD, "lse")
    if pool is not None:
        assert_right(cls, r.cls.to(x.dtype), e.cls, FORWARD, "cls")
    return o


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H", "dh"), [(1, 2, 16), (5, 3, 24), (17, 1, 72), (50, 2, 64), (65, 2, 16), (77, 1, 80)])
def test_lengths_and_head_sizes(N, H, dh, dtype):
    check(inputs(2, N, H, dh, dtype, (0, 2)), H, (0, 2), gate=torch.rand(H, device=DEVICE), pool=0)


@pytest.mark.parametrize("N", [197, 257])
def test_longer_ones(N):
    check(inputs(1, N, 2, 16, torch.float16, (0, 2)), 2, (0, 2), pool="mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("parts", [(), (0,), (1,), (2, 0), (0, 1, 2)], ids=str)
def test_every_target(parts, shared, dtype):
    data = inputs(1, 20, 2, 24, dtype, parts, rank=3, shared=shared, bias=not shared)
    check(data, 2, parts, scale=0.5, causal=shared)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(kind, causal, dtype):
    mask = torch.rand(2, 1, 70, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.7
    mask = mask & ~torch.eye(70, dtype=torch.bool, device=DEVICE)
    if kind == "additive":
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(mask, -math.inf)
    check(inputs(2, 70, 2, 16, dtype, (0, 2)), 2, (0, 2), mask=mask, causal=causal, pool=-1)


def test_a_tail_of_queries(monkeypatch):
    """The row of an A100."""
    row = next(row for row in ONE_PASS[80] if row.tail)
    assert row.tiles(70).tail == 16
    monkeypatch.setattr(module, "row_for", lambda *_, **__: row)
    check(inputs(2, 70, 2, 16, torch.float32, (0, 2)), 2, (0, 2), pool="mean", causal=True)


def test_pool_per_image():
    data = inputs(3, 9, 2, 16, torch.float32)
    check(data, 2, pool=torch.tensor([8, 0, 4], device=DEVICE))
    o, _, cls = one_pass_fwd(*data, num_heads=2, gate=torch.zeros(2, device=DEVICE), pool=3)
    assert (o == 0).all()
    assert (cls != 0).all()


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_small_deltas_keep_their_size(size):
    x, w, b, A, up = inputs(2, 50, 4, 16, torch.float16, (0, 2), size=size)
    exact = head_attention(*wide(x, w, b, A, up), num_heads=4).o - head_attention(*wide(x, w, b), num_heads=4).o
    got = one_pass_fwd(x, w, b, A, up, num_heads=4, parts=(0, 2))[0].double()
    got = got - one_pass_fwd(x, w, b, None, None, num_heads=4)[0].double()
    gain = float((got * exact).sum() / exact.square().sum())
    assert abs(gain - 1) < 0.05, gain


def test_strided_inputs_and_an_empty_batch():
    x, w, b, A, up = inputs(3, 10, 2, 16, torch.float32, (0, 2))
    want = one_pass_fwd(x, w, b, A, up, num_heads=2, parts=(0, 2))[0]
    other = x.transpose(0, 1).contiguous().transpose(0, 1)
    beside = torch.cat((w, w), 1)[:, : w.shape[1]]
    assert torch.equal(one_pass_fwd(other, beside, b, A, up, num_heads=2, parts=(0, 2))[0], want)
    o, lse, cls = one_pass_fwd(x[:0], w, b, A, up, num_heads=2, parts=(0, 2), pool=0)
    assert (o.shape, lse.shape, cls.shape) == ((0, 10, 32), (0, 2, 10), (0, 2, 16))


@pytest.mark.skipif(DEVICE == "cuda", reason="the memory would be real")
def test_offsets_beyond_two_to_the_31():
    x, w, b, A, up = inputs(4, 5, 1, 16, torch.float16, (0, 2))
    want = one_pass_fwd(x, w, b, A, up, num_heads=1, parts=(0, 2))[0]
    assert torch.equal(one_pass_fwd(far(x), w, b, A, up, num_heads=1, parts=(0, 2))[0], want)


def test_what_fits():
    assert one_pass_fits(197, 64, torch.bfloat16)
    assert not one_pass_fits(273, 64, torch.bfloat16)
    assert not one_pass_fits(257, 64, torch.float32)
    # it counts rows by the 16, which is what the rows' chunks of up to 64 come to
    assert {row.chunk for rows in ONE_PASS.values() for row in rows} == {64}
    assert all(sum(rows for _, rows in chunks_of(N, 64)) == up_to_16(N) for N in range(1, 273))
