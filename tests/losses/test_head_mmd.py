"""head_mmd on a patched model: what its gradients are, and which tensors they reach."""

import math

import pytest
import standins
import torch
from standins import relative

import fastheads

DOMAINS = torch.tensor([0, 1, 0, 2, 1, 2, 0])
GAMMAS = (0.05, 0.4)
OPTIONS = {"kernel": GAMMAS, "estimator": "biased"}
CONFIGS = {
    "softmax": fastheads.HeadConfig(),
    "sigmoid": fastheads.HeadConfig(gate="sigmoid"),
    "two layers": fastheads.HeadConfig(layers=(0, 2)),
    "gates only": fastheads.HeadConfig(rank=0),
}
FEATURES = ("heads", "embedding")


def build(config="softmax", name="clip", **options):
    """A model in float64 whose every tensor asks for a gradient, text tower and base weights included."""
    model = standins.patched(name, CONFIGS[config], dtype=torch.float64, **options)
    return model.requires_grad_(True)


def batch(seed=3):
    return standins.images(len(DOMAINS), seed=seed).double()


def loss_of(model, features, images=None, **options):
    with fastheads.capture_heads(model) as heads:
        embedding = model.encode_image(batch() if images is None else images)
    chosen = embedding if features == "embedding" else None
    return fastheads.head_mmd(heads, DOMAINS, features=features, embedding=chosen, **(OPTIONS | options))


def gradients(model, loss):
    """Name → gradient of what the backward pass of `loss` reached."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def theta_names(model):
    return {name for name, _ in model.named_parameters() if name.endswith("heads.theta")}


# ------------------------------------------------------------------- the same, written out without fastheads


def mmd_by_loops(x, domains=DOMAINS):
    """Biased MMD² with the kernels exp(−γ‖x − y‖²), mean over the pairs of domains; x `[N, D]`."""

    def mean_kernel(first, second):
        values = [torch.exp(-g * (a - b).square().sum()) for a in first for b in second for g in GAMMAS]
        return sum(values) / (len(first) * len(second))

    groups = [x[domains == d] for d in domains.unique()]
    pairs = []
    for i, first in enumerate(groups):
        for second in groups[i + 1 :]:
            pairs.append(mean_kernel(first, first) + mean_kernel(second, second) - 2 * mean_kernel(first, second))
    return sum(pairs) / len(pairs)


def gate_of(theta, kind):
    return len(theta) * theta.exp() / theta.exp().sum() if kind == "softmax" else 2 / (1 + (-theta).exp())


def dense_run(model, config, images):
    """A stock model with weights written out head by head: its embedding, the un-gated heads of its class token per
    layer `[L][B, H, dh]`, and the adapters that both are differentiable in."""
    adapters = {k: v.detach().clone().requires_grad_() for k, v in fastheads.adapter_state_dict(model).items()}
    stock = standins.stock_copy(model, standins.MODELS["clip"])
    dense = standins.dense_weights(model, adapters, config, "visual")
    tower = standins.TowerOf(stock, "visual")
    inputs = []
    for block in stock.visual.transformer.resblocks:
        block.ln_1.register_forward_hook(lambda _, __, out: inputs.append(out))
    out = torch.func.functional_call(tower, {f"model.{k}": v for k, v in dense.items()}, (images,))
    heads = []
    for layer, (block, x) in enumerate(zip(stock.visual.transformer.resblocks, inputs, strict=True)):
        H = block.attn.num_heads
        w = dense[f"visual.transformer.resblocks.{layer}.attn.in_proj_weight"]
        parts = []
        for h in range(H):
            rows = [range(part * 64 + h * 16, part * 64 + (h + 1) * 16) for part in range(3)]
            q, k, v = (x @ w[list(r)].T + block.attn.in_proj_bias[list(r)] for r in rows)
            parts.append(((q @ k.transpose(1, 2) / math.sqrt(16)).softmax(-1) @ v)[:, 0])
        heads.append(torch.stack(parts, 1))
    return out, heads, adapters


def theta_of(adapters, layer):
    return adapters[f"visual.transformer.resblocks.{layer}.attn.heads.theta"]


def layers_of(config):
    return (0, 1, 2) if config.layers is None else config.layers


# --------------------------------------------------------------------------------- whom the gradient reaches


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_gradient_reaches_every_gate_and_nothing_else(config, features):
    model, images = build(config), batch().requires_grad_()
    loss = loss_of(model, features, images)
    assert loss.shape == () and loss > 0
    reached = gradients(model, loss)
    assert set(reached) == theta_names(model)
    assert len(reached) == len(layers_of(CONFIGS[config]))
    assert images.grad is None or not images.grad.any()


@pytest.mark.parametrize("features", FEATURES)
def test_both_towers_patched_it_reaches_the_captured_one_alone(features):
    model = standins.patched("clip", fastheads.HeadConfig(towers=standins.BOTH), dtype=torch.float64)
    model.requires_grad_(True)
    reached = gradients(model, loss_of(model, features))
    assert set(reached) == {name for name in theta_names(model) if name.startswith("visual.")}
    with fastheads.capture_heads(model, "text") as heads:
        embedding = model.encode_text(standins.texts(len(DOMAINS)))
    loss = fastheads.head_mmd(heads, DOMAINS, features=features, embedding=embedding, **OPTIONS)
    assert set(gradients(model, loss)) == {name for name in theta_names(model) if not name.startswith("visual.")}


@pytest.mark.parametrize("features", FEATURES)
def test_an_embedding_that_is_a_leaf_of_another_loss_is_left_alone(features):
    """Only the gates' part of the graph carries the MMD: what lies between tower and loss gets nothing of it."""
    model = build()
    with fastheads.capture_heads(model) as heads:
        embedding = model.encode_image(batch())
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    scaled = embedding * scale
    fastheads.head_mmd(heads, DOMAINS, features=features, embedding=scaled, **OPTIONS).backward()
    assert scale.grad is None


# -------------------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("config", CONFIGS)
def test_heads_is_the_mmd_of_gated_concatenated_heads_averaged_over_layers(config):
    model, kind = build(config), CONFIGS[config].gate
    loss = loss_of(model, "heads")
    _, heads, adapters = dense_run(model, CONFIGS[config], batch())
    per_layer = {}
    for layer in layers_of(CONFIGS[config]):
        gated = heads[layer].detach() * gate_of(theta_of(adapters, layer), kind)[:, None]
        per_layer[layer] = mmd_by_loops(gated.flatten(1))
    expected = sum(per_layer.values()) / len(per_layer)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    reached = gradients(model, loss)
    for layer, own in per_layer.items():
        # of this layer's MMD alone: gates of layers below change its input, but not its gradient
        (wanted,) = torch.autograd.grad(own / len(per_layer), theta_of(adapters, layer))
        assert relative(reached[f"visual.transformer.resblocks.{layer}.attn.heads.theta"], wanted) < 1e-8


def test_without_the_detaching_the_lower_layers_gradient_would_be_another():
    """So that the test above can tell a layer-local gradient from a full one."""
    model = build()
    _, heads, adapters = dense_run(model, CONFIGS["softmax"], batch())
    gated = [h * gate_of(theta_of(adapters, layer), "softmax")[:, None] for layer, h in enumerate(heads)]
    full = [mmd_by_loops(g.flatten(1)) for g in gated]
    (through,) = torch.autograd.grad(sum(full) / 3, theta_of(adapters, 0))
    local = gradients(model, loss_of(model, "heads"))["visual.transformer.resblocks.0.attn.heads.theta"]
    assert relative(local, through) > 1e-2


@pytest.mark.parametrize("config", CONFIGS)
def test_embedding_is_the_mmd_of_the_embedding_with_its_gradient_to_each_gate(config):
    model = build(config)
    loss = loss_of(model, "embedding")
    embedding, _, adapters = dense_run(model, CONFIGS[config], batch())
    expected = mmd_by_loops(embedding)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    reached = gradients(model, loss)
    assert reached
    for name, got in reached.items():
        (wanted,) = torch.autograd.grad(expected, adapters[name], retain_graph=True)
        assert relative(got, wanted) < 1e-8, name


@pytest.mark.parametrize("features", FEATURES)
def test_options_go_to_mmd(features):
    """Preset, estimator and number of domains; against `mmd` on the same features."""
    model = build()
    with fastheads.capture_heads(model) as heads:
        embedding = model.encode_image(batch())
    gated = (heads.features * heads.gates[:, None, :, None]).flatten(2)
    for options in ({}, {"kernel": "dan"}, {"kernel": "domainbed", "estimator": "unbiased"}, {"num_domains": 5}):
        got = fastheads.head_mmd(heads, DOMAINS, features=features, embedding=embedding, **options)
        wanted = fastheads.mmd(gated if features == "heads" else embedding, DOMAINS, **options)
        assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    with pytest.raises(ValueError, match="^kernel"):
        fastheads.head_mmd(heads, DOMAINS, features=features, embedding=embedding, kernel="laplace")


@pytest.mark.parametrize("features", FEATURES)
def test_several_passes_inside_one_capture_are_one_batch(features):
    model, images = build(), batch()
    with fastheads.capture_heads(model) as heads:
        embedding = torch.cat([model.encode_image(images[:3]), model.encode_image(images[3:])])
    parts = fastheads.head_mmd(heads, DOMAINS, features=features, embedding=embedding, **OPTIONS)
    got, wanted = gradients(model, parts), gradients(model, loss_of(model, features))
    assert set(got) == set(wanted)
    assert all(relative(got[name], wanted[name]) < 1e-9 for name in wanted)


# --------------------------------------------------------------------- beside other losses, under recomputation


def together(model, features, weight):
    """Cross-entropy and the MMD of one forward pass, in one backward pass."""
    with fastheads.capture_heads(model) as heads:
        embedding = model.encode_image(batch())
    weights = torch.randn(5, standins.EMBED, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(len(DOMAINS)) % 5
    cross_entropy = torch.nn.functional.cross_entropy(embedding @ weights.T, labels)
    loss = weight * fastheads.head_mmd(heads, DOMAINS, features=features, embedding=embedding, **OPTIONS)
    return cross_entropy, loss


@pytest.mark.parametrize("features", FEATURES)
def test_beside_cross_entropy_the_gradients_add_up(features):
    model = build()
    ce, mmd = (gradients(model, together(model, features, 3.0)[i]) for i in (0, 1))
    both = gradients(model, sum(together(model, features, 3.0)))
    assert set(both) == set(ce) and any(name.endswith("lora_B") for name in ce)
    for name, got in both.items():
        if name in theta_names(model):
            assert relative(got, ce[name] + mmd[name]) < 1e-10
            assert relative(got, ce[name]) > 1e-3
        else:
            assert torch.equal(got, ce[name]), name


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("name", "how"),
    [  # OpenCLIP 3.3.0's blocks around its own Attention can't be checkpointed
        *(("clip", how) for how in ("checkpointing", "recompute", "both")),
        ("custom_text", "both"),
        ("attention", "recompute"),
    ],
)
def test_recomputation_in_the_backward_pass_changes_nothing(name, how, features):
    plain = build(name=name).train()
    wanted = gradients(plain, sum(together(plain, features, 3.0)))
    model = build(name=name, recompute=how != "checkpointing").train()
    if how != "recompute":
        model.set_grad_checkpointing()
    runs = []
    model.visual.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_: runs.append(1))
    reached = gradients(model, sum(together(model, features, 3.0)))
    assert len(runs) == (1 if how == "recompute" else 2 if features == "heads" else 3)  # it did recompute
    assert set(reached) == set(wanted)
    assert all(relative(reached[n], wanted[n]) < 1e-10 for n in wanted)


def test_a_backward_pass_inside_the_capture_records_nothing_twice():
    model = build().train()
    model.set_grad_checkpointing()
    with fastheads.capture_heads(model) as heads:
        model.encode_image(batch()).square().sum().backward()
        assert heads.features.shape == (3, len(DOMAINS), 4, 16)


def test_one_domain_in_the_batch_gives_zero_and_no_gradient():
    model = build()
    for features in FEATURES:
        with fastheads.capture_heads(model) as heads:
            embedding = model.encode_image(batch())
        alone = torch.ones(len(DOMAINS), dtype=torch.long)
        loss = fastheads.head_mmd(heads, alone, features=features, embedding=embedding, num_domains=3)
        assert loss.item() == 0
        assert gradients(model, loss) == {}


@pytest.mark.parametrize("features", FEATURES)
def test_under_autocast_the_gates_still_get_their_gradient(features):
    model = standins.patched("clip", fastheads.HeadConfig())
    images = batch().float()
    with torch.autocast("cpu", torch.bfloat16), fastheads.capture_heads(model) as heads:
        embedding = model.encode_image(images)
        loss = fastheads.head_mmd(heads, DOMAINS, features=features, embedding=embedding, **OPTIONS)
    reached = gradients(model, loss)
    assert set(reached) == theta_names(model)
    wanted = gradients(model, loss_of(model, features, images))
    for name, got in reached.items():
        assert got.dtype == torch.float32
        assert relative(got, wanted[name]) < 0.1  # bfloat16 keeps 8 bits
