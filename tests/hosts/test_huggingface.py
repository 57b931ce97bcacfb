"""Hugging Face's CLIP and SigLIP: `make test-hf` brings transformers, which the other tests go without."""

import copy
import pickle
import warnings

import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from standins import ALL, assert_unchanged, disturb, fill_adapters, images, relative, same, seeded, snapshot, texts
from standins import clip as openclip

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
    parts, targets = [f"{part}_proj" for part in "qkv"], ("q", "k", *ALL[1:])
    assert_gradients(MODELS[name], tower, parts, lambda module: f"{module}.out_proj", targets)


def assert_gradients(make, tower, parts, out_proj, targets=("q", "k", "v")):
    """parts: an attention's projections; out_proj: name of an attention → that of its output projection."""
    config = HeadConfig(rank=3, targets=targets, towers=(tower,))
    model, stock = make().double(), make().double()
    fastheads.patch(model, config)
    fill_adapters(model)
    adapters = {k: v.detach().clone().requires_grad_() for k, v in fastheads.adapter_state_dict(model).items()}
    dense = {}
    for module in adapters_of(adapters):
        theta, A, B = (adapters[f"{module}.heads.{part}"] for part in ("theta", "lora_A", "lora_B"))
        for t, part in enumerate(parts):
            delta = torch.cat([B[t, h] @ A[t, h] for h in range(4)])
            dense[f"{module}.{part}.weight"] = stock.get_parameter(f"{module}.{part}.weight").detach() + delta
        columns = (4 * theta.exp() / theta.exp().sum()).repeat_interleave(16)
        name, delta = f"{out_proj(module)}.weight", 0.0
        if "o" in targets:
            A, B = (adapters[f"{out_proj(module)}.heads.{part}"] for part in ("lora_A", "lora_B"))
            delta = torch.cat([B[h] @ A[h] for h in range(4)], 1)
        dense[name] = (stock.get_parameter(name).detach() + delta) * columns
        for part in ("fc1", "fc2") if "mlp" in targets else ():
            path = module.replace("self_attn", f"mlp.{part}")
            A, B = (adapters[f"{path}.heads.{of}"][0] for of in ("lora_A", "lora_B"))
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
    return sorted({key.rpartition(".heads.")[0] for key in adapters if key.endswith(".theta")})


def run_inputs(tower):
    return images().double() if tower == "visual" else texts()


class TowerOf(torch.nn.Module):
    def __init__(self, model, tower):
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x):
        if self.tower == "visual":
            return self.model.vision_model(pixel_values=x).pooler_output
        owner = getattr(self.model, "text_model", self.model)
        return owner(input_ids=x, attention_mask=(x != 0).long()).pooler_output


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


# ------------------------------------------------------------------------------------------- text encoders

ENCODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER |= {"max_position_embeddings": 20, "vocab_size": 50, "pad_token_id": 0, "eos_token_id": 49}
M2M = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_layers": 1}
M2M |= {"max_position_embeddings": 20, "vocab_size": 50, "pad_token_id": 0}
T5 = {"d_model": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2, "d_ff": 96, "vocab_size": 50, "pad_token_id": 0}
T5 |= {"is_encoder_decoder": False, "use_cache": False}
KINDS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**ENCODER)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**ENCODER)),
    "xlm-roberta": lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**ENCODER)),
    "m2m_100": lambda: transformers.M2M100Model(transformers.M2M100Config(**M2M)).encoder,
    "mt5": lambda: transformers.MT5EncoderModel(transformers.MT5Config(**T5)).encoder,
}


def encoder(kind, alone=False, pooler="cls_pooler"):
    """Such an encoder alone, or as OpenCLIP keeps it."""
    with seeded(0):
        transformer = disturb(KINDS[kind]())
        if alone:
            return transformer.eval()
        model = openclip(CustomTextCLIP)
        config = transformers.BertConfig(**ENCODER)
        model.text = HFTextEncoder("", 24, config, pooler, "linear")
        model.text.config, model.text.transformer = transformer.config, transformer
    return model.eval()


def states(model):
    """`[B, N, D]`, or features `[B, E]`; what stands for padding left out."""
    if hasattr(model, "encode_text"):
        return model.encode_text(texts())
    return model(input_ids=texts(), attention_mask=(texts() != 0).long()).last_hidden_state[texts() != 0]


def freed(model):
    """A pass that takes gradients, with what dropout there is off."""
    return states(model.train().apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, torch.nn.Dropout) else None))


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "alone"), [*((k, False) for k in KINDS), *((k, True) for k in list(KINDS)[:3])])
def test_text_encoders_start_unpatch_and_merge(kind, alone, how):
    model = encoder(kind, alone).requires_grad_(False)
    (model if alone else model.text.transformer).set_attn_implementation(how)
    before, expected = copy.deepcopy(model.state_dict()), states(model)
    config = HeadConfig(targets=("q", "v"), towers=("text",))
    report = fastheads.patch(model, config)
    assert [layer.num_heads for layer in report.layers] == [4, 4]
    assert relative(states(model), expected) < 1e-5
    with fastheads.disabled(model):
        assert torch.equal(states(model), expected)
    fill_adapters(model)
    adapted = states(model)
    assert relative(adapted, expected) > 1e-3
    assert torch.equal(states(pickle.loads(pickle.dumps(model))), adapted)
    merged = fastheads.merge(copy.deepcopy(model))
    assert merged.state_dict().keys() == before.keys()
    assert relative(states(merged), adapted) < 1e-5
    fastheads.unpatch(model)
    assert same(model.state_dict(), before) and torch.equal(states(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders_in_16_bits(kind, dtype):
    """The start as near to float32 as stock's own; merged, as near as rounding once more is."""
    exact = states(encoder(kind))
    model = encoder(kind).requires_grad_(False)
    model.text.to(dtype)
    stock = states(model)
    fastheads.patch(model, HeadConfig(towers=("text",)))
    assert relative(states(model), exact) <= 2 * relative(stock, exact)
    adapted = states(fill_adapters(model))
    with pytest.warns(UserWarning, match="rounding"):
        merged = fastheads.merge(copy.deepcopy(model))
    assert relative(states(merged), adapted) < 2 * relative(stock, exact) < relative(adapted, stock)
    assert torch.equal(states(fastheads.unpatch(model)), stock)


def test_a_text_encoders_gradients_are_those_of_dense_float64_weights():
    """Gates too: those of the columns of the projection that lies beside the attention."""
    names = ["query", "key", "value"], lambda module: f"{module.removesuffix('.self')}.output.dense"
    assert_gradients(lambda: encoder("xlm-roberta", alone=True), "text", *names)


@pytest.mark.parametrize("kind", ["xlm-roberta", "m2m_100"])
def test_a_text_encoders_adapters_are_trained_saved_and_captured(kind, tmp_path):
    model = encoder(kind)
    fastheads.patch(model, HeadConfig(towers=("text",)))
    fill_adapters(model)
    merged = fastheads.merge(copy.deepcopy(model))
    freed(model).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model))
    model.eval()
    with fastheads.capture_heads(model) as heads:
        states(model)
    seen = []
    last = merged.text.transformer
    last = last.layers[-1].self_attn.out_proj if kind == "m2m_100" else last.encoder.layer[-1].attention.output.dense
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    states(merged)
    gates = 1 if kind == "m2m_100" else heads.gates[-1].view(1, 4, 1)  # where they are folded
    assert relative((heads.features[-1] * gates).flatten(1), seen[0][:, 0]) < 1e-5
    fastheads.save_adapter(model, tmp_path)
    other = fastheads.load_adapter(encoder(kind), tmp_path)
    assert torch.equal(states(other), states(model))


def test_text_encoders_that_cannot_be_patched_or_captured_say_why():
    decoder = transformers.BertModel(transformers.BertConfig(**ENCODER, is_decoder=True))
    with pytest.raises(TypeError, match="decoder's"):
        fastheads.patch(decoder, HeadConfig(towers=("text",)))
    model = encoder("xlm-roberta", pooler="mean_pooler")
    fastheads.patch(model, HeadConfig(towers=("text",)))
    with pytest.raises(ValueError, match="pools no token"), fastheads.capture_heads(model):
        pass
    layer = model.text.transformer.encoder.layer[0].attention.self
    with pytest.raises(ValueError, match="cache: a patched layer"):
        layer(torch.randn(1, 3, 64), cache=object())


# ------------------------------------------------------------------------- one adapter, two forms of its base

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
