"""Heads with something between projection and attention: right by the numerics rule, whoever computes the halves."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import BACKWARD, FORWARD, assert_within
from problems import BF16, DTYPES, F16, F32, F64, LONG, Case, autocast, made, results
from standins import fill_adapters, images, patched, relative, vit
from timm.layers import Attention
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import fastheads
from fastheads import HeadConfig, reference
from fastheads.ops import Between, choose, head_attention_in_halves
from fastheads.ops.dispatch import Problem
from fastheads.reference import TARGETS

H = 2


def turned(t):
    """Normed, and turned by its position, in at least float32 as hosts do it."""
    wide = F.layer_norm(t, t.shape[-1:]).to(torch.promote_types(t.dtype, F32))
    angle = torch.arange(t.shape[2], device=t.device).view(-1, 1) * torch.linspace(0.1, 1, t.shape[3] // 2).to(wide)
    a, b = wide.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


HEAD_SCALE = torch.tensor([0.5, -1.5]).view(H, 1, 1)
WHATS = {
    "norms": Between(lambda q, k, _: (turned(q), turned(k))),
    "scale": Between(score_scale=0.6),
    "all": Between(lambda q, k, _: (turned(q), k), torch.tensor([0.3, 0.7]).view(H, 1, 1), HEAD_SCALE),
}


def halves(x, w_in, b_in, lora_A, lora_B, gate, *, between, impl, num_heads, targets, scale, mask, pool, causal=False):
    options = {"num_heads": num_heads, "targets": targets, "scale": scale, "mask": mask, "pool": pool}
    options |= {"gate": gate, "gate_form": "", "dropout_p": 0.0, "impl": impl}
    o, cls, _ = head_attention_in_halves(x, w_in, b_in, lora_A, lora_B, between, **options)
    return o, None, cls


def plain(x, w_in, b_in, lora_A, lora_B, gate, *, between, num_heads, targets, scale, mask, pool, causal=False):
    """In float64 what is right, in another dtype what PyTorch makes of it."""
    q, k, v = reference.project(x, w_in, b_in, lora_A, lora_B, num_heads=num_heads, targets=targets, scale=scale)
    if between.norms:
        q, k = between.norms(q, k, None)
    if between.score_scale is not None:
        q = q * (between.score_scale * q.shape[-1] ** 0.5)
    if mask is not None:
        mask = ~mask if mask.dtype == torch.bool else mask.to(v.dtype)
    each = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
    if between.head_scale is not None:
        each = each * between.head_scale.to(v.dtype)
    cls = None if pool is None else reference.pool_heads(each.detach(), pool)
    each = each if gate is None else each * gate.to(v.dtype).view(1, -1, 1, 1)
    return each.transpose(1, 2).flatten(2), None, cls


CASES = {
    "plain": Case(),
    "shared, masked": Case(N=18, targets=("k",), shared=True, scale=2.0, mask="bool", mask_shape=(2, 1, 18, 18)),
    "narrow, no bias": Case(
        targets=("v", "q", "k"), left_out=1, bias=False, gate=None, mask="float", mask_shape=(17, 17), pool="mean"
    ),
    "gates alone": Case(rank=0, gate="zeros", pool=None),
}
# of Triton's interpreter, seconds a case, only where everything is between
RUNS = [
    (impl, dtype, what)
    for impl in ("cpu", "stacked", "delta", "reference")
    for dtype in DTYPES.get(impl, (F32,))
    for what in (WHATS if impl in ("cpu", "reference") else ("all",))
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("impl", "dtype", "what"), RUNS, ids=str)
def test_values_and_gradients(impl, dtype, what, case):
    tensors, do, options = made(case, impl, dtype)
    between = WHATS[what]._replace(head_scale=HEAD_SCALE.to(do.device) if what == "all" else None)
    if what == "all":
        between = between._replace(score_scale=between.score_scale.to(do.device))
    got = results(halves, tensors, do, **options, between=between, impl=impl)
    exacts, errors = [], []
    for i in range(4):  # of two gates' gradients plain PyTorch may be right by luck
        near, _, _ = made(replace(case, neighbour=i), impl, dtype)
        exact = {n: None if t is None else t.double() for n, t in near.items()}
        exacts.append(results(plain, exact, do.double(), **options, between=between))
        right = results(plain, near, do, **options, between=between)
        errors.append({n: right[n].double() - t for n, t in exacts[i].items()})
    assert got.keys() == exacts[0].keys()
    for name, t in got.items():
        factor, plains = BACKWARD if name.startswith("d") else FORWARD, torch.stack([e[name] for e in errors])
        assert_within(t, plains, exacts[0][name], factor, name)


def test_dropout_drops_the_same_in_both_passes():
    tensors, do, options = made(Case(pool=None, gate=None), "cpu", F64)
    own = {n: t.requires_grad_() for n, t in tensors.items() if t is not None}
    del options["causal"]

    def run(*given):
        torch.manual_seed(3)
        values = dict.fromkeys(("b_in", "gate")) | dict(zip(own, given, strict=True))
        options_ = options | {"gate": values.pop("gate"), "gate_form": "", "dropout_p": 0.5, "impl": "cpu"}
        return head_attention_in_halves(**values, between=Between(score_scale=0.6), **options_)[0]

    assert torch.autograd.gradcheck(run, list(own.values()), fast_mode=True)


def test_one_pass_has_nothing_between_and_says_so():
    problem = Problem("cuda", F32, F32, 4, 16, between=("q_norm", "rotary positions"))
    assert choose("auto", problem).name == "stacked"
    with pytest.raises(ValueError, match="'one_pass'.*nothing between: q_norm, rotary positions"):
        choose("one_pass", problem)


@pytest.mark.parametrize("cast", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("name", ["timm_qk_norm", "timm_rotary", "development_cosine", "attention_scale_heads"])
def test_models_run_on_the_operators_and_agree_with_the_reference(name, cast):
    config = HeadConfig(towers=("visual",))
    model, other = patched(name, config), patched(name, config, impl="reference")
    assert {layer.choice.name for layer in fastheads.explain(model).layers} == {"cpu"}

    def found(one, cast):
        one.zero_grad()
        with autocast("cpu", cast):
            out = one.encode_image(images())
        out.float().square().sum().backward()
        return [out.float(), *[p.grad for p in fastheads.lora_parameters(one) + fastheads.gate_parameters(one)]]

    exact = found(other, None)
    for got, plainly, right in zip(found(model, cast), found(other, cast), exact, strict=True):
        assert relative(got, right) <= 2 * relative(plainly, right) + 1e-5


OPERATORS = ("project", "attend")


def learned(model, run):
    model.zero_grad()
    out = run(images())
    out.square().sum().backward()
    return [out.detach(), *[p.grad for p in fastheads.lora_parameters(model) + fastheads.gate_parameters(model)]]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["timm_qk_norm", "attention_scale_heads"])
def test_compiled_they_are_operators_with_the_same_gradients(name, recompute):
    model = patched(name, HeadConfig(), recompute=recompute)
    seen = []

    def backend(graph, inputs):
        parts = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        seen.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return aot_eager(graph, inputs)

    compiled = torch.compile(model.visual, backend=backend, fullgraph=True)
    for got, right in zip(learned(model, compiled), learned(model, model.visual), strict=True):
        assert relative(got, right) < 1e-5
    assert all(seen.count(f"fastheads.{own}.default") == 3 for own in OPERATORS), seen
    with fastheads.capture_heads(model) as heads:
        compiled(images())
    assert not heads.features.requires_grad  # as where no compiler looks


def test_recompute_keeps_the_layers_input_alone():
    kept, found = {}, {}
    for recompute in (False, True):
        model = patched("timm_rotary", HeadConfig(dropout=0.2), recompute=recompute).train()
        torch.manual_seed(1)
        found[recompute] = learned(model, model.visual)
        sizes = {}
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            out = model.visual(images())
        kept[recompute] = sum(sizes.values())
        del out
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    rows, D, layers = images().shape[0] * 17, 64, 3
    assert kept[False] - kept[True] > layers * rows * 4 * D * 4  # q, k, v and the heads at least


def arguments(impl, what):
    """Of each operator, what it takes for its gradients last."""
    tensors, do, options = made(WAYS[what], impl)
    mask, gate = options["mask"], tensors.pop("gate")
    settings = (H, [TARGETS.index(t) for t in WAYS[what].targets], 1.5, 0.0, impl)
    q = do.view(*do.shape[:2], H, -1).transpose(1, 2)
    gate = None if gate is None else gate.float()
    return (*tensors.values(), None, *settings), (q, q.sin(), q.cos(), gate, mask, None, "mean", 1, "", impl)


def with_gradients(given):
    floats = [isinstance(t, torch.Tensor) and t.is_floating_point() for t in given]
    return tuple(t.detach().clone().requires_grad_() if own else t for t, own in zip(given, floats, strict=True))


WAYS = {
    "masked": Case(N=5, H=H, mask="bool", mask_shape=(2, 1, 5, 5)),
    "no delta, no gate": Case(N=5, H=H, rank=0, gate=None, bias=False),
}


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize("impl", ["cpu", pytest.param("delta", marks=LONG), pytest.param("stacked", marks=LONG)])
def test_opcheck(impl, what):
    project, attend = arguments(impl, what)
    ops = torch.ops.fastheads
    torch.library.opcheck(ops.project.default, with_gradients(project))
    projected, low = ops.project(*project)
    needed = [t is not None for t in project[:5]]
    torch.library.opcheck(ops.project_backward.default, (projected.cos(), *project[:6], low, needed, *project[6:]))
    given = with_gradients(attend)
    torch.library.opcheck(ops.attend.default, given)
    o, lse, _, kept = ops.attend(*attend)
    torch.library.opcheck(
        ops.attend_backward.default, (o.cos(), *attend[:5], lse, kept if kept.numel() else o, *attend[8:])
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        (first,) = torch.autograd.grad(ops.attend(*given)[0].sum(), given[0], create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize("name", ["timm_qk_norm", "timm_rotary", "attention_scale_heads"])
def test_closed_heads_are_left_out(name):
    model = patched(name, HeadConfig(layers=(-1,)))

    def operations():
        with FlopCounterMode(display=False) as counter:
            model.encode_image(images()).sum().backward()
        return counter.get_total_flops()

    every = operations()
    with fastheads.masked(model, [(2, 0), (2, 2)]):
        half = operations()
    assert every - half >= 2 * images().shape[0] * 17 * 64 * 64 * 3 / 2  # half of W


def test_a_scale_of_its_own_is_computed():
    stock, other = vit().eval(), vit().eval()
    for model in (stock, other):
        for attention in [m for m in model.modules() if isinstance(m, Attention)]:
            attention.scale = 1.0
            attention.fused_attn = False  # which would take its own
    fastheads.patch(other)
    assert relative(other(images()), stock(images())) < 1e-5
    fill_adapters(other)
    adapted = other(images())
    assert relative(fastheads.merge(other)(images()), adapted) < 1e-5
