"""patch, unpatch, disabled, explain: what of a model is left untouched, and that it comes back.

"Relative" is max |a − b| / max |b|. 1e-5 for float32: the stock attention itself is 1e-6 off its float64 value here.
"""

import copy
import gc
from dataclasses import replace

import open_clip
import pytest
import torch
from standins import (
    ALL,
    BOTH,
    CONTEXT,
    MODELS,
    Attention,
    assert_unchanged,
    attentions,
    clip,
    default_config,
    development,
    disturb,
    features,
    fill_adapters,
    images,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["clip", "timm", "attention_inner_norm"])
def test_linear_layers_start_bit_for_bit(name, dtype):
    model, other = (MODELS[name]().to(dtype) for _ in range(2))
    config = default_config(name, targets=("q", "v"))
    with seeded(0):
        fastheads.patch(model, config)
    with seeded(0):
        fastheads.patch(other, replace(config, targets=ALL))
    with torch.no_grad():
        assert torch.equal(features(model), features(other))


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_brings_back_every_bit_and_flag(name):
    model = MODELS[name]()
    model.visual.lock(unlocked_groups=1)  # mixed flags
    model.logit_scale.requires_grad_(False)
    attentions(model, "text")[1].in_proj_bias.requires_grad_(False)
    assert len(set(snapshot(model)["flags"].values())) == 2
    before = snapshot(model)
    values = {t: features(model, t).detach() for t in BOTH}
    fastheads.patch(model, default_config(name, targets=ALL, towers=BOTH))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(fastheads.adapter_state_dict(model))
    assert list(fastheads.base_state_dict(model)) == before["keys"]
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
@pytest.mark.parametrize(("name", "layers"), [("ViT-B-32", 12), ("ViT-B-16", 2), ("ViT-L-14", 2), ("ViT-H-14", 2)])
def test_real_configs_start_merge_and_unpatch(name, layers):
    """OpenCLIP's sizes but the vocabulary; one has all its layers, the others two: a layer more has no other code."""
    config = open_clip.get_model_config(name)
    config["text_cfg"]["vocab_size"] = 64
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = layers
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


# -------------------------------------------------------------------------------------------------- disabled


@pytest.mark.parametrize("name", MODELS)
def test_disabled_is_the_original_bit_for_bit(name):
    # With the flags that patch leaves: torch itself takes other paths for frozen weights, other in the last bits
    # (nn.MultiheadAttention's fast path in eval with gradients on; matmul, which folds by requires_grad).
    model = MODELS[name]().requires_grad_(False)
    runs = [(t, mode) for t in BOTH for mode in (True, False)]
    expected = {(t, mode): features(model.train(mode), t) for t, mode in runs}
    fastheads.patch(model, default_config(name, targets=ALL, towers=BOTH))
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


def without_heads(model, heads, tower):
    """A stock model whose out_proj has zeros where these heads come in."""
    for layer, head in heads:
        attention = attentions(model, tower)[layer]
        out = getattr(attention, "proj", None) or attention.out_proj
        with torch.no_grad():
            out.weight[:, 16 * head : 16 * (head + 1)] = 0
    return model


@pytest.mark.parametrize("tower", BOTH)
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", None])
@pytest.mark.parametrize("name", ["clip", "attention_qk_norm", "development_cosine", "attention_scale_heads", "timm"])
def test_masked_heads_add_nothing_and_others_what_they_did(name, gate, tower):
    closed = [(0, 1), (1, 0), (0, 1)]
    with torch.no_grad():
        expected = features(without_heads(MODELS[name](), closed, tower), tower)
        model = MODELS[name]()
        fastheads.patch(model, HeadConfig(gate=gate, targets=ALL if gate else ("o", "fc2"), towers=BOTH))
        with fastheads.masked(model, closed, tower) as inside:
            assert inside is model
            assert relative(features(model, tower), expected) < 1e-5
        fill_adapters(model)
        on = features(model, tower)
        with fastheads.masked(model, [], tower):
            assert torch.equal(features(model, tower), on)
        with fastheads.masked(model, closed[:1], tower), fastheads.masked(model, closed[1:2], tower):
            nested = features(model, tower)
            merged = fastheads.merge(copy.deepcopy(model))
        assert (
            relative(features(without_heads(fastheads.merge(copy.deepcopy(model)), closed, tower), tower), nested)
            < 1e-5
        )
        assert relative(features(merged, tower), nested) < 1e-5
        assert torch.equal(features(model, tower), on)


def test_masked_heads_are_captured_as_they_are_and_their_gates_are_zero():
    model = patched(config=HeadConfig())
    with fastheads.capture_heads(model) as on:
        features(model)
    with fastheads.masked(model, [(0, 2)]), fastheads.capture_heads(model) as heads:
        features(model).square().mean().backward()
        assert heads.gates[0].tolist() == [*on.gates[0, :2].tolist(), 0.0, on.gates[0, 3].item()]
        assert torch.equal(heads.gates, fastheads.gates(model))
    assert torch.equal(heads.features[0], on.features[0])
    lora_A = attentions(model)[0].heads.lora_A.grad
    assert lora_A[:, 2].count_nonzero() == 0 and lora_A[:, 1].count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_head_adds_exactly_nothing_through_the_output_projections_delta(dtype):
    model = patched(config=HeadConfig(targets=ALL), dtype=dtype)
    own = attentions(model)[1].out_proj.heads
    with torch.no_grad(), fastheads.masked(model, [(1, 2)]):
        before = features(model)
        own.lora_A[2], own.lora_B[2] = 7.0, -9.0
        assert torch.equal(features(model), before)
        own.lora_B[1] = -9.0
        assert not torch.equal(features(model), before)


def test_masked_takes_layers_without_parameters_of_their_own():
    model = patched(config=HeadConfig(rank=(2, 0, 2), gate=None))
    on = features(model)
    with fastheads.masked(model, [(1, 0)]):
        assert relative(features(model), on) > 1e-3


def test_a_model_merged_while_heads_are_masked_is_a_stock_one_without_them():
    model = patched(config=HeadConfig())
    with fastheads.masked(model, [(1, 2)]):
        without = features(model)
        fastheads.merge(model)
    assert not fastheads.is_patched(model)
    assert relative(features(model), without) < 1e-5


def test_masked_ends_with_an_exception():
    model = patched(config=HeadConfig())
    on = features(model)
    with pytest.raises(KeyError), fastheads.masked(model, [(0, 0)]):
        assert not torch.equal(features(model), on)
        raise KeyError
    assert torch.equal(features(model), on)


def test_development_cross_attention_layers_are_refused():
    model = development()
    model.visual.transformer.resblocks[1].attn = Attention(64, 4, cross=True)
    before = snapshot(model)
    with pytest.raises(TypeError, match="cross-attention"):
        fastheads.patch(model)
    assert_unchanged(model, before)
