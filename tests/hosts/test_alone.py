"""An image tower or a vision transformer of timm's without a text tower: the same calls as on a whole CLIP."""

import copy
import pickle

import pytest
import torch
from standins import ALL, EMBED, MODELS, clip, disturb, fill_adapters, images, relative, same, seeded, vit
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch.utils.checkpoint import checkpoint

import fastheads
from fastheads.nn import HeadAttention


def fastvit():
    """Three layers that attend, over 4 × 4 tokens, behind one that doesn't."""
    options = {"layers": (1, 3), "embed_dims": (16, 128), "mlp_ratios": (1, 1), "downsamples": (False, True)}
    with seeded(0):
        return disturb(FastVit(**options, token_mixers=("repmixer", "attention"), num_classes=5))


ALONE = {
    "openclip": lambda: clip().visual,
    "timm": vit,
    "timm_registers": lambda: vit(reg_tokens=2),
    "timm_no_class_token": lambda: vit(class_token=False, global_pool="map"),
    "timm_mean_beside_registers": lambda: vit(reg_tokens=2, global_pool="avg"),
    "beit": lambda: vit(Beit, qkv_bias=True, use_rel_pos_bias=True, use_shared_rel_pos_bias=True, init_values=0.1),
    "relative": lambda: vit(VisionTransformerRelPos, init_values=None, qk_norm=True, rel_pos_type="bias"),
    "relative_shared": lambda: vit(VisionTransformerRelPos, init_values=None, class_token=True, shared_rel_pos=True),
    "fastvit": fastvit,
    "eva_parts": lambda: vit(Eva, qkv_fused=False, use_rot_pos_emb=True, global_pool="token"),
}


def config(model):
    """With every target there is: FastViT's MLP is convolutions."""
    return fastheads.HeadConfig.hap(3, targets=("q", "v", "o") if isinstance(model, FastVit) else ALL)


def trained(make):
    model = make().eval()
    with seeded(3):
        fastheads.patch(model, config(model))
    return fill_adapters(model)


@pytest.mark.parametrize("make", ALONE.values(), ids=ALONE)
def test_start_gradients_unpatch_and_merge(make):
    stock, x = make().eval(), images()
    expected = stock(x)
    model = copy.deepcopy(stock)
    report = fastheads.patch(model, config(model))
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


@pytest.mark.filterwarnings("ignore:merge. rounding")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", ALONE.values(), ids=ALONE)
def test_in_16_bits(make, dtype):
    stock, x, step = make().eval().to(dtype), images().to(dtype), torch.finfo(dtype).eps
    expected = stock(x)
    model = copy.deepcopy(stock)
    fastheads.patch(model)
    assert model(x).dtype == dtype and relative(model(x), expected) < 8 * step
    adapted = fill_adapters(model)(x)
    exact = copy.deepcopy(model).double()(x.double())
    assert relative(adapted, exact) < 8 * step and relative(adapted, expected) > 4 * relative(adapted, exact)
    assert relative(fastheads.merge(copy.deepcopy(model))(x), exact) < 8 * step
    fastheads.unpatch(model)
    assert same(model.state_dict(), stock.state_dict()) and torch.equal(model(x), expected)


@pytest.mark.parametrize("make", ALONE.values(), ids=ALONE)
def test_one_graph_and_the_same_gradients_when_checkpointed(make):
    model, x = trained(make), images()
    wanted = gradients(model, model)
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative(torch.compile(model, fullgraph=True, backend="eager")(x), model(x)) < 1e-5
    for name, grad in gradients(model, lambda x: checkpoint(model, x, use_reentrant=False)).items():
        assert relative(grad, wanted[name]) < 1e-5, name


def gradients(model, run):
    model.zero_grad()
    run(images()).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", ALONE.values(), ids=ALONE)
def test_an_adapter_is_saved_and_loaded(make, tmp_path):
    model, x = trained(make), images()
    fastheads.save_adapter(model, tmp_path)
    other = make().eval()
    fastheads.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="another base"):
        fastheads.load_adapter(disturb(make().eval()), tmp_path)


@pytest.mark.parametrize("name", ["clip", "timm"])
def test_an_adapter_of_a_tower_alone_is_one_of_the_whole_model_and_back(name, tmp_path):
    whole, tower = MODELS[name](), MODELS[name]().visual
    alone = tower.trunk if name == "timm" else tower
    fastheads.patch(alone)
    fastheads.save_adapter(fill_adapters(alone), tmp_path / "alone")
    fastheads.load_adapter(whole, tmp_path / "alone")
    assert torch.equal(whole.visual(images()), tower(images()))
    fastheads.save_adapter(whole, tmp_path / "whole")
    back = fastheads.load_adapter(MODELS[name]().visual, tmp_path / "whole")
    assert torch.equal(back(images()), tower(images()))


def test_an_adapter_of_another_tower_is_refused(tmp_path):
    fastheads.save_adapter(trained(vit), tmp_path)
    with pytest.raises((TypeError, ValueError), match="base|layers|tower"):
        fastheads.load_adapter(clip().visual, tmp_path)


@pytest.mark.parametrize("name", ALONE)
def test_captured_heads_are_the_pooled_tokens(name):
    model = trained(ALONE[name])
    with fastheads.capture_heads(model) as heads, torch.no_grad():
        model(images())
    last = [m for m in model.modules() if isinstance(m, HeadAttention)][-1]
    assert heads.features.shape == (3, 3, 4, last.weights(last)[0].shape[1] // 4)
    seen = []
    out = last.output(last)
    out.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(images())
    gated = heads.features[-1] * heads.gates[-1].view(1, 4, 1)
    means = {"timm_no_class_token": 0, "timm_mean_beside_registers": 3}  # over the tokens from this one on
    means |= {"beit": 1, "relative": 0, "relative_shared": 1, "fastvit": 0}
    pooled = seen[0][:, means[name] :].mean(1) if name in means else seen[0][:, 0]
    assert relative(gated.flatten(1), pooled) < 1e-5


def test_a_tower_that_pools_no_token_says_so():
    model = vit(global_pool="max")
    fastheads.patch(model)
    with pytest.raises(ValueError, match="pools no token"), fastheads.capture_heads(model):
        pass


def test_what_is_no_plain_transformer_is_refused():
    swin = SwinTransformer(img_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4)
    none = FastVit(layers=(1,), embed_dims=(16,), mlp_ratios=(1,), token_mixers=("repmixer",), downsamples=(False,))
    refused = {swin: "in windows", none: "no heads to adapt", torch.nn.Linear(2, 2): "no visual tower"}
    for model, why in refused.items():
        with pytest.raises(TypeError, match=why):
            fastheads.patch(model)
    assert vit()(images()).shape == (3, EMBED)
