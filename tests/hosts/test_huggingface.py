"""Hugging Face's CLIP and SigLIP: `make test-hf` brings transformers, which the other tests go without."""

import copy
import pickle

import pytest
import torch
from huggingface import ALONE, BOTH, MODELS, assert_gradients, attentions, clip, features
from standins import ALL, disturb, fill_adapters, images, relative, same, texts

import fastheads
from fastheads import HeadConfig

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-hf")


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_start_unpatch_and_merge(name, how, tmp_path):
    model = MODELS[name]().requires_grad_(False)  # as patch leaves it: torch takes other paths for others
    model.set_attn_implementation(how)
    before, runs = copy.deepcopy(model.state_dict()), [(tower, padded) for tower in BOTH for padded in (True, False)]
    expected = {run: features(model, *run) for run in runs}
    report = fastheads.patch(model, HeadConfig(targets=ALL, towers=BOTH))
    assert {layer.choice.name for layer in report.layers} == {"cpu"}
    assert all(relative(features(model, *run), expected[run]) < 1e-5 for run in runs)
    with fastheads.disabled(model):
        assert all(torch.equal(features(model, *run), expected[run]) for run in runs)
    fill_adapters(model)
    adapted = {run: features(model, *run) for run in runs}
    assert all(relative(adapted[run], expected[run]) > 1e-3 for run in runs)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(features(again), adapted["visual", True])
    merged = fastheads.merge(copy.deepcopy(model))
    assert merged.state_dict().keys() == before.keys()
    merged.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path, attn_implementation=how)
    assert all(relative(features(stock, *run), adapted[run]) < 1e-5 for run in runs)
    fastheads.unpatch(model)
    assert same(model.state_dict(), before)
    assert all(torch.equal(features(model, *run), expected[run]) for run in runs)


@pytest.mark.parametrize("tower", BOTH)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_gradients_are_those_of_dense_float64_weights(name, tower):
    parts, targets = [f"{part}_proj" for part in "qkv"], ("q", "k", *ALL[1:])
    assert_gradients(MODELS[name], tower, parts, lambda module: f"{module}.out_proj", targets)


@pytest.mark.parametrize("name", ALONE)
def test_towers_alone_keep_their_adapters(name, tmp_path):
    tower = "text" if "text" in name else "visual"
    model = ALONE[name]()
    fastheads.patch(model, HeadConfig(towers=(tower,)))
    fill_adapters(model)
    fastheads.save_adapter(model, tmp_path)
    other = ALONE[name]()
    fastheads.load_adapter(other, tmp_path)
    assert torch.equal(features(other, tower), features(model, tower))
    with pytest.raises(ValueError, match="another base"):
        fastheads.load_adapter(disturb(ALONE[name]()), tmp_path)


@pytest.mark.parametrize(("name", "tower"), [("clip", "visual"), ("siglip", "visual"), *((n, "text") for n in MODELS)])
def test_captured_heads_are_the_pooled_tokens(name, tower):
    model = MODELS[name]()
    fastheads.patch(model, HeadConfig(towers=BOTH, gate=None))
    seen = []
    attentions(model, tower)[-1].out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with fastheads.capture_heads(model, tower) as heads:
        features(model, tower)
    ids = texts()
    if tower == "visual":
        pooled = seen[0][:, 0] if name == "clip" else seen[0].mean(1)
    elif name.startswith("siglip"):
        pooled = seen[0][:, -1]
    else:
        pooled = seen[0][torch.arange(len(ids)), (ids == 49).int().argmax(1)]
    assert relative(heads.features[-1].flatten(1), pooled) < 1e-5


def test_eager_attention_returns_the_probabilities_and_checkpointing_the_gradients():
    model = clip()
    model.set_attn_implementation("eager")
    expected = model.vision_model(pixel_values=images(), output_attentions=True).attentions
    fastheads.patch(model)
    found = model.vision_model(pixel_values=images(), output_attentions=True).attentions
    assert len(found) == 3 and all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    fill_adapters(model).train()
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable()
        features(model).square().sum().backward()
        grads.append([p.grad.clone() for p in fastheads.lora_parameters(model)])
    assert all(relative(a, b) < 1e-6 for a, b in zip(*grads, strict=True))


def test_what_cannot_be_patched_says_why_and_changes_nothing():
    model = clip()
    model.vision_model.encoder.layers[1].self_attn.q_proj = torch.nn.Bilinear(2, 2, 2)
    other = clip()
    other.config.vision_config._attn_implementation = "flash_attention_2"
    for wrong, why in ((model, "Bilinear for its q_proj"), (other, "'flash_attention_2'.*'sdpa'")):
        with pytest.raises(TypeError, match=why):
            fastheads.patch(wrong)
        assert not fastheads.is_patched(wrong)
    text = clip().text_model
    with pytest.raises(TypeError, match="no visual tower"):
        fastheads.patch(text)
