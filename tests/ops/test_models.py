"""Whole patched models over the operator: checkpointing, DDP, FSDP2, torch.compile, and each form in its place."""

import functools
import re
from pathlib import Path

import pytest
import torch
from problems import DEVICE, DTYPES, GPU, close
from processes import on_ranks
from ranks import step_on_rank
from standins import (
    BOTH,
    TowerOf,
    attentions,
    clip,
    default_config,
    fill_adapters,
    images,
    patched,
    relative,
    seeded,
    texts,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastheads
from fastheads import HeadConfig
from fastheads.hosts.wrappers import plain_names
from fastheads.ops import fused

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
NORMS, RECOMPUTE, CHECKPOINTING, SELECTIVE, OFFLOADED = re.findall(
    r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL
)

# float32 twice, in another order of sums
SAME = 1e-4


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=SAME):
    assert found.keys() == expected.keys() and found
    for name in found:
        close(found[name], expected[name], tolerance, name)


def learn(model, encode=None):
    """Features and captured heads of both towers, and the gradients of a loss on them."""
    model.zero_grad()
    seen = {}
    encode = encode or {"visual": lambda: model.encode_image(images()), "text": lambda: model.encode_text(texts())}
    loss = 0.0
    for tower in BOTH:
        with fastheads.capture_heads(model, tower) as heads:
            seen[tower] = encode[tower]()
        seen[f"{tower} heads"] = heads.features
        loss = loss + seen[tower].square().sum() + (heads.gates.sum(1) * heads.features.mean((1, 2, 3))).sum()
    loss.backward()
    return {k: v.detach() for k, v in seen.items()}, gradients(model)


# ---------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", [False, True])
def test_openclips_checkpointing_gives_the_same_features_heads_and_gradients(recompute, dropout):
    found = []
    for blocks in (False, True):
        model = patched(config=HeadConfig(dropout=dropout, towers=BOTH), recompute=recompute).train()
        model.set_grad_checkpointing(blocks)
        with seeded(7):
            found.append(learn(model))
    assert_same(found[1][0], found[0][0], 1e-6)
    assert_same(found[1][1], found[0][1], 1e-5)  # sums of gradients in another order


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_torchs_checkpointing_gives_the_same_features_heads_and_gradients(reentrant, dropout):
    found = []
    for wrapped in (False, True):
        model = patched(config=HeadConfig(dropout=dropout, towers=BOTH)).train()
        for tower in (model.visual, model):
            for block in tower.transformer.resblocks if wrapped else ():
                block.forward = functools.partial(run_again, block.forward, reentrant)
        # the reentrant kind gives a block's parameters gradients only where its input has one: of the first block's,
        # that of the embeddings
        model.visual.conv1.weight.requires_grad_()
        model.token_embedding.weight.requires_grad_()
        with seeded(7):
            found.append(learn(model))
    assert_same(found[1][0], found[0][0], 1e-6)
    assert_same(found[1][1], found[0][1], 1e-5)  # sums of gradients in another order


def run_again(forward, reentrant, x, **kwargs):
    return checkpoint(lambda x: forward(x, **kwargs), x, use_reentrant=reentrant)


PLAIN, FEATURES = "fastheads.patch(model)", "features = model.encode_image(images)"


@functools.cache
def by_page(patch, around="", forward=FEATURES):
    """Features, gradients and the operator's forward passes in a layer, by the page's code."""
    with seeded(9), pytest.MonkeyPatch.context() as monkeypatch:
        names = {"fastheads": fastheads, "torch": torch, "model": clip().train().to(DEVICE), "images": images(5)}
        exec(patch, names)
        fill_adapters(names["model"])
        exec(around, names)
        calls, own = [], fused.forward
        monkeypatch.setattr(fused, "forward", lambda *args: calls.append(args) or own(*args))
        exec(forward, names)
        names["features"].square().sum().backward()
    return names["features"].detach(), plain_names(names["model"], gradients(names["model"]).items()), len(calls) / 3


@pytest.mark.parametrize(
    ("code", "runs"),
    [
        ((NORMS,), 1),
        ((RECOMPUTE,), 1),
        ((PLAIN, CHECKPOINTING), 2),
        ((PLAIN, SELECTIVE), 1),
        ((PLAIN, "", OFFLOADED), 1),
        ((RECOMPUTE, SELECTIVE, OFFLOADED), 1),
    ],
    ids=["norms", "recompute", "checkpointing", "selective", "offloaded", "together"],
)
def test_the_pages_ways_give_the_same_gradients(code, runs):
    features, found, ran = by_page(*code)
    expected = by_page(PLAIN)
    assert torch.equal(features, expected[0])
    assert_same(found, expected[1], 1e-6)
    assert ran == runs


def test_every_kth_adapted_layer_recomputes():
    every = [0, 1, 2]
    for k, expected in [(False, []), ("none", []), (True, every), ("projections", every), (2, [0, 2]), (3, [0])]:
        model = clip(layers=4)
        fastheads.patch(model, HeadConfig(layers=(1, 2, 3)), recompute=k)
        own = [block.attn for block in model.visual.transformer.resblocks[1:]]
        assert [i for i, attention in enumerate(own) if attention.heads.recompute is True] == expected


def test_recompute_saves_memory_in_a_whole_model():
    kept = {}
    for recompute in (False, True):
        model, sizes = patched(config=HeadConfig(), recompute=recompute), {}

        def pack(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.encode_image(images())
        kept[recompute] = sum(sizes.values())
    # three layers' q, k, v, T and un-gated heads: three images of 17 tokens, 64 wide
    assert kept[False] - kept[True] >= 3 * (3 * 17 * (3 * 64 + 64)) * 4


# ------------------------------------------------------------------------------------------------------ distributed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "targets", "wrap"),
    [
        ("clip", ("q", "v"), "ddp"),
        ("clip", ("q", "v"), "fsdp"),
        ("clip", ("q", "v"), "fsdp recompute"),
        ("clip", ("q", "v"), "fsdp norms"),
        ("clip", ("q", "o", "mlp"), "ddp"),
        ("clip", ("q", "o", "mlp"), "fsdp"),
        ("timm_rotary", ("q", "v"), "ddp"),
        ("timm_rotary", ("k", "v", "o"), "fsdp recompute"),
        ("timm_qk_norm", ("q", "v"), "fsdp"),
        ("timm_parts_inner_norm", ("q", "v"), "fsdp"),  # weights that lie together
    ],
)
def test_a_step_on_two_processes_is_a_single_processs(host, targets, wrap, tmp_path):
    model = fill_adapters(patched(host, default_config(host, targets=targets)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.encode_image(images(4)).square().mean().backward()
    optimizer.step()
    expected = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected |= {f"gradient {name}": p.grad, f"parameter {name}": p.detach()}
    on_ranks(step_on_rank, 2, 2, str(tmp_path), host, targets, wrap)
    assert_same(torch.load(tmp_path / "step.pt"), expected, 1e-5)


# ----------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("recompute", [False, "norms", True])
def test_a_compiled_tower_trains_as_the_eager_one(recompute):
    torch._dynamo.reset()
    model = TowerOf(patched(config=HeadConfig(), recompute=recompute), "visual")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (3, 5, 2):
        found = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(images(batch))
            out.square().sum().backward()
            found.append(({"out": out.detach()}, gradients(model)))
        assert_same(found[1][0], found[0][0])
        assert_same(found[1][1], found[0][1])


# --------------------------------------------------------------------------------------------- each form in a model


@pytest.mark.parametrize("impl", DTYPES)
def test_every_form_computes_the_model_of_the_reference(impl):
    device = "cpu" if impl == "cpu" else DEVICE
    config = HeadConfig(rank=2, layers=(-1,), towers=BOTH)  # a layer in each tower: the interpreter is slow
    found = []
    for name in ("reference", impl):
        model = patched("clip", config, impl=name).to(device)
        encode = {
            "visual": lambda model=model: model.encode_image(images(2).to(device)),
            "text": lambda model=model: model.encode_text(texts(2).to(device)),
        }
        found.append(learn(model, encode))
    assert_same(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])
    assert not GPU or device == "cuda" or impl == "cpu"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("impl", [*DTYPES, "reference"])
def test_heads_closed_for_good_are_left_out_by_every_form(impl, shared):
    device = "cpu" if impl in ("cpu", "reference") else DEVICE
    model = patched(config=HeadConfig(layers=(-1,), per_head=not shared, gate="sigmoid"), impl=impl).to(device)
    own = attentions(model)[-1].heads
    own.theta.data[[0, 2]] = -torch.inf

    def learned():
        model.zero_grad()
        out = model.encode_image(images(2).to(device))
        out.square().sum().backward()
        with fastheads.capture_heads(model) as heads:
            model.encode_image(images(2).to(device))
        return {"features": out.detach(), "heads": heads.features}, gradients(model)

    def operations():
        with FlopCounterMode(display=False) as counter:
            model.encode_image(images(2).to(device)).sum().backward()
        return counter.get_total_flops()

    expected, all_heads = learned(), operations()
    own.theta.requires_grad_(False)
    found, half = learned(), operations()
    assert expected[1].pop("visual.transformer.resblocks.2.attn.heads.theta")[[0, 2]].count_nonzero() == 0
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])
    rows, D = 2 * 17, 64
    assert all_heads - half >= 2 * rows * D * D * (4 + 1) / 2  # half of W and W_out, and of the gradient through W_out
    own.theta[2] = 0.0  # seen: it has another version
    assert relative(model.encode_image(images(2).to(device)), found[0]["features"]) > 1e-4
    own.theta.requires_grad_(True)
    model.encode_image(images(2).to(device)).square().sum().backward()
    assert own.theta.grad[[1, 2, 3]].count_nonzero() == 3


def test_the_environment_chooses_for_a_model_that_left_it_open(monkeypatch):
    model = patched(config=HeadConfig())
    default = model.encode_image(images())
    monkeypatch.setenv("FASTHEADS_IMPL", "reference")
    assert all(layer.choice.name == "reference" for layer in fastheads.explain(model).layers)
    out = model.encode_image(images())
    assert relative(out, default) < 1e-5
    # the reference alone has second derivatives: this is how one sees who computed
    p = fastheads.lora_parameters(model)[-1]
    (grad,) = torch.autograd.grad(out.square().sum(), p, create_graph=True)
    grad.square().sum().backward()
    assert bool(p.grad.any())
    monkeypatch.setenv("FASTHEADS_IMPL", "nonsense")
    with pytest.raises(ValueError, match="FASTHEADS_IMPL: got 'nonsense'"):
        model.encode_image(images())


def test_attention_dropout_falls_back_to_the_reference_and_still_learns():
    model = clip()
    for attention in attentions(model):
        attention.dropout = 0.1
    with seeded(1):
        report = fastheads.patch(model, HeadConfig(), impl="auto")
    assert {layer.choice.name for layer in report.layers} == {"reference"}
    fill_adapters(model)
    model.encode_image(images()).square().sum().backward()
    assert all(bool(p.grad.any()) for p in (*fastheads.lora_parameters(model), *fastheads.gate_parameters(model)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_of_a_16_bit_model_learn_in_float32(stored):
    model = patched(config=HeadConfig(), dtype=stored)
    model.encode_image(images().to(stored)).float().square().sum().backward()
    exact = patched(config=HeadConfig(), dtype=stored).double()
    exact.encode_image(images().to(stored).double()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if p.grad is not None:
            assert p.grad.dtype == torch.float32
            cosine = torch.nn.functional.cosine_similarity(p.grad.double().ravel(), q.grad.ravel(), dim=0)
            assert float(cosine) > 0.99, name  # three layers of 16-bit rounding
