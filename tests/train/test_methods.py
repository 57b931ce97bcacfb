"""Methods and objectives: what is trained, what each loss reaches, and CAR-FT's teacher."""

import copy

import pytest
import torch

import fastheads
from fastheads.train.loop import prepare
from fastheads.train.methods import METHODS, ImageEncoder, Objective, class_logits, original_features
from fastheads.train.state import trainable


def images(n=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 48, 48, generator=generator)


LABELS = torch.tensor([0, 1, 0, 1, 0, 1])
DOMAINS = torch.tensor([0, 0, 0, 1, 1, 1])


def objective(problem, **options):
    return Objective(problem.classifier, problem.logit_scale, 3, contexts=problem.contexts, **options)


def noise(model):
    torch.manual_seed(2)
    for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model):
        p.data.add_(0.1 * torch.randn_like(p))


def test_plain_lora_has_the_parameters_of_ha_lora_within_a_rounding():
    for depth, heads in ((12, 12), (24, 16), (4, 4)):
        plain, own = (METHODS[name].config(depth, heads, ("q", "o")) for name in ("lora", "ha-lora"))
        assert plain.targets == own.targets == ("q", "o")
        assert not plain.per_head and own.per_head
        wanted = sum(r * (heads + 1) for r in own.rank)  # parameters per target, in units of D
        got = sum(2 * r for r in plain.rank)
        assert abs(got - wanted) / wanted < 0.03


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_what_it_says(base, name):
    method = METHODS[name]
    if method.trains in ("nothing", "probe"):
        assert method.config(4, 4) is None
        return
    prepare(base, method)
    names = {n.rsplit(".", 1)[-1] for n in trainable(base)}
    if method.trains == "adapter":
        assert names == ({"lora_A", "lora_B"} if method.lora else set()) | ({"theta"} if method.gate else set())
    else:
        assert all(n.startswith("visual.") for n in trainable(base))
        assert set(trainable(base)) == {f"visual.{n}" for n, _ in base.visual.named_parameters()}


def test_the_objective_adds_up_its_parts(base, problem):
    prepare(base, METHODS["hap"])
    noise(base)
    parts = objective(problem, mmd_weight=0.7, context_weight=0.3)(ImageEncoder(base), base, images(), LABELS, DOMAINS)
    expected = parts["cross_entropy"] + 0.7 * parts["mmd"] + 0.3 * parts["context_kl"]
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts["context_kl"] > 0


@pytest.mark.parametrize("features", ["heads", "embedding"])
def test_mmd_reaches_the_gates_and_no_other_tensor(base, problem, features):
    prepare(base, METHODS["hap"])
    noise(base)
    for p in base.parameters():
        p.requires_grad_(True)  # even where everything could be trained
    # cross-entropy alone, then with the MMD: the gradients differ at the gates only
    gradients = []
    for weight in (0.0, 2.0):
        base.zero_grad()
        run = objective(problem, mmd_weight=weight, mmd_features=features)
        run(ImageEncoder(base), base, images(), LABELS, DOMAINS)["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in base.named_parameters() if p.grad is not None})
    differ = {n for n in gradients[0] if not torch.equal(gradients[0][n], gradients[1][n])}
    assert differ == {n for n, _ in base.named_parameters() if n.endswith("heads.theta")}


def test_teacher_under_disabled_equals_a_frozen_copy(base):
    copied = copy.deepcopy(base.visual).eval()
    prepare(base, METHODS["hap"])
    noise(base)
    base.train()
    disabled = original_features(base, images())
    assert torch.equal(disabled, original_features(base, images(), copied))
    assert not torch.allclose(disabled, base.encode_image(images()), atol=1e-3)
    assert not disabled.requires_grad and base.training and base.visual.training


def test_a_full_fine_tuning_teacher_does_not_move_with_the_student(base, problem):
    teacher = prepare(base, METHODS["car-ft"], teacher=True)
    before = original_features(base, images(), teacher)
    optimizer = torch.optim.SGD(trainable(base).values(), lr=0.1)
    run = objective(problem, context_weight=1.0, teacher=teacher)
    first = run(ImageEncoder(base), base, images(), LABELS, DOMAINS)
    assert first["context_kl"].item() == pytest.approx(0, abs=1e-6)
    first["loss"].backward()
    optimizer.step()
    assert torch.equal(before, original_features(base, images(), teacher))
    assert run(ImageEncoder(base), base, images(), LABELS, DOMAINS)["context_kl"].item() > 1e-5


def test_a_teacher_is_asked_for_where_there_is_none(base):
    with pytest.raises(ValueError, match="teacher"):
        original_features(base, images())


def test_logits_are_float32_under_autocast():
    features, classifier = torch.randn(5, 64), torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = class_logits(features, classifier, 100.0)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, class_logits(features, classifier, 100.0))
