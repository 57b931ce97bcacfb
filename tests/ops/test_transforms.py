"""The operators under PyTorch's own machinery: opcheck, torch.compile, autocast, fake tensors, torch.func."""

import pytest
import torch
from problems import BF16, DTYPES, F16, F32, GPU, INPUTS, LONG, Case, autocast, close, device_of, leaves, made, results
from standins import MODELS, images
from torch._dynamo.testing import CompileCounterWithBackend

from fastheads import explain, mmd, patch
from fastheads.ops import head_attention
from fastheads.ops.dispatch import IMPLEMENTATIONS
from fastheads.reference import TARGETS

EVERY = pytest.mark.parametrize("impl", DTYPES)
OP, BACKWARD_OP = torch.ops.fastheads.head_attention.default, torch.ops.fastheads.head_attention_backward.default
CASE = Case(B=2, N=5, H=1, dh=16, rank=2)  # opcheck runs the operator some ten times
# float32 twice, compiled and not: PyTorch's own products in another order
SAME = 2e-5


def arguments(impl, case=CASE, keep="projections", pool="", dropped=False, grad=True, form="", dtype=F32, out=False):
    """Of the operator itself."""
    tensors, do, options = made(case, impl)
    own = leaves(tensors) if grad else tensors
    tokens = torch.tensor([1, 3], device=do.device) if pool == "tokens" else None
    seed = torch.tensor([7], device=do.device) if dropped else None
    parts = [TARGETS.index(t) for t in case.targets]
    problem = (case.H, parts, case.scale, case.causal, 0.3 if dropped else 0.0, form, impl)
    w_out = torch.linspace(-1, 1, case.D**2, device=do.device).view(case.D, case.D) if out else None
    return (
        *own.values(),
        w_out,
        None if w_out is None else w_out[0],
        options["mask"],
        seed,
        tokens,
        pool,
        2,
        keep,
        dtype,
        *problem,
    ), do


# -------------------------------------------------------------------------------------------------------- opcheck

FORMS = {
    "projections": {},
    "inputs": {"keep": "inputs", "pool": "token"},
    "nothing": {"keep": "nothing", "pool": "tokens", "grad": False},
    "mean": {"pool": "mean", "case": Case(N=5, H=1, mask="bool", mask_shape=(2, 1, 5, 5), causal=True)},
    "no delta": {"case": Case(N=5, H=1, rank=0, bias=False)},
    "no gate": {"case": Case(N=5, gate=None, shared=True, targets=("v", "k", "q"))},
    "nothing but weights": {"case": Case(N=5, H=1, rank=0, gate=None, bias=False), "keep": "nothing", "grad": False},
    "dropout": {"dropped": True},
    "theta": {"form": "softmax"},
    "cast": {"dtype": F16},
    "cast, out": {"dtype": F16, "out": True},
    "out": {"out": True, "case": Case(N=5, H=1, rank=0)},
}


def checks(forms):
    """(implementation, form): in the interpreter, which is slow, all but the most telling ones are marked so."""
    found = []
    for impl in DTYPES:
        for form in forms:
            if form == "dropout" and not IMPLEMENTATIONS[impl].dropout:
                continue
            if form in ("theta", "out", "cast, out") and impl == "cpu":
                continue  # takes the gates' values alone, and no output projection
            few = (("mean", "stacked"), ("theta", "stacked"), ("cast, out", "stacked"))
            quick = impl == "cpu" or GPU or form in ("inputs", "dropout") or (form, impl) in few
            found.append(pytest.param(impl, form, marks=() if quick else LONG))
    return found


@pytest.mark.parametrize(("impl", "form"), checks(FORMS))
def test_opcheck_forward(impl, form):
    args, _ = arguments(impl, **FORMS[form])
    torch.library.opcheck(OP, args)


@pytest.mark.parametrize(("impl", "form"), checks([form for form in FORMS if FORMS[form].get("grad", True)]))
def test_opcheck_backward(impl, form):
    args, do = arguments(impl, **FORMS[form] | {"grad": False})
    (x, *weights), (dtype, *problem) = args[:10], args[14:]
    o, lse, _, projected, low, heads, x_cast = OP(*args)
    x = x_cast if x_cast.numel() else x
    heads = o if weights[4] is None and projected.numel() and impl == "cpu" else heads
    wanted = [True, form == "no gate", form == "no gate", True, True, True]
    wanted = [w and t is not None for w, t in zip(wanted, args[:6], strict=True)]
    inputs = (x, *weights, lse, projected, low, heads, wanted, F32, *problem)
    torch.library.opcheck(BACKWARD_OP, (do.to(dtype), *inputs))


@EVERY
@pytest.mark.parametrize("stored", [F32, F16], ids=str)
def test_fakes_have_the_shapes_dtypes_and_strides_of_the_real_thing(impl, stored):
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = Case(B=3, N=7, H=2, dh=24, rank=3, targets=("v", "q", "k"))
    args, _ = arguments(impl, case, pool="mean", grad=False)
    args = (args[0], args[1].to(stored), *args[2:])
    real = OP(*args)
    mode = FakeTensorMode()
    with mode:
        fake = OP(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    for got, like in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (like.shape, like.dtype, like.stride())


# -------------------------------------------------------------------------------------------------------- compile


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


USES = {
    "plain": ({}, {}),
    "causal, pooled": ({"causal": True, "pool": "mean"}, {}),
    "masked, pooled by index": ({"mask": "bool", "mask_shape": (1, 1, 9, 9), "pool": "tokens"}, {}),
    "recomputed": ({"pool": 0}, {"recompute": True}),
    "without deltas": ({"rank": 0, "pool": None}, {}),
    "theta": ({}, {"gate_form": "softmax"}),
    "without gates": ({"gate": None, "bias": False}, {}),
}


@pytest.mark.parametrize(
    ("impl", "use"),
    [
        pytest.param(i, u, marks=() if i == "cpu" or u == "recomputed" or (i, u) == ("stacked", "theta") else LONG)
        for i in DTYPES
        for u in USES
    ],
)
def test_compile_whole_forward_and_backward(impl, use):
    case, own = USES[use]
    tensors, do, options = made(Case(N=9, **case), impl)
    expected = results(head_attention, tensors, do, **options, **own, impl=impl)
    compiled = torch.compile(head_attention, fullgraph=True, backend="aot_eager")
    got = results(compiled, tensors, do, **options, **own, impl=impl)
    for name, t in got.items():
        close(t, expected[name], SAME, name)


@pytest.mark.slow
@pytest.mark.parametrize("cast", [None, BF16], ids=str)
def test_compile_by_inductor(cast):
    device = device_of("auto")
    tensors, do, options = (
        Case(N=9).tensors(F32, device=device),
        Case(N=9).gradient(F32, device),
        Case(N=9).options(device),
    )

    def block(**kwargs):  # something to fuse before and after; the MMD's operators among it
        out = head_attention(**kwargs | {"x": torch.nn.functional.layer_norm(kwargs["x"], (32,))})
        domains = torch.arange(out.o.shape[0], device=device) % 2
        loss = mmd(out.o.float().flatten(1), domains, num_domains=2, estimator="biased")
        return torch.nn.functional.gelu(out.o.float()) + loss, out.lse, out.cls

    with autocast(device, cast):
        expected = results(block, tensors, do, **options)
        got = results(torch.compile(block, fullgraph=True), tensors, do, **options)
    for name, t in got.items():
        close(t, expected[name], SAME if cast is None else 2e-2, name)


@EVERY
def test_compile_under_autocast(impl):
    cast = BF16 if BF16 in DTYPES[impl] else F16
    tensors, do, options = made(Case(N=9), impl)
    compiled = torch.compile(head_attention, fullgraph=True, backend="aot_eager")
    with autocast(device_of(impl), cast):
        expected = results(head_attention, tensors, do, **options, impl=impl)
        got = results(compiled, tensors, do, **options, impl=impl)
    assert got["o"].dtype == cast
    for name, t in got.items():
        assert t.dtype == expected[name].dtype
        close(t, expected[name], 2e-2, name)


@pytest.mark.parametrize("impl", ["cpu", "delta"])  # the choice of impl is all that differs
def test_one_compilation_serves_every_batch_size(impl):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head_attention, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for B in (3, 5):  # no other dimension's size: sizes that are equal at first are taken for one
        tensors, do, options = made(Case(B=B, N=9), impl)
        expected = results(head_attention, tensors, do, **options, impl=impl)
        got = results(compiled, tensors, do, **options, impl=impl)
        for name, t in got.items():
            close(t, expected[name], SAME, name)
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


def test_a_changing_batch_compiles_twice_at_most():
    # as users have it, without dynamic=True: the second size makes the batch dynamic, no other size compiles again
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head_attention, fullgraph=True, backend=counter)
    for B in (2, 3, 4, 7):
        tensors, do, options = made(Case(B=B, N=9, pool=0), "cpu")
        results(compiled, tensors, do, **options)
    assert counter.frame_count == 2


@pytest.mark.parametrize("impl", [i for i in DTYPES if IMPLEMENTATIONS[i].dropout])
def test_compiled_dropout_drops_one_mask_in_both_directions(impl):
    # o is linear in lora_B where v alone is adapted: <dB, B> is what the low-rank path adds to <o, do>, of one mask
    case = Case(N=9, targets=("v",), gate=None, size=1.0, pool=None)
    tensors, do, options = made(case, impl)
    compiled = torch.compile(head_attention, fullgraph=True, backend="aot_eager")
    found = [results(compiled, tensors, do, **options, dropout_p=0.5, impl=impl) for _ in range(2)]
    plain = head_attention(**tensors | {"lora_A": None, "lora_B": None}, **options, impl=impl).o
    assert not torch.equal(found[0]["o"], found[1]["o"])
    for got in found:
        added = ((got["o"] - plain).double() * do.double()).sum()
        close((got["dlora_B"].double() * tensors["lora_B"].double()).sum(), added, 1e-4, "the low-rank path")


def test_the_reference_compiles_too():
    tensors, do, options = made(Case(N=9), "cpu")
    compiled = torch.compile(head_attention, fullgraph=True, backend="aot_eager")
    expected = results(head_attention, tensors, do, **options, impl="reference")
    for name, t in results(compiled, tensors, do, **options, impl="reference").items():
        close(t, expected[name], SAME, name)


# -------------------------------------------------------------------------------------------------------- autocast


@EVERY
@pytest.mark.parametrize("stored", [F32, F16], ids=str)
def test_autocast_computes_in_16_bits_and_hands_gradients_back_in_the_inputs_own(impl, stored):
    tensors, do, options = Case(N=9).tensors(F32, stored, device_of(impl)), *made(Case(N=9), impl)[1:]
    with autocast(device_of(impl), F16):
        got = results(head_attention, tensors, do, **options, impl=impl)
    assert got["o"].dtype == F16 and got["lse"].dtype == got["cls"].dtype == F32
    for name in INPUTS:
        assert got[f"d{name}"].dtype == tensors[name].dtype, name
    with torch.autocast(device_of(impl), dtype=F16, enabled=False):
        wide = results(head_attention, tensors, do, **options, impl=impl)
    assert wide["o"].dtype == F32


def test_float64_is_left_alone_by_autocast():
    tensors, do, options = made(Case(N=9), "cpu", torch.float64)
    with autocast("cpu", BF16):
        assert results(head_attention, tensors, do, **options, impl="cpu")["o"].dtype == torch.float64


@EVERY
def test_backward_outside_autocast_is_the_same(impl):
    # as the documentation of autocast asks for
    tensors, do, options = made(Case(N=9), impl)
    grads = []
    for inside in (True, False):
        own = leaves(tensors)
        with autocast(device_of(impl), F16):
            o = head_attention(**own, **options, impl=impl).o
            if inside:
                o.backward(do.to(F16))
        if not inside:
            o.backward(do.to(F16))
        grads.append([own[n].grad for n in INPUTS])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_functional_call_and_detached_parameters():
    # what meta-learning and weight-averaging code does: the same layer, other tensors
    tensors, do, options = made(Case(N=9), "cpu")
    expected = results(head_attention, tensors, do, **options)
    moved = {n: (t.detach().clone() + 0).requires_grad_() for n, t in tensors.items()}
    o = head_attention(**moved, **options).o
    grads = torch.autograd.grad(o, list(moved.values()), do)
    for name, grad in zip(INPUTS, grads, strict=True):
        assert torch.equal(grad, expected[f"d{name}"])


# ------------------------------------------------------------------------------------------- torch.func's transforms


def losses():
    """A loss of one tensor each: attention, in x and in the gate, and the MMD."""
    tensors, do, options = made(Case(N=5, H=2, dh=16, pool=0), "cpu")
    domains = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def attention(**own):
        return (head_attention(**{**tensors, **own}, **options).o * do).sum()

    return {
        "x": (lambda x: attention(x=x), tensors["x"]),
        "gate": (lambda gate: attention(gate=gate), tensors["gate"]),
        "mmd": (lambda x: mmd(x, domains, num_domains=3), torch.randn(2, 7, 4, generator=torch.manual_seed(0))),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["x", "gate", "mmd"])
def test_gradients_by_torch_func_are_autograds(name, compiled):
    loss, at = losses()[name]
    derivative = torch.func.grad(loss)
    if compiled:
        torch._dynamo.reset()
        derivative = torch.compile(derivative, fullgraph=True, backend="aot_eager")
    own = at.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(own), own)
    torch.testing.assert_close(derivative(at), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["x", "gate", "mmd"])
def test_vmap_over_a_gradient_is_a_loop_over_it(name):
    loss, at = losses()[name]
    several = torch.stack([at, 2 * at, at.flip(0)])
    got = torch.func.vmap(torch.func.grad(loss))(several)
    for one, x in zip(got, several, strict=True):
        torch.testing.assert_close(one, torch.func.grad(loss)(x), rtol=1e-4, atol=1e-6)


def test_batched_gradients_of_one_backward_pass_are_those_of_several():
    for loss, at in losses().values():
        own = at.clone().requires_grad_()
        scales = torch.tensor([1.0, -2.0, 0.5])
        (got,) = torch.autograd.grad(loss(own), own, scales, is_grads_batched=True)
        (one,) = torch.autograd.grad(loss(own), own)
        torch.testing.assert_close(got, scales.view(-1, *[1] * one.dim()) * one, rtol=1e-5, atol=1e-7)


def test_a_named_implementation_of_the_mmd_is_refused_inside_a_transform():
    domains = torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"impl: 'cpu' has no rule for torch.func"):
        torch.func.grad(lambda x: mmd(x, domains, num_domains=2, impl="cpu"))(torch.randn(4, 3))


def test_explain_says_why_a_transform_runs_on_the_reference():
    model = MODELS["clip"]()
    patch(model)
    said = []

    def loss(images):
        said.append(explain(model))
        return model.encode_image(images).sum()

    pictures = images(2)
    got = torch.func.grad(loss)(pictures)
    own = pictures.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(model.encode_image(own).sum(), own)[0], rtol=1e-4, atol=1e-5)
    assert said[0].layers[0].choice.falls_back and "a transform of torch.func" in str(said[0])
    assert explain(model).layers[0].choice.name == "cpu"
