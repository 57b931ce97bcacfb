"""Choice: which implementation computes a layer or an MMD, and why the others do not."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastheads.kernels.tiles import LONGEST_ON_CHIP, one_pass_fits
from fastheads.reference import compute_dtype, transformed

IMPL_VARIABLE = "FASTHEADS_IMPL"
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton was told to interpret its kernels on the CPU, as the tests do without a GPU.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """What one layer asks of an implementation.

    device: "cpu", "cuda" …; index: which of them, None for the current one. dtype: what it computes in (autocast's,
    where that is on); stored: the base weight's.
    length: tokens, None where it is not known before the call. dropout: of the low-rank path's input.
    `extras` names what the fused operator does not cover ("attention dropout" …): the reference path does.
    `between` names what a host does between projection and attention, or to the scores ("ln_q", "rotary positions" …).
    """

    device: str
    dtype: torch.dtype
    stored: torch.dtype
    num_heads: int
    head_dim: int
    rank: int = 0
    length: int | None = None
    dropout: bool = False
    extras: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    index: int | None = None


def problem_of(
    x: Tensor,
    w_in: Tensor,
    lora_B: Tensor | None,
    num_heads: int,
    *,
    dropout: bool,
    mask: Tensor | None,
    extras: tuple[str, ...] = (),
    between: tuple[str, ...] = (),
) -> Problem:
    """What a call asks of an implementation."""
    if mask is not None and mask.requires_grad:
        extras += ("a mask that requires grad",)
    return Problem(
        device=x.device.type,
        index=x.device.index,
        dtype=compute_dtype(x),
        stored=w_in.dtype,
        num_heads=num_heads,
        head_dim=w_in.shape[0] // 3 // num_heads,
        rank=0 if lora_B is None else lora_B.shape[3],
        length=x.shape[1],
        dropout=dropout,
        extras=extras + surroundings(),
        between=between,
    )


@dataclass(frozen=True)
class Implementation:
    """What one implementation supports, and how far from float64 it may be.

    forward_tolerance, backward_tolerance: its error against float64 is at most this many times plain PyTorch's own in
    the same dtype (the tests hold every implementation to its own numbers).
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, int]
    max_rank: int
    max_length: int | None = None
    on_chip: int | None = None  # bytes that a head's keys and values may take
    dropout: bool = True
    halves: bool = True  # whether something can come between projection and attention
    kernels: bool = False
    forward_tolerance: float = 2.0
    backward_tolerance: float = 3.0

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Why this implementation cannot compute `problem`; empty where it can."""
        reasons = [f"does not cover {extra}" for extra in problem.extras]
        devices = (*self.devices, "cpu") if self.kernels and INTERPRETING else self.devices
        if problem.device not in devices:
            reasons.append(f"runs on {' and '.join(self.devices)}, not on {problem.device}")
        elif self.kernels:
            reasons += triton_reasons(problem.device, problem.index)
        if problem.dtype not in self.dtypes:
            reasons.append(f"does not compute in {_short(problem.dtype)}")
        low, high = self.head_dims
        if not low <= problem.head_dim <= high:
            reasons.append(f"takes head sizes {low} to {high}, not {problem.head_dim}")
        elif self.kernels and problem.head_dim % 8:
            reasons.append(f"takes head sizes that are multiples of 8, not {problem.head_dim}")
        if problem.rank > self.max_rank:
            reasons.append(f"takes ranks up to {self.max_rank}, not {problem.rank}")
        if self.max_length is not None and problem.length is not None and problem.length > self.max_length:
            reasons.append(f"takes up to {self.max_length} tokens, not {problem.length}")
        if self.on_chip is not None and problem.length is not None:
            room = min(self.on_chip, _room(problem.device, problem.index))
            if not one_pass_fits(problem.length, problem.head_dim, problem.dtype, room):
                reasons.append(f"keeps keys and values on chip, where {problem.length} tokens do not fit")
        if problem.dropout and not self.dropout:
            reasons.append("has no LoRA dropout")
        if problem.between and not self.halves:
            reasons.append(f"projects and attends in one kernel, with nothing between: {', '.join(problem.between)}")
        return reasons


_GPU = (torch.float32, torch.float16, torch.bfloat16)
_CPU = (torch.float64, *_GPU)

# In the order in which "auto" asks them; the reference can compute everything.
IMPLEMENTATIONS: dict[str, Implementation] = {
    found.name: found
    for found in (
        Implementation("stacked", ("cuda",), _GPU, (16, 128), max_rank=64, dropout=False, kernels=True),
        Implementation("delta", ("cuda",), _GPU, (16, 128), max_rank=64, kernels=True),
        Implementation(
            "one_pass",
            ("cuda",),
            _GPU,
            (16, 128),
            max_rank=32,
            max_length=LONGEST_ON_CHIP,
            on_chip=96 * 1024,
            dropout=False,
            halves=False,
            kernels=True,
        ),
        Implementation("cpu", ("cpu",), _CPU, (1, 2**31), max_rank=2**31),
    )
}
NAMES = (*IMPLEMENTATIONS, "reference")


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for a layer, and for each other but the reference the reasons why not."""

    name: str
    refused: dict[str, list[str]]

    @property
    def falls_back(self) -> bool:
        """True where the plain reference computes the layer."""
        return self.name == "reference"


def not_supported_reasons(name: str, problem: Problem) -> list[str]:
    """Why implementation `name` cannot compute `problem`; empty where it can."""
    return [] if name == "reference" else IMPLEMENTATIONS[name].not_supported_reasons(problem)


def _not_chosen_reasons(name: str, problem: Problem) -> list[str]:
    """Why "auto" passes over an implementation that could compute `problem`."""
    if problem.device not in IMPLEMENTATIONS[name].devices:
        return ["runs here in Triton's interpreter only, which is for tests"]
    if name == "stacked" and problem.rank and problem.stored in SIXTEEN_BITS:
        return [f"would round small deltas away in weights stored in {_short(problem.stored)}"]
    if name == "one_pass":
        return ["slower by the cost model, ask for it by name where memory runs out"]
    return []


def check_impl(impl: str, argument: str = "impl", names: tuple[str, ...] = NAMES) -> None:
    """Raises ValueError for a name that is no implementation of the operator."""
    if impl != "auto" and impl not in names:
        raise ValueError(f"{argument}: got {impl!r}; takes {', '.join(map(repr, ('auto', *names)))}")


def asked_for(impl: str) -> str:
    """`impl`, or what the environment variable FASTHEADS_IMPL names where it is "auto"."""
    check_impl(impl)
    if impl == "auto":
        impl = os.environ.get(IMPL_VARIABLE, "auto")
        check_impl(impl, IMPL_VARIABLE)
    return impl


def choose(impl: str, problem: Problem) -> Choice:
    """The implementation for `problem`.

    "auto": the first that supports it, the reference where none does. A name: that one, or the reference where the
    layer has something that only the reference covers (`problem.extras`); ValueError where it cannot for another
    reason, since a path asked for is not given up in silence.
    """
    impl = asked_for(impl)
    # torch.compile traces the choice, and guards on what it depends on; in eager mode a table has it.
    return _choose(impl, problem) if torch.compiler.is_compiling() else _remembered(impl, problem)


def _choose(impl: str, problem: Problem) -> Choice:
    refused = {name: not_supported_reasons(name, problem) for name in NAMES}
    if impl == "auto":
        for name in IMPLEMENTATIONS:
            refused[name] = refused[name] or _not_chosen_reasons(name, problem)
        name = next(name for name in NAMES if not refused[name])
    elif problem.extras:
        name = "reference"
    elif refused[impl]:
        raise ValueError(f"impl: {impl!r} cannot compute this layer: it {'; it '.join(refused[impl])}; takes 'auto'")
    else:
        name = impl
    return Choice(name, {k: v for k, v in refused.items() if k not in (name, "reference")})


_remembered = functools.lru_cache(maxsize=1024)(_choose)


# ------------------------------------------------------------------------------------------------------------ MMD

MMD_NAMES = ("triton", "cpu", "reference")
SMALL = 128  # samples, up to which one Triton launch does everything
SMALL_PRESETS = ("adaptive", "dan")  # whose bandwidths it takes from the features itself
MAX_DOMAINS = 64  # of the Triton kernels, and above which `mmd` numbers only the domains that occur


def choose_mmd(impl: str, x: Tensor, num_domains: int) -> str:
    """The implementation for samples like x: `impl`, or with "auto" the one sweep where x's device has it.

    Inside torch.func's transforms "auto" is the reference: the operators have no rules for them.
    """
    if transformed():
        if impl in ("cpu", "triton"):
            raise ValueError(f"impl: {impl!r} has no rule for torch.func's transforms; takes 'auto' or 'reference'")
        return "reference"
    reasons = _triton_mmd_reasons(x, num_domains)
    if impl == "auto":
        if x.device.type == "cpu":
            return "cpu"
        return "reference" if reasons else "triton"
    if impl == "cpu" and x.device.type != "cpu":
        raise ValueError(f"impl: 'cpu' runs on cpu, and the features are on {x.device}; takes 'auto'")
    if impl == "triton" and reasons:
        raise ValueError(f"impl: 'triton' cannot compute this: it {'; it '.join(reasons)}; takes 'auto'")
    return impl


def _triton_mmd_reasons(x: Tensor, num_domains: int) -> list[str]:
    """Why Triton's kernels cannot; empty where they can."""
    if x.device.type != "cuda" and not (INTERPRETING and x.device.type == "cpu"):
        reasons = [f"runs on cuda, not on {x.device.type}"]
    else:
        reasons = triton_reasons(x.device.type, x.device.index)
    if x.dtype == torch.float64:
        reasons.append("does not compute in float64")
    if num_domains > MAX_DOMAINS:
        reasons.append(f"takes up to {MAX_DOMAINS} domains, not {num_domains}")
    return reasons


# ------------------------------------------------------------------------------------------- where it would run


def looked_at(values: Tensor) -> bool:
    """Whether values are checked: on a GPU that would wait for it, in a compiled graph or a transform are none yet."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def surroundings() -> tuple[str, ...]:
    """What a problem's `extras` are told of where it runs: torch.func's transforms see only plain operations."""
    return ("a transform of torch.func",) if transformed() else ()


def triton_reasons(device: str, index: int | None) -> list[str]:
    """Why Triton cannot run on this device, the problem's own, which need not be the current one."""
    if not HAS_TRITON:
        return ["needs Triton, which is not installed"]
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(index) < (8, 0):
        return ["needs compute capability 8.0 (A100) or newer"]
    return []


def _room(device: str, index: int | None) -> int:
    """Bytes of a block's shared memory for what stays on chip; 64 KB are for what goes by. An A100 has 163 KB."""
    if device == "cuda" and torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(index)
        return int(properties.shared_memory_per_block_optin) - 64 * 1024
    return 99 * 1024


# What torch.compiler.assume_constant_result does, which imports torch._dynamo and with it Triton: 5 s at import.
triton_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]
_room._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
