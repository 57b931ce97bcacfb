"""patch, unpatch, disabled, capture_heads: what a patched model computes, and what of it is left untouched.

"Relative" is max |a − b| / max |b|. 1e-5 for float32: the stock attention itself is 1e-6 off its float64 value here.
1e-9 for float64, where both sides do the same sums in another order.
"""

import copy
import gc

import open_clip
import pytest
import torch
from processes import on_ranks
from standins import (
    BOTH,
    CONFIGS,
    CONTEXT,
    EOT,
    MODELS,
    UNGATED,
    Attention,
    TowerOf,
    assert_unchanged,
    attentions,
    clip,
    ddp_gradients,
    default_config,
    dense_weights,
    development,
    disturb,
    features,
    fill_adapters,
    images,
    oracle,
    patched,
    relative,
    seeded,
    snapshot,
    stock_copy,
    texts,
)
from torch import nn

import fastheads
from fastheads import HeadConfig

GATED = [name for name in MODELS if name not in UNGATED]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys() and expected
    for name, grad in expected.items():
        assert relative(actual[name], grad) < tolerance, name


# ------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("towers", [("visual",), ("text",), BOTH], ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_start_equals_stock(name, towers):
    model = MODELS[name]()
    expected = {(t, mode): features(model.train(mode), t).detach() for t in BOTH for mode in (True, False)}
    fastheads.patch(model, default_config(name, towers=towers))
    for (tower, mode), value in expected.items():
        assert relative(features(model.train(mode), tower), value) < 1e-5, (tower, mode)
        with torch.no_grad():
            assert relative(features(model, tower), value) < 1e-5, (tower, mode, "no_grad")


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_brings_back_every_bit_and_flag(name):
    model = MODELS[name]()
    model.visual.lock(unlocked_groups=1)  # mixed flags
    model.logit_scale.requires_grad_(False)
    attentions(model, "text")[1].in_proj_bias.requires_grad_(False)
    assert len(set(snapshot(model)["flags"].values())) == 2
    before = snapshot(model)
    values = {t: features(model, t).detach() for t in BOTH}
    fastheads.patch(model, default_config(name, towers=BOTH))
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".attn.heads." not in n] == []
    fill_adapters(model)
    assert all(relative(features(model, t), values[t]) > 1e-3 for t in BOTH)
    assert fastheads.unpatch(model) is model
    assert not fastheads.is_patched(model)
    assert_unchanged(model, before)
    assert all(torch.equal(features(model, t), values[t]) for t in BOTH)


def test_unpatch_of_two_models_in_one_container():
    pair_of = nn.ModuleDict({"student": clip(), "average": clip()})
    for model in pair_of.values():
        fastheads.patch(model)
    fastheads.unpatch(pair_of)
    assert all(p.requires_grad for p in pair_of.parameters())


def test_the_default_is_the_published_one():
    model = clip(layers=4)
    report = fastheads.patch(model)
    assert [layer.rank for layer in report.layers] == [2, 2, 8, 8]
    assert [layer.name for layer in report.layers] == [f"visual.{i}" for i in range(4)]
    assert all(not hasattr(a, "heads") for a in attentions(model, "text"))
    assert HeadConfig.hap(12).rank == (2,) * 10 + (8, 8)


def test_counts_of_vit_b_16():
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
    base = sum(p.numel() for p in model.parameters())
    report = fastheads.patch(model)
    assert (report.lora_parameters, report.gate_parameters, report.model_parameters) == (718_848, 144, base)
    assert sum(p.numel() for p in fastheads.lora_parameters(model)) == 718_848
    assert sum(p.numel() for p in fastheads.gate_parameters(model)) == 144
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 718_848 + 144
    assert "718,848" in str(report) and "144" in str(report) and "visual.11" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("ViT-B-32", 12), ("ViT-B-16", 3), ("ViT-L-14", 3), ("ViT-H-14", 3)])
def test_real_configs_start_merge_and_unpatch(name, layers):
    """Sizes of OpenCLIP's configs, the large ones cut to a few layers: a layer more has no other code."""
    config = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = min(layers, config[tower]["layers"])
    with seeded(0):
        model = disturb(open_clip.CLIP(**config), 0.01).eval()
    x, ids = images(2, model.visual.image_size[0]), nn.functional.pad(texts(2), (0, 77 - CONTEXT))
    with torch.no_grad():
        stock_image, stock_text = model.encode_image(x), model.encode_text(ids)
        before = snapshot(model)
        fastheads.patch(model, HeadConfig(towers=BOTH))
        assert relative(model.encode_image(x), stock_image) < 1e-5
        assert relative(model.encode_text(ids), stock_text) < 1e-5
        assert (
            relative(model.train().encode_image(x), stock_image) < 1e-5
        )  # no dropout: stock is the same in both modes
        fastheads.unpatch(model.eval())
        assert_unchanged(model, before)
        assert torch.equal(model.encode_image(x), stock_image)
        keys, classes = before["keys"], before["classes"]
        del before
        gc.collect()
        model.requires_grad_(False)  # the flags alone change torch's own last bits (matmul folds by requires_grad)
        frozen_text = model.encode_text(ids)
        fastheads.patch(model)
        trained = fill_adapters(model, 0.05).encode_image(x)
        assert relative(trained, stock_image) > 1e-2
        assert torch.equal(model.encode_text(ids), frozen_text)
        fastheads.merge(model)
        assert relative(model.encode_image(x), trained) < 1e-5
        assert relative(model.train().encode_image(x), trained) < 1e-5
        assert list(model.state_dict()) == keys
        assert {n: type(m) for n, m in model.named_modules()} == classes


# ---------------------------------------------------------------------------------- what stays the same object


@pytest.mark.parametrize("name", ["clip", "attention", "development"])
def test_modules_and_parameters_are_the_same_objects(name):
    model, other = MODELS[name](), MODELS[name]()
    modules = {n: (m, type(m)) for n, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    data = {n: (p.data_ptr(), p._version) for n, p in parameters.items()}
    untouched = snapshot(other)
    old_forward = type(attentions(model)[0]).forward
    fastheads.patch(model, default_config(name, towers=BOTH))
    features(model).sum().backward()
    for path, (module, cls) in modules.items():
        assert model.get_submodule(path) is module and isinstance(module, cls)
    now = dict(model.named_parameters())
    assert all(now[n] is p for n, p in parameters.items())
    assert {n: (p.data_ptr(), p._version) for n, p in parameters.items()} == data
    assert attentions(model)[0].in_proj_weight is parameters["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert modules["visual.transformer.resblocks.0.attn"][1].forward is old_forward
    assert_unchanged(other, untouched)
    assert not fastheads.is_patched(other) and fastheads.is_patched(model)


def test_openclips_own_methods_go_on_working():
    model = clip()
    fastheads.patch(model)
    assert model.no_weight_decay() and model.visual.transformer.get_cast_dtype() == torch.float32
    out = model.visual.forward_intermediates(images(2), indices=[0])
    assert relative(out["image_features"], features(model, batch=2)) < 1e-6


@pytest.mark.parametrize("name", ["clip", "attention_qk_norm", "development"])
def test_deepcopy_and_pickle(name, tmp_path):
    model = patched(name)
    expected = {t: features(model, t).detach() for t in BOTH}
    torch.save(model, tmp_path / "model.pt")
    with fastheads.capture_heads(model):
        twin = copy.deepcopy(model)
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    for copied in (twin, read):
        assert fastheads.is_patched(copied)
        assert type(attentions(copied)[0]) is type(attentions(model)[0])
        assert all(torch.equal(features(copied, t), expected[t]) for t in BOTH)
        with fastheads.capture_heads(copied) as heads:
            features(copied)
        assert len(heads.features) == 3
        with torch.no_grad():
            fastheads.lora_parameters(copied)[0].zero_()  # its own storage
        fastheads.unpatch(copied)
        assert all(p.requires_grad for p in copied.parameters())
    assert fastheads.is_patched(model)
    assert all(torch.equal(features(model, t), expected[t]) for t in BOTH)


def test_states_are_split_by_name():
    model = clip()
    keys = list(model.state_dict())
    fastheads.patch(model, HeadConfig(targets=("q", "k", "v"), per_head=False))
    adapter = fastheads.adapter_state_dict(model)
    assert list(fastheads.base_state_dict(model)) == keys
    path = "visual.transformer.resblocks.2.attn.heads."
    shapes = {k.removeprefix(path): tuple(v.shape) for k, v in adapter.items() if k.startswith(path)}
    assert shapes == {"lora_A": (3, 1, 2, 64), "lora_B": (3, 4, 16, 2), "theta": (4,)}
    assert sorted(model.state_dict()) == sorted([*keys, *adapter])
    assert not torch.equal(adapter[path + "lora_A"], torch.zeros(3, 1, 2, 64))
    assert not adapter[path + "lora_B"].any() and not adapter[path + "theta"].any()


def test_gates_per_tower():
    model = patched(config=HeadConfig(gate="sigmoid", towers=BOTH))
    values = fastheads.gates(model)
    assert {t: tuple(v.shape) for t, v in values.items()} == {"visual": (3, 4), "text": (2, 2)}
    expected = torch.stack([2 * torch.sigmoid(a.heads.theta) for a in attentions(model)])
    assert relative(values["visual"], expected) < 1e-6 and not values["visual"].requires_grad
    model = clip()
    fastheads.patch(model, HeadConfig(layers=(0, 2)))
    assert torch.equal(fastheads.gates(model), torch.ones(2, 4))
    fastheads.unpatch(model)
    fastheads.patch(model, HeadConfig(gate=None))
    assert torch.equal(fastheads.gates(model), torch.ones(3, 4)) and fastheads.gate_parameters(model) == []


def test_explain_says_what_patch_says_and_changes_nothing():
    model = clip()
    before = snapshot(model)
    config = HeadConfig(layers=(2, 0), towers=BOTH[:1])
    foreseen = fastheads.explain(model, config)
    assert_unchanged(model, before)
    assert foreseen == fastheads.patch(model, config) == fastheads.explain(model)
    assert [layer.name for layer in foreseen.layers] == ["visual.0", "visual.2"]
    assert foreseen.layers[0].choice.name == "cpu"
    assert set(foreseen.layers[0].choice.refused) == {"stacked", "delta", "one_pass"}
    assert all(foreseen.layers[0].choice.refused.values())


def test_explain_names_what_only_the_reference_covers():
    for name, extra in [("attention_qk_norm", "ln_q"), ("development_cosine", "logit_scale")]:
        assert extra in str(fastheads.explain(MODELS[name]()))
    assert "head_scale" in str(fastheads.explain(MODELS["development_scale_heads"]()))
    model = clip()
    attentions(model)[0].dropout = 0.1
    assert "attention dropout" in str(fastheads.explain(model))


# ------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_16_bit_casts_keep_adapters_float32(cast):
    model = patched(config=HeadConfig())
    before = {k: v.clone() for k, v in fastheads.adapter_state_dict(model).items()}
    objects = [id(p) for p in fastheads.lora_parameters(model)]
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "to": torch.bfloat16}[cast]
    model.to("cpu", dtype) if cast == "to" else getattr(model, cast)()
    assert all(v.dtype == dtype for v in fastheads.base_state_dict(model).values() if v.is_floating_point())
    after = fastheads.adapter_state_dict(model)
    assert all(after[k].dtype == torch.float32 and torch.equal(after[k], v) for k, v in before.items())
    assert [id(p) for p in fastheads.lora_parameters(model)] == objects
    out = features(model)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fastheads.lora_parameters(model))


def test_patching_a_16_bit_base_makes_float32_adapters():
    for dtype in (torch.bfloat16, torch.float16):
        model = clip().to(dtype)
        fastheads.patch(model)
        assert {v.dtype for v in fastheads.adapter_state_dict(model).values()} == {torch.float32}


def test_double_makes_float64_adapters():
    model = patched()
    before = {k: v.clone() for k, v in fastheads.adapter_state_dict(model).items()}
    model.double()
    after = fastheads.adapter_state_dict(model)
    assert all(after[k].dtype == torch.float64 and torch.equal(after[k].float(), v) for k, v in before.items())
    model = clip().double()
    fastheads.patch(model)
    assert {v.dtype for v in fastheads.adapter_state_dict(model).values()} == {torch.float64}
    assert features(model).dtype == torch.float64


def test_back_from_double_the_adapters_are_float32():
    model = patched().double().float()
    assert {v.dtype for v in fastheads.adapter_state_dict(model).values()} == {torch.float32}


def test_a_cast_keeps_gradients_of_adapters_in_their_dtype():
    model = patched()
    features(model).sum().backward()
    model.half()
    assert {p.grad.dtype for p in fastheads.lora_parameters(model) if p.grad is not None} == {torch.float32}


def test_autocast_computes_in_bfloat16_and_trains_in_float32():
    model = patched(config=HeadConfig())
    plain = features(model).detach()
    with torch.autocast("cpu", torch.bfloat16), fastheads.capture_heads(model) as heads:
        out = features(model)
    assert out.dtype == torch.bfloat16 and heads.features.dtype == torch.float32
    assert relative(out, plain) < 0.1
    out.float().square().sum().backward()
    for p in (*fastheads.lora_parameters(model), *fastheads.gate_parameters(model)):
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_base_weights_are_never_written(dtype):
    """PEFT merges and unmerges around each forward: bf16 weights drift by 1.8 % in 100 steps."""
    model = clip(layers=1, vision={"width": 16, "head_width": 8, "image_size": 16}).to(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fastheads.patch(model, HeadConfig(rank=2))
    trained = [*fastheads.lora_parameters(model), *fastheads.gate_parameters(model)]
    start = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    x = images(2, 16).to(dtype)
    for _ in range(1000):
        model.encode_image(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, s) and p.isfinite().all() for p, s in zip(trained, start, strict=True))
    after = fastheads.base_state_dict(model)
    assert all(torch.equal(after[k], v) for k, v in before.items())


# ------------------------------------------------------------------------- the outputs, against dense weights


@pytest.mark.parametrize("name", GATED)
def test_outputs_and_gradients_equal_dense_float64_autograd(name):
    config = HeadConfig(rank=2, alpha=3.0, towers=BOTH)
    model = patched(name, config, dtype=torch.float64)
    for tower in BOTH:
        model.zero_grad()
        expected, adapters = oracle(model, MODELS[name], config, tower)
        out = features(model, tower)
        assert relative(out, expected) < 1e-9
        weight = torch.linspace(-1, 1, out.numel()).view_as(out).double()
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        wanted = {k: v.grad for k, v in adapters.items() if v.grad is not None}
        assert len(wanted) == 3 * len(attentions(model, tower))
        assert_same_gradients(gradients(model), wanted, 1e-8)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_config_equals_dense_float64(config):
    model = patched("clip", config, dtype=torch.float64)
    single = patched("clip", config)
    for tower in BOTH:
        expected, adapters = oracle(model, clip, config, tower)
        assert relative(features(model, tower), expected) < 1e-9
        assert relative(features(single, tower), oracle(single, clip, config, tower)[0]) < 1e-5
        model.zero_grad()
        features(model, tower).square().sum().backward()
        expected.square().sum().backward()
        assert_same_gradients(gradients(model), {k: v.grad for k, v in adapters.items() if v.grad is not None}, 1e-8)


def test_unfrozen_base_weights_get_their_gradients():
    config = HeadConfig(rank=2)
    model = patched("clip", config, dtype=torch.float64)
    dense, _ = oracle(model, clip, config, "visual")
    last = attentions(model)[-1]
    parts = {"out_proj.weight": last.out_proj.weight, "out_proj.bias": last.out_proj.bias}
    parts |= {"in_proj_weight": last.in_proj_weight, "in_proj_bias": last.in_proj_bias}
    for p in parts.values():
        p.requires_grad_()
    features(model).square().sum().backward()
    step = 1e-5
    for name, p in parts.items():
        with seeded(3):
            direction = torch.randn_like(p)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * step)
                ends.append(features(model).square().sum())
                p.sub_(direction, alpha=sign * step)
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert abs(float((p.grad * direction).sum()) - slope) < 1e-6 * abs(slope), name
    assert relative(features(model), dense) < 1e-9


def test_lora_dropout_drops_in_training_only():
    model = patched(config=HeadConfig(dropout=0.5))
    expected = features(patched(config=HeadConfig())).detach()
    model.train()
    first, second = features(model), features(model)
    assert relative(first, second) > 1e-3
    first.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fastheads.lora_parameters(model))
    assert relative(features(model.eval()), expected) < 1e-6
    small = patched(config=HeadConfig(dropout=0.5), size=0.005)
    x = images(1)
    with seeded(0), torch.no_grad():  # its mean is the plain model's, to first order in the delta
        mean = small.train().encode_image(x.expand(400, -1, -1, -1)).mean(0, keepdim=True)
        plain, start = small.eval().encode_image(x), features(patched(config=HeadConfig(), size=0.0), batch=1)
    assert float((mean - plain).norm() / (plain - start).norm()) < 0.1


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


# -------------------------------------------------------------------------------------------------- disabled


@pytest.mark.parametrize("name", MODELS)
def test_disabled_is_the_original_bit_for_bit(name):
    # With the flags that patch leaves: torch itself takes other paths for frozen weights, other in the last bits
    # (nn.MultiheadAttention's fast path in eval with gradients on; matmul, which folds by requires_grad).
    model = MODELS[name]().requires_grad_(False)
    runs = [(t, mode) for t in BOTH for mode in (True, False)]
    expected = {(t, mode): features(model.train(mode), t) for t, mode in runs}
    fastheads.patch(model, default_config(name, towers=BOTH))
    fill_adapters(model)
    with fastheads.disabled(model) as inside:
        assert inside is model
        assert all(torch.equal(features(model.train(mode), t), expected[t, mode]) for t, mode in runs)
    assert all(relative(features(model.train(mode), t), expected[t, mode]) > 1e-3 for t, mode in runs)


def test_disabled_nests_and_ends_with_an_exception():
    model = patched()
    with torch.no_grad():
        stock = features(stock_copy(model, clip).float())
        on = features(model)
        with fastheads.disabled(model):
            with fastheads.disabled(model):
                assert relative(features(model), stock) < 1e-5
            assert relative(features(model), stock) < 1e-5
        assert torch.equal(features(model), on)
        with pytest.raises(KeyError), fastheads.disabled(model):
            raise KeyError
        assert torch.equal(features(model), on)


# --------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["clip", "cls_embedding", "development"])
def test_checkpointing_gives_the_same_gradients(name, dropout):
    config = HeadConfig(dropout=dropout, towers=BOTH)
    results = []
    for blocks, recompute in [(False, False), (True, False), (False, True), (True, True)]:
        model = patched(name, config, recompute=recompute).train()
        model.set_grad_checkpointing(blocks)
        with seeded(7):
            sum(features(model, t).square().sum() for t in BOTH).backward()
        results.append(gradients(model))
    assert len(results[0]) == 15
    for other in results[1:]:
        assert_same_gradients(other, results[0], 1e-6)


# ---------------------------------------------------------------------------------------------- capture_heads


def own_heads(model, build, config, tower):
    """`[L, B, H, dh]` un-gated heads of the pooled token, from a float64 stock model's attention inputs."""
    seen = []

    def keep(module, args, kwargs):
        seen.append((module, args[0], kwargs.get("attn_mask")))

    stock = TowerOf(stock_copy(model, build), tower)
    adapters = fastheads.adapter_state_dict(model)
    dense = dense_weights(model, adapters, config, tower)
    for attention in attentions(stock.model, tower):
        attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        x = stock.inputs()
        torch.func.functional_call(stock, {f"model.{k}": v for k, v in dense.items()}, (x,))
        prefix = "visual." if tower == "visual" else "text." if hasattr(model, "text") else ""
        out = []
        for layer, (attention, y, mask) in enumerate(seen):
            count, tokens, dim = y.shape
            heads = attention.num_heads
            w = dense[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_weight"]
            q, k, v = (y @ w.T + attention.in_proj_bias).view(count, tokens, 3, heads, -1).unbind(2)
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / (dim // heads) ** 0.5
            if mask is not None and mask.dtype == torch.bool:  # only the development branch's reach here
                mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
            if mask is not None:
                scores = scores + (mask if mask.dim() == 2 else mask.view(count, heads, tokens, tokens))
            out.append(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v))
    each = torch.stack(out)
    if tower == "visual":
        average = build is not clip and "development" not in getattr(build, "__name__", "")
        return each[:, :, 1:].mean(2) if average else each[:, :, 0]
    if getattr(getattr(model, "text", None), "cls_emb", None) is not None:
        return each[:, :, -1]
    ends = [row.index(EOT) for row in x.tolist()]
    return torch.stack([each[:, i, end] for i, end in enumerate(ends)], 1)


@pytest.mark.parametrize("tower", BOTH)
@pytest.mark.parametrize("name", ["clip", "custom_text", "cls_embedding", "development"])
def test_captured_heads_are_the_ungated_heads_of_the_pooled_token(name, tower):
    config = HeadConfig(rank=2, alpha=3.0, towers=BOTH)
    model = patched(name, config, dtype=torch.float64)
    expected = own_heads(model, MODELS[name], config, tower)
    with fastheads.capture_heads(model, tower) as heads:
        features(model, "text"), features(model, "visual")
    assert heads.features.shape == expected.shape == ((3, 3, 4, 16) if tower == "visual" else (2, 3, 2, 16))
    assert not heads.features.requires_grad and heads.features.dtype == torch.float64
    assert relative(heads.features, expected) < 1e-9
    assert len(heads.thetas) == len(expected) and heads.gates.requires_grad
    wanted = fastheads.gates(model)[tower]
    assert torch.equal(heads.gates, wanted)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("tower", BOTH)
@pytest.mark.parametrize("recompute", ["blocks", "heads"])
def test_recomputation_records_nothing_twice(recompute, tower, where):
    model = patched(config=HeadConfig(towers=(tower,)), recompute=recompute == "heads")
    with fastheads.capture_heads(model) as plain:
        features(model, tower)
    model.set_grad_checkpointing(recompute == "blocks")
    with fastheads.capture_heads(model) as heads:
        out = features(model, tower)
        if where == "inside":
            out.sum().backward()
    if where == "outside":
        out.sum().backward()
    assert heads.features.shape == plain.features.shape
    assert torch.equal(heads.features, plain.features)


def test_capture_follows_the_forward_passes():
    model = patched(config=HeadConfig(layers=(0, 2)))
    with fastheads.capture_heads(model) as first:
        features(model, batch=2, seed=1)
    with fastheads.capture_heads(model) as second:
        features(model, batch=3, seed=2)
    with fastheads.capture_heads(model) as both:
        features(model, batch=2, seed=1)
        with fastheads.disabled(model):
            features(model, batch=4)
        with torch.no_grad():
            features(model, batch=3, seed=2)
    features(model, batch=5)  # outside: not recorded
    assert both.features.shape == (2, 5, 4, 16)
    # close, not equal: a matmul of PyTorch's may round a row differently with where the storage happens to lie
    torch.testing.assert_close(both.features, torch.cat((first.features, second.features), 1))


def test_capture_errors():
    model = patched(config=HeadConfig())
    with fastheads.capture_heads(model) as heads:
        pass
    with pytest.raises(RuntimeError, match="nothing was captured"):
        heads.features  # noqa: B018
    with fastheads.capture_heads(model), fastheads.disabled(model):
        features(model)
    nested = fastheads.capture_heads(model)
    with pytest.raises(ValueError, match="captured already"), fastheads.capture_heads(model), nested:
        pass
    with fastheads.capture_heads(model):  # the failed one left nothing behind
        pass
    with pytest.raises(KeyError), fastheads.capture_heads(model):
        raise KeyError
    with fastheads.capture_heads(model) as again:
        features(model)
    assert again.features.shape[1] == 3
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_capture_of_both_towers_at_once():
    model = patched()
    with fastheads.capture_heads(model, "visual") as image, fastheads.capture_heads(model, "text") as text:
        model(images(3), texts(3))
    assert image.features.shape == (3, 3, 4, 16) and text.features.shape == (2, 3, 2, 16)


# ----------------------------------------------------------------------------------- compile, processes


def small_tower(tower):
    """One layer: compiling takes seconds for each."""
    torch._dynamo.reset()
    model = clip(layers=1, text={"layers": 1})
    fastheads.patch(model, HeadConfig(towers=(tower,)))
    return TowerOf(fill_adapters(model), tower)


@pytest.mark.parametrize("tower", BOTH)
def test_compile_fullgraph(tower):
    model = small_tower(tower)
    x = model.inputs()
    expected = model(x)
    expected.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert relative(out, expected) < 1e-5
    out.square().sum().backward()
    assert_same_gradients(gradients(model), wanted, 1e-4)
    assert fastheads.is_patched(compiled)
    with pytest.raises(TypeError, match="OptimizedModule.*patch first"):
        fastheads.patch(torch.compile(clip()))


@pytest.mark.parametrize("tower", BOTH)
def test_compile_fullgraph_with_capture(tower):
    model = small_tower(tower)
    x = model.inputs()
    with fastheads.capture_heads(model.model) as plain:
        expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with fastheads.capture_heads(model.model) as heads:
            out = compiled(x)
        assert relative(out, expected) < 1e-5
        assert relative(heads.features, plain.features) < 1e-5


@pytest.mark.slow
def test_ddp_means_the_gradients(tmp_path):
    model = patched(config=HeadConfig())
    features(model, batch=4).square().mean().backward()
    on_ranks(ddp_gradients, 2, str(tmp_path))
    found = torch.load(tmp_path / "gradients.pt")
    assert_same_gradients({k: g for k, g in found.items() if g is not None}, gradients(model), 1e-5)


def test_development_cross_attention_layers_are_refused():
    model = development()
    model.visual.transformer.resblocks[1].attn = Attention(64, 4, cross=True)
    before = snapshot(model)
    with pytest.raises(TypeError, match="cross-attention"):
        fastheads.patch(model)
    assert_unchanged(model, before)
