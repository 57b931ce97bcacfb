"""OpenCLIP's ways of locking a tower, called after patch: the base is as asked, and frozen adapters are named once."""

import copy
import pickle
import warnings

import pytest
import torch
from open_clip import CustomTextCLIP
from standins import BOTH, TowerOf, clip, custom, features, images, patched

import fastheads
from fastheads import HeadConfig

LOCKS = {
    # the call, and the layers whose adapters it freezes
    "image tower": (lambda m: m.lock_image_tower(), ["visual.0", "visual.1", "visual.2"]),
    "image tower but two groups": (lambda m: m.lock_image_tower(unlocked_groups=2), ["visual.0", "visual.1"]),
    "image tower but its head": (lambda m: m.visual.lock(unlocked_groups=1), ["visual.0", "visual.1", "visual.2"]),
    "text tower": (lambda m: m.lock_text_tower(), ["text.0", "text.1"]),
    "text tower but a layer": (lambda m: m.lock_text_tower(unlocked_layers=2), ["text.0"]),
    "everything": (lambda m: m.requires_grad_(False), ["visual.0", "visual.1", "visual.2", "text.0", "text.1"]),
}


def base_flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters() if ".attn.heads." not in name}


def said(run):
    """The warnings of a call, without torch's on the Python it runs in."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "Guards may run slower" not in str(w.message)]


def step(model):
    """A training step's forward passes, of both towers."""
    for tower in BOTH:
        features(model.train(), tower)


def both():
    return patched("clip", HeadConfig(towers=BOTH))


@pytest.mark.parametrize(("lock", "layers"), LOCKS.values(), ids=LOCKS)
def test_a_lock_after_patch_leaves_the_base_as_asked_and_names_what_it_froze(lock, layers):
    model, stock = both(), clip().requires_grad_(False)
    lock(model), lock(stock)
    assert base_flags(model) == base_flags(stock)
    (message,) = said(lambda: step(model))
    assert f"the adapters of {', '.join(layers)} are frozen" in message and "requires_grad_(True)" in message
    assert said(lambda: step(model)) == []  # once
    for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model):  # as the message says
        p.requires_grad_(True)
    sum(features(model, tower).square().sum() for tower in BOTH).backward()
    assert all(p.grad is not None for p in fastheads.lora_parameters(model))
    assert base_flags(model) == base_flags(stock)


def test_a_custom_text_tower_is_locked_alike():
    model = clip(CustomTextCLIP)
    fastheads.patch(model, HeadConfig(towers=BOTH))
    model.lock_text_tower()
    (message,) = said(lambda: step(model))
    assert "text.0, text.1 are frozen" in message


QUIET = {
    "evaluation": lambda m: features(m.eval()),
    "no gradient": lambda m: torch.no_grad()(features)(m),
    "inference mode": lambda m: torch.inference_mode()(features)(m),
    "disabled": lambda m: enter_disabled(m),
}


def enter_disabled(model):
    with fastheads.disabled(model):
        step(model)


@pytest.mark.parametrize("run", QUIET.values(), ids=QUIET)
def test_nothing_is_said_where_nothing_is_trained(run):
    model = both().train()
    model.lock_image_tower()
    assert said(lambda: run(model)) == []
    assert len(said(lambda: step(model))) == 1


@pytest.mark.parametrize("part", [fastheads.lora_parameters, fastheads.gate_parameters])
def test_nothing_is_said_of_lora_alone_or_gates_alone(part):
    model = both()
    for p in part(model):
        p.requires_grad_(False)
    assert said(lambda: step(model)) == []


def test_nothing_is_said_of_a_layer_without_adapters():
    model = clip()
    fastheads.patch(model, HeadConfig(rank=(2, 0, 2), gate=None))
    assert said(lambda: step(model)) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_speaks_of_its_own_adapters(copied):
    model = both()
    twin = copied(model)
    twin.lock_image_tower()
    assert said(lambda: step(model)) == []
    assert len(said(lambda: step(twin))) == 1


def test_other_attentions_say_it_too():
    model = custom()
    fastheads.patch(model)
    model.lock_image_tower()
    assert len(said(lambda: step(model))) == 1


def test_a_compiled_step_says_it_without_a_break_in_the_graph():
    """While it is traced: torch.compile itself doesn't notice parameters that are frozen after that."""
    torch._dynamo.reset()
    model = clip(layers=1)
    fastheads.patch(model, HeadConfig())
    model.lock_image_tower()
    compiled = torch.compile(TowerOf(model.train(), "visual"), fullgraph=True, backend="eager")
    (message,) = said(lambda: compiled(images()))
    assert "visual.0 are frozen" in message
    assert said(lambda: compiled(images())) == []
