"""Every implementation at the edges of its domain (no gradients, no batch, no visible key, huge scores)."""

import math
from dataclasses import replace

import pytest
import torch
from problems import (
    BF16,
    DTYPES,
    EVERY,
    F16,
    F32,
    F64,
    FULL,
    IMPLS,
    INPUTS,
    SAME,
    Case,
    autocast,
    close,
    exact_results,
    leaves,
    made,
    random_case,
    results,
)

from fastheads import reference
from fastheads.ops import cpu, fused, head_attention

# ----------------------------------------------------------------------------------------------------------- edges


TOLERANCES = {F64: 1e-10, F32: 1e-5, F16: 4e-3, BF16: 3e-2}  # a few units in the last place of what is summed


def without_gradients(case, impl, dtype):
    tensors, do, options = made(case, impl, dtype)
    with torch.no_grad():
        found = head_attention(**tensors, **options, impl=impl)
    with torch.inference_mode():
        again = head_attention(**tensors, **options, impl=impl)
    right = exact_results(tensors, do, **options)
    for name in ("o", "lse", "cls"):
        if name in right:
            close(getattr(found, name), right[name], TOLERANCES[dtype], f"{case}: {name}")
            assert torch.equal(getattr(found, name), getattr(again, name))
    assert not found.o.requires_grad


@EVERY
def test_without_gradients_the_numbers_are_the_same(impl):
    for case in (FULL, Case(gate="zeros", pool=None), Case(pool=None, bias=False), Case(rank=0, pool=None)):
        without_gradients(case, impl, F32)


@pytest.mark.parametrize("few", [0, 10**9], ids=["merged", "beside"])
@pytest.mark.parametrize("dtype", DTYPES["cpu"], ids=str)
def test_the_cpus_two_ways_without_gradients(dtype, few, monkeypatch):
    # many tokens: deltas and gates folded into the weights; few: products beside them
    monkeypatch.setattr(cpu, "FEW", few)
    for seed in range(20):
        case = random_case(seed, lengths=(1, 9, 33))
        without_gradients(replace(case, pool=None if seed % 2 else case.pool, gate="random"), "cpu", dtype)


@EVERY
def test_an_empty_batch(impl):
    for case in (Case(B=0, pool=0), Case(B=0, rank=0, gate=None, pool="mean"), Case(B=0, pool=None, causal=True)):
        found = all_results_of_empty(case, impl)
        assert found["o"].shape == (0, case.N, case.D)
        assert found["lse"].shape == (0, case.H, case.N)
        for name, t in found.items():
            if name.startswith("d") and name != "dx":
                assert not t.any(), name


def all_results_of_empty(case, impl):
    tensors, do, options = made(case, impl)
    found = results(head_attention, tensors, do, **options, impl=impl)
    for name in INPUTS:
        if tensors[name] is not None:
            assert found[f"d{name}"].shape == tensors[name].shape
    return found


@EVERY
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_row_that_sees_nothing_is_zero_and_passes_nothing_back(impl, kind, recompute):
    case = Case(B=2, N=18, H=2, targets=("q", "k", "v"), pool=3)
    tensors, do, options = made(case, impl)
    mask = torch.zeros(2, 1, 18, 18, dtype=torch.bool, device=do.device)
    mask[0, :, 3] = True  # one query of one image
    mask[1] = True  # all of the other image
    options["mask"] = mask if kind == "bool" else torch.zeros_like(mask, dtype=F32).masked_fill(mask, -math.inf)
    got = results(head_attention, tensors, do, **options, impl=impl, recompute=recompute)
    assert all(bool(torch.isfinite(t).all()) for n, t in got.items() if n != "lse")
    assert not got["o"][0, 3].any() and not got["o"][1].any()
    assert not got["dx"][1].any()
    assert not got["cls"].any()
    assert bool((got["lse"][0, :, 3] == -math.inf).all()) and bool((got["lse"][1] == -math.inf).all())
    # all the others, and every gradient, are as if the blind queries were not asked for
    blind = do.clone()
    blind[0, 3], blind[1] = 0, 0
    seen = options | {"mask": torch.where(mask.all(-1, keepdim=True), torch.zeros_like(mask), mask)}
    expected = exact_results(tensors, blind, **seen)
    for name in ("x", "w_in", "b_in", "lora_A", "lora_B", "gate"):
        close(got[f"d{name}"], expected[f"d{name}"], SAME, name)


@EVERY
def test_causal_with_a_mask_that_leaves_early_rows_nothing(impl):
    # causality and the mask each leave something to every query, both together nothing to the first
    case = Case(B=1, N=17, H=2, causal=True, pool=None)
    tensors, do, options = made(case, impl)
    mask = torch.zeros(17, dtype=torch.bool, device=do.device)
    mask[0] = True
    got = results(head_attention, tensors, do, **options | {"mask": mask}, impl=impl)
    assert all(bool(torch.isfinite(t).all()) for n, t in got.items() if n != "lse")
    assert not got["o"][:, 0].any()


@EVERY
def test_a_silenced_head_learns_its_gate(impl):
    case = Case(H=3, gate="zeros", N=19)
    tensors, do, options = made(case, impl)
    assert float(tensors["gate"][0]) == 0.0
    got = results(head_attention, tensors, do, **options, impl=impl)
    right = exact_results(tensors, do, **options)
    assert float(right["dgate"][0].abs()) > 1e-2
    close(got["dgate"], right["dgate"], 1e-5, "dgate")
    assert not got["o"].view(2, 19, 3, 16)[:, :, 0].any()
    assert bool(got["cls"][:, 0].any())  # the captured heads are un-gated


@EVERY
def test_scores_beyond_float16(impl):
    # q k up to 1e6: past float16's range, far past exp's
    case = Case(N=17, pool=None)
    tensors, do, options = made(case, impl)
    tensors["w_in"][: 2 * case.D] *= 300
    got = results(head_attention, tensors, do, **options, impl=impl)
    right = exact_results(tensors, do, **options)
    close(got["o"], right["o"], 1e-2, "o")
    close(got["lse"], right["lse"], 1e-5, "lse")
    assert all(bool(torch.isfinite(t).all()) for t in got.values())


@EVERY
def test_large_finite_masks_keep_a_softmax(impl):
    # the common way to mask without infinities: finfo.min everywhere leaves the mean of the values, not NaN or zero
    case = Case(N=17, pool=None, H=2, gate=None)
    tensors, do, options = made(case, impl)
    mask = torch.full((17, 17), torch.finfo(F32).min, device=do.device)
    got = results(head_attention, tensors, do, **options | {"mask": mask}, impl=impl)
    assert all(bool(torch.isfinite(t).all()) for t in got.values())
    _, _, v = reference.project(
        *(tensors[n] for n in INPUTS[:5]), num_heads=2, targets=options["targets"], scale=options["scale"]
    )
    close(got["o"], reference.gate_heads(v.mean(2, keepdim=True).expand_as(v), None, F32), 1e-5, "o")


@EVERY
@pytest.mark.parametrize("least", [-1e9, -1.7e9, torch.finfo(F32).min])
def test_rows_that_see_only_hugely_masked_keys_pass_nothing_back(impl, least):
    # of such a row float32's log-sum-exp has no digits left: exp(S - lse) may be anything, infinity too
    case = Case(B=1, N=18, H=2, pool=None, gate=None)
    tensors, do, options = made(case, impl)
    mask = torch.zeros(18, 18, device=do.device)
    mask[[2, 9]] = least
    got = results(head_attention, tensors, do, **options | {"mask": mask}, impl=impl)
    blind = do.clone()
    blind[:, [2, 9]] = 0
    expected = exact_results(tensors, blind, **options)
    for name in INPUTS[:5]:
        close(got[f"d{name}"], expected[f"d{name}"], SAME, f"d{name}")


@EVERY
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("masked", [-1e4, -1e6, -2e6, -5e6, -8e6])
def test_rows_whose_keys_are_all_masked_by_a_large_number(impl, masked, recompute):
    # their log-sum-exp is rounded to 0.06 … 0.5, but P still sums to 1: dv of all keys together is do, gated
    case = Case(B=2, N=18, H=2, pool=None)
    tensors, do, options = made(case, impl)
    for causal in (False, True):
        mask = torch.zeros(18, 18, device=do.device)
        mask[[2, 9]] = masked
        only = torch.zeros_like(do)
        only[:, [2, 9]] = do[:, [2, 9]]
        own = options | {"mask": mask, "causal": causal}
        got = results(head_attention, tensors, only, **own, impl=impl, recompute=recompute)
        want = only.double().view(2, 18, 2, -1) * tensors["gate"].double()[:, None]
        close(got["db_in"][2 * case.D :], want.sum((0, 1)).flatten(), 1e-5, f"dv of all keys, causal {causal}")


# --------------------------------------------------------------------------------------------------- derivatives


@EVERY
def test_the_dense_gradient_of_a_frozen_base_is_never_formed(impl):
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                sizes.append(out.numel())
            return out

    case = Case(B=1, N=5, H=2, dh=32, pool=None)  # of few tokens, so that nothing else is as large as D x D
    tensors, do, options = made(case, impl)
    problem = (do.dtype, 2, [0, 2], 1.0, False, 0.0, "", impl)
    kept = fused.forward(*tensors.values(), *[None] * 5, "", 0, "projections", *problem)
    saved = (*tensors.values(), *[None] * 4, kept[1], *kept[3:6])
    for base in (False, True):
        sizes.clear()
        needed = [True, base, False, True, True, True]
        with Products():
            fused.backward(do, *saved, needed, *problem)
        assert (max(sizes) >= case.D * case.D) == base, sizes


@EVERY
def test_a_second_derivative_is_refused_in_words(impl):
    tensors, do, options = made(Case(), impl)
    own = leaves(tensors)
    o = head_attention(**own, **options, impl=impl).o
    (dx,) = torch.autograd.grad(o, own["x"], do, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*impl='reference'"):
        dx.sum().backward()


@EVERY
def test_log_sum_exp_and_pooled_heads_are_not_differentiable(impl):
    tensors, _, options = made(Case(), impl)
    o, lse, cls = head_attention(**leaves(tensors), **options, impl=impl)
    assert o.requires_grad and not lse.requires_grad and not cls.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        (lse.sum() + cls.sum()).backward()


def test_gradcheck_in_float64():
    tensors, _, options = made(
        Case(B=1, N=5, H=2, dh=3, rank=2, targets=("v", "q", "k"), pool=None), "cpu", torch.float64
    )
    own = leaves(tensors)
    for more in ({}, {"causal": True}, {"recompute": True}):
        assert torch.autograd.gradcheck(
            lambda *t, more=more: head_attention(**dict(zip(INPUTS, t, strict=True)), **options | more, impl="cpu").o,
            tuple(own.values()),
        )


def test_a_mask_that_learns_is_the_references():
    case = Case(N=9, mask="float", mask_shape=(9, 9))
    tensors, do, options = made(case, "cpu")
    mask = options["mask"].requires_grad_()
    head_attention(**tensors, **options, impl="auto").o.backward(do)
    assert mask.grad is not None and bool(mask.grad.any())


# ----------------------------------------------------------------------------------------------- output projection


def projected(case, impl, dtype=F32):
    """A problem with an output projection, float32, of its own; bias: as the case has it."""
    tensors, do, options = made(case, impl)
    g = torch.Generator().manual_seed(3)
    w_out = (torch.randn(case.D, case.D, generator=g) * case.D**-0.5).to(do.device, dtype)
    b_out = torch.randn(case.D, generator=g).to(do.device, dtype) if case.bias else None
    return tensors, do, options, w_out, b_out


OUT_CASES = {
    "deltas": Case(N=9),
    "theta": Case(N=9, extra={"gate_form": "softmax"}),
    "no bias": Case(N=9, bias=False),
    "gates alone": Case(N=9, rank=0),
    "neither": Case(N=9, rank=0, gate=None, pool=None),
}


@EVERY
@pytest.mark.parametrize("cast", [None, F16], ids=["plain", "autocast"])
@pytest.mark.parametrize("which", OUT_CASES)
def test_the_output_projection_is_a_linear_layer_behind(impl, cast, which):
    tensors, do, options, w_out, b_out = projected(OUT_CASES[which], impl)

    def behind(**own):
        out = head_attention(**own)
        return out._replace(o=torch.nn.functional.linear(out.o, w_out, b_out))

    with autocast(do.device.type, cast):
        got = results(head_attention, tensors, do, **options, impl=impl, w_out=w_out, b_out=b_out)
        same = results(behind, tensors, do, **options, impl=impl)
    assert got.keys() == same.keys()
    for name, t in got.items():
        assert t.dtype == same[name].dtype
        close(t, same[name], SAME, name)  # the same casts, the same products


@EVERY
@pytest.mark.parametrize("recompute", [False, True])
def test_a_trained_output_projection_gets_its_gradients(impl, recompute):
    tensors, do, options, w_out, b_out = projected(Case(N=9), impl)
    own = [w_out.requires_grad_(), b_out.requires_grad_()]
    out = head_attention(**leaves(tensors), **options, impl=impl, w_out=w_out, b_out=b_out, recompute=recompute)
    heads = head_attention(**tensors, **options, impl=impl).o
    dw, db = torch.autograd.grad(out.o, own, do)
    close(dw, do.flatten(0, 1).T @ heads.flatten(0, 1), SAME, "dw_out")
    close(db, do.sum((0, 1)), SAME, "db_out")


def test_an_output_projection_that_does_not_fit_is_refused_by_name():
    tensors, _, options, w_out, b_out = projected(Case(N=9), "cpu")
    for given, said in (
        ({"w_out": w_out[:, :-1]}, r"^w_out: got shape \(32, 31\); takes \(32, 32\)"),
        ({"w_out": w_out, "b_out": b_out[:-1]}, r"^b_out: got shape \(31,\); takes \(32,\)"),
        ({"b_out": b_out}, r"^b_out: got one beside no w_out"),
        ({"w_out": w_out.to("meta")}, r"^w_out: is on meta"),
    ):
        with pytest.raises(ValueError, match=said):
            head_attention(**tensors, **options, **given)


# --------------------------------------------------------------------------------------------------------- theta


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("form", reference.GATES)
def test_theta_in_place_of_the_gates(impl, form):
    """The same numbers, and theta's gradient, as with the gates made of it outside."""
    tensors, do, options = made(Case(H=3, N=9), impl)

    def outside(*, gate, **own):
        return head_attention(gate=reference.GATES[form](gate), **own)

    got = results(head_attention, tensors, do, **options, impl=impl, gate_form=form)
    same = results(outside, tensors, do, **options, impl=impl)
    assert got.keys() == same.keys()
    for name, t in got.items():
        if impl == "reference" or (impl == "cpu" and not name.startswith("d")):
            assert torch.equal(t, same[name]), name
        close(t, same[name], SAME, name)


@EVERY
@pytest.mark.parametrize("recompute", [False, True])
def test_theta_that_is_not_trained_and_theta_alone(impl, recompute):
    tensors, do, options = made(Case(H=3, N=9), impl)
    for needed in (("lora_A",), ("gate",)):
        own = {n: t.detach().clone().requires_grad_(n in needed) for n, t in tensors.items()}
        head_attention(**own, **options, impl=impl, gate_form="softmax", recompute=recompute).o.backward(do)
        assert all((t.grad is not None) == (n in needed) for n, t in own.items())


def test_an_unknown_form_is_refused_by_name():
    tensors, _, options = made(Case(), "cpu")
    with pytest.raises(ValueError, match=r"^gate_form: got 'tanh'; takes '', 'softmax', 'sigmoid'"):
        head_attention(**tensors, **options, gate_form="tanh")


def test_a_form_without_a_gate_is_no_gate():
    tensors, _, options = made(Case(gate=None), "cpu")
    for impl in ("cpu", "reference"):
        plain = head_attention(**tensors, **options, impl=impl).o
        assert torch.equal(head_attention(**tensors, **options, impl=impl, gate_form="softmax").o, plain)
