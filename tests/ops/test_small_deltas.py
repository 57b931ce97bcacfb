"""Small deltas survive: what a delta of a thousandth of the weights changes is that change, not its rounding.

Rounding o to bf16 costs about 1e-3 |o| per element, against a change of 1e-3 |o|: over n elements the gain is then
uncertain by about 1.6 / sqrt(n), 0.7 % for the 49,152 here. The rule allows 5 %.
"""

import functools

import pytest
import torch
from problems import BF16, DEVICE, DTYPES, F16, F32, GPU, LONG, TRITON, autocast, device_of
from standins import clip, images, seeded

import fastheads
from fastheads import HeadConfig, reference
from fastheads.ops import Problem, choose, head_attention

SIZES = [1e-1, 1e-2, 1e-3]
H, DH, RANK = 4, 32, 2
D = H * DH


@functools.cache
def layer(size, stored, targets, device, large):
    """x and the base, the latter in `stored`; adapters in float32, of ‖Δ‖ = size·‖W‖ in each target."""
    B, N = (8, 48) if large else (1, 48)  # fp16 and fp32, whose rounding is an eighth and less, need fewer
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    w_in = (rand(3 * D, D) * D**-0.5).to(stored)
    lora_A, lora_B = rand(len(targets), H, RANK, D) * D**-0.5, rand(len(targets), H, DH, RANK)
    for t in range(len(targets)):
        part = "qkv".index(targets[t])
        delta = lora_B[t] @ lora_A[t]
        lora_B[t] *= size * w_in[part * D : (part + 1) * D].double().norm() / delta.norm()
    tensors = {"w_in": w_in, "b_in": (0.1 * rand(3 * D)).to(stored), "lora_A": lora_A.float(), "lora_B": lora_B.float()}
    return rand(B, N, D).float().to(device), {n: t.to(device) for n, t in tensors.items()}


def gain_of(impl, size, stored, cast, targets=("q", "v"), large=True, fold_first=False):
    """⟨Δy, Δy₆₄⟩ / ‖Δy₆₄‖² of what the deltas change in o."""
    device = device_of(impl)
    x, tensors = layer(size, stored, targets, device, large)
    x = x if cast else x.to(stored)
    bare = {"lora_A": None, "lora_B": None}
    own = {"num_heads": H, "targets": targets}

    def effect(run, x, tensors, adapted):
        return (run(x, **adapted, **own).o.double() - run(x, **tensors | bare, **own).o.double()).ravel()

    exact = {n: t.double() for n, t in tensors.items()}
    dy64 = effect(reference.head_attention, x.double(), exact, exact)
    adapted = tensors
    if fold_first:  # what merging into the stored weights does
        up = reference.up_matrix(tensors["lora_B"], targets, 1.0, per_head=True)
        merged = (tensors["w_in"].float() + up @ tensors["lora_A"].flatten(0, 2)).to(stored)
        adapted = tensors | bare | {"w_in": merged}
    with torch.no_grad(), autocast(device, cast):
        dy = effect(functools.partial(head_attention, impl=impl), x, tensors, adapted)
    return float(torch.dot(dy, dy64) / dy64.square().sum())


def auto(stored, cast, device):
    """The form that "auto" takes on `device` for this layer."""
    return choose("auto", Problem(device, cast or stored, stored, H, DH, RANK)).name


def can(impl, *dtypes):
    return all(d in DTYPES[impl] for d in dtypes if d is not None)


# (stored, autocast): the base as it is held, and what it is computed in
HELD = [(F32, None), (BF16, None), (F16, None), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (BF16, F16)]
# The interpreter has no bf16; there delta's and stacked's bf16 numbers wait for a GPU.
BY_DEFAULT = [(auto(s, c, kind), s, c) for kind in ("cpu", "cuda") for s, c in HELD]
BY_DEFAULT = [p for p in dict.fromkeys(BY_DEFAULT) if can(p[0], p[2] or p[1])]
# Each form by name, where its rule promises: stacked rounds W + s·B A to the dtype of the computation, which is the
# identity for no 16-bit base; the others add the delta inside float32 accumulators.
BY_NAME = [
    (impl, s, c)
    for impl in DTYPES
    for s, c in HELD
    if can(impl, c or s) and not (impl == "stacked" and s in (F16, BF16)) and (impl, s, c) not in BY_DEFAULT
]


def label(p):
    return "-".join(str(v).removeprefix("torch.") for v in p)


def test_every_dtype_has_a_default_form_that_keeps_small_deltas():
    assert auto(F32, None, "cuda") == auto(F32, BF16, "cuda") == "stacked"
    assert auto(BF16, None, "cuda") == auto(F16, F16, "cuda") == "delta"
    assert {auto(s, c, "cpu") for s, c in HELD} == {"cpu"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", BY_DEFAULT + BY_NAME, ids=label)
def test_the_gain_of_a_small_delta_is_one(form, size):
    gain = gain_of(form[0], size, form[1], form[2], large=GPU or form[0] == "cpu")
    assert abs(gain - 1) < 0.05, f"gain {gain:.4f}"


@pytest.mark.parametrize("targets", [("q",), ("k",), ("k", "q")], ids="".join)
@pytest.mark.parametrize("form", [f for f in BY_DEFAULT if f[1] != F32], ids=label)
def test_the_gain_of_a_small_delta_in_the_scores_is_one(form, targets):
    # without v, whose change would hide theirs
    gain = gain_of(form[0], 1e-2, form[1], form[2], targets, large=GPU or form[0] == "cpu")
    assert abs(gain - 1) < 0.05, f"gain {gain:.4f}"


@pytest.mark.parametrize(("stored", "size"), [(BF16, 1e-3), (F16, 1e-4)], ids=str)
def test_merging_into_16_bit_weights_would_fail(stored, size):
    # so that the tests above can fail: in weights stored in 16 bits the same delta drowns
    gain = gain_of("cpu", size, stored, None, fold_first=True)
    assert gain < 0.9, f"gain {gain:.4f}"


@pytest.mark.parametrize("impl", ["stacked"])
def test_stacked_is_not_the_default_of_16_bit_weights_for_a_reason(impl):
    stored, size = (BF16, 1e-3) if GPU else (F16, 1e-4)
    gain = gain_of(impl, size, stored, None, large=GPU)
    assert gain < 0.9, f"gain {gain:.4f}"


# -------------------------------------------------------------------------------------------------------- training


def trained(base, held, impl, steps, rate, cast=None, device="cpu"):
    """lora_B A of every layer after `steps` of plain gradient descent, on a base whose weights are `held`."""
    model = clip(layers=2)
    model.load_state_dict(base)
    model = model.to(held).to(device)
    with seeded(3):
        fastheads.patch(model, HeadConfig(rank=2), impl=impl)
    parameters = [*fastheads.lora_parameters(model), *fastheads.gate_parameters(model)]
    for p in parameters:
        assert p.dtype == torch.float32
    optimizer = torch.optim.SGD(parameters, lr=rate)
    x, wanted = images(4, seed=1).to(device), torch.randn(4, 24, generator=torch.Generator().manual_seed(2)).to(device)
    for _ in range(steps):
        with autocast(device, cast):
            features = model.encode_image(x if cast else x.to(held))
        loss = (features.float() - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    deltas = [m.heads.lora_B.detach() @ m.heads.lora_A.detach() for m in attentions_of(model)]
    sizes = [
        float(d.norm() / m.in_proj_weight.float().norm()) for d, m in zip(deltas, attentions_of(model), strict=True)
    ]
    gates = torch.cat([g.detach().ravel() for g in fastheads.gate_parameters(model)])
    return torch.cat([d.ravel() for d in deltas]).double().cpu(), gates.double().cpu(), max(sizes)


def attentions_of(model):
    return [block.attn for block in model.visual.transformer.resblocks]


# steps of about 1e-5 of the weights: under half a unit in the last place of bf16 (4e-3) and fp16 (5e-4) by far
RUNS = [("auto", F32, BF16), ("auto", BF16, None), ("auto", F16, None), ("auto", BF16, BF16)]
IN_TRITON = [(impl, F16, None) for impl in TRITON if impl != "stacked"] + [("stacked", F32, F16)]


@pytest.mark.parametrize(
    "run", [*RUNS, *(pytest.param(r, marks=() if r[0] == "delta" else LONG) for r in IN_TRITON)], ids=label
)
def test_training_at_a_tiny_rate_follows_float32(run):
    impl, held, cast = run
    device = DEVICE if impl != "auto" or GPU else "cpu"
    steps, rate = (30, 2e-3) if impl == "auto" or GPU else (3, 2e-2)
    base = {k: v.to(held).float() if v.is_floating_point() else v for k, v in clip(layers=2).state_dict().items()}
    delta, gates, size = trained(base, held, impl, steps, rate, cast, device)
    right, right_gates, _ = trained(base, F32, "reference", steps, rate, device=device)
    assert 1e-5 < size < 1e-3, f"the steps are not tiny: {size:.1e}"
    for name, found, wanted in (("delta", delta, right), ("gates", gates, right_gates)):
        gain = float(torch.dot(found, wanted) / wanted.square().sum())
        cosine = float(torch.dot(found, wanted) / (found.norm() * wanted.norm()))
        assert abs(gain - 1) < 0.05, f"{name}: gain {gain:.4f}"
        assert cosine > 0.99, f"{name}: cosine {cosine:.4f}"
