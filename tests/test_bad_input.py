"""The table of bad input: what each public function says to it. That of the losses is in losses/test_bad_input.py.

Folders and images have their table in train/data/test_bad_input.py, damaged adapters in test_adapters_broken.py, the
command line in cli/test_bad_input.py.
"""

import pytest
import torch
from bad_input import NAN, Table, adapted, assert_refused, nothing, with_
from standins import ALL, BOTH, MODELS, Attention, attentions, clip, images, patched, vit
from timm.models.eva import Eva
from torch import nn

import fastheads
from fastheads import HeadConfig, losses

TABLE = Table()
row = TABLE.row


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
    ("target", {"targets": ("q", "out")}, ValueError, ["targets", "'out'", "'q', 'k', 'v', 'o', 'fc1', 'fc2', 'mlp'"]),
    ("targets text", {"targets": "qv"}, TypeError, ["targets", "'qv'"]),
    ("targets empty", {"targets": ()}, TypeError, ["targets"]),
    ("targets twice", {"targets": ("q", "q")}, ValueError, ["targets", "at most once"]),
    ("targets twice in the MLP", {"targets": ("mlp", "fc1")}, ValueError, ["targets", "at most once"]),
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
row(
    "patch recompute", clip, lambda m, t: fastheads.patch(m, recompute="all"), ValueError, "recompute", "'all'", "k ≥ 1"
)
row("patch twice", with_(two_step), lambda m, t: fastheads.patch(m), ValueError, "model", "already", "unpatch")
row("patch twice, other tower", with_(two_step), lambda m, t: fastheads.patch(m, inner()), ValueError, "already")
both("config a dict", clip, TypeError, "config", "dict", "HeadConfig", config={"rank": 2})
both("impl", clip, ValueError, "impl", "'cuda'", "'auto'", impl="cuda")
both("impl a number", clip, ValueError, "impl", "3", impl=3)
row(
    "patch strict",
    with_(attention(lambda: nn.MultiheadAttention(64, 4, dropout=0.1))),
    lambda m, t: fastheads.patch(m, strict=True),
    ValueError,
    "strict",
    "visual.1",
    "stacked",
    "attention dropout",
)
for layers, named_layer in [((3,), "3"), ((0, -4), "-4"), ((99,), "99")]:
    both(f"layers {layers}", clip, ValueError, "layers", named_layer, "0 … 2", config=HeadConfig(layers=layers))
both("layers twice", clip, ValueError, "layers", "once", config=HeadConfig(layers=(0, -3)))
both("ranks for 3 layers", clip, ValueError, "rank", "2 ranks", "3", config=HeadConfig(rank=(2, 8)))
both("ranks for text", clip, ValueError, "rank", "text", config=HeadConfig(rank=(2, 2, 2), towers=BOTH))
both("no visual", lambda: nn.Linear(2, 2), TypeError, "model", "Linear", "visual", "OpenCLIP")
both("no text", with_(image_tower_alone), TypeError, "model", "text", config=inner())
both("timm tower", with_(replace_visual("TimmModel")), TypeError, "visual", "TimmModel", "no attention")
both("ResNet tower", with_(replace_visual("ModifiedResNet")), TypeError, "visual", "ResNet")
both("unknown tower", with_(replace_visual("Swin")), TypeError, "visual", "Swin", "no heads to adapt")
both("unknown attention", with_(attention(lambda: nn.Linear(64, 64))), TypeError, "visual.1", "Linear")
both("block without attn", with_(lambda m: delattr(block(m), "attn")), TypeError, "visual", "resblocks[i].attn")
both(
    "an MLP of other parts",
    lambda: vit(Eva, swiglu_mlp=True, scale_mlp=True),
    TypeError,
    *("targets", "'fc1'", "visual.0", "nothing at mlp.c_fc or mlp.fc1"),
    config=HeadConfig(targets=ALL),
)
both(
    "an output projection of another kind",
    with_(lambda m: setattr(block(m).attn, "out_proj", nn.utils.parametrizations.weight_norm(block(m).attn.out_proj))),
    TypeError,
    *("targets", "'o'", "visual.1", "ParametrizedNonDynamicallyQuantizableLinear", "nn.Linear"),
    config=HeadConfig(targets=ALL),
)
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


def enter(context):
    with context:
        pass


NEED_A_PATCH = {
    "unpatch": fastheads.unpatch,
    "merge": fastheads.merge,
    "disabled": lambda m: enter(fastheads.disabled(m)),
    "masked": lambda m: enter(fastheads.masked(m, [])),
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
row("load_adapter tower", with_(replace_visual("ModifiedResNet")), load_into(), TypeError, "visual", "ResNet")
row(
    *("load_adapter wrapped", with_(nn.DataParallel), load_into(), TypeError, "patch first"),
)

# ---------------------------------------------------------------------------------------------------- plan


def plan(**options):
    return lambda m, t: fastheads.plan(m, **{"batch": 4, **options})


for name, options, error, words in [
    ("batch zero", {"batch": 0}, ValueError, ["batch", "0", "≥ 1"]),
    ("batch float", {"batch": 4.0}, ValueError, ["batch", "4.0"]),
    ("classes", {"classes": 0}, ValueError, ["classes", "≥ 1"]),
    ("gpu", {"gpu": "V100"}, ValueError, ["gpu", "'V100'", "A100-40, A100-80, H100"]),
    ("method", {"method": "zero-shot"}, ValueError, ["method", "'zero-shot'", "ha-lora"]),
    ("precision", {"precision": "fp16"}, ValueError, ["precision", "'fp16'", "amp-bf16"]),
    ("impl", {"impl": "triton"}, ValueError, ["impl", "'triton'", "'stacked'"]),
    ("rank of gates alone", {"method": "dig", "rank": 2}, ValueError, ["rank", "dig"]),
    ("config of none", {"method": "car-ft", "config": HeadConfig()}, ValueError, ["config", "car-ft"]),
    ("recompute of none", {"method": "car-ft", "recompute": True}, ValueError, ["recompute", "car-ft"]),
    ("recompute", {"recompute": -1}, ValueError, ["recompute", "-1", "k ≥ 1"]),
]:
    row(f"plan {name}", clip, plan(**options), error, *words)

row("plan name", nothing, lambda m, t: fastheads.plan("ViT-B16", batch=4), ValueError, "model", "'ViT-B16'", "ViT-B-16")
row("plan no model", nothing, plan(), TypeError, "model", "NoneType")
row("plan patched", adapted(), plan(), ValueError, "model", "patched already")


# ------------------------------------------------------------------------------------------- capture_heads


def capture(**options):
    return lambda m, t: enter(fastheads.capture_heads(m, **options))


def nested(model, folder):
    with fastheads.capture_heads(model), fastheads.capture_heads(model):
        pass


def masked(heads, **options):
    return lambda m, t: enter(fastheads.masked(m, heads, **options))


row("masked layer", adapted(), masked([(0, 0), (3, 0)]), ValueError, "heads", "layer 3", "0, 1, 2")
row("masked head", adapted(), masked([(0, 0), (2, 4)]), ValueError, "heads", "head 4", "0 … 3")
row("masked tower", adapted(), masked([(0, 0)], tower="text"), ValueError, "tower", "'text'", "visual")
no_pool = with_(set_part(lambda m: m.visual, "pool_type", lambda: "none"), adapted())
row("capture_heads tower", adapted(), capture(tower="vision"), ValueError, "tower", "'vision'", "visual")
row("capture_heads unpatched tower", adapted(), capture(tower="text"), ValueError, "tower", "'text'", "visual")
row("capture_heads nested", adapted(), nested, ValueError, "captured already")
row("capture_heads pool", no_pool, capture(), ValueError, "visual", "pool")


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own scripting and quantisation
@pytest.mark.parametrize(("build", "call", "error", "words"), TABLE)
def test_bad_input_is_refused_in_words_and_changes_nothing(build, call, error, words, tmp_path):
    assert_refused(build, call, error, words, tmp_path)


def test_every_public_function_is_in_the_table():
    without = {"PatchReport", "Plan", *losses.__all__}
    assert [name for name in fastheads.__all__ if name not in without | TABLE.functions()] == []
