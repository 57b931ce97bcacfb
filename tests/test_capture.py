"""capture_heads: the un-gated heads of the pooled token, once for each forward pass."""

import pytest
import torch
from standins import (
    BOTH,
    EOT,
    MODELS,
    TowerOf,
    attentions,
    clip,
    dense_weights,
    features,
    images,
    patched,
    relative,
    stock_copy,
    texts,
)

import fastheads
from fastheads import HeadConfig


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
