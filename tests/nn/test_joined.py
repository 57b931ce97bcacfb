"""Frozen q, k and v weights of their own lie together in memory: no call copies them, and nobody else can tell."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from standins import fill_adapters, images, relative, same, seeded, vit
from timm.models.eva import Eva

import fastheads
from fastheads import ops


def stock():
    return vit(Eva, qkv_fused=False, global_pool="token").eval()


def patched():
    model = stock()
    with seeded(3):
        fastheads.patch(model)
    return fill_adapters(model)


@pytest.fixture
def copies(monkeypatch):
    """Runs a model; how many of its layers got a copy of their weights, and what it answers."""
    real, given = ops.head_attention, []
    monkeypatch.setattr(ops, "head_attention", lambda x, w_in, *a, **k: given.append(w_in) or real(x, w_in, *a, **k))

    def run(model):
        given.clear()
        out = model(images().to(next(model.parameters()).dtype))
        places = [block.attn.q_proj.weight.data_ptr() for block in model.blocks]
        assert len(given) == len(places)
        return sum(w.data_ptr() != place for w, place in zip(given, places, strict=True)), out

    return run


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def test_parameters_are_what_they_were(copies, tmp_path):
    plain, model = stock().requires_grad_(False), stock()
    before = {name: (p, id(p)) for name, p in model.named_parameters()}
    fastheads.patch(model)
    assert copies(model)[0] == 0
    for name, (p, key) in before.items():
        own = model.get_parameter(name)
        assert id(own) == key and own.untyped_storage().nbytes() == p.nbytes and own.storage_offset() == 0
    state, expected = fastheads.base_state_dict(model), dict(plain.state_dict())
    assert same(state, expected)
    assert len(saved(state)) == len(saved(expected))
    save_file(state, tmp_path / "base.safetensors")
    assert same(load_file(tmp_path / "base.safetensors"), expected)
    fastheads.unpatch(model)
    assert len(pickle.dumps(model)) < 1.01 * len(pickle.dumps(plain))
    assert torch.equal(model(images()), plain(images()))


MOVED = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(io.BytesIO(saved(model)), weights_only=False),
    "to": lambda model: model.double().float(),
    "trained and frozen again": lambda model: model.requires_grad_(True).requires_grad_(False),
    "load_state_dict": lambda model: model.load_state_dict(patched().state_dict()) and model,
    "patched again": lambda model: reloaded(fastheads.unpatch(model), fastheads.adapter_state_dict(patched())),
}
APART = {
    "trained": lambda model: model.requires_grad_(True),
    "assigned": lambda model: model.load_state_dict(patched().state_dict(), assign=True) and model,
    "shared by processes": lambda model: model.share_memory(),
    "data": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()] and model,
}


def reloaded(model, adapters):
    fastheads.patch(model)
    model.load_state_dict(adapters, strict=False)
    return model


@pytest.mark.parametrize("change", MOVED.values(), ids=MOVED)
def test_they_lie_together_again_where_they_were_moved(change, copies):
    model = patched()
    expected = copies(model)[1]
    count, found = copies(change(model))
    assert count == 0 and relative(found, expected) < 1e-6


@pytest.mark.parametrize("change", APART.values(), ids=APART)
def test_elsewhere_they_are_copied(change, copies):
    model = patched()
    expected = copies(model)[1]
    model = change(model)
    count, found = copies(model)
    assert count == 3 and relative(found, expected) < 1e-6
    trained = any(block.attn.q_proj.weight.requires_grad for block in model.blocks)
    assert all((block.attn.heads.joined is not None) == trained for block in model.blocks)  # nothing is held for nobody
    found.sum().backward()
    assert all((block.attn.k_proj.weight.grad is not None) == trained for block in model.blocks)


def test_what_is_written_into_them_counts(copies):
    model, other = patched(), stock()
    with torch.no_grad():
        for m in (model, other):
            for block in m.blocks:
                block.attn.k_proj.weight.mul_(1.5)
    again = reloaded(other, fastheads.adapter_state_dict(model))
    assert copies(model)[0] == 0 and torch.equal(copies(model)[1], copies(again)[1])
    assert relative(copies(model)[1], copies(patched())[1]) > 1e-4
    with torch.no_grad():
        merged = fastheads.merge(copy.deepcopy(model))
        assert relative(merged(images()), copies(model)[1]) < 1e-5


def test_compiled_and_transformed_they_are_copied(copies):
    model = patched()
    expected = copies(model)[1]
    x = images()
    assert relative(torch.compile(model, backend="eager", fullgraph=True)(x), expected) < 1e-6
    with torch.no_grad():
        assert relative(torch.func.vmap(lambda one: model(one[None])[0])(x), expected) < 1e-5
    assert copies(model)[0] == 0
