"""Without the dispatcher where nobody looks, through the registered operators where somebody does; the same bits."""

import sys

import pytest
import torch
from problems import FULL, IMPLS, leaves, made
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastheads.ops import head_attention

MODULE = sys.modules["fastheads.ops.head_attention"]
NAMES = ["fastheads::head_attention", "fastheads::head_attention_backward"]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.own = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastheads":
            self.own.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A tensor of a class of its own, which notes what is done with it."""

    done: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.done.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


def passes(impl, watch=None):
    tensors, do, options = made(FULL, impl)
    own = leaves(tensors)
    if watch is None:
        out = head_attention(**own, **options, impl=impl)
        out.o.backward(do)
    else:
        with watch:
            out = head_attention(**own, **options, impl=impl)
            out.o.backward(do)
    return [out.o, out.lse, out.cls, *(t.grad for t in own.values() if t is not None)]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mode_sees_the_operators_and_changes_nothing(impl):
    seen = Seen()
    watched, unwatched = passes(impl, seen), passes(impl)
    assert seen.own == NAMES
    assert all(torch.equal(a, b) for a, b in zip(watched, unwatched, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mode_of_the_backward_pass_alone_sees_its_operator(impl):
    tensors, do, options = made(FULL, impl)
    out = head_attention(**leaves(tensors), **options, impl=impl)
    with Seen() as seen:
        out.o.backward(do)
    assert seen.own == NAMES[1:]


def test_without_gradients_a_mode_sees_the_operator_too():
    tensors, _, options = made(FULL, "cpu")
    with Seen() as seen, torch.no_grad():
        head_attention(**tensors, **options, impl="cpu")
    assert seen.own == NAMES[:1]


def test_nobody_looks_and_the_operators_are_not_called(monkeypatch):
    for name in ("_FORWARD", "_BACKWARD"):
        monkeypatch.setattr(MODULE, name, None)
    passes("cpu")


def test_a_tensor_of_a_class_of_its_own_goes_through_the_operator():
    tensors, _, options = made(FULL, "cpu")
    head_attention(**(tensors | {"x": tensors["x"].as_subclass(Own)}), **options, impl="cpu")
    assert "fastheads.head_attention.default" in Own.done


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_a_batch_of_gradients_goes_through_the_operator(how):
    tensors, do, options = made(FULL, "cpu")
    own = leaves(tensors)
    o, wanted = head_attention(**own, **options, impl="cpu").o, list(own.values())
    several = torch.stack([do, 2 * do])

    def backward(v, **how):
        return torch.autograd.grad(o, wanted, v, retain_graph=True, **how)

    if how == "vmap":
        together = torch.func.vmap(backward)(several)
    else:
        together = backward(several, is_grads_batched=True)
    for i, v in enumerate(several):
        assert all(
            torch.allclose(t[i], alone, rtol=1e-5, atol=1e-6) for t, alone in zip(together, backward(v), strict=True)
        )
