"""context_kl on features, and on a patched model beside itself with the adapters off."""

import pytest
import standins
import torch
from standins import relative

import fastheads


def kl_inputs():
    generator = torch.Generator().manual_seed(4)
    student, teacher, contexts = (torch.randn(n, 6, generator=generator).double() for n in (5, 5, 9))
    return student, teacher, torch.nn.functional.normalize(contexts, dim=-1)


def kl_by_loops(student, teacher, contexts, scale):
    total = 0.0
    for f, g in zip(student, teacher, strict=True):
        p, q = ((scale * contexts @ (v / v.norm())).exp() for v in (g, f))
        p, q = p / p.sum(), q / q.sum()
        total = total + sum(p[i] * (p[i].log() - q[i].log()) for i in range(len(contexts)))
    return total / len(student)


@pytest.mark.parametrize("scale", [1.0, 14.3, torch.tensor(14.3)], ids=str)
def test_context_kl_is_the_mean_divergence_of_the_original_from_the_tuned(scale):
    student, teacher, contexts = kl_inputs()
    got = fastheads.context_kl(student, teacher, contexts, scale)
    assert got.shape == ()
    assert got.item() == pytest.approx(kl_by_loops(student, teacher, contexts, float(scale)).item(), rel=1e-6)
    assert fastheads.context_kl(student, 3 * student, contexts, scale).item() == pytest.approx(0, abs=1e-12)


def test_context_kl_trains_the_student_and_not_the_teacher():
    student, teacher, contexts = kl_inputs()
    student.requires_grad_(), teacher.requires_grad_()
    fastheads.context_kl(student, teacher, contexts, 14.3).backward()
    assert teacher.grad is None
    own = student.detach().clone().requires_grad_()
    kl_by_loops(own, teacher.detach(), contexts, 14.3).backward()
    assert relative(student.grad, own.grad) < 1e-9


def test_context_kl_between_a_patched_model_and_itself_disabled_trains_the_adapters():
    model = standins.patched("clip", fastheads.HeadConfig(), dtype=torch.float64)
    images = standins.images(7, seed=3).double()
    with fastheads.disabled(model):
        original = model.encode_image(images)
    _, _, contexts = kl_inputs()
    contexts = torch.nn.functional.normalize(torch.randn(9, standins.EMBED).double(), dim=-1)
    loss = fastheads.context_kl(model.encode_image(images), original, contexts, 20.0)
    assert loss > 1e-4
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, p in model.named_parameters() if ".heads." in name}


@pytest.mark.parametrize(
    ("which", "change", "argument"),
    [
        (0, lambda x: x[0], "features"),
        (0, lambda x: x[None], "features"),
        (1, lambda x: x[:-1], "teacher_features"),
        (1, lambda x: x[:, :-1], "teacher_features"),
        (2, lambda x: x[:, :-1], "context_weights"),
        (2, lambda x: x[0], "context_weights"),
        (2, lambda x: x.T, "context_weights"),
    ],
)
def test_context_kl_names_the_argument_whose_shape_does_not_fit(which, change, argument):
    inputs = list(kl_inputs())
    inputs[which] = change(inputs[which])
    with pytest.raises(ValueError, match=f"^{argument}: got shape"):
        fastheads.context_kl(*inputs, 14.3)


@pytest.mark.parametrize(("which", "argument"), [(0, "features"), (1, "teacher_features"), (2, "context_weights")])
def test_context_kl_names_the_argument_that_is_no_tensor(which, argument):
    inputs = list(kl_inputs())
    inputs[which] = inputs[which].tolist()
    with pytest.raises(TypeError, match=f"^{argument}: "):
        fastheads.context_kl(*inputs, 14.3)
