"""What `loops` says the kernels compute is what they compute, product by product, in Triton's interpreter."""

import pytest
import torch
from triton.runtime import interpreter

from bench.base.memory import peak_bytes
from bench.roofline import loops
from bench.roofline.mmd import TF32X3, Problem, bytes_beyond, passes
from fastheads import mmd
from fastheads.kernels import attention_bwd, attention_fwd, low_rank, one_pass
from fastheads.kernels.launch import launching
from fastheads.kernels.low_rank import LowRank
from fastheads.kernels.tiles import BACKWARD, is_spread, row_for

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
DH = 64


@pytest.fixture
def counted(monkeypatch):
    """Operations of every tl.dot, and every exponential, of what ran."""
    found = {"products": 0, "exps": 0}
    builder = interpreter.interpreter_builder.__class__
    dot, exp2 = builder.create_dot, builder.create_exp2

    def count_dot(self, a, b, *args):
        (m, k), n = a.data.shape, b.data.shape[1]
        found["products"] += 2 * m * n * k
        return dot(self, a, b, *args)

    def count_exp2(self, x):
        found["exps"] += x.data.size
        return exp2(self, x)

    monkeypatch.setattr(builder, "create_dot", count_dot)
    monkeypatch.setattr(builder, "create_exp2", count_exp2)
    return found


@pytest.fixture(params=[80, 90])
def arch(request, monkeypatch):
    """The tiles are those of this chip."""
    for module in (attention_fwd, attention_bwd, one_pass):
        monkeypatch.setattr(module, "architecture", lambda x: request.param)
    return request.param


def problem(length, parts=(), rank=2, heads=1, batch=1):
    D, R = heads * DH, max(1, len(parts)) * heads * rank
    qkv = torch.zeros(batch, length, 3 * D, dtype=torch.float16)
    low = torch.zeros(batch, length, -(-R // 16) * 16, dtype=torch.float16)
    up = torch.zeros(len(parts), heads, DH, rank)
    return qkv, LowRank(low, up, parts, 1.0, False) if parts else None


CASES = [(50, ()), (77, ()), (197, ()), (257, ()), (330, ()), (50, (0, 2)), (197, (0, 2)), (300, (0, 1, 2))]


@pytest.mark.parametrize("length, parts", CASES, ids=str)
def test_attention_forward(length, parts, arch, counted):
    qkv, delta = problem(length, parts)
    attention_fwd.attention_fwd(qkv, num_heads=1, delta=delta)
    assert loops.attention_fwd(arch, DH, length, parts, 2) == (counted["products"], counted["exps"])


@pytest.mark.parametrize("heads", [1, 1000], ids=["few heads", "many heads"])
@pytest.mark.parametrize("length, parts", CASES, ids=str)
def test_attention_backward(length, parts, heads, arch, counted, monkeypatch):
    """Where the batch has many heads they fill the chip, else a head's blocks are spread over it."""
    if heads > 1 and not 80 < length <= 272:
        return  # the same tiles
    given = {"deltas": len(parts), "spread": is_spread(length, heads)}
    row = row_for(BACKWARD, arch, DH, length, torch.float16, **given)
    qkv, delta = problem(length, parts)
    do, lse = torch.zeros_like(qkv[..., :DH]), torch.zeros(1, 1, length)
    attention_bwd.attention_bwd(do, qkv, lse, num_heads=1, delta=delta, _row=row)
    # log2(row sums) takes no exponential; nothing else does but the probabilities
    assert loops.attention_bwd(arch, DH, length, heads, parts, 2) == (counted["products"], counted["exps"])


@pytest.mark.parametrize("length, parts", [(50, ()), (197, (0, 2))], ids=str)
def test_one_pass(length, parts, arch, counted):
    x, w = torch.zeros(1, length, 2 * DH, dtype=torch.float16), torch.zeros(6 * DH, 2 * DH, dtype=torch.float16)
    low = (torch.zeros(2, 2, 2, 2 * DH, dtype=torch.float16), torch.zeros(2, 2, DH, 2)) if parts else (None, None)
    one_pass.one_pass_fwd(x, w, None, *low, num_heads=2, parts=parts)
    found = loops.one_pass_fwd(arch, DH, length, 2, parts, 2) * 2
    assert found == (counted["products"], counted["exps"])


@pytest.mark.parametrize("batch, rank", [(1, 2), (3, 20)])
def test_low_rank_gradients(batch, rank, counted, monkeypatch):
    monkeypatch.setattr(low_rank, "PROGRAMS", 8)
    monkeypatch.setattr(loops, "PROGRAMS", 8)
    qkv, delta = problem(197, (0, 2), rank, heads=2, batch=batch)
    low_rank.low_rank_bwd(qkv, delta, torch.zeros_like(delta.low))
    assert loops.low_rank_bwd(DH, batch * 197, 2, 2, rank).products == counted["products"]


# At most so many times as many, on an A100 and on Hopper. Wide blocks pad more and read less: docs/decisions.md.
PRODUCTS = {
    50: (0.25, 0.25),
    77: (0.4, 0.4),
    197: (0.82, 1.39),
    257: (1.02, 1.02),
    577: (1.72, 1.63),
    1025: (1.65, 1.52),
}


@pytest.mark.parametrize("length, most", PRODUCTS.items(), ids=str)
def test_products_of_the_backward_pass_against_those_of_flash_attention_2(length, most):
    """Its blocks at head size 64 are 128 × 128, five products (flash_bwd_launch_template.h, run_mha_bwd_hdim64)."""
    flash = 5 * 2 * DH * sum(loops.blocks(length, 128)) ** 2
    for arch, times in zip((80, 90), most, strict=True):
        assert loops.attention_bwd(arch, DH, length, 1000).products / flash <= times


@pytest.mark.parametrize("samples", [60, 100, 300, 700])
def test_pairs_of_the_mmd_on_a_cpu(samples, monkeypatch):
    """Of one block all, of several fewer."""
    made, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y, **k: made.append(x.shape[1] * y.shape[2]) or bmm(x, y, **k))
    mmd(torch.randn(samples, 40), torch.arange(samples) % 2, num_domains=2, impl="cpu")
    assert loops.mmd_pairs(samples, 40) == sum(made)
    assert (sum(made) == samples**2) == (samples <= 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [700, 1500])
def test_products_and_memory_of_the_mmd_on_a_gpu(samples, dtype):
    """The roofline's operations are those of the launches, less what whole tiles add; its bytes those allocated."""
    x, ids, made = torch.randn(samples, 640).to(dtype).requires_grad_(), torch.arange(samples) % 2, [0.0]

    def run(kernel, grid, *args, **meta):
        if kernel.__name__ == "mmd_tile_kernel":
            made[0] += grid[0] * meta["BM"] * meta["BN"] * 640
        elif kernel.__name__ == "mmd_pull_kernel":
            made[0] += grid[0] * meta["BM"] * meta["BD"] * args[5][1]

    def step():
        x.grad, made[0] = None, 0.0
        with launching(run):
            mmd(x, ids, num_domains=2, kernel="domainbed", impl="triton").backward()

    step()
    x.grad = None
    problem, size = Problem(samples, 640, dtype.itemsize), samples * 640 * dtype.itemsize
    assert peak_bytes(step, "cpu") - size == pytest.approx(bytes_beyond(problem), rel=0.05)
    products = sum(part.attention for part in passes(problem, 80)) / TF32X3
    assert products == pytest.approx(2 * made[0], rel=0.1) and products <= 2 * made[0]


@pytest.mark.parametrize("samples", [140, 500])
def test_pairs_of_the_mmd_on_a_gpu(samples, counted):
    """The kernel's products, less those of sums by domain, in whole tiles."""
    found = []

    def run(kernel, grid, *args, **meta):
        if kernel.__name__ == "mmd_tile_kernel":
            found.append((grid[0] * meta["BM"] * meta["BN"], meta["BM"], meta["BN"]))

    with launching(run):
        mmd(torch.randn(samples, 600), torch.arange(samples) % 2, num_domains=2, impl="triton")
    computed, needed = sum(tiles for tiles, *_ in found), loops.mmd_pairs(samples, 600, "cuda")
    assert needed <= computed <= needed + sum((samples + n) * m + samples * n for _, m, n in found)
    assert (needed == samples**2) == (len(found) == 1) == (samples == 140)
