"""merge and wise_ft: the learned model as a stock model.

Patched outputs are held against float64 in test_patching.py; here merged ones against patched ones, and merged weights
against weights written out head by head. 1e-5 relative (max over max): float32 outputs of these models.
"""

import copy
import pickle
import re
import warnings

import open_clip
import pytest
import torch
from standins import (
    BOTH,
    CONFIGS,
    MODELS,
    assert_unchanged,
    attentions,
    clip,
    default_config,
    dense_weights,
    disturb,
    features,
    fill_adapters,
    images,
    patched,
    relative,
    seeded,
    snapshot,
)

import fastheads
from fastheads import HeadConfig


def assert_merges(model, stock):
    """Merged: what the patched model computed, in a stock model."""
    shape = snapshot(stock)
    expected = {t: features(model, t).detach() for t in BOTH}
    assert any(relative(features(stock, t), expected[t]) > 1e-3 for t in BOTH), "nothing was learned"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastheads.merge(model) is model
    for tower in BOTH:
        assert relative(features(model, tower), expected[tower]) < 1e-5, tower
    now = snapshot(model)
    for what in ("keys", "classes", "attributes", "dtypes", "flags", "modes", "hooks"):
        assert now[what] == shape[what], what


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_patched(name):
    assert_merges(patched(name), MODELS[name]())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_equals_patched_for_every_config(config):
    model = patched("clip", config)
    adapters = fastheads.adapter_state_dict(model)
    wanted = {k: v for t in BOTH for k, v in dense_weights(model, adapters, config, t).items()}
    base = {k: v.clone() for k, v in fastheads.base_state_dict(model).items()}
    assert_merges(model, clip())
    for key, value in model.state_dict().items():
        if key in wanted:
            assert relative(value, wanted[key]) < 1e-6, key
        else:
            assert torch.equal(value, base[key]), key


def test_merged_in_evaluation_mode_and_without_gradients():
    model = patched("clip").eval()
    with torch.no_grad():
        expected = features(model)
        assert relative(features(fastheads.merge(model)), expected) < 1e-5


def test_merge_is_formed_outside_autocast():
    model, plain = patched("clip"), fastheads.merge(patched("clip"))
    with torch.autocast("cpu", torch.bfloat16):
        fastheads.merge(model)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


def test_merge_keeps_objects_and_restores_flags():
    model = clip()
    model.visual.lock(unlocked_groups=1)
    before = snapshot(model)
    assert set(before["flags"].values()) == {True, False}
    fastheads.patch(model, HeadConfig(towers=BOTH))
    fill_adapters(model)
    fastheads.merge(model)
    assert_unchanged(model, before, values=False)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before["state"][k])}
    assert changed == {k for k in before["keys"] if k.endswith(("in_proj_weight", "attn.out_proj.weight"))}
    values = features(model).detach()
    fastheads.patch(model)  # and it may be patched again
    assert relative(features(model), values) < 1e-5


def test_disabled_does_not_change_what_is_merged():
    model, plain = patched("clip"), fastheads.merge(patched("clip"))
    with fastheads.disabled(model):
        fastheads.merge(model)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_stock_open_clip_loads_the_merged_weights(tmp_path):
    with seeded(0):
        model = disturb(open_clip.create_model("ViT-B-32"), 0.01).eval()
    fastheads.patch(model)
    fill_adapters(model, 0.05)
    x = images(2, 224)
    with torch.no_grad():
        expected = model.encode_image(x)
        torch.save(fastheads.merge(model).state_dict(), tmp_path / "merged.pt")
        stock = open_clip.create_model("ViT-B-32", pretrained=str(tmp_path / "merged.pt")).eval()
        assert torch.equal(stock.encode_image(x), model.encode_image(x))
        assert relative(stock.encode_image(x), expected) < 1e-5


# --------------------------------------------------------------------------------------------- 16-bit weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.1, 0.01])
def test_16_bit_merge_warns_with_the_rounding_error(dtype, size):
    config = HeadConfig(gate=None)
    model = patched("clip", config, dtype=dtype, size=size)
    wanted = dense_weights(model, fastheads.adapter_state_dict(model), config, "visual")
    old = {k: v.clone().double() for k, v in fastheads.base_state_dict(model).items()}
    with pytest.warns(UserWarning, match=f"rounding to {dtype}") as caught:
        fastheads.merge(model)
    new = model.state_dict()
    keys = [k for k in wanted if k.endswith("in_proj_weight")]
    # rounded once: every weight is the float64 result's nearest neighbour (or, computed in float32, a tie's other side)
    for key in keys:
        assert relative(new[key], wanted[key].to(dtype)) < torch.finfo(dtype).eps
        assert (new[key] == wanted[key].to(dtype)).double().mean() > 0.999
    lost = sum((new[k].double() - wanted[k]).square().sum() for k in keys)
    change = sum((wanted[k] - old[k]).square().sum() for k in keys)
    (percent,) = re.findall(r"by ([\d.]+)%", str(caught[0].message))
    assert abs(float(percent) / 100 - float((lost / change).sqrt())) < 1e-3


def test_a_16_bit_merge_of_nothing_learned_changes_nothing():
    model = clip().bfloat16()
    before = snapshot(model)
    fastheads.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastheads.merge(model)
    assert_unchanged(model, before)


# ------------------------------------------------------------------------------------------- refused merges


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "theta"])
def test_adapters_that_are_not_finite_are_refused(part, value):
    model = patched("clip", HeadConfig())
    with torch.no_grad():
        getattr(attentions(model)[1].heads, part).flatten()[0] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"visual\.1.*not finite"):
        fastheads.merge(model)
    assert_unchanged(model, before)
    assert fastheads.is_patched(model)


def test_weights_that_overflow_their_dtype_are_refused():
    model = patched("clip", HeadConfig(rank=0), dtype=torch.float16)
    with torch.no_grad():
        attentions(model)[0].out_proj.weight[:, :16] = 30_000.0
        attentions(model)[0].heads.theta.copy_(torch.tensor([5.0, 0.0, 0.0, 0.0]))  # gate 3.9
    before = snapshot(model)
    with pytest.raises(ValueError):
        fastheads.merge(model)
    assert_unchanged(model, before)


# ------------------------------------------------------------------------------------------------- wise_ft


def tuned_and_original():
    return fastheads.merge(patched("clip")), clip()


@pytest.mark.parametrize("as_state", [True, False], ids=["state_dict", "model"])
def test_wise_ft_ends_and_middle(as_state):
    for alpha in (0, 1, 0.5, 0.3):
        tuned, original = tuned_and_original()
        after = {k: v.clone() for k, v in tuned.state_dict().items()}
        before, kept = original.state_dict(), snapshot(original)
        objects = snapshot(tuned)
        assert fastheads.wise_ft(tuned, before if as_state else original, alpha) is tuned
        assert_unchanged(original, kept)
        assert_unchanged(tuned, objects, values=False)
        for key, value in tuned.state_dict().items():
            wanted = (1 - alpha) * before[key].double() + alpha * after[key].double()
            exact = {0: before, 1: after}.get(alpha)
            if exact is not None:
                assert torch.equal(value, exact[key]), (alpha, key)
            else:
                assert relative(value, wanted) < 1e-7, (alpha, key)


def test_wise_ft_leaves_the_model_as_it_was_when_refused():
    tuned, original = tuned_and_original()
    before = snapshot(tuned)
    other = clip(layers=2)
    smaller = {k: v[..., :1] if v.dim() else v for k, v in original.state_dict().items()}
    for wrong in (other, {}, smaller, patched("clip")):
        with pytest.raises(ValueError, match="original"):
            fastheads.wise_ft(tuned, wrong, 0.5)
    for alpha in (-0.1, 1.1, float("nan"), "half", None):
        with pytest.raises(ValueError, match="alpha"):
            fastheads.wise_ft(tuned, original, alpha)
    assert_unchanged(tuned, before)
    model = patched("clip", default_config("clip"))
    kept = snapshot(model)
    with pytest.raises(ValueError, match="merge"):
        fastheads.wise_ft(model, original, 0.5)
    assert_unchanged(model, kept)


# ------------------------------------------------------------------ an original that followed the training


def fine_tune(model):
    with torch.no_grad():
        for p in model.visual.parameters():
            p.add_(0.1)
    return model


def adapt(model):
    fastheads.patch(model, HeadConfig())
    return fastheads.merge(fill_adapters(model))


FOLLOWED = {
    # what was taken before training and lies in the model's own memory
    "state dict": lambda m: m.state_dict(),
    "state dict as a dict": lambda m: dict(m.state_dict()),
    "tensors": lambda m: {k: v.detach().view_as(v) for k, v in m.state_dict().items()},
    "the model itself": lambda m: m,
    "a shallow copy": copy.copy,
    "a wrapper's": lambda m: torch.nn.DataParallel(m).state_dict(),
}


@pytest.mark.parametrize("train", [adapt, fine_tune])
@pytest.mark.parametrize("take", FOLLOWED.values(), ids=FOLLOWED)
def test_an_original_that_followed_the_training_is_refused(take, train):
    model = clip()
    original = take(model)
    before = snapshot(train(model))
    with pytest.raises(ValueError, match=r"original: .*followed.*v\.clone\(\).*copy\.deepcopy\(model\)"):
        fastheads.wise_ft(model, original, 0.5)
    assert_unchanged(model, before)


@pytest.mark.parametrize("train", [adapt, fine_tune])
@pytest.mark.parametrize("take", [lambda m: {k: v.clone() for k, v in m.state_dict().items()}, copy.deepcopy])
def test_the_copies_that_the_message_names_are_averaged(take, train):
    model = clip()
    original = take(model)
    tuned = {k: v.clone() for k, v in train(model).state_dict().items()}
    fastheads.wise_ft(model, original, 0.5)
    for key, value in model.state_dict().items():
        assert relative(value, (clip().state_dict()[key] + tuned[key]) / 2) < 1e-6, key


@pytest.mark.parametrize("train", [adapt, fine_tune])
def test_a_frozen_tower_that_both_share_is_no_matter(train):
    model, original = clip(), clip()
    for name in ("transformer", "token_embedding", "ln_final"):
        setattr(model, name, getattr(original, name))
    tuned = {k: v.clone() for k, v in train(model).state_dict().items()}
    fastheads.wise_ft(model, original, 0.5)
    for key, value in model.state_dict().items():
        if "visual" in key:
            assert relative(value, (clip().state_dict()[key] + tuned[key]) / 2) < 1e-6, key
        else:
            assert torch.equal(value, clip().state_dict()[key]), key


@pytest.mark.parametrize("copied", [lambda m: m, lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_one_adapted_tensor_that_followed_is_enough(copied):
    """Its name stays with the merged model and its copies."""
    model = copied(adapt(clip()))
    key = "visual.transformer.resblocks.1.attn.out_proj.weight"
    original = {k: v.clone() for k, v in clip().state_dict().items()}
    original[key] = model.state_dict()[key]
    with pytest.raises(ValueError, match=f"original.*{key}"):
        fastheads.wise_ft(model, original, 0.5)
    original[key] = clip().state_dict()[key]
    original["visual.conv1.weight"] = model.state_dict()["visual.conv1.weight"]  # was not adapted
    fastheads.wise_ft(model, original, 0.5)


def test_what_was_trained_beside_counts_as_adapted():
    model = clip()
    fastheads.patch(model)
    fill_adapters(model)
    with torch.no_grad():
        model.visual.ln_post.weight.add_(1.0)
    fastheads.merge(model)
    original = {k: v.clone() for k, v in clip().state_dict().items()}
    original["visual.ln_post.weight"] = model.visual.ln_post.weight
    with pytest.raises(ValueError, match="original.*ln_post"):
        fastheads.wise_ft(model, original, 0.5)


def test_neighbours_in_one_storage_share_nothing():
    model = clip()
    state = model.state_dict()
    both = {k: torch.stack((v, v)) for k, v in state.items()}
    for k, p in model.named_parameters():
        p.data = both[k][0]
    fine_tune(model)
    fastheads.wise_ft(model, {k: v[1] for k, v in both.items()}, 0.5)
    assert relative(model.visual.conv1.weight, clip().visual.conv1.weight + 0.05) < 1e-6
