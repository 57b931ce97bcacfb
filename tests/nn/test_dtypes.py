"""Casts and autocast: adapters stay float32 (float64 under a float64 base), and the base is never written."""

import pytest
import torch
from standins import ALL, clip, features, images, patched, relative

import fastheads
from fastheads import HeadConfig


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_16_bit_casts_keep_adapters_float32(cast):
    model = patched(config=HeadConfig(targets=ALL))
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
    model = patched(config=HeadConfig(targets=ALL))
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
