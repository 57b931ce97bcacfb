"""out_proj's weights go into the operator where calling it would do nothing else; whatever else it is, is called."""

import pytest
import torch
import torch.nn.functional as F
from standins import attentions, features, fill_adapters, patched
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

import fastheads
from fastheads.nn.attention import is_plain_linear


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class LoraLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnParameter(nn.Parameter):
    pass


def hooked(linear):
    linear.register_forward_hook(lambda module, args, y: 2 * y)


def hooked_before(linear):
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    linear.bias.data.mul_(2)


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Twice())
    parametrize.register_parametrization(linear, "bias", Twice())


def pruned(linear):
    prune.identity(linear, "weight")
    linear.weight_orig.data.mul_(2)
    linear.bias.data.mul_(2)


def with_a_forward_of_its_own(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


def of_another_class(linear):
    linear.__class__ = LoraLinear


def compiled(linear):
    linear.compile(backend="eager")
    linear.weight.data.mul_(2)
    linear.bias.data.mul_(2)


def of_another_kind_of_tensor(linear):
    linear.weight = OwnParameter(2 * linear.weight.data)
    linear.bias.data.mul_(2)


# Each makes out_proj answer twice as much.
MADE = (
    hooked,
    hooked_before,
    parametrized,
    pruned,
    with_a_forward_of_its_own,
    of_another_class,
    compiled,
    of_another_kind_of_tensor,
)


@pytest.mark.parametrize("cls", [nn.Linear, NonDynamicallyQuantizableLinear])
def test_a_linear_layer_is_plain(cls):
    assert is_plain_linear(cls(4, 4)) and is_plain_linear(cls(4, 4, bias=False))


@pytest.mark.parametrize("name", ["clip", "attention"])
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_an_out_proj_that_is_more_is_called(name, make):
    plain, other = (patched(name) for _ in range(2))
    make(attentions(other)[-1].out_proj)
    assert not is_plain_linear(attentions(other)[-1].out_proj)
    for parameter in attentions(plain)[-1].out_proj.parameters():
        parameter.data.mul_(2)
    assert torch.equal(features(other), features(plain))


def test_hooks_of_all_modules_see_it_called():
    model, seen = patched(), []
    names = {module: name for name, module in model.named_modules()}
    handle = register_module_forward_hook(lambda module, args, y: seen.append(names.get(module)))
    try:
        features(model)
    finally:
        handle.remove()
    assert sum("out_proj" in name for name in seen if name) == 3


@pytest.mark.parametrize("name", ["clip", "attention", "attention_inner_norm"])
def test_the_operator_gets_it_and_the_numbers_stay(name, monkeypatch):
    """With `ln_inner` in between it doesn't."""
    given, real = [], fastheads.ops.head_attention

    def listening(*args, **options):
        given.append(options["w_out"] is not None)
        return real(*args, **options)

    monkeypatch.setattr(fastheads.ops, "head_attention", listening)
    model = fill_adapters(patched(name))
    got = features(model)
    assert set(given) == {name != "attention_inner_norm"}
    for module in attentions(model):
        hooked_linear = module.out_proj
        hooked_linear.register_forward_hook(lambda module, args, y: F.linear(args[0], module.weight, module.bias))
    assert torch.equal(features(model), got)
