"""Random head-attention problems, who can compute them here, and the numerics rule over all their results.

Not a test file. The oracle is `fastheads.reference` in float64, which has tests of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from numerics import assert_right, assert_within, plain_heads
from torch import Tensor

from fastheads import reference
from fastheads.ops import head_attention
from fastheads.ops.dispatch import IMPLEMENTATIONS

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TRITON = ("stacked", "delta", "one_pass")
# Every implementation joins every test of tests/ops here: a line each, with the dtypes it computes in where they
# run. Triton's interpreter keeps bfloat16 as integers, and its tl.dot on them is garbage: bf16 waits for a GPU.
_KERNELS = (F32, F16, BF16) if GPU else (F32, F16)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (F64, F32, F16, BF16),
    "stacked": _KERNELS,
    "delta": _KERNELS,
    "one_pass": _KERNELS,
}
IMPLS = tuple(DTYPES)
INPUTS = ("x", "w_in", "b_in", "lora_A", "lora_B", "gate")
EVERY = pytest.mark.parametrize("impl", IMPLS)
# float32 twice by the same implementation, from tensors laid out differently: only the order of sums may differ
SAME = 2e-5

CPU_HEAD_DIMS = (16, 24, 32, 64, 72, 80, 88, 104, 112, 128)
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 50, 63, 64, 65, 77, 96, 127, 128, 129, 130)
SMALL_LENGTHS = (5, 15, 16, 17, 20, 33)


def count(default: int) -> int:
    """How many random problems a grid has: `default`, or what the environment variable FASTHEADS_GRID says."""
    return int(os.environ.get("FASTHEADS_GRID", default))


# What the interpreter takes minutes for and adds little to what runs always: on a GPU, or with FASTHEADS_GRID set.
LONG = (
    pytest.mark.slow,
    pytest.mark.skipif(not GPU and "FASTHEADS_GRID" not in os.environ, reason="minutes of Triton's interpreter"),
)


def device_of(impl: str) -> str:
    """Where `impl` runs: a GPU, or on the CPU in Triton's interpreter."""
    return "cpu" if impl in ("cpu", "plain") else DEVICE


@dataclass(frozen=True)
class Case:
    """One problem without its numbers: those follow from `seed`.

    gate: None, "random", "zeros" (some heads are silenced) or "ones".
    mask: None, "bool", "additive" or "float" (additive, finite), of shape mask_shape, which broadcasts to [B, H, N, N].
    """

    B: int = 2
    N: int = 17
    H: int = 2
    dh: int = 16
    rank: int = 2
    targets: tuple[str, ...] = ("q", "v")
    shared: bool = False
    gate: str | None = "random"
    mask: str | None = None
    mask_shape: tuple[int, ...] = ()
    causal: bool = False
    bias: bool = True
    scale: float = 1.0
    pool: Any = 0
    size: float = 0.3  # of lora_B
    seed: int = 0
    left_out: int = 0  # further heads that x is as wide as
    neighbour: int = 0  # x is so many thousandths larger: as well conditioned, and rounded otherwise
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def D(self) -> int:
        return (self.H + self.left_out) * self.dh

    @property
    def E(self) -> int:
        """The width of all heads."""
        return self.H * self.dh

    def tensors(self, dtype: torch.dtype, stored: torch.dtype | None = None, device: str = "cpu") -> dict[str, Any]:
        """x in `dtype`, the base in `stored`, adapters and gates in at least float32: as a user holds them."""
        g = torch.Generator().manual_seed(self.seed)
        stored, wide = stored or dtype, torch.promote_types(dtype, torch.float32)
        B, N, H, D, E, T = self.B, self.N, self.H, self.D, self.E, len(self.targets)

        def rand(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * size).to(dtype).to(device)

        out: dict[str, Any] = dict.fromkeys(INPUTS)
        out["x"] = rand(B, N, D, size=1 + self.neighbour / 1000)
        out["w_in"] = rand(3 * E, D, size=D**-0.5, dtype=stored)
        if self.bias:
            out["b_in"] = rand(3 * E, size=0.3, dtype=stored)
        if self.rank:
            out["lora_A"] = rand(T, 1 if self.shared else H, self.rank, D, size=D**-0.5, dtype=wide)
            out["lora_B"] = rand(T, H, self.dh, self.rank, size=self.size, dtype=wide)
        if self.gate is not None:
            gate = 1 + rand(H, size=0.5, dtype=wide)
            if self.gate == "zeros":
                gate[::2] = 0
            if self.gate == "ones":
                gate[:] = 1
            out["gate"] = gate
        return out

    def gradient(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """The incoming gradient `[B, N, E]`, of size one."""
        g = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.B, self.N, self.E, generator=g, dtype=torch.float64).to(dtype).to(device)

    def options(self, device: str = "cpu") -> dict[str, Any]:
        """The keywords of `head_attention` but for gate and impl; every query sees at least itself."""
        g = torch.Generator().manual_seed(self.seed + 2)
        mask = None
        if self.mask is not None:
            drawn = torch.randn(*self.mask_shape, generator=g)
            dropped = drawn > 0.5
            if self.N > 1 and self.mask_shape[-1] > 1:
                if len(self.mask_shape) > 1 and self.mask_shape[-2] > 1:
                    dropped.diagonal(dim1=-2, dim2=-1).fill_(False)
                elif self.causal:
                    dropped[..., 0] = False
                else:
                    dropped[..., self.N // 2] = False
            else:
                dropped.fill_(False)
            mask = {
                "bool": dropped,
                "additive": drawn.masked_fill(dropped, float("-inf")),
                "float": drawn,
            }[self.mask].to(device)
        pool = self.pool
        if isinstance(pool, str) and pool == "tokens":
            pool = torch.randint(self.N, (self.B,), generator=g).to(device)
        return {
            "num_heads": self.H,
            "targets": self.targets,
            "scale": self.scale,
            "causal": self.causal,
            "mask": mask,
            "pool": pool,
            **self.extra,
        }


FULL = Case(N=18, H=2, targets=("q", "k", "v"), mask="additive", mask_shape=(2, 2, 18, 18), pool=0)


def made(case: Case, impl: str, dtype: torch.dtype = F32) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
    """Where `impl` runs: the inputs by name, the incoming gradient and the options."""
    device = device_of(impl)
    return case.tensors(dtype, device=device), case.gradient(dtype, device), case.options(device)


def random_case(
    seed: int,
    *,
    head_dims: tuple[int, ...] = CPU_HEAD_DIMS,
    lengths: tuple[int, ...] = LENGTHS,
    width: int = 384,
    most: int = 5,
) -> Case:
    """The problem number `seed`; `width` bounds E, `most` the batch and the heads."""
    r = random.Random(seed)
    dh = r.choice(head_dims)
    B, N, H = r.randint(1, min(3, most)), r.choice(lengths), r.randint(1, max(1, min(most, width // dh)))
    targets = tuple(r.sample(("q", "k", "v"), r.randint(1, 3)))
    mask = r.choice((None, None, "bool", "additive", "float"))
    full = (B, H, N, N)
    shape = tuple(n if r.random() < 0.6 else 1 for n in full)[r.choice((0, 0, 0, 1, 2, 3)) :]
    return Case(
        B=B,
        N=N,
        H=H,
        dh=dh,
        rank=r.choice((0, 1, 2, 3, 8)),
        targets=targets,
        shared=r.random() < 0.3,
        gate=r.choice((None, "random", "random", "zeros")),
        mask=mask,
        mask_shape=shape if mask else (),
        causal=r.random() < 0.4,
        bias=r.random() < 0.7,
        scale=r.choice((0.5, 1.0, 2.0)),
        pool=r.choice(
            (None, 0, -1, "tokens", "mean", slice(0, None), slice(N - 1, None)) if N > 1 else (None, 0, -1, "tokens")
        ),
        left_out=r.choice((0, 0, 0, 1, 2)),
        seed=seed,
    )


@contextlib.contextmanager
def autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to `dtype`; None: as it is."""
    with torch.autocast(device, dtype=dtype) if dtype is not None else contextlib.nullcontext():
        yield


def leaves(tensors: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies that require grad, in `dtype` where it is given."""
    return {
        n: None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()
    }


def results(run: Callable[..., Any], tensors: dict[str, Any], do: Tensor, **options: Any) -> dict[str, Tensor]:
    """Of `run(**tensors, **options)`: o, lse, cls where there are any, and every input's gradient as `dx`, `dw_in` …"""
    own = leaves(tensors)
    out = run(**own, **options)
    o, lse, cls = out if isinstance(out, tuple) else (out, None, None)
    o.backward(do.to(o.dtype))
    found = {"o": o, "lse": lse, "cls": cls} | {f"d{n}": t.grad for n, t in own.items() if t is not None}
    return {n: t.detach() for n, t in found.items() if t is not None}


def exact_results(tensors: dict[str, Any], do: Tensor, **options: Any) -> dict[str, Tensor]:
    """As `results`, of the reference in float64, from the very same numbers."""
    mask = options.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        options["mask"] = mask.double()
    doubles = {n: None if t is None else t.double() for n, t in tensors.items()}
    return results(reference.head_attention, doubles, do.double(), **options)


def plain_results(tensors: dict[str, Any], do: Tensor, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """As `results`, of plain PyTorch computing in `dtype`."""

    def plain(x: Tensor, *, gate: Tensor | None, pool: Any, **own: Any) -> Any:
        heads, lse = plain_heads(x.to(dtype), **own)
        o = heads if gate is None else heads * gate.to(dtype).view(1, -1, 1, 1)
        return o.transpose(1, 2).flatten(2), lse, None if pool is None else reference.pool_heads(heads.detach(), pool)

    return results(plain, tensors, do, **options)


def all_results(
    case: Case, impl: str, dtype: torch.dtype, stored: torch.dtype | None, cast: torch.dtype | None, **own: Any
) -> list[dict[str, Tensor]]:
    """What `impl` makes of a case ("plain": nothing), what plain PyTorch does in the same dtype, and what is right."""
    device = device_of(impl)
    tensors, do, options = (
        case.tensors(dtype, stored, device),
        case.gradient(cast or dtype, device),
        case.options(device),
    )
    got = {}
    if impl != "plain":
        with autocast(device, cast):
            got = results(head_attention, tensors, do, **options, impl=impl, **own)
    wide = torch.promote_types(dtype, torch.float32)
    for name, t in got.items():
        wanted = {"o": cast or dtype, "lse": wide, "cls": wide}.get(name) or tensors[name[1:]].dtype
        assert t.dtype == wanted, f"{name}: {t.dtype}, not {wanted}"
    exact = exact_results(tensors, do, **options)
    assert impl == "plain" or sorted(got) == sorted(exact), f"{case}: {sorted(got)} are not {sorted(exact)}"
    return [got, exact if dtype == torch.float64 else plain_results(tensors, do, cast or dtype, **options), exact]


def assert_numerics(
    case: Case,
    impl: str,
    dtype: torch.dtype,
    *,
    stored: torch.dtype | None = None,
    cast: torch.dtype | None = None,
    draws: int = 6,
    **own: Any,
) -> None:
    """`impl` on `case` against the rule: x in `dtype`, the base stored in `stored`, under autocast to `cast`.

    The rule compares errors, and the error of a handful of numbers (the gradient of three gates) says little: plain
    PyTorch may be right by luck. So where a result breaks the rule, `draws` neighbours of the problem are judged as
    one, by plain PyTorch's errors in four times as many. Other draws of its numbers would be other problems: how far a
    softmax carries a rounding depends on them.
    """
    got, plain, exact = all_results(case, impl, dtype, stored, cast, **own)
    if dtype == torch.float64:
        for name, t in got.items():
            # Of a gradient that is 0 (of q and k, of one token) the numbers that cancel are of size one.
            error = float((t - exact[name]).abs().max() / (exact[name].abs().max() or 1.0))
            assert error < 1e-10, f"{case}: {name} is off by {error:.1e}"
        return
    broken, own_rule = [], IMPLEMENTATIONS[impl]
    for name, t in got.items():
        factor = own_rule.forward_tolerance if name in ("o", "lse", "cls") else own_rule.backward_tolerance
        try:
            assert_right(t, plain[name], exact[name], factor, name)
        except AssertionError:
            broken.append((name, factor))
    if not broken:
        return
    again = [replace(case, neighbour=i) for i in range(4 * draws)]
    kinds = (impl, dtype, stored, cast)
    ours = [[got, exact], *(all_results(c, *kinds, **own)[::2] for c in again[1:draws])]
    plains = [[plain, exact], *(all_results(c, "plain", *kinds[1:])[1:] for c in again[1:])]
    for name, factor in broken:
        got_draws, exact_draws = (torch.stack([found[i][name].double() for found in ours]) for i in range(2))
        errors = torch.stack([found[0][name].double() - found[1][name] for found in plains])
        assert_within(got_draws, errors, exact_draws, factor, f"{impl} {dtype} {case}: {name}")


def poison(monkeypatch: Any) -> None:
    """Memory that is allocated and not filled starts as NaN: what a kernel leaves unwritten, or reads before, shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """max |actual - expected| is within `tolerance` times max |expected|."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.numel():
        error = float((actual.detach().double() - expected.detach().double()).abs().max())
        assert error <= tolerance * float(expected.double().abs().max()), f"{what}: off by {error:.2e}"
