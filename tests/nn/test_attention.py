"""What a patched attention computes, and the gradients of its adapters: against dense float64 weights; recomputed,
compiled, on two processes.

"Relative" is max |a − b| / max |b|. 1e-5 for float32: the stock attention itself is 1e-6 off its float64 value here.
1e-9 for float64, where both sides do the same sums in another order.
"""

import pytest
import torch
from processes import on_ranks
from standins import (
    ALL,
    BOTH,
    CONFIGS,
    MODELS,
    UNGATED,
    TowerOf,
    attentions,
    clip,
    ddp_gradients,
    features,
    fill_adapters,
    images,
    oracle,
    patched,
    relative,
    seeded,
)

import fastheads
from fastheads import HeadConfig

GATED = [name for name in MODELS if name not in UNGATED]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys() and expected
    for name, grad in expected.items():
        assert relative(actual[name], grad) < tolerance, name


# ------------------------------------------------------------------------- the outputs, against dense weights


@pytest.mark.parametrize("name", GATED)
def test_outputs_and_gradients_equal_dense_float64_autograd(name):
    config = HeadConfig(rank=2, alpha=3.0, targets=ALL, towers=BOTH)
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
        assert len(wanted) == 9 * len(attentions(model, tower))
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


@pytest.mark.parametrize("targets", [("q", "v"), ("o", "mlp")], ids="".join)
def test_lora_dropout_drops_in_training_only(targets):
    model = patched(config=HeadConfig(dropout=0.5, targets=targets))
    expected = features(patched(config=HeadConfig(targets=targets))).detach()
    model.train()
    first, second = features(model), features(model)
    assert relative(first, second) > 1e-3
    first.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fastheads.lora_parameters(model))
    assert relative(features(model.eval()), expected) < 1e-6
    small = patched(config=HeadConfig(dropout=0.5, targets=targets), size=0.005)
    x = images(1)
    with seeded(0), torch.no_grad():  # its mean is the plain model's, to first order in the delta
        mean = small.train().encode_image(x.expand(400, -1, -1, -1)).mean(0, keepdim=True)
        plain, start = (
            small.eval().encode_image(x),
            features(patched(config=HeadConfig(targets=targets), size=0.0), batch=1),
        )
    assert float((mean - plain).norm() / (plain - start).norm()) < 0.1


# --------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("name", ["attention_qk_norm", "timm_rotary", "development_cosine"])
def test_the_reference_path_keeps_no_probabilities_where_none_are_asked_for(name):
    model, kept = patched(name, HeadConfig()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        expected = features(model)
    assert kept and not [shape for shape in kept if shape[-2:] == (17, 17)]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(features(model), expected) < 5e-2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["clip", "cls_embedding", "development", "timm"])
def test_checkpointing_gives_the_same_gradients(name, dropout):
    config = HeadConfig(dropout=dropout, targets=ALL if name == "timm" else ("q", "v"), towers=BOTH)
    results = []
    for blocks, recompute in [(False, False), (True, False), (False, True), (True, True)]:
        model = patched(name, config, recompute=recompute).train()
        model.set_grad_checkpointing(blocks)
        with seeded(7):
            sum(features(model, t).square().sum() for t in BOTH).backward()
        results.append(gradients(model))
    assert len(results[0]) == 5 * (9 if name == "timm" else 3)
    for other in results[1:]:
        assert_same_gradients(other, results[0], 1e-6)


# ----------------------------------------------------------------------------------- compile, processes


def small_tower(tower):
    """One layer: compiling takes seconds for each."""
    torch._dynamo.reset()
    model = clip(layers=1, text={"layers": 1})
    fastheads.patch(model, HeadConfig(targets=ALL if tower == "visual" else ("q", "v"), towers=(tower,)))
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
