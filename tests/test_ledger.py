"""The ledger: bytes that follow from shapes, autograd's nodes in its engine's order, nothing of the model's in it."""

import copy
import functools
from contextlib import nullcontext

import open_clip
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu

import fastheads
from fastheads.ledger import _backward, count, fake_copy
from fastheads.nn.attention import is_plain_linear

WIDTH, HEADS, TOKENS = 128, 4, 17


@functools.cache
def tower(layers=2):
    """Images of 32 × 32 in patches of 8."""
    vision = open_clip.CLIPVisionCfg(layers, WIDTH, WIDTH // HEADS, patch_size=8, image_size=32)
    return open_clip.CLIP(16, vision, open_clip.CLIPTextCfg(8, 64, 32, 2, 1))


@functools.cache
def saved(impl, layers=2, recompute=False, offload=False):
    """What a tower keeps of a batch."""
    device, mode = "cpu" if impl == "cpu" else "cuda", FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_copy(tower(layers), mode, device, torch.bfloat16)
    with mode:
        fastheads.patch(model, fastheads.HeadConfig(rank=2), impl=impl, recompute=recompute)

    @functools.cache
    def of(batch):
        def images():
            with mode:
                return (torch.empty(batch, 3, 32, 32, device=device, dtype=torch.bfloat16),)

        def loss(x):
            with save_on_cpu() if offload else nullcontext():
                return model.encode_image(x).float().sum()

        return count(model, images, loss, mode=mode, device=device).saved

    return of


@pytest.mark.parametrize(
    ("impl", "recompute", "rows"),
    [
        ("stacked", False, 4),
        ("delta", False, 4),
        ("one_pass", False, 1),
        ("stacked", "norms", 3),
        ("delta", "norms", 3),
        ("stacked", True, 0),
        ("one_pass", True, 0),
    ],
)
def test_a_layer_keeps_what_its_shapes_say(impl, recompute, rows):
    B = 8
    four, two = (saved(impl, layers, recompute)(B)["attention"] for layers in (4, 2))
    # T's columns: two targets, four heads, rank two
    low = 16 if rows == 4 or (impl, recompute) == ("delta", "norms") else 0
    expected = 2 * B * TOKENS * (rows * WIDTH + low)  # LayerNorm's output; q, k, v
    expected += 4 * B * TOKENS * (HEADS + 2)  # log-sum-exp, LayerNorm's mean and deviation
    assert (four - two) / 2 == expected


@pytest.mark.parametrize("impl", ["stacked", "delta", "one_pass", "reference", "cpu"])
def test_what_is_saved_grows_with_the_batch_in_a_straight_line(impl):
    one, two, five = (sum(saved(impl)(B).values()) for B in (8, 16, 40))
    assert five - two == 3 * (two - one)


def test_all_that_a_layer_keeps_can_be_offloaded():
    four, two = (saved("stacked", layers, offload=True)(8) for layers in (4, 2))
    assert four == two and "attention" not in two


def test_weights_are_no_activations():
    big = saved("delta")(1)  # bfloat16 throughout: nothing is cast
    assert sum(big.values()) < 20 * TOKENS * WIDTH * 2 * 2  # the MLPs' weights alone are ten times as much


def test_a_fake_layers_output_projection_is_the_operators_as_a_real_ones():
    mode = FakeTensorMode()
    for model in (tower(), fake_copy(tower(), mode, "cuda")):
        assert is_plain_linear(model.visual.transformer.resblocks[0].attn.out_proj)


class Shared(nn.Module):
    """A leaf used twice, a broadcast, a node of Python that leads to another, and a cast."""

    def __init__(self):
        super().__init__()
        self.w, self.g = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        y = Twice.apply(Twice.apply(x @ self.w, self.g)[0], self.g)
        return ((y[0] * self.g + x) @ self.w).double().sum() + y[1].sum()


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return x * g, 2 * x

    @staticmethod
    def backward(ctx, dy, dz):
        x, g = ctx.saved_tensors
        dz = torch.zeros_like(x) if dz is None else dz
        return dy * g + 2 * dz, (dy * x).sum(0)


def test_nodes_give_the_engines_gradients():
    by_engine = Shared()
    by_nodes, x = copy.deepcopy(by_engine), torch.randn(5, 6)
    by_engine(x).backward()
    loss = by_nodes(x)
    waiting = {loss.grad_fn: [torch.ones_like(loss)]}
    del loss
    _backward(waiting)
    for own, expected in zip(by_nodes.parameters(), by_engine.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)
