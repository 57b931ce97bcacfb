"""Recipe: the numbers of a training run, and whether a method can be trained by them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastheads.config import HeadConfig
from fastheads.reference import PRESETS
from fastheads.train.methods import Method


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run. Weights of 0 switch a loss off.

    lr: of LoRA and a linear head, or of the encoder under full fine-tuning. fixed_head: the head stays as fitted.
    gate_lr: of the gates, which have no weight decay. targets, rank, gate, shared: of `Method.config`.
    mmd_to: what the MMD's gradient reaches: "gates", "lora" or "both"; mmd_layers: how much each layer's MMD counts.
    sequential: deltas alone in the first half of the steps, then gates alone. wise_ft: adapters are scored averaged
    with the original too, half and half, as full fine-tuning always is; numbers: and at these parts of the tuned
    weights. target_curve: the target is scored at every evaluation too, for a curve; it enters no choice.
    per_domain: images of each source domain in a step, over all processes; on each they come in `accumulate` parts, one
    after the other, which changes no gradient. fsdp: of several processes each holds a share of the image tower.
    recompute: of `patch`; 0: no layer. checkpointing: whole blocks are computed again in the backward pass. compile: by
    `torch.compile`. tf32: of a GPU's float32 products.
    ema: the decay of an exponential moving average of what is trained, which is evaluated and kept instead; 0: none.
    """

    steps: int = 20_000
    per_domain: int = 12
    accumulate: int = 1
    lr: float = 2e-4
    gate_lr: float = 2e-3
    weight_decay: float = 0.1
    mmd_weight: float = 0.0
    context_weight: float = 0.0
    mmd_kernel: str = "adaptive"
    mmd_features: str = "heads"
    mmd_to: str = "gates"
    mmd_layers: tuple[float, ...] | None = None
    targets: tuple[str, ...] | None = None
    rank: tuple[int, ...] | None = None
    gate: str | None = None
    shared: bool = False
    sequential: bool = False
    evaluate_every: int = 500
    save_every: int = 500
    batch_size: int = 256
    workers: int = 0
    cache: bool = False
    recompute: int | str = 0
    checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    tf32: bool = False
    ema: float = 0.0
    fixed_head: bool = False
    wise_ft: bool | tuple[float, ...] = False
    target_curve: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.targets is not None:
            object.__setattr__(self, "targets", HeadConfig(targets=self.targets).targets)  # checked, and in full
        for name in ("rank", "mmd_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rank is not None and 0 in HeadConfig(rank=self.rank).rank:  # type: ignore[operator]
            raise ValueError(f"rank: got {self.rank!r}; takes integers ≥ 1")
        for name, takes in (("gate", ("softmax", "sigmoid", None)), ("mmd_to", ("gates", "lora", "both"))):
            if getattr(self, name) not in takes:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; takes {', '.join(map(repr, takes))}")
        for name in ("steps", "per_domain", "accumulate", "evaluate_every", "save_every", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; takes an integer ≥ 1")
        for name in ("lr", "gate_lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; takes a finite number > 0")
        for name in ("weight_decay", "mmd_weight", "context_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; takes a finite number ≥ 0")
        if not isinstance(self.wise_ft, bool):
            object.__setattr__(self, "wise_ft", tuple(self.wise_ft))
            if not self.wise_ft or not all(0 <= alpha <= 1 for alpha in self.wise_ft):
                raise ValueError(f"wise_ft: got {self.wise_ft!r}; takes numbers from 0 to 1, True or False")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: got {self.ema!r}; takes a number from 0 on and below 1")

    @property
    def adapter(self) -> dict[str, Any]:
        """The arguments of `Method.config`."""
        return {name: getattr(self, name) for name in ("targets", "rank", "gate", "shared")}


def check_run(method: Method, recipe: Recipe, precision: str = "no", processes: int = 1) -> None:
    """That `fit` can run a recipe: each of the processes has an image of each domain for every part of a step, and the
    MMD, if there is one, a gradient in this precision, and enough images.

    Raises ValueError.
    """
    if method.trains not in ("adapter", "encoder"):
        return
    if recipe.sequential and not (method.lora and method.gate):
        raise ValueError(f"sequential: got True, but {method.id} has not both deltas and gates; takes False")
    least = processes * recipe.accumulate
    if recipe.per_domain < least and least > 1:
        raise ValueError(
            f"per_domain: got {recipe.per_domain}; takes {least} or more with {processes} process"
            f"{'es' * (processes > 1)} and accumulate {recipe.accumulate}: an image of each domain for every part"
        )
    if not (method.mmd and recipe.mmd_weight):
        return
    if recipe.mmd_to != "gates" and (recipe.mmd_features != "embedding" or not method.lora):
        raise ValueError(
            f"mmd_to: got {recipe.mmd_to!r}, but {method.id}'s MMD of mmd_features={recipe.mmd_features!r} reaches "
            'gates alone; takes "gates", or mmd_features="embedding" and a method with deltas'
        )
    if recipe.mmd_layers is not None and recipe.mmd_features != "heads":
        raise ValueError(
            f'mmd_layers: got {recipe.mmd_layers} with mmd_features="{recipe.mmd_features}", which has no layers; '
            "takes None there"
        )
    if recipe.mmd_layers is not None and not (min(recipe.mmd_layers, default=-1) >= 0 < sum(recipe.mmd_layers)):
        raise ValueError(f"mmd_layers: got {recipe.mmd_layers}; takes numbers ≥ 0, not all 0")
    if precision == "fp16" and recipe.mmd_features == "embedding":
        raise ValueError(
            'precision: "fp16" scales the loss, but not the inner gradient of mmd_features="embedding", which would '
            'underflow; takes "bf16" or "no" there, or mmd_features="heads"'
        )
    preset = PRESETS.get(recipe.mmd_kernel)
    if recipe.per_domain < 2 and preset is not None and preset.estimator == "unbiased":
        others = " or ".join(f'"{kernel}"' for kernel, other in PRESETS.items() if other.estimator == "biased")
        raise ValueError(
            f'per_domain: got {recipe.per_domain}, but {method.id}\'s MMD with mmd_kernel="{recipe.mmd_kernel}" is of '
            f"two images of a domain or more; takes 2 or more there, or mmd_kernel={others}"
        )
