"""Bad input of head_mmd."""

import pytest
import standins
import torch

import fastheads

DOMAINS = torch.tensor([0, 1, 0, 2, 1, 2, 0])
IMAGES = standins.images(len(DOMAINS))
FEATURES = ("heads", "embedding")


def build():
    return standins.patched("clip", fastheads.HeadConfig())


@pytest.fixture(scope="module")
def captured():
    model = build()
    with fastheads.capture_heads(model) as heads:
        embedding = model.encode_image(IMAGES)
    return heads, embedding


def test_a_model_without_gates_is_refused():
    model = standins.patched("clip", fastheads.HeadConfig(gate=None))
    for features in FEATURES:
        with fastheads.capture_heads(model) as heads:
            embedding = model.encode_image(standins.images(len(DOMAINS)))
        with pytest.raises(ValueError, match="gate"):
            fastheads.head_mmd(heads, DOMAINS, features=features, embedding=embedding)


def test_a_capture_in_which_nothing_ran_is_refused():
    model = build()
    with fastheads.capture_heads(model) as heads:
        pass
    with pytest.raises(RuntimeError, match="nothing was captured"):
        fastheads.head_mmd(heads, DOMAINS)
    with fastheads.capture_heads(model) as heads, fastheads.disabled(model):
        model.encode_image(IMAGES)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        fastheads.head_mmd(heads, DOMAINS)


def test_a_missing_embedding_is_asked_for(captured):
    with pytest.raises(ValueError, match="^embedding: is needed"):
        fastheads.head_mmd(captured[0], DOMAINS, features="embedding")


def test_a_detached_embedding_is_refused(captured):
    heads, embedding = captured
    with pytest.raises(ValueError, match="^embedding: carries no gradient"):
        fastheads.head_mmd(heads, DOMAINS, features="embedding", embedding=embedding.detach())
    with torch.no_grad():
        alone = build().encode_image(IMAGES)
    with pytest.raises(ValueError, match="^embedding: carries no gradient"):
        fastheads.head_mmd(heads, DOMAINS, features="embedding", embedding=alone)


def test_an_embedding_that_does_not_depend_on_the_gates_is_refused(captured):
    other = build().encode_image(IMAGES)
    with pytest.raises(ValueError, match="^embedding: does not depend"):
        fastheads.head_mmd(captured[0], DOMAINS, features="embedding", embedding=other)


@pytest.mark.parametrize("features", ["head", "tokens", None, 3])
def test_unknown_features_are_refused(captured, features):
    with pytest.raises(ValueError, match="^features: got .*heads.*embedding"):
        fastheads.head_mmd(*captured[:1], DOMAINS, features=features, embedding=captured[1])


@pytest.mark.parametrize("features", FEATURES)
def test_an_unreduced_loss_is_refused(captured, features):
    heads, embedding = captured
    with pytest.raises(ValueError, match="^reduction"):
        fastheads.head_mmd(heads, DOMAINS, features=features, embedding=embedding, reduction="none")


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("domains", "error"),
    [
        (DOMAINS[:-1], ValueError),
        (torch.cat([DOMAINS, DOMAINS]), ValueError),
        (DOMAINS[:, None], ValueError),
        (DOMAINS.double(), TypeError),
        (DOMAINS.tolist(), TypeError),
        (None, TypeError),
        (DOMAINS - 1, ValueError),
    ],
    ids=["short", "long", "two dimensions", "floats", "a list", "none", "negative"],
)
def test_domains_that_do_not_fit_are_refused(captured, features, domains, error):
    heads, embedding = captured
    with pytest.raises(error, match="^domains"):
        fastheads.head_mmd(heads, domains, features=features, embedding=embedding)


@pytest.mark.parametrize("heads", [None, "heads", torch.zeros(3, 7, 4, 16)], ids=["none", "text", "tensor"])
def test_heads_of_another_type_are_refused(heads):
    with pytest.raises(TypeError, match="^heads: got .*capture_heads"):
        fastheads.head_mmd(heads, DOMAINS)


@pytest.mark.parametrize("embedding", ["embedding", [1.0, 2.0], 3.0])
def test_an_embedding_of_another_type_is_refused(captured, embedding):
    with pytest.raises(TypeError, match="^embedding"):
        fastheads.head_mmd(captured[0], DOMAINS, features="embedding", embedding=embedding)


def test_frozen_gates_are_told_in_words():
    model = build()
    for theta in fastheads.gate_parameters(model):
        theta.requires_grad_(False)
    with fastheads.capture_heads(model) as heads:
        embedding = model.encode_image(IMAGES)
    with pytest.raises(ValueError, match="gates|embedding"):
        fastheads.head_mmd(heads, DOMAINS, features="embedding", embedding=embedding)
