"""What a patched model carries: its states by name, its gates, copies that are patched models of their own."""

import copy

import pytest
import torch
from standins import ALL, BOTH, attentions, clip, default_config, features, patched, relative

import fastheads
from fastheads import HeadConfig


@pytest.mark.parametrize("name", ["clip", "attention_qk_norm", "development"])
def test_deepcopy_and_pickle(name, tmp_path):
    model = patched(name, default_config(name, targets=ALL, towers=BOTH))
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
