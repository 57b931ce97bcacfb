"""What only a GPU can show: captured graphs, streams, ids nobody looked at, grids beyond 65,535 programs, tf32."""

from dataclasses import replace

import pytest
import torch
from problems import BF16, F32, INPUTS, TRITON, Case, assert_numerics, close, leaves, results

import fastheads
from fastheads.ops import head_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EVERY = pytest.mark.parametrize("impl", TRITON)
CASE = Case(B=4, N=50, H=4, dh=64, rank=8, pool=0)


def made(case, dtype=BF16):
    return case.tensors(dtype, device="cuda"), case.gradient(dtype, "cuda"), case.options("cuda")


def step(own, do, options, impl):
    """o and the gradients of every input, as a training step would compute them."""
    o = head_attention(**own, **options, impl=impl).o
    return (o.detach(), *torch.autograd.grad(o, [own[n] for n in INPUTS], do))


@EVERY
def test_a_captured_graph_replays_forward_and_backward(impl):
    tensors, do, options = made(CASE)
    own = leaves(tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles what there is to compile
            step(own, do, options, impl)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(own, do, options, impl)
    other = CASE.__class__(**{**CASE.__dict__, "seed": 9})
    with torch.no_grad():
        for name, t in other.tensors(BF16, device="cuda").items():
            own[name].copy_(t)
    graph.replay()
    for got, expected in zip(captured, step(own, do, options, impl), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("n", [12, 140])
def test_ids_out_of_range_do_not_end_the_context(n):
    x = torch.randn(n, 8, device="cuda")
    domains = torch.arange(n, device="cuda") % 3
    expected = fastheads.mmd(x[:-2], domains[:-2], num_domains=3)
    domains[-2:] = torch.tensor([-1, 2**40], device="cuda")
    torch.testing.assert_close(fastheads.mmd(x, domains, num_domains=3), expected, rtol=1e-4, atol=1e-6)
    torch.cuda.synchronize()


def test_a_captured_graph_draws_another_mask_each_time():
    tensors, do, options = made(Case(B=2, N=50, H=2, dh=64, size=1.0, pool=None))
    own = leaves(tensors)
    for _ in range(2):
        head_attention(**own, **options, dropout_p=0.5, impl="delta").o.backward(do)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = head_attention(**own, **options, dropout_p=0.5, impl="delta").o
    found = []
    for _ in range(2):
        graph.replay()
        found.append(o.detach().clone())
    assert not torch.equal(*found)


@EVERY
def test_several_streams_at_once(impl):
    cases = [Case(B=8, N=50, H=4, dh=64, seed=s, pool=None) for s in range(4)]
    problems = [made(case) for case in cases]
    expected = [results(head_attention, *problem[:2], **problem[2], impl=impl) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    found = []
    for _ in range(5):
        found.clear()
        for stream, (tensors, do, options) in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(results(head_attention, tensors, do, **options, impl=impl))
    torch.cuda.synchronize()
    for got, right in zip(found, expected, strict=True):
        assert all(torch.equal(got[name], right[name]) for name in right)


@EVERY
def test_more_images_and_heads_than_a_second_grid_axis_holds(impl):
    # 66,000 (image, head) pairs; the last image alone is the same problem
    case = Case(B=33_000, N=5, H=2, dh=16, pool=0)
    tensors, do, options = made(case)
    last = {n: t[-1:] if n == "x" else t for n, t in tensors.items()}
    got = results(head_attention, tensors, do, **options, impl=impl)
    alone = results(head_attention, last, do[-1:], **options, impl=impl)
    for name in ("o", "lse", "cls", "dx"):
        close(got[name][-1:], alone[name], 1e-2, name)


@EVERY
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_used_where_pytorch_may_and_nowhere_else(impl, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    case = Case(B=4, N=65, H=4, dh=64, pool=None)
    tensors, do, options = made(case, F32)
    got = results(head_attention, tensors, do, **options, impl=impl)
    exact = results(head_attention, *made(case, F32)[:2], **options, impl="reference")
    error = float((got["o"] - exact["o"]).abs().max() / exact["o"].abs().max())
    assert error < (1e-2 if tf32 else 1e-5)  # tf32 keeps 10 bits
    if not tf32:
        assert_numerics(case, impl, F32)


@EVERY
@pytest.mark.parametrize("N", [50, 197, 257])
@pytest.mark.parametrize("dh", [64, 80, 88, 104])
def test_vision_transformers_in_bf16(impl, N, dh):
    if impl == "one_pass" and 2 * (-(-N // 16) * 16) * (-(-dh // 16) * 16) * 2 > 96 * 1024:
        pytest.skip("keys and values do not fit on chip")
    assert_numerics(Case(B=4, N=N, H=4, dh=dh, rank=8), impl, BF16)


@EVERY
@pytest.mark.parametrize("N", [401, 577, 730, 4096])
def test_long_sequences_in_bf16(impl, N):
    if impl == "one_pass":
        pytest.skip("one_pass takes up to 272 tokens")
    case = Case(B=1, N=N, H=2, causal=True) if N > 1000 else Case(B=2, N=N, H=4)
    assert_numerics(replace(case, dh=64, rank=8), impl, BF16, draws=2)


def test_auto_takes_the_kernels():
    tensors, _, options = made(CASE)
    with pytest.raises(RuntimeError, match="no second derivative"):
        own = leaves(tensors)
        o = head_attention(**own, **options).o
        torch.autograd.grad(o.float().sum(), own["x"], create_graph=True)[0].sum().backward()
