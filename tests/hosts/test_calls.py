"""Every host attention answers each call of its own, masks and layouts included, as the original does."""

import copy
import inspect

import open_clip
import pytest
import timm
import torch
from standins import Attention, disturb, relative, seeded
from torch import nn

import fastheads
from fastheads import HeadConfig

# --------------------------------------------------------------------------- the call of nn.MultiheadAttention


class OneBlock(nn.Module):
    """As little of an OpenCLIP model as patch takes: an image tower with one attention layer."""

    def __init__(self, attention):
        super().__init__()
        self.visual, self.visual.transformer = nn.Module(), nn.Module()
        block = nn.Module()
        block.attn = attention
        self.visual.transformer.resblocks = nn.ModuleList([block])


B, N, H, D = 2, 5, 4, 16
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)


def pair(make, config=None):
    """A stock attention module and its patched twin."""
    with seeded(0):
        stock = disturb(make(), 0.2)
    twin = copy.deepcopy(stock)
    fastheads.patch(OneBlock(twin), config or HeadConfig())
    return stock, twin


def attention_inputs(*shape):
    return torch.randn(*(shape or (B, N, D)), generator=torch.Generator().manual_seed(1))


def boolean_mask(*shape):
    """Random, no row masked entirely."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(2)) < 0.4
    return mask & ~torch.eye(shape[-1], dtype=torch.bool)


PADDING = torch.tensor([[False] * N, [False, False, False, True, True]])
MHA_CALLS = {
    "plain": {"need_weights": False},
    "weights": {},
    "weights_per_head": {"average_attn_weights": False},
    "bool_2d": {"attn_mask": boolean_mask(N, N)},
    "bool_3d": {"attn_mask": boolean_mask(B * H, N, N), "average_attn_weights": False},
    "additive_2d": {"attn_mask": attention_inputs(N, N), "need_weights": False},
    "additive_3d": {"attn_mask": attention_inputs(B * H, N, N), "need_weights": False},
    "padding_bool": {"key_padding_mask": PADDING},
    "padding_float": {"key_padding_mask": attention_inputs(B, N), "need_weights": False},
    "padding_and_bool": {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "need_weights": False},
    "padding_and_additive": {"key_padding_mask": PADDING.float() * -3.0, "attn_mask": attention_inputs(N, N)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal_weights": {"attn_mask": CAUSAL, "is_causal": True},
}


def assert_same_answer(stock, twin, x, call):
    expected, weights = stock(x, x, x, **call)
    out, own = twin(x, x, x, **call)
    assert relative(out, expected) < 1e-5
    assert (own is None) == (weights is None)
    if weights is not None:
        assert own.dtype == weights.dtype and relative(own, weights) < 1e-5


@pytest.mark.filterwarnings("ignore:Support for mismatched")  # torch: a boolean beside a float mask
@pytest.mark.parametrize("call", MHA_CALLS.values(), ids=MHA_CALLS)
def test_multihead_attention_calls(call):
    for batch_first in (True, False):
        for bias in (True, False):
            stock, twin = pair(lambda f=batch_first, b=bias: nn.MultiheadAttention(D, H, bias=b, batch_first=f))
            for mode in (True, False):
                x = attention_inputs() if batch_first else attention_inputs(N, B, D)
                assert_same_answer(stock.train(mode), twin.train(mode), x, call)


def test_multihead_attention_unbatched():
    stock, twin = pair(lambda: nn.MultiheadAttention(D, H, batch_first=True))
    x = attention_inputs(N, D)
    calls = [{}, {"average_attn_weights": False}, {"need_weights": False}, {"attn_mask": CAUSAL}]
    calls += [{"attn_mask": boolean_mask(H, N, N)}, {"key_padding_mask": PADDING[1]}]
    for call in calls:
        assert_same_answer(stock, twin, x, call)


def test_multihead_attention_keywords_and_dtypes():
    stock, twin = pair(lambda: nn.MultiheadAttention(D, H, batch_first=True))
    x = attention_inputs()
    assert relative(twin(query=x, key=x, value=x)[0], stock(query=x, key=x, value=x)[0]) < 1e-5
    out, weights = twin.bfloat16()(*[x.bfloat16()] * 3)
    assert out.dtype == weights.dtype == torch.bfloat16


def test_trained_weights_are_returned_as_they_were_used():
    _, twin = pair(lambda: nn.MultiheadAttention(D, H, batch_first=True))
    with seeded(1), torch.no_grad():
        twin.heads.lora_B.normal_()
    x = attention_inputs()
    dense = torch.einsum("thdr,thrk->thdk", twin.heads.lora_B, twin.heads.lora_A).reshape(2, D, D)
    w = twin.in_proj_weight.view(3, D, D) + torch.stack((dense[0], torch.zeros(D, D), dense[1]))
    q, k, _ = (x @ w.mT.reshape(3, 1, D, D) + twin.in_proj_bias.view(3, 1, 1, D)).view(3, B, N, H, -1)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / (D // H) ** 0.5
    assert relative(twin(x, x, x, average_attn_weights=False)[1], scores.softmax(-1)) < 1e-5
    assert relative(twin(x, x, x)[1], scores.softmax(-1).mean(1)) < 1e-5


def test_cross_attention_is_refused_in_words():
    x, y = attention_inputs(), attention_inputs(B, N + 1, D)
    _, twin = pair(lambda: nn.MultiheadAttention(D, H, batch_first=True))
    with pytest.raises(ValueError, match="self-attention.*unpatch"):
        twin(x, y, y)
    with pytest.raises(ValueError, match="attn_mask"):
        twin(x, x, x, attn_mask=CAUSAL[:-1])
    with pytest.raises(ValueError, match="key_padding_mask"):
        twin(x, x, x, key_padding_mask=PADDING[:, :-1])
    with pytest.raises(ValueError, match="attn_mask: got torch.uint8; takes booleans"):
        twin(x, x, x, attn_mask=CAUSAL.to(torch.uint8))
    with pytest.raises(ValueError, match="key_padding_mask: got torch.uint8; takes booleans"):
        twin(x, x, x, attn_mask=CAUSAL, key_padding_mask=PADDING.to(torch.uint8))
    with pytest.raises(ValueError, match="is_causal.*attn_mask"):
        twin(x, x, x, is_causal=True)
    _, twin = pair(lambda: Attention(D, H))
    for call in ({"k_x": y}, {"k_x": x, "v_x": y}):
        with pytest.raises(ValueError, match="self-attention.*unpatch"):
            twin(x, **call)
    with pytest.raises(ValueError, match="attn_mask"):
        twin(x, attn_mask=CAUSAL[:-1])


# --------------------------------------------------------------------------------- the call of both Attentions

MASKS = {
    "none": None,
    "additive_2d": attention_inputs(N, N),
    "additive_3d": attention_inputs(B * H, N, N),
    "additive_4d": attention_inputs(B, H, N, N),
    "bool_2d": boolean_mask(N, N),
    "bool_3d": boolean_mask(B * H, N, N),
    "bool_4d": boolean_mask(B, H, N, N),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", ["", "qk_norm", "scale_heads", "scaled_cosine", "inner_norm"])
def test_both_attentions_with_their_own_masks(options, mask):
    options = {options: True} if options else {}
    config = HeadConfig(gate=None) if "inner_norm" in options else None
    value, x = MASKS[mask], attention_inputs()
    if "scaled_cosine" not in options:  # 3.3.0's scaled cosine attention fails in stock OpenCLIP: bmm of 4-D tensors
        stock, twin = pair(lambda: open_clip.transformer.Attention(D, H, **options), config)
        assert relative(twin(x, value), stock(x, value)) < 1e-5
        assert relative(twin(x, attn_mask=value), stock(x, attn_mask=value)) < 1e-5
    stock, twin = pair(lambda: Attention(D, H, **options), config)
    keep = ~value if value is not None and value.dtype == torch.bool else value
    expected = stock(x, attn_mask=keep)
    assert relative(twin(x, attn_mask=keep), expected) < 1e-5
    assert relative(twin(x, x, x, keep), expected) < 1e-5
    assert relative(twin(x, k_x=x, attn_mask=keep), expected) < 1e-5


@pytest.mark.parametrize("mask", [name for name in MASKS if "3d" not in name])
@pytest.mark.parametrize("options", ["", "qk_norm", "scale_norm", "gated"])
def test_timms_attention_with_its_own_masks(options, mask):
    config = HeadConfig(gate=None) if options == "scale_norm" else None
    norms = {"norm_layer": nn.LayerNorm} if "norm" in options else {}
    value, x = MASKS[mask], attention_inputs()
    value = ~value if value is not None and value.dtype == torch.bool else value
    make = {options: True} if options else {}
    stock, twin = pair(lambda: timm.layers.Attention(D, H, qkv_bias=True, **make, **norms), config)
    assert relative(twin(x, value), stock(x, value)) < 1e-5
    assert relative(twin(x, attn_mask=value), stock(x, attn_mask=value)) < 1e-5
    if mask == "none":
        assert relative(twin(x, is_causal=True), stock(x, is_causal=True)) < 1e-5
        with fastheads.disabled(twin):
            assert torch.equal(twin(x, is_causal=True), stock(x, is_causal=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["eva", "rope"])
def test_timms_rotary_attentions(kind, fused):
    options = {"qkv_fused": fused, "num_prefix_tokens": 2, "scale_norm": False}
    cls = timm.models.eva.EvaAttention if kind == "eva" else timm.layers.AttentionRope
    stock, twin = pair(lambda: cls(D, H, **options))
    x, rope = attention_inputs(), attention_inputs(N - 2, 2 * D // H)
    for call in ({}, {"rope": rope}, {"rope": rope, "attn_mask": ~CAUSAL}, {"rope": rope, "is_causal": True}):
        assert relative(twin(x, **call), stock(x, **call)) < 1e-5
    assert relative(twin(x, rope, MASKS["additive_2d"]), stock(x, rope, MASKS["additive_2d"])) < 1e-5


def test_timms_attention_refuses_what_does_not_fit():
    _, twin = pair(lambda: timm.layers.Attention(D, H))
    for wrong in (CAUSAL[:-1], CAUSAL[0], CAUSAL.expand(3, H, N, N)):
        with pytest.raises(ValueError, match="attn_mask"):
            twin(attention_inputs(), wrong)
    for make, why in (
        (lambda: timm.layers.Attention(D, H, attn_head_dim=8), "wider or narrower"),
        (lambda: timm.layers.Attention(D, H, scale_norm=True, norm_layer=nn.LayerNorm), "gate=None"),
    ):
        with pytest.raises(TypeError, match=why):
            pair(make)
    other = timm.layers.Attention(D, H)
    other.qkv = nn.Conv1d(D, 3 * D, 1)
    with pytest.raises(TypeError, match="Conv1d for its qkv"):
        fastheads.patch(OneBlock(other))


@pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(timm.layers.AttentionRope).parameters, reason="timm has it since 1.0.30"
)
def test_timms_attention_with_fewer_heads_of_keys_is_refused():
    with pytest.raises(TypeError, match="fewer heads of keys"):
        pair(lambda: timm.layers.AttentionRope(D, H, num_kv_heads=2, qkv_fused=False))


def test_the_two_mask_conventions_are_told_apart():
    old, new = pair(lambda: open_clip.transformer.Attention(D, H))[1], pair(lambda: Attention(D, H))[1]
    new.load_state_dict(old.state_dict())
    x = attention_inputs()
    assert relative(new(x, attn_mask=~CAUSAL), old(x, attn_mask=CAUSAL)) < 1e-6
    changed = x.clone()
    changed[:, -1] += 1.0
    assert torch.equal(new(changed, attn_mask=~CAUSAL)[:, :-1], new(x, attn_mask=~CAUSAL)[:, :-1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(D, H, dropout=0.5, batch_first=True),
        lambda: open_clip.transformer.Attention(D, H, attn_drop=0.5),
        lambda: Attention(D, H, attn_drop=0.5),
    ],
    ids=["mha", "attention", "development"],
)
def test_attention_dropout(make):
    stock, twin = pair(make)
    x = attention_inputs()

    def run(module):
        return module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)

    assert relative(run(twin.eval()), run(stock.eval())) < 1e-5
    twin.train(), stock.train()
    assert relative(run(twin), run(twin)) > 1e-3
    x = x[:1].expand(4000, -1, -1).contiguous()
    with seeded(0), torch.no_grad():  # the same distribution: mean and variance of 4,000 draws
        draws = [run(m) for m in (twin, stock)]
    assert relative(draws[0].mean(0), draws[1].mean(0)) < 0.05
    assert relative(draws[0].var(0), draws[1].var(0)) < 0.2
    run(twin).sum().backward()
    assert twin.heads.lora_B.grad.any() and twin.heads.theta.grad.any()
