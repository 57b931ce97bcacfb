"""The table of bad input: what each public function says to it, before it changes anything.

A row is: id, how the model is built, the call, the exception, words its message must hold (the argument's name first).

Folders and images have their table in train/test_data.py, damaged adapters in test_adapters.py, the command line in
test_cli.py.
"""

import pytest
import torch
from standins import (
    BOTH,
    MODELS,
    Attention,
    assert_unchanged,
    attentions,
    clip,
    features,
    images,
    patched,
    seeded,
    snapshot,
)
from torch import nn

import fastheads
from fastheads import HeadConfig

NAN = float("nan")
ROWS = []


def row(id, build, call, error, *words):
    ROWS.append(pytest.param(build, call, error, words, id=id))


def adapted(**options):
    """A builder of a patched model, image tower only unless asked otherwise."""
    return lambda: patched("clip", HeadConfig(**options))


def with_(change, build=clip):
    """A builder of a model with something changed in it."""

    def make():
        model = build()
        changed = change(model)
        return model if changed is None else changed

    return make


def named(cls_name, module="somewhere", base=nn.Module):
    """An instance of a class of that name, holding `.module`: what a wrapper looks like without its library."""
    cls = type(cls_name, (base,), {"__module__": module})
    return cls()


def wrapped(cls_name, module="somewhere", child="module"):
    def change(model):
        outer = named(cls_name, module)
        setattr(outer, child, model)
        return outer

    return change


def image_tower_alone(model):
    outer = nn.Module()
    outer.visual = model.visual
    return outer


def block(model, i=1):
    return model.visual.transformer.resblocks[i]


def nothing():
    return None


# ------------------------------------------------------------------------------------------------ HeadConfig

for name, options, error, words in [
    ("rank float", {"rank": 2.0}, TypeError, ["rank", "2.0"]),
    ("rank bool", {"rank": True}, TypeError, ["rank", "True"]),
    ("rank text", {"rank": "2"}, TypeError, ["rank", "'2'"]),
    ("rank None", {"rank": None}, TypeError, ["rank", "None"]),
    ("rank negative", {"rank": -1}, ValueError, ["rank", "-1", "≥ 0"]),
    ("ranks empty", {"rank": ()}, TypeError, ["rank"]),
    ("ranks negative", {"rank": (2, -2)}, ValueError, ["rank", "-2"]),
    ("ranks and layers", {"rank": (2, 8), "layers": (0,)}, ValueError, ["rank", "2 ranks", "1 layers"]),
    ("nothing to train", {"rank": 0, "gate": None}, ValueError, ["rank", "gate=None"]),
    ("target", {"targets": ("q", "o")}, ValueError, ["targets", "'o'", "'q', 'k', 'v'"]),
    ("targets text", {"targets": "qv"}, TypeError, ["targets", "'qv'"]),
    ("targets empty", {"targets": ()}, TypeError, ["targets"]),
    ("targets twice", {"targets": ("q", "q")}, ValueError, ["targets", "at most once"]),
    ("tower", {"towers": ("vision",)}, ValueError, ["towers", "'vision'", "'visual', 'text'"]),
    ("towers text", {"towers": "visual"}, TypeError, ["towers", "'visual'"]),
    ("towers empty", {"towers": []}, TypeError, ["towers"]),
    ("gate", {"gate": "relu"}, ValueError, ["gate", "'relu'", "softmax"]),
    ("gate bool", {"gate": False}, ValueError, ["gate", "False"]),
    ("alpha nan", {"alpha": NAN}, ValueError, ["alpha", "nan"]),
    ("alpha inf", {"alpha": float("inf")}, ValueError, ["alpha", "inf"]),
    ("alpha text", {"alpha": "16"}, ValueError, ["alpha", "'16'"]),
    ("dropout one", {"dropout": 1.0}, ValueError, ["dropout", "1.0", "[0, 1)"]),
    ("dropout negative", {"dropout": -0.1}, ValueError, ["dropout", "-0.1"]),
    ("dropout nan", {"dropout": NAN}, ValueError, ["dropout", "nan"]),
    ("dropout None", {"dropout": None}, ValueError, ["dropout", "None"]),
    ("per_head", {"per_head": 1}, TypeError, ["per_head", "1"]),
    ("layers int", {"layers": 3}, TypeError, ["layers", "3"]),
    ("layers empty", {"layers": ()}, TypeError, ["layers"]),
    ("layers float", {"layers": (1.0,)}, TypeError, ["layers", "1.0"]),
]:
    row(f"HeadConfig {name}", nothing, lambda m, t, o=options: HeadConfig(**o), error, *words)
row("HeadConfig.hap 0", nothing, lambda m, t: HeadConfig.hap(0), ValueError, "depth", "0")
row("HeadConfig.hap float", nothing, lambda m, t: HeadConfig.hap(12.0), ValueError, "depth", "12.0")
row("HeadConfig.from_dict key", nothing, lambda m, t: HeadConfig.from_dict({"r": 1}), ValueError, "config", "'r'")
row("HeadConfig keyword", nothing, lambda m, t: HeadConfig(ranks=2), TypeError, "ranks")

# ------------------------------------------------------------------------------------------- patch and explain


def both(id, build, error, *words, config=None, **options):
    """The same refusal from patch and from explain, which foresees it."""
    row(f"patch {id}", build, lambda m, t: fastheads.patch(m, config, **options), error, *words)
    row(f"explain {id}", build, lambda m, t: fastheads.explain(m, config, **options), error, *words)


def quantised_attention(model):
    block(model).attn.in_proj_weight = nn.Parameter(torch.zeros(192, 64, dtype=torch.int8), requires_grad=False)


def quantise(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def scripted_part(model):
    block(model).mlp = torch.jit.script(nn.Linear(64, 64))


def traced_tower(model):
    model.visual = torch.jit.trace(model.visual.eval(), images(1), check_trace=False)


def replace_visual(cls_name):
    def change(model):
        model.visual = named(cls_name)

    return change


def replace_text(model):
    model.text = named("HFTextEncoder")


def attention(make):
    def change(model):
        block(model).attn = make()

    return change


def set_part(owner, name, value):
    def change(model):
        setattr(owner(model), name, value())

    return change


def two_step(model):
    fastheads.patch(model, HeadConfig(rank=1))


cross = lambda: nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True)  # noqa: E731
inner = lambda: HeadConfig(towers=("text",))  # noqa: E731

row("patch not a module", lambda: "ViT-B-16", lambda m, t: fastheads.patch(m), TypeError, "model", "str", "OpenCLIP")
row("explain not a module", lambda: None, lambda m, t: fastheads.explain(m), TypeError, "model", "NoneType")
row("patch twice", with_(two_step), lambda m, t: fastheads.patch(m), ValueError, "model", "already", "unpatch")
row("patch twice, other tower", with_(two_step), lambda m, t: fastheads.patch(m, inner()), ValueError, "already")
both("config a dict", clip, TypeError, "config", "dict", "HeadConfig", config={"rank": 2})
both("impl", clip, ValueError, "impl", "'cuda'", "'auto'", impl="cuda")
both("impl a number", clip, ValueError, "impl", "3", impl=3)
row(
    "patch strict",
    MODELS["attention_qk_norm"],
    lambda m, t: fastheads.patch(m, strict=True),
    ValueError,
    "strict",
    "visual.0",
    "stacked",
    "ln_q",
)
for layers, named_layer in [((3,), "3"), ((0, -4), "-4"), ((99,), "99")]:
    both(f"layers {layers}", clip, ValueError, "layers", named_layer, "0 … 2", config=HeadConfig(layers=layers))
both("layers twice", clip, ValueError, "layers", "once", config=HeadConfig(layers=(0, -3)))
both("ranks for 3 layers", clip, ValueError, "rank", "2 ranks", "3", config=HeadConfig(rank=(2, 8)))
both("ranks for text", clip, ValueError, "rank", "text", config=HeadConfig(rank=(2, 2, 2), towers=BOTH))
both("no visual", lambda: nn.Linear(2, 2), TypeError, "model", "Linear", "visual", "OpenCLIP")
both("no text", with_(image_tower_alone), TypeError, "model", "text", config=inner())
both("timm tower", with_(replace_visual("TimmModel")), TypeError, "visual", "timm")
both("ResNet tower", with_(replace_visual("ModifiedResNet")), TypeError, "visual", "ResNet")
both("Hugging Face tower", with_(replace_text), TypeError, "text", "Hugging Face", config=inner())
both("unknown tower", with_(replace_visual("Swin")), TypeError, "visual", "Swin", "resblocks")
both("unknown attention", with_(attention(lambda: nn.Linear(64, 64))), TypeError, "visual.1", "Linear")
both("block without attn", with_(lambda m: delattr(block(m), "attn")), TypeError, "visual", "attn")
both("cross-attention", with_(attention(cross)), TypeError, "visual.1", "cross-attention")
both("cross, dev", with_(attention(lambda: Attention(64, 4, cross=True))), TypeError, "visual.1", "cross-attention")
both("bias_kv", with_(attention(lambda: nn.MultiheadAttention(64, 4, add_bias_kv=True))), TypeError, "add_bias_kv")
both(
    "zero_attn", with_(attention(lambda: nn.MultiheadAttention(64, 4, add_zero_attn=True))), TypeError, "add_zero_attn"
)
for api in ("attention", "development"):
    both(f"ln_inner, {api}", MODELS[f"{api}_inner_norm"], TypeError, "visual.0", "ln_inner", "gate=None")
fsdp = with_(set_part(block, "mlp", lambda: named("FullyShardedDataParallel")))
both("FSDP inside", fsdp, TypeError, "FSDP", "patch first")
fsdp2 = with_(set_part(block, "mlp", lambda: type("FSDPLinear", (type("FSDPModule", (), {}), nn.Linear), {})(2, 2)))
both("FSDP2 inside", fsdp2, TypeError, "FSDP", "patch first")
both("PEFT around", with_(wrapped("PeftModel", "peft.peft_model", "base_model")), TypeError, "PEFT", "merge_and_unload")
both("PEFT inside", with_(set_part(block, "mlp", lambda: named("Linear", "peft.tuners.lora.layer"))), TypeError, "PEFT")
both("peft_config", with_(set_part(lambda m: m, "peft_config", dict)), TypeError, "PEFT")
both("scripted", lambda: torch.jit.script(nn.Linear(2, 2)), TypeError, "model", "scripted", "eager")
both("scripted inside", with_(scripted_part), TypeError, "scripted", "mlp")
both("traced tower", with_(traced_tower), TypeError, "scripted", "visual")
both("quantised", with_(quantise), TypeError, "quantised", "float")
both(
    "bitsandbytes",
    with_(set_part(block, "mlp", lambda: named("Linear4bit", "bitsandbytes.nn"))),
    TypeError,
    "quantised",
)
both("int8 weights", with_(quantised_attention), TypeError, "visual.1", "quantised")

# ------------------------------------------------------------------------- functions of a patched model

text_batch, ids = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])


def enter(context):
    with context:
        pass


NEED_A_PATCH = {
    "unpatch": fastheads.unpatch,
    "merge": fastheads.merge,
    "disabled": lambda m: enter(fastheads.disabled(m)),
    "gates": fastheads.gates,
    "lora_parameters": fastheads.lora_parameters,
    "gate_parameters": fastheads.gate_parameters,
    "adapter_state_dict": fastheads.adapter_state_dict,
    "base_state_dict": fastheads.base_state_dict,
    "capture_heads": lambda m: enter(fastheads.capture_heads(m)),
}
for name, function in NEED_A_PATCH.items():
    row(f"{name} unpatched", clip, lambda m, t, f=function: f(m), ValueError, "model", "not patched")
    row(f"{name} no model", lambda: 3, lambda m, t, f=function: f(m), TypeError, "model", "int")
row("save_adapter unpatched", clip, lambda m, t: fastheads.save_adapter(m, t / "a"), ValueError, "model", "not patched")
row("save_adapter no model", nothing, lambda m, t: fastheads.save_adapter(m, t / "a"), TypeError, "model", "NoneType")
row("is_patched no model", nothing, lambda m, t: fastheads.is_patched(m), TypeError, "model", "NoneType")
for name in ("unpatch", "merge"):
    function = NEED_A_PATCH[name]
    wrapper = with_(nn.DataParallel, adapted())
    row(f"{name} wrapped", wrapper, lambda m, t, f=function: f(m), TypeError, "model", "DataParallel")
    row(f"{name} part", adapted(), lambda m, t, f=function: f(m.visual), ValueError, "model")
row("save_adapter part", adapted(), lambda m, t: fastheads.save_adapter(m.visual, t / "a"), ValueError, "model")


def spoil(part, value):
    def change(model):
        with torch.no_grad():
            getattr(attentions(model)[2].heads, part).flatten()[-1] = value

    return with_(change, adapted())


for part, value in [("lora_A", NAN), ("lora_B", float("inf")), ("theta", NAN), ("theta", -float("inf"))]:
    merge = lambda m, t: fastheads.merge(m)  # noqa: E731
    row(f"merge {part} {value}", spoil(part, value), merge, ValueError, "visual.2", "finite")
    save = lambda m, t: fastheads.save_adapter(m, t / "a")  # noqa: E731
    row(f"save_adapter {part} {value}", spoil(part, value), save, ValueError, "model", part, "finite")

row("wise_ft patched", adapted(), lambda m, t: fastheads.wise_ft(m, clip(), 0.5), ValueError, "model", "merge")
for alpha in (-0.1, 1.5, NAN, None):
    row(
        f"wise_ft {alpha}", clip, lambda m, t, a=alpha: fastheads.wise_ft(m, clip(), a), ValueError, "alpha", str(alpha)
    )
row("wise_ft model", nothing, lambda m, t: fastheads.wise_ft(m, clip(), 0.5), TypeError, "model", "NoneType")
row(
    "wise_ft other", clip, lambda m, t: fastheads.wise_ft(m, clip(layers=2), 0.5), ValueError, "original", "resblocks.2"
)
wise = lambda m, t: fastheads.wise_ft(m, "openai", 0.5)  # noqa: E731
row("wise_ft original", clip, wise, TypeError, "original", "str")

row(
    *("load_adapter missing", clip, lambda m, t: fastheads.load_adapter(m, t / "none")),
    *(FileNotFoundError, "directory", "does not exist"),
)
row("load_adapter empty", clip, lambda m, t: fastheads.load_adapter(m, t), FileNotFoundError, "directory", "no adapter")


def load_into(**options):
    def call(model, folder):
        fastheads.save_adapter(patched("clip", HeadConfig()), folder)
        fastheads.load_adapter(model, folder, **options)

    return call


row("load_adapter base", lambda: clip(seed=1), load_into(), ValueError, "directory", "another base", "check_base")
row("load_adapter config", adapted(rank=3), load_into(), ValueError, "directory", "config", "unpatch")
row("load_adapter impl", clip, load_into(impl="cuda"), ValueError, "impl", "'cuda'")
row("load_adapter no model", nothing, load_into(), TypeError, "model", "NoneType")
row("load_adapter tower", with_(replace_visual("TimmModel")), load_into(), TypeError, "visual", "timm")
row(
    *("load_adapter wrapped", with_(nn.DataParallel), load_into(), TypeError, "patch first"),
)

# ------------------------------------------------------------------------------------------- capture_heads


def capture(**options):
    return lambda m, t: enter(fastheads.capture_heads(m, **options))


def nested(model, folder):
    with fastheads.capture_heads(model), fastheads.capture_heads(model):
        pass


no_pool = with_(set_part(lambda m: m.visual, "pool_type", lambda: "none"), adapted())
row("capture_heads tower", adapted(), capture(tower="vision"), ValueError, "tower", "'vision'", "visual")
row("capture_heads unpatched tower", adapted(), capture(tower="text"), ValueError, "tower", "'text'", "visual")
row("capture_heads nested", adapted(), nested, ValueError, "captured already")
row("capture_heads pool", no_pool, capture(), ValueError, "visual", "pool")

# -------------------------------------------------------------------------------------------------- losses


def mmd(features=text_batch, domains=ids, **options):
    return lambda m, t: fastheads.mmd(features, domains, **options)


meta = lambda x: x.to("meta")  # noqa: E731
row("mmd features list", nothing, mmd([1.0]), TypeError, "features", "list")
row("mmd features 1-D", nothing, mmd(torch.ones(4)), ValueError, "features", "(4,)", "[N, D]")
row("mmd features 4-D", nothing, mmd(torch.ones(1, 1, 4, 2)), ValueError, "features", "[L, N, D]")
row("mmd features int", nothing, mmd(text_batch.long()), TypeError, "features", "int64")
row("mmd domains list", nothing, mmd(domains=[0, 0, 1, 1]), TypeError, "domains", "list")
row("mmd domains float", nothing, mmd(domains=ids.float()), TypeError, "domains", "float32", "int64")
row("mmd domains bool", nothing, mmd(domains=ids.bool()), TypeError, "domains", "bool")
row("mmd domains short", nothing, mmd(domains=ids[:3]), ValueError, "domains", "(3,)", "[4]")
row("mmd domains 2-D", nothing, mmd(domains=ids[None]), ValueError, "domains", "(1, 4)")
row("mmd domains device", nothing, mmd(domains=meta(ids)), ValueError, "domains", "meta", "cpu")
row("mmd domains negative", nothing, mmd(domains=ids - 1), ValueError, "domains", "-1")
row("mmd domains too high", nothing, mmd(domains=ids + 1, num_domains=2), ValueError, "domains", "2", "num_domains")
for value in (0, -1, 2.0, True, "2"):
    row(f"mmd num_domains {value!r}", nothing, mmd(num_domains=value), ValueError, "num_domains", repr(value))
row("mmd kernel", nothing, mmd(kernel="gauss"), ValueError, "kernel", "'gauss'", "'adaptive'")
row("mmd kernel None", nothing, mmd(kernel=None), TypeError, "kernel", "None")
row("mmd kernel empty", nothing, mmd(kernel=[]), ValueError, "kernel", "gammas")
row("mmd kernel texts", nothing, mmd(kernel=["1"]), TypeError, "kernel", "'1'")
for value in (NAN, float("inf"), 0.0, -1.0):
    row(f"mmd gamma {value}", nothing, mmd(kernel=[1.0, value]), ValueError, "kernel", str(value), "finite")
    row(f"mmd gamma tensor {value}", nothing, mmd(kernel=torch.tensor([1.0, value])), ValueError, "kernel", "finite")
row("mmd gammas 2-D", nothing, mmd(kernel=torch.ones(1, 2)), ValueError, "kernel", "(1, 2)", "[U]")
row("mmd gammas int", nothing, mmd(kernel=torch.ones(2).long()), ValueError, "kernel", "int64")
row("mmd estimator", nothing, mmd(estimator="linear"), ValueError, "estimator", "'linear'", "unbiased")
row("mmd reduction", nothing, mmd(reduction="sum"), ValueError, "reduction", "'sum'", "mean")
row("mmd impl", nothing, mmd(impl="cuda"), ValueError, "impl", "'cuda'")
one = torch.tensor([0, 0, 0, 1])
row("mmd one sample", nothing, mmd(domains=one, estimator="unbiased"), ValueError, "domains", "[1]", "unbiased")


def head_mmd(domains=ids, *, heads=None, run=True, **options):
    """Captures a forward pass over 4 images, then calls head_mmd."""

    def call(model, folder):
        with seeded(0), fastheads.capture_heads(model) as captured:
            embedding = features(model, batch=4) if run else None
        given = {k: v(model, embedding) if callable(v) else v for k, v in options.items()}
        fastheads.head_mmd(captured if heads is None else heads, domains, **given)

    return call


def frozen(model, embedding):
    return embedding.detach()


def unrelated(model, embedding):
    return embedding.detach().requires_grad_()


def no_grad(model, embedding):
    with torch.no_grad():
        return features(model, batch=4)


embedded = {"features": "embedding"}
row("head_mmd heads", adapted(), head_mmd(heads=text_batch), TypeError, "heads", "Tensor", "capture_heads")
row("head_mmd nothing", adapted(), head_mmd(run=False), RuntimeError, "heads", "nothing was captured")
row("head_mmd no gates", adapted(gate=None), head_mmd(), ValueError, "heads", "gate=None")
row("head_mmd features", adapted(), head_mmd(features="tokens"), ValueError, "features", "'tokens'", "embedding")
row("head_mmd reduction", adapted(), head_mmd(reduction="none"), ValueError, "reduction")
row("head_mmd domains", adapted(), head_mmd(ids[:3]), ValueError, "domains", "(3,)", "[4]")
row("head_mmd domains dtype", adapted(), head_mmd(ids.float()), TypeError, "domains", "float32")
row("head_mmd domain ids", adapted(), head_mmd(ids - 1), ValueError, "domains", "-1")
row("head_mmd kernel", adapted(), head_mmd(kernel=[NAN]), ValueError, "kernel", "nan")
row("head_mmd keyword", adapted(), head_mmd(bandwidth=1.0), TypeError, "bandwidth")
row("head_mmd no embedding", adapted(), head_mmd(**embedded), ValueError, "embedding", "encode_image")
row("head_mmd frozen", adapted(), head_mmd(embedding=frozen, **embedded), ValueError, "embedding", "gradient")
row("head_mmd no_grad", adapted(), head_mmd(embedding=no_grad, **embedded), ValueError, "embedding", "gradient")
row("head_mmd unrelated", adapted(), head_mmd(embedding=unrelated, **embedded), ValueError, "embedding", "gates")
row("head_mmd embedding no gates", adapted(gate=None), head_mmd(embedding=frozen, **embedded), ValueError, "gate=None")
row(
    *("head_mmd embedding list", adapted(), head_mmd(embedding=[1.0], **embedded), TypeError, "embedding", "list"),
)


def kl(features=text_batch, teacher=text_batch, weights=text_batch, scale=100.0):
    return lambda m, t: fastheads.context_kl(features, teacher, weights, scale)


row("context_kl features 1-D", nothing, kl(text_batch[0]), ValueError, "features", "(8,)", "[B, E]")
row("context_kl features 3-D", nothing, kl(text_batch[None]), ValueError, "features", "(1, 4, 8)")
row("context_kl teacher", nothing, kl(teacher=text_batch[:3]), ValueError, "teacher_features", "(3, 8)", "(4, 8)")
row("context_kl weights", nothing, kl(weights=text_batch.T), ValueError, "context_weights", "(8, 4)", "[C, 8]")
row("context_kl weights 1-D", nothing, kl(weights=text_batch[0]), ValueError, "context_weights", "(8,)")
for name, call, error, words in [
    ("features list", kl([1.0]), TypeError, ["features", "list"]),
    ("teacher None", kl(teacher=None), TypeError, ["teacher_features", "NoneType"]),
    ("weights list", kl(weights=[[1.0] * 8]), TypeError, ["context_weights", "list"]),
    ("features int", kl(text_batch.long()), TypeError, ["features", "int64"]),
    ("teacher int", kl(teacher=text_batch.long()), TypeError, ["teacher_features", "int64"]),
    ("weights int", kl(weights=text_batch.long()), TypeError, ["context_weights", "int64"]),
    ("teacher device", kl(teacher=meta(text_batch)), ValueError, ["teacher_features", "meta"]),
    ("weights device", kl(weights=meta(text_batch)), ValueError, ["context_weights", "meta"]),
    ("scale nan", kl(scale=NAN), ValueError, ["logit_scale", "nan"]),
    ("scale text", kl(scale="100"), TypeError, ["logit_scale", "'100'"]),
]:
    row(f"context_kl {name}", nothing, call, error, *words)

# ------------------------------------------------------------------------------------------------ text weights

tokenizer = lambda prompts: torch.ones(len(prompts), 12, dtype=torch.int64)  # noqa: E731
for function in (fastheads.class_text_weights, fastheads.context_text_weights):
    name = function.__name__

    def text(*args, f=function):
        return lambda m, t: f(m, tokenizer, *args)

    row(f"{name} classnames text", clip, text("dog", ["a {}."]), ValueError, "classnames", "'dog'")
    row(f"{name} classnames empty", clip, text([], ["a {}."]), ValueError, "classnames", "[]")
    row(f"{name} templates text", clip, text(["dog"], "a {}."), ValueError, "templates", "'a {}.'")
    row(f"{name} templates empty", clip, text(["dog"], []), ValueError, "templates", "[]")
    row(f"{name} no place", clip, text(["dog"], ["a {}.", "a photo."]), ValueError, "templates", "'a photo.'", "{}")
    other = text(["dog"], ["a {style} photo."])
    row(f"{name} other place", clip, other, ValueError, "templates", "style")
    no_text = lambda: nn.Linear(2, 2)  # noqa: E731
    row(f"{name} model", no_text, text(["dog"], ["a {}."]), TypeError, "model", "Linear")


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own scripting and quantisation
@pytest.mark.parametrize(("build", "call", "error", "words"), ROWS)
def test_bad_input_is_refused_in_words_and_changes_nothing(build, call, error, words, tmp_path):
    model = build()
    inner = getattr(model, "module", model)
    before = snapshot(model), snapshot(inner)
    with pytest.raises(error) as caught:
        call(model, tmp_path)
    assert_unchanged(model, before[0])
    assert_unchanged(inner, before[1])
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not (tmp_path / "a").exists()  # nothing was saved


def test_every_public_function_is_in_the_table():
    rows = {word for p in ROWS for word in p.id.split()}
    without = {"PatchReport"}
    assert [name for name in fastheads.__all__ if name not in without and name not in rows] == []


def test_ids_are_unique():
    ids = [p.id for p in ROWS]
    assert len(set(ids)) == len(ids)
