"""Class and context weights: the means they say they are, of every way to write a template, without a trace left."""

import pytest
import standins
import torch

import fastheads
from fastheads.losses import context as contexts

NAMES = ("red fox", "owl", "a cat")
TEMPLATES = ("a photo of a {}.", "a {} in snow", "one more {}")
WEIGHTS = {"class": fastheads.class_text_weights, "context": fastheads.context_text_weights}


def tokenizer(prompts):
    """The letters, as ids of the stand-in's vocabulary; like CLIP's, as long as its context and with an end token."""
    assert isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    ids = torch.zeros(len(prompts), standins.CONTEXT, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        # letters from all over the prompt: the templates differ at their beginnings, the names in the middle
        letters = [1 + ord(c) % 47 for c in prompt][:: max(1, len(prompt) // 10)][: standins.CONTEXT - 1]
        ids[row, : len(letters)] = torch.tensor(letters)
        ids[row, len(letters)] = standins.EOT
    return ids


def normalised(vector):
    return vector / vector.pow(2).sum().sqrt()


def embedding(model, prompt):
    """One prompt through the text tower on its own, as a unit vector."""
    return normalised(model.encode_text(tokenizer([prompt]))[0].detach())


@pytest.fixture(scope="module")
def model():
    return standins.clip().double().eval()


def test_a_class_is_the_normalised_mean_over_templates_of_normalised_embeddings(model):
    rows = []
    for name in NAMES:
        total = sum(embedding(model, template.replace("{}", name)) for template in TEMPLATES)
        rows.append(normalised(total / len(TEMPLATES)))
    got = fastheads.class_text_weights(model, tokenizer, NAMES, TEMPLATES)
    assert got.shape == (3, standins.EMBED)
    assert torch.allclose(got, torch.stack(rows), atol=1e-12)


def test_a_context_is_the_normalised_mean_over_classes_of_normalised_embeddings(model):
    rows = []
    for template in TEMPLATES:
        total = sum(embedding(model, template.replace("{}", name)) for name in NAMES[:2])
        rows.append(normalised(total / 2))
    got = fastheads.context_text_weights(model, tokenizer, NAMES[:2], TEMPLATES)
    assert got.shape == (3, standins.EMBED)
    assert torch.allclose(got, torch.stack(rows), atol=1e-12)


def test_the_embeddings_are_normalised_before_the_mean(model):
    """The two orders differ measurably here, so the tests above tell them apart."""
    raw = torch.stack([model.encode_text(tokenizer([t.replace("{}", "owl")]))[0].detach() for t in TEMPLATES])
    other = normalised(raw.mean(0))
    got = fastheads.class_text_weights(model, tokenizer, ["owl"], TEMPLATES)[0]
    assert (got - other).abs().max() > 1e-4


def test_the_default_contexts_are_the_80_templates_of_open_clip(model):
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    got = fastheads.context_text_weights(model, tokenizer, NAMES[:1])
    assert got.shape == (80, standins.EMBED)
    expected = [embedding(model, template("red fox")) for template in OPENAI_IMAGENET_TEMPLATES]
    assert torch.allclose(got, torch.stack(expected), atol=1e-12)


def test_the_default_classifier_is_a_photo_of_a(model):
    got = fastheads.class_text_weights(model, tokenizer, ["owl"])
    assert torch.allclose(got[0], embedding(model, "a photo of a owl."), atol=1e-12)


@pytest.mark.parametrize(
    "template",
    ["the {} here", "the {class} here", "the {0} here", lambda name: f"the {name} here"],
    ids=["braces", "class", "index", "callable"],
)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_every_way_to_write_a_template_gives_the_same_weights(model, weights, template):
    seen = []

    def spy(prompts):
        seen.extend(prompts)
        return tokenizer(prompts)

    weights(model, spy, NAMES, [template])
    assert seen == ["the red fox here", "the owl here", "the a cat here"]


def test_a_template_may_name_the_class_twice(model):
    got = fastheads.class_text_weights(model, tokenizer, ["owl"], ["{} and {} and {class}"])
    assert torch.allclose(got[0], embedding(model, "owl and owl and owl"), atol=1e-12)


def test_braces_in_a_class_name_are_left_alone(model):
    got = fastheads.class_text_weights(model, tokenizer, ["{owl}"], ["the {} here"])
    assert torch.allclose(got[0], embedding(model, "the {owl} here"), atol=1e-12)


def test_the_batch_size_does_not_matter(model):
    sizes = []

    def spy(prompts):
        sizes.append(len(prompts))
        return tokenizer(prompts)

    whole = contexts.prompt_embeddings(model, spy, NAMES, TEMPLATES)
    parts = contexts.prompt_embeddings(model, spy, NAMES, TEMPLATES, batch_size=4)
    assert sizes == [9, 4, 4, 1]
    assert whole.shape == (3, 3, standins.EMBED)
    assert torch.allclose(whole, parts, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_no_gradient_comes_back(weights):
    model = standins.clip()
    assert all(p.requires_grad for p in model.parameters())
    with torch.enable_grad():
        got = weights(model, tokenizer, NAMES, TEMPLATES)
    assert not got.requires_grad and got.grad_fn is None
    assert torch.is_grad_enabled()


def test_a_16_bit_tower_gives_unit_rows_in_float32():
    model = standins.clip().bfloat16()
    got = fastheads.class_text_weights(model, tokenizer, NAMES, TEMPLATES)
    assert got.dtype == torch.float32
    assert torch.allclose(got.norm(dim=-1), torch.ones(3), atol=1e-6)


def test_a_patched_text_tower_is_the_one_that_speaks():
    model = standins.patched("clip").eval()
    got = fastheads.class_text_weights(model, tokenizer, NAMES, TEMPLATES)
    with fastheads.disabled(model):
        original = fastheads.class_text_weights(model, tokenizer, NAMES, TEMPLATES)
    assert (got - original).abs().max() > 1e-3


def mixed_modes(model):
    """Training mode, but for one block of each tower and the whole second layer of the text tower."""
    model.train()
    model.visual.transformer.resblocks[1].eval()
    model.transformer.resblocks[1].eval()
    model.transformer.resblocks[1].mlp.train()
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_the_tower_runs_in_evaluation_mode_and_every_module_gets_its_own_mode_back(weights):
    model = standins.clip()
    before = mixed_modes(model)
    inside = []
    model.transformer.register_forward_pre_hook(lambda m, _: inside.extend(part.training for part in m.modules()))
    weights(model, tokenizer, NAMES, TEMPLATES)
    assert inside and not any(inside)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_the_modes_come_back_even_if_the_tokenizer_raises(weights):
    model = standins.clip()
    before = mixed_modes(model)

    def broken(prompts):
        raise RuntimeError("no vocabulary")

    with pytest.raises(RuntimeError, match="vocabulary"):
        weights(model, broken, NAMES, TEMPLATES)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(
    ("names", "templates", "argument"),
    [
        ((), TEMPLATES, "classnames"),
        ("owl", TEMPLATES, "classnames"),
        (NAMES, (), "templates"),
        (NAMES, "a photo of a {}.", "templates"),
        (NAMES, ["a photo of it"], "templates"),
        (NAMES, ["a {} photo", "a photo of it"], "templates"),
        (NAMES, ["a photo of {{}}"], "templates"),
        (NAMES, ["a photo of {name}"], "templates"),
        (NAMES, ["a photo of {1}"], "templates"),
        (NAMES, ["a photo of {"], "templates"),
    ],
    ids=[
        "no class",
        "a bare name",
        "no template",
        "a bare template",
        "no place",
        "no place in the second",
        "escaped braces",
        "another field",
        "another index",
        "half a place",
    ],
)
def test_bad_input_is_told_by_the_argument_before_anything_runs(weights, names, templates, argument):
    model = standins.clip()
    model.encode_text = lambda *_: pytest.fail("the text tower ran")
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        weights(model, tokenizer, names, templates)
