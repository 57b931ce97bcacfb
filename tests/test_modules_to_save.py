"""Base tensors trained beside the adapters: saved by choice, named otherwise, and what unpatch says of them."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from standins import BOTH, assert_unchanged, clip, features, fill_adapters, patched, relative, same, snapshot
from timm.utils import ModelEmaV2
from torch.optim.swa_utils import AveragedModel

import fastheads
from fastheads import HeadConfig

TRAINED = ("logit_scale", "ln_final.weight", "visual.ln_post.bias", "visual.transformer.resblocks.1.ln_1.weight")
OUTSIDE = ("logit_scale", "ln_final.weight")  # of the adapted image tower


def train(model, names=TRAINED):
    """As an optimiser does with some of the base's parameters thawed."""
    for name in names:
        p = model.get_parameter(name)
        p.requires_grad_(True).grad = torch.ones_like(p)
    torch.optim.SGD([model.get_parameter(name) for name in names], lr=0.1).step()
    return model


def trained(names=TRAINED):
    return train(patched("clip", HeadConfig()), names)


def said(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught]


def quiet(run):
    result, messages = said(run)
    assert messages == []
    return result


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -------------------------------------------------------------------------------------------- saved by choice

LN_1 = [f"transformer.resblocks.{i}.ln_1.weight" for i in range(2)]
LN_1 += [f"visual.transformer.resblocks.{i}.ln_1.weight" for i in range(3)]
ALL = ["logit_scale", "ln_final", "ln_post", "visual.transformer.resblocks.1.ln_1"]


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    model = trained()
    quiet(lambda: fastheads.save_adapter(model, tmp_path, modules_to_save=ALL))
    fresh = clip()
    quiet(lambda: fastheads.load_adapter(fresh, tmp_path))
    assert same(state(fresh), state(model))
    for tower in BOTH:
        assert torch.equal(features(fresh, tower), features(model, tower))
    quiet(lambda: fastheads.unpatch(fresh))
    assert_unchanged(fresh, snapshot(clip()) | {"objects": snapshot(fresh)["objects"]})


@pytest.mark.parametrize(
    ("wanted", "tensors"),
    [
        (["logit_scale"], ["logit_scale"]),
        (["ln_1.weight"], LN_1),
        (["visual.ln_post"], ["visual.ln_post.weight", "visual.ln_post.bias"]),
        (["ln_post", "visual.ln_post.bias", "proj"], ["visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"]),
        (
            ["resblocks.2.attn.out_proj"],
            ["visual.transformer.resblocks.2.attn.out_proj." + n for n in ("weight", "bias")],
        ),
    ],
)
def test_names_are_matched_in_full_or_by_their_last_components(wanted, tensors, tmp_path):
    quiet(lambda: fastheads.save_adapter(patched("clip", HeadConfig()), tmp_path, modules_to_save=wanted))
    found = [name for name in load_file(tmp_path / "adapter_model.safetensors") if ".heads." not in name]
    assert sorted(found) == sorted(tensors)
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) == sorted(tensors)


@pytest.mark.parametrize("wanted", [["ln_7"], ["ost"], ["heads"], ["lora_A"], [""], ["ln_post", "ln_7"]])
def test_a_name_that_nothing_has_is_refused(wanted, tmp_path):
    with pytest.raises(ValueError, match=f"modules_to_save: got {wanted[-1]!r}"):
        fastheads.save_adapter(trained(), tmp_path / "a", modules_to_save=wanted)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("wanted", ["ln_post", [1], None])
def test_names_that_are_none_are_refused(wanted, tmp_path):
    with pytest.raises(TypeError, match="modules_to_save: got .*; takes a sequence of names"):
        fastheads.save_adapter(trained(), tmp_path / "a", modules_to_save=wanted)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["b", "a"], "in another order, first at class 0, 'a' there and 'b' here"),
        (["a", "c"], "'b' not here, 'c' here only"),
        (["a"], "'b' not here"),
        (["a", "b", "b"], "in another order, first at class 2, none there and 'b' here"),
    ],
)
def test_a_head_of_other_classes_is_refused_and_changes_nothing(classes, words, tmp_path):
    model = patched("clip")
    fastheads.save_adapter(model, tmp_path, classes=["a", "b"])
    other = clip()
    with pytest.raises(ValueError, match=f"^directory: .* other classes: {words}$"):
        fastheads.load_adapter(other, tmp_path, classes=classes)
    assert not fastheads.is_patched(other)
    fastheads.load_adapter(other, tmp_path, classes=["a", "b"])
    with pytest.raises(TypeError, match="^classes: got 'ab'"):
        fastheads.save_adapter(model, tmp_path, classes="ab")


def test_a_saved_module_that_is_not_finite_is_refused(tmp_path):
    model = trained()
    with torch.no_grad():
        model.visual.ln_post.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite.*ln_post"):
        fastheads.save_adapter(model, tmp_path / "a", modules_to_save=ALL)


def test_a_module_of_another_shape_is_refused_and_changes_nothing(tmp_path):
    fastheads.save_adapter(trained(), tmp_path, modules_to_save=[*ALL, "token_embedding"])
    other = clip()
    other.token_embedding = torch.nn.Embedding(60, 32)
    before = snapshot(other)
    with pytest.raises(ValueError, match="don't fit the model, first at 'token_embedding.weight'"):
        fastheads.load_adapter(other, tmp_path)
    assert_unchanged(other, before)


def test_another_adapter_puts_the_base_back_first(tmp_path):
    with_modules = fastheads.save_adapter(trained(), tmp_path / "a", modules_to_save=ALL)
    plain = fastheads.save_adapter(fill_adapters(patched("clip", HeadConfig()), seed=8), tmp_path / "b")
    model = fastheads.load_adapter(clip(), with_modules)
    quiet(lambda: fastheads.load_adapter(model, plain))
    assert same(fastheads.base_state_dict(model), state(clip()))
    quiet(lambda: fastheads.load_adapter(model, with_modules))
    assert same(state(model), state(trained()))
    assert same(state(quiet(lambda: fastheads.unpatch(model))), state(clip()))


def test_what_a_loaded_adapter_brought_stays_when_disabled_and_merged(tmp_path):
    fastheads.save_adapter(trained(), tmp_path, modules_to_save=ALL)
    model = fastheads.load_adapter(clip(), tmp_path)
    expected = features(model).detach()
    stock = train(clip())
    assert same(fastheads.base_state_dict(model), state(stock))
    with fastheads.disabled(model):
        assert relative(features(model), features(stock)) < 1e-5
    quiet(lambda: fastheads.merge(model))
    assert relative(features(model), expected) < 1e-5
    assert all(torch.equal(model.get_parameter(name), stock.get_parameter(name)) for name in TRAINED)


def test_a_run_that_goes_on_from_its_own_checkpoint_still_knows_the_base(tmp_path):
    fastheads.save_adapter(trained(), tmp_path / "a", modules_to_save=ALL)
    model = fastheads.load_adapter(clip(), tmp_path / "a")
    model.load_state_dict(state(model))
    _, (message,) = said(lambda: fastheads.save_adapter(model, tmp_path / "b"))
    assert "logit_scale" in message and "(7 tensors)" in message  # weight and bias of three norms
    assert same(state(quiet(lambda: fastheads.unpatch(model))), state(clip()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_can_be_unpatched_too(copied, tmp_path):
    fastheads.save_adapter(trained(), tmp_path, modules_to_save=ALL)
    twin = copied(fastheads.load_adapter(clip(), tmp_path))
    assert same(state(quiet(lambda: fastheads.unpatch(twin))), state(clip()))


# ---------------------------------------------------------------------------------------- said where it isn't


@pytest.mark.parametrize("names", [TRAINED, OUTSIDE, TRAINED[:1]])
def test_what_is_trained_beside_and_not_saved_is_named_and_the_adapter_loads(names, tmp_path):
    """Also where the base was frozen again before saving."""
    for model in (trained(names), trained(names).requires_grad_(False)):
        _, (message,) = said(lambda model=model: fastheads.save_adapter(model, tmp_path))
        assert names[0] in message and "not saved" in message and f"modules_to_save=[{names[0]!r}" in message
        fresh, (message,) = said(lambda: fastheads.load_adapter(clip(), tmp_path))
        assert names[0] in message and "saved without" in message
        assert same(fastheads.adapter_state_dict(fresh), fastheads.adapter_state_dict(model))
        assert same(fastheads.base_state_dict(fresh), state(clip()))


def test_only_what_is_left_out_is_named(tmp_path):
    _, (message,) = said(lambda: fastheads.save_adapter(trained(), tmp_path, modules_to_save=["ln_post", "ln_1"]))
    assert "logit_scale" in message and "ln_final.weight" in message and "visual" not in message


def test_many_names_are_counted(tmp_path):
    names = [name for name, _ in clip().named_parameters() if "ln_" in name]
    _, (message,) = said(lambda: fastheads.save_adapter(trained(names), tmp_path))
    assert f"… ({len(names)} tensors)" in message and len(message) < 400


def test_what_was_not_trained_is_still_checked(tmp_path):
    said(lambda: fastheads.save_adapter(trained(), tmp_path))
    other = clip()
    with torch.no_grad():
        other.visual.conv1.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="another base"):
        fastheads.load_adapter(other, tmp_path)


def test_running_statistics_are_no_base_that_stays(tmp_path):
    """A buffer that training moves."""
    model = clip()
    model.visual.norm = torch.nn.BatchNorm1d(4)
    fastheads.patch(model)
    quiet(lambda: fastheads.save_adapter(model, tmp_path))
    model.visual.norm.train()(torch.randn(3, 4))
    _, (message,) = said(lambda: fastheads.save_adapter(model, tmp_path))
    assert "visual.norm.running_mean" in message


def test_unpatch_names_what_it_does_not_put_back():
    model = trained()
    _, (message,) = said(lambda: fastheads.unpatch(model))
    assert "logit_scale" in message and "written since patch" in message and "4 tensors" in message
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, clip().state_dict()[name])
    }
    assert changed == set(TRAINED)


def test_unpatch_names_what_was_trained_before_an_adapter_replaced_it(tmp_path):
    """Its original is known no more."""
    folder = fastheads.save_adapter(trained(), tmp_path, modules_to_save=ALL)
    model = patched("clip", HeadConfig())
    train(model, ["visual.ln_post.bias"])
    said(lambda: fastheads.load_adapter(model, folder))
    _, (message,) = said(lambda: fastheads.unpatch(model))
    assert "visual.ln_post.bias" in message and "logit_scale" not in message


# -------------------------------------------------------------------------------------- and not where it needn't


def averaged(model):
    average = AveragedModel(model)
    for _ in range(3):
        average.update_parameters(model)
    return average.module


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    features(model).square().sum().backward()
    optimizer.step()
    return model


ORDINARY = {
    "nothing": lambda m: m,
    "the same weights again": lambda m: m.load_state_dict(state(m)) and m,
    "other weights": lambda m: m.load_state_dict({k: v + 1 for k, v in state(m).items()}) and m,
    "a deepcopy": copy.deepcopy,
    "a pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "an average": averaged,
    "there and back": lambda m: m.double().float(),
    "to 16 bits": lambda m: m.bfloat16(),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "a training step": stepped,
}


@pytest.mark.parametrize("run", ORDINARY.values(), ids=ORDINARY)
def test_no_false_alarm(run, tmp_path):
    for build in (lambda: patched("clip", HeadConfig()), lambda: patched("attention_qk_norm", HeadConfig())):
        model = run(build())
        quiet(lambda model=model: fastheads.save_adapter(model, tmp_path))
        quiet(lambda model=model: fastheads.unpatch(model))


def test_an_ema_whose_rounding_moves_the_base_is_saved_for_that_base(tmp_path):
    """timm's second version rounds decay · x + (1 − decay) · x, frozen weights too."""
    model = patched("clip", HeadConfig())
    average = ModelEmaV2(model, decay=0.9)
    for _ in range(3):
        average.update(model)
    said(lambda: fastheads.save_adapter(average, tmp_path))
    fresh, _ = said(lambda: fastheads.load_adapter(clip(), tmp_path))
    assert relative(features(fresh), features(average.module)) < 1e-5


def test_fingerprints_see_any_changed_element_of_any_dtype():
    from fastheads.model.patched import fingerprint

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool):
        for shape in ((), (1,), (7,), (5, 3), (16, 8)):
            tensor = torch.zeros(shape, dtype=dtype)
            before = fingerprint(tensor)
            assert (
                before
                == fingerprint(tensor.clone())
                == fingerprint(torch.zeros(140, dtype=dtype)[3 : 3 + tensor.numel()].view(shape))
            )
            tensor.view(-1)[-1] = 1
            assert fingerprint(tensor) != before
    transposed = torch.randn(5, 3).T
    assert fingerprint(transposed) == fingerprint(transposed.contiguous())
    assert fingerprint(torch.ones(2, device="meta")) is None
    assert fingerprint(torch.ones(2).to_sparse()) is None
