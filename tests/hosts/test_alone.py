"""An image tower or a vision transformer of timm's without a text tower: the same calls as on a whole CLIP."""

import copy
import pickle

import pytest
import torch
from standins import ALL, EMBED, clip, disturb, fill_adapters, images, relative, same, seeded, vit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer

import fastheads
from fastheads.nn import HeadAttention

ALONE = {
    "openclip": lambda: clip().visual,
    "timm": vit,
    "timm_registers": lambda: vit(reg_tokens=2),
    "timm_no_class_token": lambda: vit(class_token=False, global_pool="map"),
    "timm_mean_beside_registers": lambda: vit(reg_tokens=2, global_pool="avg"),
    "eva_parts": lambda: vit(Eva, qkv_fused=False, use_rot_pos_emb=True, global_pool="token"),
}


CONFIG = fastheads.HeadConfig.hap(3, targets=ALL)


def trained(make):
    model = make().eval()
    with seeded(3):
        fastheads.patch(model, CONFIG)
    return fill_adapters(model)


@pytest.mark.parametrize("make", ALONE.values(), ids=ALONE)
def test_start_gradients_unpatch_and_merge(make):
    stock, x = make().eval(), images()
    expected = stock(x)
    model = copy.deepcopy(stock)
    report = fastheads.patch(model, CONFIG)
    assert [layer.rank for layer in report.layers] == [2, 8, 8]
    assert relative(model(x), expected) < 1e-5
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model))
    adapted = fill_adapters(model)(x)
    assert relative(adapted, expected) > 1e-3
    with torch.no_grad():
        assert relative(pickle.loads(pickle.dumps(model))(x), adapted) < 1e-6
    merged = fastheads.merge(copy.deepcopy(model))
    fresh = make().eval()
    fresh.load_state_dict(merged.state_dict())  # stock keys, and no others
    assert relative(fresh(x), adapted) < 1e-5
    fastheads.unpatch(model)
    assert type(model) is type(stock) and same(model.state_dict(), stock.state_dict())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", ALONE.values(), ids=ALONE)
def test_an_adapter_is_saved_and_loaded(make, tmp_path):
    model, x = trained(make), images()
    fastheads.save_adapter(model, tmp_path)
    other = make().eval()
    fastheads.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="another base"):
        fastheads.load_adapter(disturb(make().eval()), tmp_path)


def test_an_adapter_of_another_tower_is_refused(tmp_path):
    fastheads.save_adapter(trained(vit), tmp_path)
    with pytest.raises((TypeError, ValueError), match="base|layers|tower"):
        fastheads.load_adapter(clip().visual, tmp_path)


@pytest.mark.parametrize("name", ALONE)
def test_captured_heads_are_the_pooled_tokens(name):
    model = trained(ALONE[name])
    with fastheads.capture_heads(model) as heads, torch.no_grad():
        model(images())
    assert heads.features.shape == (3, 3, 4, 16)
    last = [m for m in model.modules() if isinstance(m, HeadAttention)][-1]
    seen = []
    out = last.output(last)
    out.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(images())
    gated = heads.features[-1] * heads.gates[-1].view(1, 4, 1)
    means = {"timm_no_class_token": 0, "timm_mean_beside_registers": 3}  # over the tokens from this one on
    pooled = seen[0][:, means[name] :].mean(1) if name in means else seen[0][:, 0]
    assert relative(gated.flatten(1), pooled) < 1e-5


def test_a_tower_that_pools_no_token_says_so():
    model = vit(global_pool="max")
    fastheads.patch(model)
    with pytest.raises(ValueError, match="pools no token"), fastheads.capture_heads(model):
        pass


def test_what_is_no_plain_transformer_is_refused():
    swin = SwinTransformer(img_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4)
    for model, why in ((swin, r"blocks\[i\]\.attn"), (torch.nn.Linear(2, 2), "no visual tower")):
        with pytest.raises(TypeError, match=why):
            fastheads.patch(model)
    assert vit()(images()).shape == (3, EMBED)
