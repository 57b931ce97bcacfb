"""Hugging Face's CLIP and SigLIP: `make test-hf` brings transformers, which the other tests go without."""

import copy
import pickle

import pytest
import torch
from standins import ALL, disturb, fill_adapters, images, relative, same, seeded, texts

import fastheads
from fastheads import HeadConfig

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-hf")

VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
TEXT |= {"max_position_embeddings": 12, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
BOTH = ("visual", "text")


def clip(**options):
    config = transformers.CLIPConfig(text_config=TEXT | options, vision_config=VISION, projection_dim=24)
    return made(transformers.CLIPModel, config)


def siglip():
    return made(transformers.SiglipModel, transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))


def siglip2():
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16}
    return made(transformers.Siglip2Model, transformers.Siglip2Config(text_config=TEXT, vision_config=vision))


def made(cls, config):
    with seeded(0):
        return disturb(cls(config)).eval()


MODELS = {"clip": clip, "clip_old_eos": lambda: clip(eos_token_id=2), "siglip": siglip, "siglip2": siglip2}
ALONE = {
    "clip_vision": lambda: clip().vision_model,
    "clip_text": lambda: clip().text_model,
    "siglip_vision": lambda: siglip().vision_model,
}


def features(model, tower="visual", padded=True):
    """`[B, E]`, pooled."""
    if tower == "visual":
        owner = getattr(model, "vision_model", model)
        if type(owner).__name__.startswith("Siglip2"):  # patches of images of any shape, some of them padding
            there = torch.ones(3, 16, dtype=torch.long)
            there[1, 12:] = 0
            patches = {"pixel_attention_mask": there, "spatial_shapes": torch.tensor([[4, 4], [3, 4], [4, 4]])}
            return owner(pixel_values=images().view(3, 16, 192), **patches).pooler_output
        return owner(pixel_values=images()).pooler_output
    ids, owner = texts(), getattr(model, "text_model", model)
    return owner(input_ids=ids, attention_mask=(ids != 0).long() if padded else None).pooler_output


def attentions(model, tower):
    owner = getattr(model, "vision_model" if tower == "visual" else "text_model", model)
    return [layer.self_attn for layer in owner.encoder.layers]


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
    config = HeadConfig(rank=3, targets=("q", "k", "v", "o", "mlp"), towers=(tower,))
    model, stock = MODELS[name]().double(), MODELS[name]().double()
    fastheads.patch(model, config)
    fill_adapters(model)
    adapters = {k: v.detach().clone().requires_grad_() for k, v in fastheads.adapter_state_dict(model).items()}
    dense = {}
    for attention, module_name in zip(attentions(stock, tower), adapters_of(adapters), strict=True):
        theta, A, B = (adapters[f"{module_name}.heads.{part}"] for part in ("theta", "lora_A", "lora_B"))
        gate = 4 * theta.exp() / theta.exp().sum()
        for t, part in enumerate("qkv"):
            delta = torch.cat([B[t, h] @ A[t, h] for h in range(4)])
            dense[f"{module_name}.{part}_proj.weight"] = getattr(attention, f"{part}_proj").weight.detach() + delta
        columns = gate.repeat_interleave(16)
        A, B = (adapters[f"{module_name}.out_proj.heads.{part}"] for part in ("lora_A", "lora_B"))
        delta = torch.cat([B[h] @ A[h] for h in range(4)], 1)
        dense[f"{module_name}.out_proj.weight"] = (attention.out_proj.weight.detach() + delta) * columns
        for part in ("fc1", "fc2"):
            path = module_name.replace("self_attn", f"mlp.{part}")
            A, B = (adapters[f"{path}.heads.{name}"][0] for name in ("lora_A", "lora_B"))
            dense[f"{path}.weight"] = stock.get_parameter(f"{path}.weight").detach() + B @ A
    wrapped = TowerOf(stock, tower)
    expected = torch.func.functional_call(wrapped, {f"model.{k}": v for k, v in dense.items()}, (run_inputs(tower),))
    out = TowerOf(model, tower)(run_inputs(tower))
    assert relative(out, expected) < 1e-9
    out.square().sum().backward()
    expected.square().sum().backward()
    for key, value in adapters.items():
        assert relative(dict(model.named_parameters())[key].grad, value.grad) < 1e-8, key


def adapters_of(adapters):
    """The attention modules' names, layers in order."""
    return sorted({key.rpartition(".heads.")[0] for key in adapters if ".self_attn.heads." in key})


def run_inputs(tower):
    return images().double() if tower == "visual" else texts()


class TowerOf(torch.nn.Module):
    def __init__(self, model, tower):
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x):
        if self.tower == "visual":
            return self.model.vision_model(pixel_values=x).pooler_output
        return self.model.text_model(input_ids=x, attention_mask=(x != 0).long()).pooler_output


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
