"""Tensors of any strides, given and asked for, are read and written as they are, by every implementation."""

import math

import pytest
import torch
from problems import BF16, EVERY, F32, FULL, INPUTS, SAME, Case, close, device_of, exact_results, leaves, made, results

from fastheads import reference
from fastheads.ops import head_attention


def strided(t):
    """The same numbers, every second element of a buffer of NaN."""
    buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
    buffer[..., ::2] = t
    return buffer[..., ::2]


def transposed(t):
    """The same numbers, the last dimension not the fastest."""
    return t.flip(0).flip(0) if t.dim() < 2 else t.transpose(0, -1).contiguous().transpose(0, -1)


def inside(t):
    """The same numbers in the middle of a larger buffer of NaN, not aligned to 16 bytes."""
    buffer = t.new_full([n + 3 for n in t.shape], math.nan)
    view = buffer[tuple(slice(1, n + 1) for n in t.shape)]
    return view.copy_(t)


@EVERY
@pytest.mark.parametrize("layout", [strided, transposed, inside])
def test_inputs_of_any_layout(impl, layout):
    tensors, do, options = made(FULL, impl)
    expected = results(head_attention, tensors, do, **options, impl=impl)
    views = {n: layout(t).requires_grad_() for n, t in tensors.items()}
    options["mask"] = layout(options["mask"])
    o, lse, cls = head_attention(**views, **options, impl=impl)
    close(o, expected["o"], SAME, "o")
    close(lse, expected["lse"], SAME, "lse")
    close(cls, expected["cls"], SAME, "cls")
    for name, grad in zip(INPUTS, torch.autograd.grad(o, [views[n] for n in INPUTS], layout(do)), strict=True):
        close(grad, expected[f"d{name}"], SAME, f"d{name}")


@EVERY
@pytest.mark.parametrize("kind", ["batch", "tokens", "features", "all"])
def test_gradients_of_stride_zero(impl, kind):
    tensors, do, options = made(FULL, impl)
    part = {"batch": do[:1], "tokens": do[:, :1], "features": do[..., :1], "all": do[:1, :1, :1]}[kind]
    expanded = part.expand_as(do)
    expected = results(head_attention, tensors, expanded.contiguous(), **options, impl=impl)
    own = leaves(tensors)
    o = head_attention(**own, **options, impl=impl).o
    for name, grad in zip(INPUTS, torch.autograd.grad(o, [own[n] for n in INPUTS], expanded), strict=True):
        close(grad, expected[f"d{name}"], SAME, f"d{name}")


@EVERY
def test_inputs_of_stride_zero(impl):
    # one image for the whole batch, one gate for all heads, one mask row for all queries, one delta for all heads
    case = Case(N=18, H=2, mask="float", mask_shape=(1, 1, 1, 18))
    tensors, do, options = made(case, impl)
    small = {n: tensors[n][:1] for n in ("x", "gate")} | {n: tensors[n][:, :1] for n in ("lora_A", "lora_B")}
    full = {n: t.expand_as(tensors[n]) for n, t in small.items()}
    dense = {n: full.get(n, t).contiguous() for n, t in tensors.items()}
    expected = results(head_attention, dense, do, **options, impl=impl)
    views = {n: full.get(n, t).detach().requires_grad_() for n, t in tensors.items()}
    assert views["x"].stride(0) == views["gate"].stride(0) == views["lora_B"].stride(1) == 0
    options["mask"] = options["mask"].expand(2, 2, 18, 18)
    o = head_attention(**views, **options, impl=impl).o
    close(o, expected["o"], SAME, "o")
    for name, grad in zip(INPUTS, torch.autograd.grad(o, [views[n] for n in INPUTS], do), strict=True):
        close(grad, expected[f"d{name}"], SAME, f"d{name}")


@EVERY
def test_a_16_bit_mask_is_read_as_it_is(impl):
    case = Case(N=17, mask="additive", mask_shape=(17, 17))
    tensors, do, options = made(case, impl)
    low = options | {"mask": options["mask"].to(BF16)}
    expected = exact_results(tensors, do, **low)
    got = results(head_attention, tensors, do, **low, impl=impl)
    for name, t in got.items():
        close(t, expected[name], SAME, name)


POOLS = {
    "of every second": lambda tokens: torch.stack((tokens, torch.full_like(tokens, 77)), 1)[:, 0],
    "one for all": lambda tokens: tokens[:1].expand(len(tokens)),
    "from an odd offset": lambda tokens: torch.cat((tokens[:1], tokens))[1:],
}


@pytest.mark.parametrize("layout", POOLS)
@EVERY
def test_pooled_tokens_of_any_layout(impl, layout):
    case = Case(B=3, N=5, H=2)
    device = device_of(impl)
    tensors, options = case.tensors(F32, device=device), case.options(device)
    tokens = POOLS[layout](torch.tensor([4, 0, 2], device=device))
    got = head_attention(**tensors, **options | {"pool": tokens}, impl=impl).cls
    heads, _, _ = reference.attend(*reference.project(*[tensors[n] for n in INPUTS[:5]], num_heads=2))
    for image, token in enumerate(tokens.tolist()):
        close(got[image], heads[image, :, token].to(got), 1e-4, "cls")
