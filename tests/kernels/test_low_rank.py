"""What stands around the attention kernels: low-rank gradients, folded weights, dropout."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import BACKWARD, FORWARD, assert_right, far
from summed import low_rank_bwd

from fastheads.kernels import low_rank
from fastheads.kernels.dropout import dropout
from fastheads.kernels.fold import fold, padded_rank
from fastheads.kernels.low_rank import LowRank
from fastheads.reference import up_matrix

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
TARGETS = ("q", "k", "v")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel doesn't write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


def low_rank_problem(B, N, H, dh, r, parts, shared, dtype, scale=0.5):
    g = torch.Generator().manual_seed(0)
    D, T = H * dh, len(parts)
    columns = T * (1 if shared else H) * r
    C = padded_rank(columns)
    dqkv = torch.randn(B, N, 3 * D + C, generator=g).to(dtype)[..., : 3 * D]
    low = torch.randn(B, N, 3 * D + C, generator=g).to(dtype)[..., 3 * D :]
    up = torch.randn(T, H, dh, r, generator=g)
    return dqkv, LowRank(low, up, parts, scale, shared), columns


def formulas(dqkv, delta, columns, dtype):
    """U and dB, in dtype."""
    B, N, _ = dqkv.shape
    T, H, dh, r = delta.up.shape
    names = tuple(TARGETS[p] for p in delta.parts)
    u = dqkv.to(dtype) @ up_matrix(delta.up.to(dtype), names, delta.scale, per_head=not delta.shared)
    low = delta.low[..., :columns].to(dtype).view(B, N, T, -1, r).expand(B, N, T, H, r)
    dy = dqkv.to(dtype).reshape(B, N, 3, H, dh)[:, :, list(delta.parts)]
    return u, delta.scale * torch.einsum("bnthd,bnthr->thdr", dy, low)


@DTYPES
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "B,N,H,dh,r,parts", [(2, 5, 3, 16, 1, (0, 2)), (3, 50, 2, 40, 5, (1,)), (1, 150, 2, 80, 20, (0, 1, 2))]
)
def test_low_rank_gradients(B, N, H, dh, r, parts, shared, dtype):
    dqkv, delta, columns = low_rank_problem(B, N, H, dh, r, parts, shared, dtype)
    C = delta.low.shape[-1]
    buffer = torch.full((B, N, C + 4), 7.0, dtype=dtype)
    u = buffer[..., 2 : C + 2]
    db = low_rank_bwd(dqkv, delta, u)
    for got, plain, exact, name in zip(
        (u[..., :columns], db),
        formulas(dqkv, delta, columns, dtype),
        formulas(dqkv, delta, columns, torch.float64),
        ("u", "db"),
        strict=True,
    ):
        assert_right(got, plain, exact, BACKWARD, name)
    assert db.dtype == torch.float32
    assert not u[..., columns:].any()
    assert bool((buffer[..., :2] == 7).all() and (buffer[..., C + 2 :] == 7).all())


def test_low_rank_gradients_in_several_steps_repeat_bit_for_bit(monkeypatch):
    monkeypatch.setattr(low_rank, "PROGRAMS", 8)
    dqkv, delta, columns = low_rank_problem(4, 130, 2, 16, 3, (0, 2), False, torch.float32)
    results = []
    for _ in range(2):
        u = torch.empty_like(delta.low)
        results.append((u, low_rank_bwd(dqkv, delta, u)))
    u, db = formulas(dqkv, delta, columns, torch.float64)
    assert_right(results[0][0][..., :columns], u.float(), u, BACKWARD)
    assert_right(results[0][1], formulas(dqkv, delta, columns, torch.float32)[1], db, BACKWARD)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("shared", [False, True])
def test_low_rank_gradients_at_offsets_beyond_two_to_the_31(shared):
    dqkv, delta, _ = low_rank_problem(4, 5, 2, 16, 3, (0, 2), shared, torch.float16)
    u = torch.zeros(delta.low.shape, dtype=torch.float16)
    want = low_rank_bwd(dqkv, delta, u)
    u_far = far(torch.zeros_like(u))
    assert torch.equal(low_rank_bwd(far(dqkv), delta._replace(low=far(delta.low)), u_far), want)
    assert torch.equal(u_far, u)


def test_folding_and_dropout_at_offsets_beyond_two_to_the_31():
    w, a, b = torch.randn(48, 16), torch.randn(2, 1, 3, 16), torch.randn(2, 1, 16, 3)
    rows = torch.empty_strided((47 * 2**26 + 16,), (1,), dtype=torch.float16).as_strided((48, 16), (2**26, 1))
    options = {"num_heads": 1, "parts": (0, 2), "scale": 1.0, "shared": False, "merge": True, "dtype": torch.float32}
    assert torch.equal(fold(rows.copy_(w), None, a, b, **options)[0], fold(w.half(), None, a, b, **options)[0])
    x, seed = torch.randn(4, 5, 24).half(), torch.tensor([1])
    assert torch.equal(dropout(far(x), 0.5, seed), dropout(x, 0.5, seed))


def test_low_rank_gradients_of_an_empty_batch():
    dqkv, delta, _ = low_rank_problem(0, 5, 2, 16, 3, (0, 2), False, torch.float32)
    assert torch.equal(low_rank_bwd(dqkv, delta, torch.empty(0, 5, 16)), torch.zeros(2, 2, 16, 3))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("parts,shared", [((0, 2), False), ((1,), True), ((0, 1, 2), True)])
def test_fold(parts, shared, stored):
    g = torch.Generator().manual_seed(0)
    H, dh, r, T = 3, 40, 5, len(parts)
    D = H * dh
    w = torch.randn(D, 3 * D, generator=g).to(stored).t()  # not contiguous
    a = torch.randn(T, 1 if shared else H, D, r, generator=g).mT
    b = torch.randn(T, H, dh, r, generator=g)
    bias = torch.randn(3 * D, 2, generator=g).to(stored)[:, 0]
    options = {"num_heads": H, "parts": parts, "scale": 0.5, "shared": shared}
    names = tuple(TARGETS[p] for p in parts)
    rows = a.flatten(0, 2)
    up = up_matrix(b, names, 0.5, per_head=not shared)
    exact = w.double() + up.double() @ rows.double()
    for dtype in (torch.float32, torch.float16):
        merged, merged_bias, *_ = fold(w, bias, a, b, merge=True, dtype=dtype, **options)
        assert merged.dtype == dtype and merged.shape == (3 * D + padded_rank(len(rows)), D)
        # Plain PyTorch forms it in float32, and rounds
        assert_right(merged[: 3 * D], (w.float() + up @ rows).to(dtype), exact, FORWARD, "W + s B A")
        apart, apart_bias, *_ = fold(w, bias, a, b, merge=False, dtype=dtype, **options)
        assert torch.equal(apart[: 3 * D], w.float().to(dtype))
        for out in (merged, apart):
            assert torch.equal(out[3 * D : 3 * D + len(rows)], rows.to(dtype))
            assert not out[3 * D + len(rows) :].any()
        for out in (merged_bias, apart_bias):
            assert out.dtype == dtype and out.shape == merged.shape[:1]
            assert torch.equal(out[: 3 * D], bias.float().to(dtype)) and not out[3 * D :].any()
        without, *none = fold(w, None, a, b, merge=True, dtype=dtype, **options)
        assert none == [None] * 3 and torch.equal(without, merged)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("bias_in,bias_out", [(True, True), (True, False), (False, True), (False, False)])
def test_fold_casts_out_proj_too(rank, dtype, bias_in, bias_out):
    g = torch.Generator().manual_seed(0)
    H, dh = 3, 40  # rows of a matrix that are no multiple of a block's, nor columns
    D = H * dh
    w_in, w_out = torch.randn(3 * D, D, generator=g).half(), torch.randn(D, D, generator=g).t()
    b_in = torch.randn(3 * D, generator=g) if bias_in else None
    b_out = torch.randn(D, 2, generator=g)[:, 0] if bias_out else None
    a, b = (torch.randn(2, H, rank, D, generator=g), torch.randn(2, H, dh, rank, generator=g)) if rank else (None, None)
    options = {"num_heads": H, "parts": (0, 2) if rank else (), "scale": 0.5, "shared": False, "merge": True}
    alone = fold(w_in, b_in, a, b, dtype=dtype, **options)[:2]
    own, bias, out, out_bias = fold(w_in, b_in, a, b, w_out, b_out, dtype=dtype, **options)
    assert torch.equal(own, alone[0]) and (bias is None if b_in is None else torch.equal(bias, alone[1]))
    assert torch.equal(out, w_out.to(dtype)) and out.dtype == dtype
    assert out_bias is None if b_out is None else torch.equal(out_bias, b_out.to(dtype))
    if not rank:
        assert torch.equal(own, w_in.to(dtype)) and (bias is None or torch.equal(bias, b_in.to(dtype)))


def test_padded_rank():
    assert [padded_rank(c) for c in (1, 16, 17, 48)] == [16, 16, 32, 48]


@DTYPES
@pytest.mark.parametrize("shape", [(3, 70), (1, 5, 301), (2, 1, 2, 64)])
def test_dropout(shape, dtype):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(shape, generator=g) + 0.5).to(dtype)
    seed = torch.tensor([2**40 + 7])
    y = dropout(x, 0.25, seed)
    kept = y != 0
    assert torch.equal(y, dropout(x, 0.25, seed))
    assert_right(
        y, torch.where(kept, x * dtype_scale(dtype, 0.25), 0), torch.where(kept, x.double() / 0.75, 0), FORWARD
    )
    # The gradient of one is the mask that was drawn
    assert torch.equal(dropout(torch.ones_like(x), 0.25, seed) != 0, kept)
    assert not torch.equal(dropout(x, 0.25, torch.tensor([8])) != 0, kept)
    assert torch.equal(dropout(x, 0.0, seed), x)
    assert not dropout(x, 1.0, seed).any()


def dtype_scale(dtype, p):
    return torch.tensor(1 / (1 - p), dtype=dtype)


def test_dropout_of_any_strides_and_into_a_given_output():
    x, seed = torch.rand(4, 6, 40) + 0.5, torch.tensor([3])
    strided = torch.empty(6, 4, 50)[..., 5:45].transpose(0, 1).copy_(x)
    y = dropout(x, 0.5, seed)
    out = torch.empty_like(x)
    assert dropout(strided, 0.5, seed, out=out) is out
    assert torch.equal(out, y)
    assert dropout(x[:0], 0.5, seed).shape == (0, 6, 40)


def test_dropout_drops_each_element_as_often_as_asked():
    """Six standard deviations of 40,000 draws; neighbours, which share a Philox call, independent."""
    p, n = 0.3, 40_000
    drops = (dropout(torch.ones(50, 800), p, torch.tensor([5])) == 0).double()
    bound = 6 * math.sqrt(p * (1 - p) / n)
    assert abs(float(drops.mean()) - p) < bound
    assert float((drops.mean(0) - p).abs().max()) < 6 * math.sqrt(p * (1 - p) / 50)
    for shift in (1, 2, 3, 4):
        assert abs(float((drops[:, shift:] * drops[:, :-shift]).mean()) - p * p) < 2 * bound
