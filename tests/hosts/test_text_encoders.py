"""Hugging Face's text encoders, alone and inside OpenCLIP's `HFTextEncoder` (`make test-hf`)."""

import copy
import pickle

import pytest
import torch
from huggingface import assert_gradients
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from standins import clip as openclip
from standins import disturb, fill_adapters, relative, same, seeded, texts

import fastheads
from fastheads import HeadConfig

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-hf")

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
