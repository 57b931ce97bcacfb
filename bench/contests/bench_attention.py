"""From q, k, v as the projection leaves them, `[B, N, 3D]`, to gated heads `[B, N, D]`, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contests.contenders.ways import xformers_why_not
from bench.contests.contest import Contender, Group, NotRunError, Trial
from bench.contests.models import SETTINGS, Setting
from fastheads import reference
from fastheads.ops import cpu
from fastheads.ops.dispatch import IMPLEMENTATIONS, Problem

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
Attend = Callable[[Tensor, Tensor, int], Tensor]  # qkv [B, N, 3D], gate [H], heads → [B, N, D]


@dataclass(frozen=True)
class AttentionCase:
    """setting: a key of SETTINGS. precision: a key of DTYPES."""

    setting: str
    batch: int
    device: str
    precision: str
    draw: int = 0
    exact: bool = False

    @property
    def of(self) -> Setting:
        return SETTINGS[self.setting]

    @property
    def name(self) -> str:
        return f"{self.of.name}, batch {self.batch}, {self.of.tokens} tokens, {self.precision}"

    def small(self, draw: int) -> AttentionCase:
        return replace(self, batch=2, draw=draw)

    def extra(self) -> dict[str, Any]:
        keys = {"setting": self.setting, "batch": self.batch, "tokens": self.of.tokens, "precision": self.precision}
        return keys | {"heads": self.of.heads, "head_dim": self.of.head_dim}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """qkv, gate, and the gradient of the heads."""
        g = torch.Generator().manual_seed(self.draw)
        B, N, D = self.batch, self.of.tokens, self.of.width
        qkv, do = (torch.randn(B, N, d, generator=g).to(self.device, DTYPES[self.precision]) for d in (3 * D, D))
        gate = (1 + 0.3 * torch.randn(self.of.heads, generator=g)).to(self.device)
        wide = torch.float64 if self.exact else None
        qkv, do, gate = (t if wide is None else t.to(wide) for t in (qkv, do, gate))
        return qkv.requires_grad_(), gate.requires_grad_(), do


def cases(device: str, size: str) -> list[AttentionCase]:
    if size == "rehearsal":
        return [AttentionCase("tiny", 2, device, "bf16" if device == "cuda" else "float32")]
    if device == "cuda":
        return [AttentionCase(key, batch, device, "bf16") for key, batch in (("B/16", 256), ("L/14", 128))]
    shapes = [("B/32", 8), ("B/16", 2)] if size == "full" else [("B/32", 8)]
    return [AttentionCase(key, batch, device, "float32") for key, batch in shapes]


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, views `[B, H, N, dh]`."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, (3, heads, -1)).unbind(2))
    return q, k, v


def sdpa(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    return F.scaled_dot_product_attention(*split(qkv, heads)).transpose(1, 2).flatten(2)


def sdpa_gated(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    o = F.scaled_dot_product_attention(*split(qkv, heads))
    return (o * gate.to(o.dtype).view(1, -1, 1, 1)).transpose(1, 2).flatten(2)


def formula(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    each, _, _ = reference.attend(*split(qkv, heads))
    return reference.gate_heads(each, gate, qkv.dtype)


def xformers_gated(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    from xformers.ops import memory_efficient_attention

    o = memory_efficient_attention(*qkv.unflatten(2, (3, heads, -1)).unbind(2))
    return (o * gate.to(o.dtype).view(1, 1, -1, 1)).flatten(2)


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_gated(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    o = _flex()(*split(qkv, heads))
    return (o * gate.to(o.dtype).view(1, -1, 1, 1)).transpose(1, 2).flatten(2)


@functools.cache
def _compiled() -> Any:
    return torch.compile(formula)


def compiled(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    return _compiled()(qkv, gate, heads)


class _Kernels(torch.autograd.Function):
    """fastheads' own forward and backward, as its operator composes them, between the projection and the heads."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
        options: dict[str, Any] = {"num_heads": heads, "gate": gate, "mask": None, "causal": False, "pool": None}
        ungated = None
        if qkv.device.type == "cpu":
            o, lse, _, ungated = cpu.attention_fwd(qkv, **options)
        else:
            from fastheads.kernels.attention_fwd import attention_fwd

            o, lse, _ = attention_fwd(qkv, **options)
        ctx.save_for_backward(qkv, gate, lse, ungated)
        ctx.heads = heads
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gate, lse, ungated = ctx.saved_tensors
        if qkv.device.type == "cpu":
            dqkv = torch.empty_like(qkv)
            options = {"num_heads": ctx.heads, "gate": gate, "mask": None, "causal": False}
            return dqkv, cpu.attention_bwd(grads[0], qkv, lse, ungated, dqkv, **options), None
        from fastheads.kernels.attention_bwd import attention_bwd

        return *attention_bwd(grads[0], qkv, lse, num_heads=ctx.heads, gate=gate), None


def kernels(qkv: Tensor, gate: Tensor, heads: int) -> Tensor:
    return _Kernels.apply(qkv, gate, heads)


def trial(case: AttentionCase, attend: Attend) -> Trial:
    qkv, gate, do = case.tensors()

    def forward() -> Tensor:
        return attend(qkv, gate, case.of.heads)

    def run() -> Any:
        return torch.autograd.grad(forward(), [qkv, gate], do, allow_unused=True)

    def outputs() -> dict[str, Tensor]:
        o = forward()
        dqkv, dgate = torch.autograd.grad(o, [qkv, gate], do, allow_unused=True)
        return {"o": o.detach(), "dqkv": dqkv} | ({} if dgate is None else {"dgate": dgate})

    def known() -> Iterator[Tensor]:
        yield from (qkv, gate, do)

    return Trial(run, outputs, forward, known, case.batch)


def _build(case: AttentionCase, attend: Attend, why_not: Callable[[AttentionCase], str]) -> Trial:
    reason = why_not(case)
    if reason:
        raise NotRunError(reason)
    return trial(case, attend)


def _contender(
    name: str, words: str, attend: Attend, why_not: Callable[[AttentionCase], str] = lambda case: "", **options: Any
) -> Contender:
    return Contender(name, words, functools.partial(_build, attend=attend, why_not=why_not), **options)


def _refused(case: AttentionCase, impl: str) -> str:
    dtype = DTYPES[case.precision]
    problem = Problem(case.device, dtype, dtype, case.of.heads, case.of.head_dim, length=case.of.tokens)
    return "; ".join(IMPLEMENTATIONS[impl].not_supported_reasons(problem))


def _no_backward(case: AttentionCase) -> str:
    return "" if case.device == "cuda" else "FlexAttention has no backward pass on a CPU"


def _standard(case: AttentionCase, maths: str, exact: bool) -> dict[str, Tensor]:
    attend: Sequence[Attend] = (sdpa, sdpa) if maths == "ungated" else (sdpa_gated, formula)
    return trial(replace(case, exact=exact), attend[exact]).outputs()


GROUP = Group(
    "attention",
    "sdpa",
    (
        _contender("sdpa", "SDPA, no gate", sdpa, maths="ungated"),
        _contender("triton", "fastheads, Triton", kernels, functools.partial(_refused, impl="stacked"), ours=True),
        _contender("cpu", "fastheads, cpu", kernels, functools.partial(_refused, impl="cpu"), ours=True),
        _contender("reference", "fastheads, reference", formula, ours=True),
        _contender("sdpa, gate", "SDPA, then the gate", sdpa_gated),
        _contender("xformers", "xformers, then the gate", xformers_gated, lambda c: xformers_why_not(c.device)),
        _contender("flex", "FlexAttention, then the gate", flex_gated, _no_backward, slow_start=True),
        _contender("compiled", "torch.compile of the reference", compiled, slow_start=True),
    ),
    cases,
    exact=lambda case, maths: _standard(case, maths, True),
    plain=lambda case, maths: _standard(case, maths, False),
)


def test_attention(compete: Callable[..., None], case: AttentionCase, contender: Contender) -> None:
    compete(GROUP, case, contender)
