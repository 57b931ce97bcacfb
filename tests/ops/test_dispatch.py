"""Who computes what, and what is said of the others."""

from types import SimpleNamespace

import pytest
import torch
from problems import BF16, F16, F32, F64, Case
from standins import attentions, clip, features
from torch._subclasses.fake_tensor import FakeTensorMode

import fastheads
from fastheads import HeadConfig, mmd
from fastheads.ops import NAMES, Problem, asked_for, choose, dispatch, head_attention
from fastheads.ops.dispatch import IMPLEMENTATIONS, not_supported_reasons

TRITON = ("stacked", "delta", "one_pass")


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    """Triton installed, not interpreting; no choice remembered."""
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.delenv(dispatch.IMPL_VARIABLE, raising=False)
    dispatch._remembered.cache_clear()
    yield
    dispatch._remembered.cache_clear()


def problem(**changes):
    return Problem(
        **{"device": "cuda", "dtype": F32, "stored": F32, "num_heads": 12, "head_dim": 64, "rank": 2, **changes}
    )


# --------------------------------------------------------------------------------------------------------- reasons


def test_a_plain_problem_is_every_kernels():
    assert all(not_supported_reasons(name, problem()) == [] for name in TRITON)
    assert not_supported_reasons("cpu", problem(device="cpu")) == []
    assert not_supported_reasons("reference", problem(device="mps", dtype=F64)) == []


REASONS = {
    "device": (TRITON, {"device": "cpu"}, "runs on cuda, not on cpu"),
    "device of the cpu's": (("cpu",), {"device": "cuda"}, "runs on cpu, not on cuda"),
    "unknown device": ((*TRITON, "cpu"), {"device": "mps"}, "not on mps"),
    "dtype": (TRITON, {"dtype": F64}, "does not compute in float64"),
    "small head": (TRITON, {"head_dim": 8}, "takes head sizes 16 to 128, not 8"),
    "large head": (TRITON, {"head_dim": 136}, "takes head sizes 16 to 128, not 136"),
    "odd head": (TRITON, {"head_dim": 36}, "multiples of 8, not 36"),
    "rank": (("stacked", "delta"), {"rank": 65}, "takes ranks up to 64, not 65"),
    "rank of one pass": (("one_pass",), {"rank": 33}, "takes ranks up to 32, not 33"),
    "length": (("one_pass",), {"length": 273}, "takes up to 272 tokens, not 273"),
    "on chip": (("one_pass",), {"length": 257, "head_dim": 128}, "on chip, where 257 tokens do not fit"),
    "dropout": (("stacked", "one_pass"), {"dropout": True}, "has no LoRA dropout"),
    "extras": ((*TRITON, "cpu"), {"device": "cuda", "extras": ("ln_q", "ln_k")}, "does not cover ln_q"),
}


@pytest.mark.parametrize("which", REASONS)
def test_each_reason_is_given_in_words(which):
    names, changes, words = REASONS[which]
    for name in names:
        assert any(words in reason for reason in not_supported_reasons(name, problem(**changes))), name


def test_all_reasons_are_given_not_the_first():
    found = not_supported_reasons("delta", problem(device="cpu", dtype=F64, rank=100, head_dim=200, extras=("ln_q",)))
    assert len(found) == 5


def test_limits_themselves_are_taken():
    for head_dim in (16, 72, 80, 88, 104, 112, 128):
        assert not_supported_reasons("delta", problem(head_dim=head_dim, rank=64)) == []
    assert not_supported_reasons("one_pass", problem(length=272, dtype=BF16)) == []
    assert not_supported_reasons("one_pass", problem(length=None)) == []  # not known before the call


def test_without_triton_the_kernels_say_so(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert not_supported_reasons("stacked", problem()) == ["needs Triton, which is not installed"]
    assert choose("auto", problem()).name == "reference"


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_chips_before_the_a100_are_refused(monkeypatch, capability, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    choice = choose("auto", problem())
    assert choice.name == ("stacked" if taken else "reference")
    assert taken or "compute capability 8.0 (A100) or newer" in choice.refused["delta"][0]


def test_one_pass_asks_the_chip_for_its_shared_memory(monkeypatch):
    taken = problem(dtype=BF16, length=257)
    assert not_supported_reasons("one_pass", taken) == []
    monkeypatch.setattr(dispatch, "_room", lambda *_: 35 * 1024)  # of the 99 KB that a block has on a small chip
    assert "on chip, where 257 tokens do not fit" in not_supported_reasons("one_pass", taken)[0]
    assert not_supported_reasons("one_pass", problem(dtype=BF16, length=50)) == []


def test_a_box_of_mixed_chips_is_asked_about_the_one_that_holds_the_tensor(monkeypatch):
    """Number 0, the current one, is an old chip with little memory; number 1 an A100."""
    chips = [SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024) for kilobytes in (64, 163)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: ((7, 5), (8, 0))[d or 0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d=None: chips[d or 0])
    for index, taken in ((None, False), (0, False), (1, True)):
        asked = problem(dtype=BF16, length=257, index=index)
        assert (choose("auto", asked).name == "stacked") is taken, index
        assert (not_supported_reasons("one_pass", asked) == []) is taken, index
        assert (dispatch.triton_reasons("cuda", index) == []) is taken  # what the MMD asks
    reasons = " ".join(not_supported_reasons("one_pass", problem(dtype=BF16, length=50, index=0)))
    assert "A100" in reasons and "on chip" in reasons


@pytest.mark.parametrize("call", ["head_attention", "mmd"])
def test_the_operators_ask_about_their_tensors_device(monkeypatch, call):
    """On fake tensors of the second GPU."""
    asked = []
    monkeypatch.setattr(dispatch, "triton_reasons", lambda *device: asked.append(device) or [])
    with FakeTensorMode():
        x = torch.empty(2, 8, 32, device="cuda:1")
        if call == "mmd":
            mmd(x, torch.zeros(8, dtype=torch.int64, device="cuda:1"), num_domains=2)
        else:
            head_attention(x, torch.empty(96, 32, device="cuda:1"), num_heads=2)
    assert asked and set(asked) == {("cuda", 1)}


def test_every_implementation_states_its_tolerances():
    assert set(IMPLEMENTATIONS) == {*TRITON, "cpu"} and set(NAMES) == {*IMPLEMENTATIONS, "reference"}
    for found in IMPLEMENTATIONS.values():
        assert found.forward_tolerance <= 2 and found.backward_tolerance <= 3  # the rule of the tests


# ------------------------------------------------------------------------------------------------------------ auto

CHOICES = {
    "float32 weights": ({}, "stacked"),
    "float32 weights under autocast": ({"dtype": BF16}, "stacked"),
    "bf16 weights": ({"dtype": BF16, "stored": BF16}, "delta"),
    "fp16 weights": ({"dtype": F16, "stored": F16}, "delta"),
    "fp16 weights under bf16 autocast": ({"dtype": BF16, "stored": F16}, "delta"),
    "16-bit weights without deltas": ({"dtype": BF16, "stored": BF16, "rank": 0}, "stacked"),
    "dropout": ({"dropout": True}, "delta"),
    "dropout, 16-bit weights": ({"dropout": True, "dtype": F16, "stored": F16}, "delta"),
    "short": ({"length": 50}, "stacked"),
    "long": ({"length": 4096}, "stacked"),
    "float64 on a GPU": ({"dtype": F64, "stored": F64}, "reference"),
    "a large head": ({"head_dim": 160}, "reference"),
    "on a CPU": ({"device": "cpu"}, "cpu"),
    "on a CPU, anything": ({"device": "cpu", "dtype": F64, "head_dim": 5, "rank": 99, "dropout": True}, "cpu"),
    "on Apple's": ({"device": "mps"}, "reference"),
    "extras": ({"extras": ("ln_q",)}, "reference"),
    "extras on a CPU": ({"device": "cpu", "extras": ("attention dropout",)}, "reference"),
}


@pytest.mark.parametrize("which", CHOICES)
def test_auto(which):
    changes, expected = CHOICES[which]
    choice = choose("auto", problem(**changes))
    assert choice.name == expected
    assert choice.falls_back == (expected == "reference")
    assert set(choice.refused) == set(IMPLEMENTATIONS) - {expected}


def test_auto_says_why_it_passes_over_what_could():
    refused = choose("auto", problem(dtype=BF16, stored=BF16)).refused
    assert refused["stacked"] == ["would round small deltas away in weights stored in bfloat16"]
    assert "ask for it by name" in refused["one_pass"][0]
    assert refused["cpu"] == ["runs on cpu, not on cuda"]


def test_auto_never_runs_triton_in_its_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    choice = choose("auto", problem(device="cpu"))
    assert choice.name == "cpu"
    assert all("interpreter only" in choice.refused[name][0] for name in TRITON)
    # even where the reference is all that is left
    assert choose("auto", problem(device="cpu", extras=("ln_q",))).name == "reference"
    assert choose("delta", problem(device="cpu")).name == "delta"  # asked for by name, as these tests do


# --------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("name", [*TRITON, "reference"])
def test_a_name_is_taken_at_its_word(name):
    assert choose(name, problem(dtype=BF16, stored=BF16)).name == name


def test_a_name_that_cannot_is_refused_with_all_its_reasons():
    with pytest.raises(ValueError, match="impl: 'one_pass' cannot compute this layer") as error:
        choose("one_pass", problem(dtype=F64, dropout=True))
    assert "does not compute in float64" in str(error.value) and "has no LoRA dropout" in str(error.value)
    assert "'auto'" in str(error.value)


def test_a_name_falls_back_for_what_only_the_reference_covers():
    choice = choose("delta", problem(extras=("ln_q", "ln_k")))
    assert choice.name == "reference"
    assert choice.refused["delta"] == ["does not cover ln_q", "does not cover ln_k"]


@pytest.mark.parametrize("name", ["triton", "", "Stacked", "cuda"])
def test_an_unknown_name_is_refused_and_the_known_ones_listed(name):
    with pytest.raises(
        ValueError, match="impl: got .*; takes 'auto', 'stacked', 'delta', 'one_pass', 'cpu', 'reference'"
    ):
        choose(name, problem())


def test_the_environment_overrides_auto_alone(monkeypatch):
    monkeypatch.setenv("FASTHEADS_IMPL", "delta")
    assert asked_for("auto") == "delta"
    assert choose("auto", problem()).name == "delta"
    assert choose("stacked", problem()).name == "stacked"
    monkeypatch.setenv("FASTHEADS_IMPL", "auto")
    assert choose("auto", problem()).name == "stacked"
    monkeypatch.setenv("FASTHEADS_IMPL", "fastest")
    with pytest.raises(ValueError, match="FASTHEADS_IMPL: got 'fastest'; takes 'auto'"):
        choose("auto", problem())
    assert choose("delta", problem()).name == "delta"


def test_the_environment_is_held_to_what_it_names(monkeypatch):
    monkeypatch.setenv("FASTHEADS_IMPL", "stacked")
    tensors = Case(N=3).tensors(F32)
    with pytest.raises(ValueError, match="'stacked' cannot compute this layer: it runs on cuda, not on cpu"):
        head_attention(**tensors, num_heads=2)


# ---------------------------------------------------------------------------------------------------------- models


def test_the_report_shows_each_layers_path_and_why_not_the_others():
    model = clip()
    planned = fastheads.explain(model)
    report = fastheads.patch(model)
    text = str(report)
    assert str(planned) == text == str(fastheads.explain(model))
    assert text.count("→ cpu") == 3
    assert "stacked: runs on cuda, not on cpu" in text and "(all layers)" in text
    assert all(layer.choice.name == "cpu" and not layer.choice.falls_back for layer in report.layers)


def test_the_report_follows_a_cast_to_16_bits():
    model = clip()
    fastheads.patch(model, impl="auto")
    for layer in fastheads.explain(model.bfloat16()).layers:
        assert layer.choice.name == "cpu"
    # what it would say on a GPU: the stored dtype decides
    assert choose("auto", problem(dtype=BF16, stored=BF16)).name == "delta"


def test_layers_with_extras_run_on_the_reference_and_the_report_says_so():
    def dropping():
        model = clip()
        for attention in attentions(model):
            attention.dropout = 0.1
        return model

    model = dropping()
    report = fastheads.patch(model, HeadConfig(), impl="cpu")
    assert all(layer.choice.name == "reference" for layer in report.layers)
    assert "cpu: does not cover attention dropout" in str(report)
    features(model).sum().backward()
    with pytest.raises(ValueError, match=r"strict: 3 layers fall back.*attention dropout"):
        fastheads.patch(dropping(), HeadConfig(), strict=True)


def test_a_model_can_be_patched_for_each_name_that_runs_here():
    expected = None
    for impl in ("auto", "cpu", "reference"):
        model = clip()
        torch.manual_seed(0)
        report = fastheads.patch(model, impl=impl)
        assert {layer.choice.name for layer in report.layers} == {"cpu" if impl == "auto" else impl}
        out = features(model)
        expected = out if expected is None else expected
        assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("impl", TRITON)
def test_patching_for_what_cannot_run_is_refused_before_anything_changes(impl):
    model = clip()
    with pytest.raises(ValueError, match=f"impl: '{impl}' cannot compute this layer: it runs on cuda, not on cpu"):
        fastheads.patch(model, impl=impl)
    assert not fastheads.is_patched(model)


# ------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "x": ({"x": torch.zeros(3, 32)}, "x: got shape"),
    "num_heads": ({"num_heads": 5}, "num_heads: got 5; takes a divisor of the width 32"),
    "no heads": ({"num_heads": 0}, "num_heads: got 0"),
    "w_in": ({"w_in": torch.zeros(32, 96)}, r"w_in: got shape \(32, 96\); takes \(96, 32\)"),
    "b_in": ({"b_in": torch.zeros(32)}, r"b_in: got shape \(32,\); takes \(96,\)"),
    "lora_A alone": ({"lora_B": None}, "lora_B: got None beside the other"),
    "lora_A": ({"lora_A": torch.zeros(2, 3, 2, 32)}, "lora_A: got shape"),
    "lora_B": ({"lora_B": torch.zeros(1, 2, 16, 2)}, "lora_B: got shape"),
    "targets": ({"targets": ("q", "o")}, "targets: got"),
    "targets twice": ({"targets": ("q", "q")}, "targets: got"),
    "gate": ({"gate": torch.ones(3)}, r"gate: got shape \(3,\); takes \(2,\)"),
    "mask": ({"mask": torch.zeros(4, 4)}, "mask: got shape"),
    "mask of five dimensions": ({"mask": torch.zeros(1, 1, 1, 5, 5)}, "mask: got shape"),
    "mask of bytes": ({"mask": torch.ones(5, 5, dtype=torch.uint8)}, "mask: got torch.uint8; takes booleans"),
    "mask of integers": ({"mask": torch.ones(5, 5, dtype=torch.int64)}, "mask: got torch.int64; takes booleans"),
    "pool": ({"pool": 5}, "pool: got token 5; takes -5 to 4"),
    "pool of none": ({"x": torch.zeros(2, 0, 32), "pool": 0}, "pool: got token 0; takes none, for x has no tokens"),
    "pool in words": ({"pool": "max"}, "pool: got 'max'"),
    "pool from past the end": ({"pool": slice(5, None)}, "pool: got slice.5, None, None.; takes"),
    "pool of a stretch": ({"pool": slice(1, 3)}, "pool: got slice.1, 3, None.; takes"),
    "pool per image": ({"pool": torch.zeros(3, dtype=torch.long)}, "pool: got shape"),
    "pool in 32 bits": ({"pool": torch.zeros(2, dtype=torch.int32)}, "pool: got torch.int32; takes int64"),
    "pool past the end": ({"pool": torch.tensor([0, 5])}, "pool: got tokens from 0 to 5; takes 0 to 4"),
    "pool from the end": ({"pool": torch.tensor([-1, 0])}, "pool: got tokens from -1 to 0; takes 0 to 4"),
    "device of pool": ({"pool": torch.zeros(2, dtype=torch.long, device="meta")}, "pool: is on meta"),
    "impl": ({"impl": "triton"}, "impl: got 'triton'"),
    "device": ({"w_in": torch.zeros(96, 32, device="meta")}, "w_in: is on meta"),
    "device of lora_B": ({"lora_B": torch.zeros(2, 2, 16, 2, device="meta")}, "lora_B: is on meta"),
    "dropout": ({"dropout_p": 1.5}, "dropout_p: got 1.5"),
    "dropout of all": ({"dropout_p": 1.0}, "dropout_p: got 1.0"),
}


@pytest.mark.parametrize("which", BAD)
def test_tensors_that_do_not_fit_are_refused_by_name(which):
    changes, words = BAD[which]
    tensors = Case(N=5).tensors(F32)
    with pytest.raises(ValueError, match=words):
        head_attention(**{**tensors, "num_heads": 2, **changes})
