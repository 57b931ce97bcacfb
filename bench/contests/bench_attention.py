"""From q, k, v as the projection leaves them, `[B, N, 3D]`, to gated heads `[B, N, D]`, and back."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contests.attentions import gated, joined, split, xformers_attention
from bench.contests.contenders.towers import xformers_why_not
from bench.contests.contest import Contender, Group, Trial, training_trial
from bench.contests.vision import VisionCase, cases
from fastheads import reference
from fastheads.ops import cpu
from fastheads.ops.dispatch import IMPLEMENTATIONS, Problem

compile_once = functools.cache(torch.compile)
Attend = Callable[[Tensor, Tensor, int], Tensor]  # qkv [B, N, 3D], gate [H], heads → [B, N, D]


def trial(case: VisionCase, attend: Attend) -> Trial:
    H, D = case.of.heads, case.of.width
    qkv, do = (case.tensor(case.batch, case.length, d, stream=i, dtype=case.stored) for i, d in enumerate((3 * D, D)))
    gate = 1 + 0.3 * case.tensor(H, stream=2, dtype=torch.float32)
    known, named = (qkv.requires_grad_(), gate.requires_grad_(), do), {"qkv": [qkv], "gate": [gate]}
    forward = functools.partial(attend, qkv, gate, H)
    return training_trial(forward, do, lambda: named, lambda: known, result="o", samples=case.batch)


def sdpa(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    return joined(F.scaled_dot_product_attention(*split(qkv, heads)))


def gated_after(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    return lambda qkv, gate, heads: gated(attend(*split(qkv, heads)), gate)


def formula(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    each, _, _ = reference.attend(*split(qkv, heads))
    return reference.gate_heads(each, gate, qkv.dtype)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return compile_once(flex_attention, dynamic=False)(q, k, v)


class _Kernels(torch.autograd.Function):
    """fastheads' own forward and backward, as its operator composes them, between the projection and the heads."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
        options: dict[str, Any] = {"gate": gate, "mask": None, "causal": False, "pool": None}
        ungated = None
        if qkv.device.type == "cpu":
            o, lse, _, ungated = cpu.attend(*split(qkv, heads), **options)
        else:
            from fastheads.kernels.attention_fwd import attention_fwd

            o, lse, _ = attention_fwd(qkv, num_heads=heads, **options)
        ctx.save_for_backward(qkv, gate, lse, ungated)
        ctx.heads = heads
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gate, lse, ungated = ctx.saved_tensors
        if qkv.device.type == "cpu":
            options: dict[str, Any] = {"gate": gate, "mask": None, "causal": False}
            *dqkv, dgate = cpu.attend_bwd(grads[0], *split(qkv, ctx.heads), lse, ungated, **options)
            return torch.cat(dqkv, 1).view_as(qkv), dgate, None
        from fastheads.kernels.attention_bwd import attention_bwd
        from fastheads.kernels.sums import sums

        dqkv, dgates = attention_bwd(grads[0], qkv, lse, num_heads=ctx.heads, gate=gate)
        return dqkv, sums(dgates, None)[0], None


def _refused(case: VisionCase, impl: str) -> str:
    problem = Problem(case.device, case.stored, case.stored, case.of.heads, case.of.head_dim, length=case.length)
    return "; ".join(IMPLEMENTATIONS[impl].not_supported_reasons(problem))


def _contender(name: str, words: str, attend: Attend, **options: Any) -> Contender:
    return Contender(name, words, functools.partial(trial, attend=attend), **options)


NO_BACKWARD = "FlexAttention has no backward pass on a CPU"
PLAIN = gated_after(F.scaled_dot_product_attention)
KERNELS, XFORMERS, FLEX = _Kernels.apply, gated_after(xformers_attention), gated_after(flex)
CONTENDERS = (
    _contender("sdpa", "SDPA, no gate", sdpa, maths="ungated"),
    _contender("triton", "fastheads, Triton", KERNELS, ours=True, why_not=lambda case: _refused(case, "stacked")),
    _contender("cpu", "fastheads, cpu", KERNELS, ours=True, why_not=lambda case: _refused(case, "cpu")),
    _contender("reference", "fastheads, reference", formula, ours=True),
    _contender("sdpa, gate", "SDPA, then the gate", PLAIN),
    _contender("xformers", "xformers, then the gate", XFORMERS, why_not=xformers_why_not),
    _contender("flex", "FlexAttention, then the gate", FLEX, slow_start=True,
               why_not=lambda case: "" if case.device == "cuda" else NO_BACKWARD),
    _contender("compiled", "torch.compile of the reference", lambda *problem: compile_once(formula)(*problem),
               slow_start=True),
)  # fmt: skip


def standard(case: VisionCase, maths: str) -> Trial:
    return trial(case, sdpa if maths == "ungated" else formula if case.exact else PLAIN)


GROUP = Group("attention", "sdpa", CONTENDERS, functools.partial(cases, "attention", quick=[("B/32", 8)]), standard)


def test_attention(compete, case, contender):
    compete(GROUP, case, contender)
