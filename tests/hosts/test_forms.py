"""One adapter in OpenCLIP's and in Hugging Face's form of its base (`make test-hf`)."""

import warnings

import pytest
import torch
from huggingface import BOTH, TEXT, VISION, features
from standins import assert_unchanged, fill_adapters, images, relative, same, snapshot, texts
from standins import clip as openclip

import fastheads
from fastheads import HeadConfig

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-hf")

NAMES = {  # OpenCLIP's, Hugging Face's
    "transformer.resblocks": "encoder.layers",
    ".attn.": ".self_attn.",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "token_embedding": "embeddings.token_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
}


def of(model, hidden_act="gelu"):
    """Hugging Face's form of `standins.clip()`, or of one like it."""
    words = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128, "hidden_act": hidden_act}
    blocks = model.visual.transformer.resblocks
    shape = {"num_hidden_layers": len(blocks), "num_attention_heads": blocks[0].attn.num_heads}
    shape |= {"intermediate_size": 128, "hidden_act": hidden_act}
    config = transformers.CLIPConfig(text_config=TEXT | words, vision_config=VISION | shape, projection_dim=24)
    state = {}
    for name, weight in model.state_dict().items():
        if name in ("visual.proj", "text_projection"):
            state[f"{name.replace('.proj', '_projection')}.weight"] = weight.T
        elif name == "logit_scale":
            state[name] = weight
        else:
            tower, name = ("vision" if name.startswith("visual.") else "text"), name.removeprefix("visual.")
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            parts = weight.chunk(3) if "in_proj" in name else (weight,)
            for part, own in zip("qkv", parts, strict=False):
                state[f"{tower}_model.{name.replace('in_proj_', f'{part}_proj.')}"] = own
    other = transformers.CLIPModel(config).eval()
    other.load_state_dict(state)
    return other


def embedded(model, tower):
    """`[B, E]`, whichever form it has."""
    if isinstance(model, transformers.CLIPModel):
        return getattr(model, f"{tower}_projection")(features(model, tower))
    return model.encode_image(images()) if tower == "visual" else model.encode_text(texts())


@pytest.mark.parametrize("towers", [BOTH, ("text", "visual"), ("visual",), ("text",)], ids="-".join)
def test_an_adapter_carries_over_to_the_other_form_and_back(towers, tmp_path):
    config = HeadConfig(targets=("q", "k", "v", "o", "mlp"), towers=towers)
    model = openclip().eval()
    fastheads.patch(model, config)
    fill_adapters(model)
    fastheads.save_adapter(model, tmp_path / "openclip")
    other = of(openclip())
    assert all(relative(embedded(other, t), embedded(openclip(), t)) < 1e-5 for t in BOTH)
    fastheads.load_adapter(other, tmp_path / "openclip")
    assert all(relative(embedded(other, t), embedded(model, t)) < 1e-5 for t in BOTH)
    assert all(relative(embedded(other, t), embedded(openclip(), t)) > 1e-3 for t in towers)
    fastheads.save_adapter(other, tmp_path / "huggingface", modules_to_save=["logit_scale"])
    back = fastheads.load_adapter(openclip().eval(), tmp_path / "huggingface")
    assert same(fastheads.adapter_state_dict(back), fastheads.adapter_state_dict(model))
    if len(towers) == 1:
        alone = of(openclip()).vision_model if towers == ("visual",) else of(openclip()).text_model
        fastheads.load_adapter(alone, tmp_path / "openclip")
        assert torch.equal(features(alone, towers[0]), features(other, towers[0]))
        fastheads.save_adapter(alone, tmp_path / "alone")
        back = fastheads.load_adapter(openclip().eval(), tmp_path / "alone")
        assert same(fastheads.adapter_state_dict(back), fastheads.adapter_state_dict(model))


def test_an_adapter_carries_over_to_the_other_form_in_16_bits_and_back(tmp_path):
    model = openclip().eval()
    fastheads.patch(model)
    fastheads.save_adapter(fill_adapters(model), tmp_path / "float32")
    for dtype in (torch.bfloat16, torch.float16):
        half = of(openclip()).to(dtype)
        with pytest.warns(UserWarning, match=f"float32, here {str(dtype)[6:]}"):
            fastheads.load_adapter(half, tmp_path / "float32", check_base=False)
        out = half.visual_projection(half.vision_model(pixel_values=images().to(dtype)).pooler_output)
        assert relative(out, embedded(model, "visual")) < 0.02 < relative(out, embedded(openclip(), "visual"))
        fastheads.save_adapter(half, tmp_path / "half")
        with pytest.warns(UserWarning, match=f"{str(dtype)[6:]}, here float32"):
            back = fastheads.load_adapter(openclip(), tmp_path / "half", check_base=False)
        assert same(fastheads.adapter_state_dict(back), fastheads.adapter_state_dict(model))


def test_what_does_not_carry_over_says_so_and_changes_nothing(tmp_path):
    model = openclip()
    fastheads.patch(model, HeadConfig())
    fastheads.save_adapter(fill_adapters(model), tmp_path / "plain")
    fastheads.save_adapter(model, tmp_path / "carrying", modules_to_save=["ln_post", "logit_scale"])
    wider = of(openclip(vision={"head_width": 32}))
    for other, folder, check, why in (
        (
            of(openclip()),
            "carrying",
            True,
            r"other names.*: visual.ln_post.weight, visual.ln_post.bias; .*kind it was saved from",
        ),
        (of(openclip(seed=1)), "plain", True, "another base.*weights"),
        (of(openclip(), "quick_gelu"), "plain", True, "another base.*activation GELU, here QuickGELU"),
        (of(openclip(layers=2)), "plain", True, "layers 3, here 2"),
        (of(openclip(layers=2)), "plain", False, r"don't fit.*as many layers"),
        (wider, "plain", True, "heads 4, here 2"),
        (wider, "plain", False, r"don't fit.*\(2, 4, .*\(2, 2, .*as many layers and heads"),
    ):
        before = snapshot(other)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=why):
            warnings.simplefilter("ignore")
            fastheads.load_adapter(other, tmp_path / folder, check_base=check)
        assert_unchanged(other, before)
