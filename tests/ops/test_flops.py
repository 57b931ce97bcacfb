"""`FlopCounterMode` over a patched model: stock's operations and the low-rank products, exactly."""

import pytest
import torch
import torch.nn.functional as F
from standins import clip, images
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fastheads
from fastheads import HeadConfig
from fastheads.ops import Between, head_attention, head_attention_in_halves

LAYERS, B, N, D, H = 3, 3, 17, 64, 4


def counted(run):
    with FlopCounterMode(display=False) as counter:
        found = run()
    return counter.get_total_flops(), found


def passes(model):
    """Operations of the image tower forward, and back to the images."""
    x = images().requires_grad_()
    ahead, y = counted(lambda: model.encode_image(x))
    back, _ = counted(lambda: y.sum().backward())
    return ahead, back


def attention_flops():
    """PyTorch's own count on a GPU; its count on a CPU leaves attention out, in torch 2.11 at least."""
    qkv = [(B, H, N, D // H)] * 3
    if counted(lambda: F.scaled_dot_product_attention(*(torch.ones(shape) for shape in qkv)))[0]:
        return 0, 0
    return LAYERS * sdpa_flop_count(*qkv), LAYERS * sdpa_backward_flop_count(qkv[0], *qkv)


@pytest.fixture(scope="module")
def stock():
    model = clip().requires_grad_(False)
    return tuple(own + attention for own, attention in zip(passes(model), attention_flops(), strict=True))


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v")])
def test_a_patched_model_counts_stock_and_the_low_rank_products(stock, targets, per_head):
    model = clip()
    fastheads.patch(model, HeadConfig(rank=3, targets=targets, per_head=per_head))
    rows = LAYERS * B * N
    down = 2 * rows * D * len(targets) * 3 * (H if per_head else 1)
    up = 2 * rows * D * len(targets) * 3
    ahead, back = passes(model)
    assert ahead - stock[0] == down + up  # T = x Aᵀ, T Bᵀ
    assert back - stock[1] == 2 * up + 2 * down  # U = dY B, dYᵀ T; Uᵀ x, U A


def test_gates_alone_count_as_stock(stock):
    model = clip()
    fastheads.patch(model, HeadConfig(rank=0))
    assert passes(model) == stock


def test_without_gradients_it_counts_the_same(stock):
    model = clip()
    fastheads.patch(model, HeadConfig(rank=0))
    with torch.no_grad():
        ahead, _ = counted(lambda: model.encode_image(images()))
    assert ahead == stock[0]


def test_what_is_computed_again_is_counted_again(stock):
    model = clip()
    fastheads.patch(model, HeadConfig(rank=0), recompute=True)
    ahead, back = passes(model)
    assert ahead == stock[0] and back - stock[1] == LAYERS * 2 * B * N * 3 * D * D


def test_only_gradients_asked_for_are_counted():
    x, w = torch.randn(B, N, D), torch.randn(3 * D, D)
    of = {"num_heads": H, "impl": "cpu"}
    attention = 10 * B * N * N * D
    for name, products in (("x", 1), ("w", 1), ("x w", 2)):
        given = [t.clone().requires_grad_(n in name) for n, t in (("x", x), ("w", w))]
        y = head_attention(*given, **of).o
        back, _ = counted(lambda y=y: y.sum().backward())
        assert back - attention == products * 2 * B * N * 3 * D * D, name


@pytest.mark.parametrize("impl", ["cpu", "stacked"])
def test_the_output_projection_counts_the_same_in_the_operator_and_behind_it(impl):
    x, w, w_out = torch.randn(1, 5, 32, requires_grad=True), torch.randn(96, 32), torch.randn(32, 32)
    ahead, y = counted(lambda: head_attention(x, w, num_heads=2, impl=impl, w_out=w_out).o)
    back, _ = counted(lambda: y.sum().backward())
    ahead_without, y = counted(lambda: head_attention(x, w, num_heads=2, impl=impl).o)
    back_without, _ = counted(lambda: y.sum().backward())
    assert ahead - ahead_without == back - back_without == 2 * 5 * 32 * 32


def test_ones_own_formula_is_kept():
    given = {torch.ops.fastheads.head_attention: lambda *args, **kwargs: 7}
    with FlopCounterMode(display=False, custom_mapping=given) as counter:
        head_attention(torch.randn(B, N, D), torch.randn(3 * D, D), num_heads=H, impl="cpu")
    assert counter.get_total_flops() == 7


def test_the_operators_halves_count_as_the_whole():
    x, w_in = torch.ones(2, 17, 64, requires_grad=True), torch.ones(192, 64)
    deltas = torch.ones(2, 4, 3, 64, requires_grad=True), torch.ones(2, 4, 16, 3, requires_grad=True)
    options = {
        "num_heads": 4,
        "targets": ("q", "v"),
        "scale": 1.0,
        "gate": torch.ones(4),
        "mask": None,
        "dropout_p": 0.0,
    }

    def halves():
        between = Between(score_scale=0.5)
        return head_attention_in_halves(
            x, w_in, None, *deltas, between, **options, gate_form="", pool=None, impl="delta"
        )[0]

    ahead, whole = counted(lambda: head_attention(x, w_in, None, *deltas, **options).o)
    back, _ = counted(whole.sum().backward)
    found, o = counted(halves)
    assert (found, counted(o.sum().backward)[0]) == (ahead, back)
