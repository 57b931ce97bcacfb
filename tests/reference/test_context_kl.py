"""CAR-FT's KL divergence in `fastheads.reference`, against one written by hand."""

import pytest
import torch
import torch.nn.functional as F
from dense_heads import EXACT
from torch.autograd import gradcheck

from fastheads.reference import context_kl


def unit_rows(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def context_kl_loops(features, teacher, weights, logit_scale):
    """mean over images of sum_t p(t) (log p(t) - log q(t)), p the teacher's, every term by hand."""
    total = 0.0
    for f_student, f_teacher in zip(features, teacher, strict=True):
        logs = []
        for f in (f_teacher, f_student):
            f = f / f.square().sum().sqrt()
            logits = [float(logit_scale) * (f * w).sum() for w in weights]
            top = max(float(z) for z in logits)
            log_sum = top + sum((z - top).exp() for z in logits).log()
            logs.append([z - log_sum for z in logits])
        total = total + sum(p.exp() * (p - q) for p, q in zip(*logs, strict=True))
    return total / len(features)


@pytest.fixture
def car_ft():
    teacher = unit_rows(6, 512, seed=0)
    student = teacher + 0.5 * unit_rows(6, 512, seed=1)
    return student * 3.0, teacher * 5.0, unit_rows(9, 512, seed=2)


@pytest.mark.parametrize("logit_scale", [1.0, 14.3, 100.0])
def test_context_kl_equals_the_formula_image_by_image(car_ft, logit_scale):
    want = context_kl_loops(*car_ft, logit_scale)
    got = context_kl(*car_ft, logit_scale)
    assert got.shape == ()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)  # differences of logs near 1
    as_tensor = context_kl(*car_ft, torch.tensor(logit_scale, dtype=torch.float64))
    torch.testing.assert_close(as_tensor, want, rtol=1e-10, atol=1e-13)


def test_context_kl_is_teacher_relative_to_student_not_the_reverse(car_ft):
    student, teacher, w = car_ft
    forward, reverse = (context_kl_loops(*pair, w, 100.0) for pair in ((student, teacher), (teacher, student)))
    assert abs(forward - reverse) > 0.05 * forward  # the two directions are told apart here
    torch.testing.assert_close(context_kl(student, teacher, w, 100.0), forward, rtol=1e-10, atol=0)


def test_context_kl_is_averaged_over_the_batch(car_ft):
    student, teacher, w = car_ft
    once = context_kl(student, teacher, w, 100.0)
    twice = context_kl(student.repeat(2, 1), teacher.repeat(2, 1), w, 100.0)
    torch.testing.assert_close(twice, once, **EXACT)


def test_context_kl_is_zero_and_flat_for_equal_features(car_ft):
    student, _, w = car_ft
    student.requires_grad_()
    loss = context_kl(student, student.detach().clone(), w, 100.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_context_kl_sends_no_gradient_to_the_teacher(car_ft):
    student, teacher, w = (t.requires_grad_() for t in car_ft)
    context_kl(student, teacher, w.detach(), 100.0).backward()
    assert teacher.grad is None or (teacher.grad == 0).all()
    assert (student.grad != 0).any()


def test_context_kl_gradient_is_the_derivative():
    student, teacher, w = unit_rows(3, 8, seed=0), unit_rows(3, 8, seed=1), unit_rows(4, 8, seed=2)
    assert gradcheck(lambda s: context_kl(s, teacher, w, 10.0), [student.requires_grad_()])


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_context_kl_ignores_the_length_of_features(car_ft, which):
    student, teacher, w = car_ft
    want = context_kl(student, teacher, w, 100.0)
    factor = torch.linspace(0.1, 40.0, 6, dtype=torch.float64)[:, None]
    if which == "student":
        student = student * factor
    else:
        teacher = teacher * factor
    torch.testing.assert_close(context_kl(student, teacher, w, 100.0), want, rtol=1e-10, atol=0)


def test_context_kl_without_the_logit_scale_would_vanish(car_ft):
    # The documented trap: cosines of 1/sqrt(512) leave a near uniform softmax, and KL grows with
    # the scale's square.
    assert context_kl(*car_ft, 1.0) < 1e-3 * context_kl(*car_ft, 100.0)


def test_context_kl_stays_finite_for_saturated_softmaxes(car_ft):
    student, teacher, w = (t.float() for t in car_ft)
    student.requires_grad_()
    loss = context_kl(student, teacher, w, 1e4)  # probabilities underflow to 0; 0 log 0 is 0
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_context_kl_of_16_bit_features_is_computed_in_float32(car_ft, dtype):
    low = [t.to(dtype) for t in car_ft]
    want = context_kl_loops(*(t.double() for t in low), 100.0)
    got = context_kl(*low, 100.0)
    # float32 logits of size 100 carry errors of about 1e-5; bfloat16 ones would carry 0.4
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
