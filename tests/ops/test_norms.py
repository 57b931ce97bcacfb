"""Where x is LayerNorm's output it is not kept, but made again; and where that can't be right, it is kept."""

import gc

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_right, plain_head_attention
from problems import EVERY, F16, F32, F64, Case, leaves, made
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fastheads.ops import head_attention
from fastheads.ops.dispatch import IMPLEMENTATIONS

CASE = Case(N=18, H=2, targets=("q", "v"), pool=None, size=1.0)
AGAIN = pytest.mark.parametrize("recompute", ["norms", True])


def norm(h, weight, bias, cast=None):
    """LayerNorm; with `cast` as OpenCLIP's under autocast: of float32, and back."""
    y = F.layer_norm(h if cast is None else h.float(), h.shape[-1:], weight, bias)
    return y if cast is None else y.to(cast)


def through(dtype, impl, run=None, cast=None, around=lambda run, *args: run(*args), **given):
    """Of `run`, or head_attention, behind a LayerNorm whose input has an offset: its answer and gradients. The numbers
    are the same in every dtype."""
    tensors, do, options = made(CASE, impl, F16)
    affine = [1 + torch.arange(CASE.D, device=do.device) / 64, torch.ones(CASE.D, device=do.device) / 2]
    affine = [t.to(F32 if cast else dtype) for t in affine]
    for name, t in tensors.items():
        wide = torch.promote_types(dtype, F32)
        tensors[name] = t.to(dtype if name in ("x", "w_in", "b_in") else wide)
    own = leaves(tensors | {"x": tensors["x"] + 2})
    for name in ("w_in", "b_in"):
        own[name].requires_grad_(False)
    given = options | ({"impl": impl} if run is None else {}) | given

    def layer(h):
        out = (run or head_attention)(**{**own, "x": norm(h, *affine, cast)}, **given)
        return out if isinstance(out, torch.Tensor) else out.o

    o = around(layer, own["x"])
    names = ("x", "lora_A", "lora_B", "gate")
    grads = torch.autograd.grad(o, [own[n] for n in names], do.to(o.dtype))
    return dict(zip(names, grads, strict=True)) | {"o": o.detach()}


@EVERY
@AGAIN
def test_gradients_are_within_the_rule(impl, recompute):
    exact = through(F64, "cpu", run=plain_head_attention)
    for dtype, cast in ((F32, None), (F16, None), (F16, F16)) if impl == "cpu" else ((F16, F16),):
        got = through(dtype, impl, cast=cast, recompute=recompute)
        plain = through(dtype, impl, run=plain_head_attention, cast=cast)
        for name, t in got.items():
            assert_right(t, plain[name], exact[name], IMPLEMENTATIONS[impl].backward_tolerance, f"{dtype} {name}")


@EVERY
@AGAIN
def test_layernorms_output_is_gone_after_the_forward_pass(impl, recompute):
    tensors, _, options = made(CASE, impl, F16)
    own = leaves(tensors)
    for again, gone in ((recompute, True), (False, False)):
        x = norm(own["x"] * 1, None, None, F16)
        storage = StorageWeakRef(x.untyped_storage())
        o = head_attention(**{**own, "x": x}, **options, impl=impl, recompute=again).o
        del x
        gc.collect()  # Triton's interpreter holds what it was given in a cycle
        assert storage.expired() is gone
        del o


def written(x):
    with torch.no_grad():
        return x.mul_(2)


CASES = {
    "not LayerNorm's": lambda x: x * 1,
    "written since": written,
    "transposed twice": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@AGAIN
@pytest.mark.parametrize("how", CASES)
def test_what_is_no_output_of_layernorms_any_more_is_kept(how, recompute):
    found = []
    for again in (False, recompute):
        run = lambda x, a=again, **own: head_attention(CASES[how](x), **own, impl="cpu", recompute=a).o  # noqa: E731
        found.append(through(F32, "cpu", run=run))
    for name, t in found[1].items():
        assert torch.equal(t, found[0][name]), name


@AGAIN
def test_layernorms_input_written_before_backward_is_noticed(recompute):
    tensors, do, options = made(CASE, "cpu")
    own = leaves(tensors)
    h = own["x"] * 1
    o = head_attention(**{**own, "x": norm(h, None, None)}, **options, impl="cpu", recompute=recompute).o
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(o, [own["lora_A"]], do)


@AGAIN
def test_under_checkpointing_and_offloading_it_is_the_same(recompute):
    def offloaded(run, h):
        with save_on_cpu():
            return run(h)

    expected = through(F32, "cpu", recompute=recompute)
    for way in (lambda run, h: checkpoint(run, h, use_reentrant=False), offloaded):
        for name, t in through(F32, "cpu", around=way, recompute=recompute).items():
            assert torch.equal(t, expected[name]), name


@AGAIN
def test_there_is_no_second_derivative(recompute):
    tensors, do, options = made(CASE, "cpu")
    own = {n: t if n != "x" else t.requires_grad_() for n, t in tensors.items()}
    o = head_attention(**{**own, "x": norm(own["x"] * 1, None, None)}, **options, impl="cpu", recompute=recompute).o
    (dx,) = torch.autograd.grad(o, [own["x"]], do, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()
