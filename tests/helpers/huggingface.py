"""Small models of Hugging Face's for the tests of its hosts. Not a test file."""

import pytest
import torch
from standins import disturb, fill_adapters, images, relative, seeded, texts

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
