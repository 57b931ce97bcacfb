"""Training: it learns, keeps the best weights, and refuses what it can't train before anything is changed."""

import contextlib
import dataclasses
from types import SimpleNamespace

import open_clip
import pytest
import standins
import timm
import torch
from accelerate import DistributedType
from standins import same
from training import ONE_STEP, RECIPE, weights

import fastheads
from fastheads.demo.base import MODEL
from fastheads.train import loop
from fastheads.train.evaluation import Score, fit_head, fit_probe, image_features, make_problem, score, source_splits
from fastheads.train.loop import fit, prepare
from fastheads.train.methods import METHODS
from fastheads.train.recipe import Recipe, check_run
from fastheads.train.state import trainable


def test_training_lowers_the_loss_and_reports_each_step(base, problem):
    seen = []
    recipe = dataclasses.replace(RECIPE, steps=30, evaluate_every=30, lr=1e-3)
    run = fit(base, METHODS["fine-tune"], problem, recipe, report=seen.append)
    assert [values["step"] for values in seen] == list(range(1, 31))
    assert {"loss", "cross_entropy", "images_per_second", "steps"} <= set(seen[0])
    assert sum(v["loss"] for v in seen[-5:]) < 0.7 * sum(v["loss"] for v in seen[:5])
    assert run["selected_step"] == 30 and len(run["history"]["validation"]) == 1


def test_histories_hold_losses_and_gates_over_time(base, problem):
    run = fit(base, METHODS["hap"], problem, RECIPE)
    assert run["history"]["step"] == list(range(1, 9))
    assert len(run["history"]["mmd"]) == len(run["history"]["loss"]) == 8
    assert run["gates"]["step"][0] == 0 and torch.tensor(run["gates"]["values"][0]).eq(1).all()
    assert torch.tensor(run["gates"]["values"][-1]).shape == (6, 4)
    assert not torch.tensor(run["gates"]["values"][-1]).eq(1).any()


@pytest.mark.parametrize("curve", [False, True])
def test_the_best_weights_on_source_validation_are_kept(base, problem, monkeypatch, curve):
    """And the target's accuracy, recorded on the way where its curve is asked for, has no part in it."""
    from fastheads.train import loop

    accuracies = iter([0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.4, 0.4])  # two sources, four evaluations; ties: lower loss
    losses = iter([1.0, 1.0, 0.5, 0.5, 0.6, 0.6, 0.1, 0.1])
    targets = iter([1.0, 0.1, 0.2, 0.3])
    seen = []

    def pretend(model, _, name, *__):
        if name == problem.target:
            return Score(next(targets), 0.0, 4)
        seen.append(weights(model))
        return Score(next(accuracies), next(losses), 4)

    monkeypatch.setattr(loop, "score", pretend)
    run = fit(base, METHODS["hap"], problem, dataclasses.replace(RECIPE, evaluate_every=2, target_curve=curve))
    assert run["selected_step"] == 4
    assert run["history"].get("target") == ([[2, 1.0], [4, 0.1], [6, 0.2], [8, 0.3]] if curve else None)
    assert same(weights(base), seen[2])


def test_what_is_left_of_the_sense_of_context_is_recorded(base, problem):
    """Against the definition, in float64: which domain's words fit an image, and how far that is from the original."""
    tokenizer, domains, classes = open_clip.get_tokenizer(MODEL), problem.folders.domains, problem.folders.class_names

    def probabilities(name):
        loader = problem.evaluation_loader(name, "validation", RECIPE)
        unit = torch.nn.functional.normalize
        with torch.no_grad():
            images = unit(base.encode_image(torch.cat([batch[0] for batch in loader])).double(), dim=-1)
            texts = [base.encode_text(tokenizer([f"a {d} of a {c}." for c in classes])).double() for d in domains]
        weights = unit(torch.stack([unit(text, dim=-1).mean(0) for text in texts]), dim=-1)
        return (base.logit_scale.double().exp() * images @ weights.T).softmax(-1)

    before = {name: probabilities(name) for name in problem.sources}
    recipe = dataclasses.replace(RECIPE, evaluate_every=8)
    history = fit(base, METHODS["fine-tune"], problem, recipe)["history"]
    base.eval()
    for step, kept in ((0, before), (8, {name: probabilities(name) for name in problem.sources})):
        right = [(kept[name].argmax(-1) == domains.index(name)).double().mean().item() for name in kept]
        moved = [(p * (p / kept[name]).log()).sum(-1).mean().item() for name, p in before.items()]
        assert dict(history["context_accuracy"])[step] == pytest.approx(sum(right) / 2)
        assert dict(history["context_change"])[step] == pytest.approx(sum(moved) / 2, rel=1e-3, abs=1e-6)
    assert dict(history["context_change"])[8] > 1e-3


def test_the_target_is_never_loaded_in_training(base, problem, monkeypatch):
    from fastheads.train.data import images

    opened = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda path: opened.append(path) or decode(path))
    folders = dataclasses.replace(problem.folders, decoded={})
    fit(base, METHODS["hap"], dataclasses.replace(problem, folders=folders, loaders={}), RECIPE)
    assert {path.parts[-3] for path in opened} == {"blue", "green"}


def test_gates_have_no_weight_decay(base, problem):
    from fastheads.train.optimization import parameter_groups

    prepare(base, METHODS["hap"])
    groups = parameter_groups(base, lr=1.0, gate_lr=1.0, weight_decay=RECIPE.weight_decay)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decay[id(p)] == 0 for p in fastheads.gate_parameters(base))
    assert all(decay[id(p)] == RECIPE.weight_decay for p in fastheads.lora_parameters(base))


def test_bf16_mixed_precision_trains(base, problem):
    run = fit(base, METHODS["hap"], problem, dataclasses.replace(RECIPE, steps=2), precision="bf16")
    assert all(torch.isfinite(torch.tensor(run["history"]["loss"])))
    assert all(p.dtype == torch.float32 for p in trainable(base).values())


def test_linear_probe_learns_the_sources(base, problem):
    probe = fit_probe(base, problem, RECIPE)
    assert probe.weight.shape == (2, problem.classifier.shape[1])
    assert score(base, problem, "blue", "training", RECIPE, probe).accuracy > 0.9
    assert score(base, problem, "red", "all", RECIPE).images == 20


def test_a_head_is_a_logistic_regression_on_the_features_as_they_are(vit, vit_problem):
    """By the conditions of the least loss, in float64: C · ∂loss/∂w = −w for one of the strengths, and ∂loss/∂b = 0."""
    head = fit_head(vit, vit_problem, RECIPE)
    x, y = (
        torch.cat(parts)
        for parts in zip(
            *(
                image_features(vit, vit_problem.evaluation_loader(name, "training", RECIPE))
                for name in ("blue", "green")
            ),
            strict=True,
        )
    )
    with torch.no_grad():
        images = next(iter(vit_problem.evaluation_loader("blue", "training", RECIPE)))[0]
        assert torch.allclose(vit(images), head(x[: len(images)]), atol=1e-5)
    size = x.norm(dim=-1).mean().double()
    weight = (head.weight.detach().double() * size).requires_grad_()
    bias = head.bias.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() / size @ weight.T + bias, y, reduction="sum")
    of_weight, of_bias = torch.autograd.grad(loss, (weight, bias))
    # What is regularised of two classes is the difference of their rows, twice the second one.
    of_weight, weight = of_weight[1], weight.detach()[1]
    errors = [float((C * of_weight + 2 * weight).abs().max() / weight.abs().max()) for C in (0.1, 1, 10, 100, 1000)]
    assert min(errors) < 0.02 and of_bias.abs().max() < 1e-2


def test_what_needs_text_is_refused(vit, vit_problem):
    for method, options in (("car-ft", {}), ("zero-shot", {}), ("hap", {"context_weight": 0.5})):
        with pytest.raises(ValueError, match="text tower"):
            fit(vit, METHODS[method], vit_problem, dataclasses.replace(RECIPE, **options))
    with pytest.raises(ValueError, match="head of 5 classes"):
        make_problem(timm.create_model("test_vit", num_classes=5), None, vit_problem.folders, "red", (None, None))


def test_a_probe_refuses_sources_without_a_class(base, folders, problem):
    dark = {name: [i for i in indices if folders.files[folders.index(name)][i][1] == 0]
            for name, indices in problem.training.items()}  # fmt: skip
    with pytest.raises(ValueError, match=r"no image of class 'light'.*\(blue: 8, green: 7\)"):
        fit_probe(base, dataclasses.replace(problem, training=dark), RECIPE)


@pytest.mark.parametrize(
    ("sources", "message"),
    [([], "sources"), ("blue", "sources"), (["red"], "the target 'red'"), (["blue", "mauve"], "no domain 'mauve'")],
)
def test_sources_must_be_other_domains(folders, sources, message):
    with pytest.raises(ValueError, match=message):
        source_splits(folders, "red", sources)


def test_sources_are_all_but_the_target_or_those_named_split_alike(folders):
    whole = source_splits(folders, "red", seed=3)
    assert list(whole) == ["blue", "green"]
    assert source_splits(folders, "red", ["green"], seed=3) == {"green": whole["green"]}
    assert list(source_splits(folders, "red", ["green", "blue"])) == ["blue", "green"]


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("per_domain", 1.5), ("lr", 0.0), ("gate_lr", float("nan")), ("mmd_weight", -1)]
)
def test_a_recipe_refuses_bad_numbers(option, value):
    with pytest.raises(ValueError, match=option):
        Recipe(**{option: value})


def test_a_loss_that_is_not_finite_stops_the_run(base, problem):
    with pytest.raises(FloatingPointError, match="step"):
        fit(base, METHODS["fine-tune"], problem, dataclasses.replace(RECIPE, lr=1e30))


@pytest.mark.parametrize("method", ["fine-tune", "ha-lora"])
def test_a_context_weight_works_with_any_trained_method(base, problem, method):
    run = fit(base, METHODS[method], problem, dataclasses.replace(RECIPE, steps=3, context_weight=0.5))
    assert run["history"]["context_kl"][0] == pytest.approx(0, abs=1e-6) and run["history"]["context_kl"][-1] > 0


def test_fp16_with_the_inner_gradient_of_the_embedding_mmd_is_refused(base, problem):
    recipe = dataclasses.replace(RECIPE, mmd_features="embedding")
    with pytest.raises(ValueError, match="precision"):
        fit(base, METHODS["hap"], problem, recipe, precision="fp16")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mmd_layers": (1.0,) * 6, "mmd_features": "embedding"}, "mmd_layers: got .* which has no layers"),
        ({"mmd_layers": (0.0, 0.0)}, "mmd_layers: got .* not all 0"),
    ],
)
def test_weights_of_layers_that_count_for_nothing_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        check_run(METHODS["hap"], dataclasses.replace(RECIPE, **changes))
    check_run(METHODS["zero-shot"], dataclasses.replace(RECIPE, accumulate=16, **changes))  # which takes none of it


@pytest.mark.parametrize(
    ("method", "changes", "fits"),
    [
        ("hap", {}, False),
        ("dig", {}, False),
        ("ha-lora", {}, True),
        ("hap", {"mmd_kernel": "domainbed"}, True),
        ("hap", {"mmd_kernel": "dan"}, True),
        ("hap", {"mmd_weight": 0.0}, True),
        ("hap", {"per_domain": 2}, True),
    ],
)
def test_an_mmd_of_one_image_a_domain_is_refused_before_anything_is_changed(base, problem, method, changes, fits):
    recipe = dataclasses.replace(RECIPE, **{"per_domain": 1, "steps": 1, **changes})
    check = contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r"per_domain: got 1.*mmd_kernel")
    with check:
        check_run(METHODS[method], recipe)
    if not fits:
        before = list(base.state_dict())
        with pytest.raises(ValueError, match="per_domain"):
            fit(base, METHODS[method], problem, recipe)
        assert list(base.state_dict()) == before


def other_attention():
    model = standins.clip()
    model.visual.transformer.resblocks[0].attn = torch.nn.Linear(2, 2)
    return model


def no_attention():
    model = standins.clip()
    del model.visual.transformer.resblocks[1].attn
    return model


def no_layers():
    model = standins.clip()
    model.visual.transformer.resblocks = torch.nn.ModuleList()
    return model


ODD = {"another attention": other_attention, "no attention": no_attention, "no layers": no_layers}


def assert_refused(model, method):
    """In the words of patch, with nothing changed."""
    before = standins.snapshot(model)
    with pytest.raises(TypeError, match="model: ") as wanted:
        fastheads.patch(model)
    with pytest.raises(TypeError) as told:
        prepare(model, METHODS[method])
    assert str(told.value) == str(wanted.value)
    standins.assert_unchanged(model, before)


ADAPTERS = [method.id for method in METHODS.values() if method.trains == "adapter"]


@pytest.mark.parametrize("method", ADAPTERS)
def test_methods_with_adapters_refuse_other_towers(other_base, method):
    assert_refused(other_base, method)


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("build", ODD.values(), ids=ODD)
def test_methods_with_adapters_refuse_odd_towers(build, method):
    assert_refused(build(), method)


def test_the_best_weights_come_with_their_running_statistics(resnet, monkeypatch):
    from fastheads.train import loop

    base, problem = resnet
    scores = iter([0.9] * 2 + [0.1] * 4)  # two sources, three evaluations
    monkeypatch.setattr(loop, "score", lambda *_: Score(next(scores), 1.0, 4))
    recipe = dataclasses.replace(ONE_STEP, steps=3, evaluate_every=1)
    assert fit(base, METHODS["fine-tune"], problem, recipe)["selected_step"] == 1
    assert base.visual.bn1.num_batches_tracked == 1


def test_frozen_batch_norms_keep_their_statistics(base, problem):
    norm = torch.nn.BatchNorm2d(base.visual.conv1.out_channels)
    base.visual.conv1 = torch.nn.Sequential(base.visual.conv1, norm)
    fit(base, METHODS["ha-lora"], problem, ONE_STEP)
    assert norm.num_batches_tracked == 0


def test_answers_are_among_the_classes_that_a_domain_has(base, problem):
    folders = problem.folders
    light = tuple(file for file in folders.files[folders.index("red")] if file[1] == 1)
    fewer = dataclasses.replace(folders, files=(*folders.files[:2], light))
    found = score(base, dataclasses.replace(problem, folders=fewer, loaders={}), "red", "all", RECIPE)
    assert (found.accuracy, found.loss, found.images) == (1.0, 0.0, 10)
    assert score(base, problem, "red", "all", RECIPE).loss > 0.1


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_configuration_of_accelerates_for_shards_is_refused(base, problem, monkeypatch, kind):
    monkeypatch.setattr(loop, "Accelerator", lambda **options: SimpleNamespace(distributed_type=DistributedType[kind]))
    with pytest.raises(ValueError, match=f"accelerate's configuration: got {kind}; takes MULTI_GPU, and --fsdp"):
        fit(base, METHODS["hap"], problem, Recipe(steps=1))
