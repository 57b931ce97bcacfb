"""plan: what a training step holds in memory, and the largest batch that fits, before anything runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastheads.capture import capture_heads
from fastheads.config import HeadConfig
from fastheads.hosts.vision import checkpoint_blocks, context_length, head_of, image_size, image_tower, text_encoder
from fastheads.ledger import Ledger, count, fake_copy, nbytes
from fastheads.losses import head_mmd
from fastheads.model import gate_parameters, lora_parameters
from fastheads.patching import patch
from fastheads.train.methods import METHODS, ImageEncoder, Objective, check_text, class_logits

GIB = 2**30
# Bytes of which PyTorch says on such a card that they are its total capacity.
GPUS = {"A100-40": int(39.4 * GIB), "A100-80": int(79.1 * GIB), "H100": int(79.1 * GIB)}
CONTEXT = GIB  # an assumption: of CUDA's context, its libraries and their workspaces
TRAINED = {name: method for name, method in METHODS.items() if method.trains in ("adapter", "encoder")}
PRECISIONS = ("fp32", "bf16", "amp-bf16")
DOMAINS, CONTEXTS, LOGIT_SCALE = 3, 80, 100.0  # of the counted step

NOT_MEASURED = (
    "counted from shapes, and not yet held against a GPU's allocator, whose rounding and gaps come on top; "
    f"{CONTEXT / 1e9:.1f} GB for CUDA's context and libraries are an assumption"
)


@dataclass(frozen=True)
class Plan:
    """What a training step holds, in bytes, and what fits. Printing it shows a table.

    Attributes:
        text: what images are told apart by: so many classes, or captions.
        impl: what computes the patched layers; "" where none is.
        room: of the GPU, less what CUDA takes; None on a CPU.
        model_bytes: before the step begins, by what it is: weights of both towers, adapters, AdamW's two states.
        saved_bytes: alive between forward and backward, by the part of the model that made it, images among them.
        peak_bytes: likewise when it is most, without `model_bytes`; "backward" are temporaries and gradients so far.
        gradient_bytes: all of them.
        largest: the largest batch that fits: "plain", "recompute" (as asked for, or of all layers), "checkpointing";
            None on a CPU.
    """

    model: str
    batch: int
    gpu: str
    method: str
    text: str
    precision: str
    impl: str
    recompute: int | str
    checkpointing: bool
    room: int | None
    model_bytes: dict[str, int]
    gradient_bytes: int
    saved_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    largest: dict[str, int] | None

    @property
    def total(self) -> int:
        """Bytes of the whole step at its peak, without CUDA's own."""
        return sum(self.model_bytes.values()) + sum(self.peak_bytes.values())

    @property
    def fits(self) -> bool | None:
        """Whether that has room; None on a CPU."""
        return None if self.room is None else self.total <= self.room

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        note = {} if self.room is None else {"note": NOT_MEASURED}
        return {**asdict(self), "total": self.total, "fits": self.fits, **note}

    def __str__(self) -> str:
        kind = int(self.recompute) if isinstance(self.recompute, bool) else self.recompute
        again = f"recompute {kind}".removesuffix(" 1") if kind else ""
        parts = (self.method, self.text, self.precision, self.impl, again, "checkpointing" * self.checkpointing)
        how = ", ".join(filter(None, parts))
        lines = [f"{self.model}, batch {self.batch:,}: {how}", f"{'':<32}{'MB':>10}{'per image':>11}"]
        lines += [_line(name, size) for name, size in self.model_bytes.items()]
        lines += [_line(name, size, self.batch) for name, size in self.peak_bytes.items()]
        lines.append(_line("at the peak", self.total))
        lines.append(_line("saved for backward", sum(self.saved_bytes.values()), self.batch))
        lines.append(_line("gradients, once all are made", self.gradient_bytes))
        if self.room is not None and self.largest is not None:
            word = "fits" if self.fits else "does not fit"
            lines.append(
                f"{self.gpu}: {word} into {self.room / 1e6:,.0f} MB; largest batch "
                + _words(self.largest, again or "recompute")
            )
            lines.append(f"({NOT_MEASURED})")
        return "\n".join(lines)


def _line(name: str, size: int, batch: int = 0) -> str:
    return f"  {name:<30}{size / 1e6:>10,.1f}" + (f"{size / batch / 1e6:>11,.2f}" if batch else "")


def _words(largest: dict[str, int], again: str) -> str:
    if not any(largest.values()):
        return "none: one image is too many"
    words = {"plain": "", "recompute": f"with {again} ", "checkpointing": "with checkpointing "}
    return ", ".join(f"{words[how]}{batch:,}" for how, batch in largest.items())


def plan(
    model: str | nn.Module,
    *,
    batch: int,
    gpu: str = "A100-80",
    method: str = "hap",
    config: HeadConfig | None = None,
    rank: int | Sequence[int] | None = None,
    targets: Sequence[str] | None = None,
    precision: str = "amp-bf16",
    recompute: bool | int | str = False,
    checkpointing: bool = False,
    impl: str = "auto",
    classes: int = 345,
    captions: bool = False,
) -> Plan:
    """What a training step of `fastheads train` holds in memory, and the largest batch that fits.

    Counted on tensors without values (`fastheads.ledger`): no GPU, no weights, a minute at most. Peaks on a CPU are
    within 10 % of the allocator's (`tests/bench/test_plan.py`); a GPU's were not measured yet.

    Args:
        model: a name as `fastheads train` takes it (`"ViT-B-16"`, `"timm:deit_tiny_patch16_224"`), or the model, not
            patched; it is left alone.
        batch: images in a step.
        gpu: `"A100-40"`, `"A100-80"` or `"H100"`.
        method: `"fine-tune"`, `"car-ft"`, `"lora"`, `"ha-lora"`, `"dig"` or `"hap"`.
        config: of the adapters; None: the method's.
        rank: another rank in it, or one per layer.
        targets: others in it.
        precision: `"fp32"`; `"bf16"`: the model stored in it (adapters stay float32); `"amp-bf16"`: autocast.
        recompute: of `patch`.
        checkpointing: whole blocks are computed again (OpenCLIP's `set_grad_checkpointing`). `largest` has the answers
            with and without.
        impl: of `patch`; `"cpu"` counts a step on a CPU, where there is no `largest`.
        classes: C of the classifier `[C, E]`, text or linear head (a model that is given has its own); 345 are
            DomainNet's.
        captions: each image has a caption of its own instead, which the text tower encodes in the step, and the loss is
            CLIP's, over the batch.

    Raises ValueError or TypeError naming the argument, and what `patch` raises.
    """
    for name, value in (("batch", batch), ("classes", classes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}; takes an integer ≥ 1")
    for name, given, takes in (("gpu", gpu, GPUS), ("method", method, TRAINED), ("precision", precision, PRECISIONS)):
        if given not in takes:
            raise ValueError(f"{name}: got {given!r}; takes {', '.join(takes)}")
    from fastheads.train.models import build  # with what loads weights and images, which few imports need

    recompute = 0 if recompute == "none" else recompute
    name, model = (model, build(model, classes)) if isinstance(model, str) else (type(model).__name__, model)
    options: Any = {"method": method, "config": config, "rank": rank, "targets": targets, "precision": precision}
    options |= {"impl": impl, "classes": classes, "captions": captions}
    step = Step(model, recompute=recompute, checkpointing=checkpointing, **options)
    room = largest = None
    if step.device != "cpu":
        room = GPUS[gpu] - CONTEXT
        ways = {"plain": (0, False), "recompute": (recompute or 1, False), "checkpointing": (recompute, True)}
        if not step.impl:
            del ways["recompute"]
        largest = {}
        for way, (k, blocks) in ways.items():
            asked = (k, blocks) == (recompute, checkpointing)
            other = step if asked else Step(model, recompute=k, checkpointing=blocks, **options)
            try:
                largest[way] = other.largest(room, batch)
            except TypeError:  # OpenCLIP 3.3's blocks around its own Attention can't be checkpointed
                if asked or not blocks:
                    raise
    ledger = step.ledger(batch)
    return Plan(
        name,
        batch,
        "" if room is None else gpu,
        method,
        "captions" if captions else f"{classes:,} classes",
        precision,
        step.impl,
        recompute,
        checkpointing,
        room,
        step.model_bytes,
        step.gradient_bytes,
        ledger.saved,
        ledger.peak,
        largest,
    )


def largest_batch(total: Callable[[int], int], room: int, start: int) -> int:
    """The largest batch whose `total` is at most `room` bytes; 0 where none is.

    Two counts give a line, which holds but for the pairs of a contrastive loss and what only small batches do
    otherwise: the answer is counted too, and the line drawn anew through it until it stays.
    """
    before, batch = start, 2 * start
    for _ in range(16):
        slope = (total(batch) - total(before)) / (batch - before)
        found = math.floor(batch + (room - total(batch)) / slope)
        if found == batch or found < 1:
            return max(0, found)
        before, batch = batch, found
    return batch


class Step:
    """A training step of a fake copy of `model`, to be counted at any batch. Arguments: those of `plan`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str = "hap",
        config: HeadConfig | None = None,
        rank: int | Sequence[int] | None = None,
        targets: Sequence[str] | None = None,
        precision: str = "amp-bf16",
        recompute: bool | int | str = False,
        checkpointing: bool = False,
        impl: str = "auto",
        classes: int = 345,
        captions: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}; takes OpenCLIP's name of a model, or the model")
        if head_of(model) is None and text_encoder(model) is None:
            raise TypeError(
                f"model: {type(model).__name__} has no text tower; takes an OpenCLIP model, Hugging Face's CLIP or "
                "SigLIP, or a vision model with a linear head"
            )
        check_text(model, TRAINED[method])
        if head_of(model) is not None and captions:
            raise ValueError(f"captions: need a text tower, and {type(model).__name__} has none; takes False")
        self.method, self.captions = TRAINED[method], captions
        adapter = self.method.trains == "adapter"
        lora = self.method.lora or config is not None
        adapted = {"config": adapter, "rank": lora, "targets": lora, "recompute": adapter}
        changed: Any = {name: x for name, x in (("rank", rank), ("targets", targets)) if x is not None}
        for name, given in (("config", config), *changed.items(), ("recompute", recompute or None)):
            if given is not None and not adapted[name]:
                raise ValueError(f"{name}: got {given!r}, and {method} has none; takes None there")
        self.device = "cpu" if impl == "cpu" else "cuda"
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.autocast = torch.bfloat16 if precision == "amp-bf16" else None
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = cast(Any, fake_copy(model, self.mode, self.device, self.dtype).train())
        checkpoint_blocks(self.model, checkpointing)
        self.impl, teacher, adapters = "", None, list[nn.Parameter]()
        with self.mode:
            if adapter:
                config = config or self.method.config_for(model)
                config = config and replace(config, **changed)
                report = patch(self.model, config, impl=impl, recompute=recompute)
                self.impl = " and ".join(dict.fromkeys(layer.choice.name for layer in report.layers))
                adapters = lora_parameters(self.model) + gate_parameters(self.model)
            else:
                if self.method.context:
                    teacher = fake_copy(image_tower(model), self.mode, self.device, self.dtype)
                self.model.requires_grad_(False)
                image_tower(self.model).requires_grad_(True)
            with torch.no_grad():
                width = ImageEncoder(self.model)(self._images(1))[0].shape[-1]
            own, self.classes = head_of(self.model), classes
            if own is not None:
                self.classes = own.requires_grad_(True).out_features
            self.objective = Objective(
                torch.empty(classes, width, device=self.device) if own is None else None,
                LOGIT_SCALE,
                DOMAINS,
                contexts=torch.empty(CONTEXTS, width, device=self.device) if self.method.context else None,
                mmd_weight=0.1 * self.method.mmd,
                context_weight=1.0 * self.method.context,
                teacher=teacher,
            )
        tensors = [*self.model.parameters(), *self.model.buffers()]
        texts = [t for t in (self.objective.classifier, self.objective.contexts) if t is not None]
        copied = [*teacher.parameters(), *teacher.buffers()] if teacher else []
        self._beside, self.gradient_bytes = [*texts, *copied], nbytes(p for p in tensors if p.requires_grad)
        sizes = {
            "weights": nbytes(tensors) - nbytes(adapters),
            "teacher": nbytes(copied),
            "class weights": nbytes(texts),
        }
        sizes |= {"adapters": nbytes(adapters), "AdamW's states": 2 * self.gradient_bytes}
        self.model_bytes = {name: size for name, size in sizes.items() if size}

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def ledger(self, batch: int) -> Ledger:
        """What a step of `batch` images holds."""
        found = count(
            self.model,
            lambda: self._inputs(batch),
            self._loss,
            mode=self.mode,
            device=self.device,
            autocast=self.autocast,
            there=self._beside,
        )
        # AdamW's step: the gradients, and once more as much (torch.optim's foreach: "~ sizeof(params) more").
        after = {"images": found.saved["images"], "AdamW's step": 2 * self.gradient_bytes}
        return found if sum(found.peak.values()) >= sum(after.values()) else Ledger(found.saved, after)

    def total(self, batch: int) -> int:
        """Bytes of the whole step at its peak, the model's among them."""
        return sum(self.model_bytes.values()) + sum(self.ledger(batch).peak.values())

    def largest(self, room: int, start: int = 256) -> int:
        """The largest batch whose step takes at most `room` bytes; 0 where none does."""
        return largest_batch(self.total, room, start)

    def _images(self, batch: int) -> Tensor:
        return torch.empty(batch, 3, *image_size(self.model), device=self.device, dtype=self.dtype)

    def _inputs(self, batch: int) -> tuple[Tensor, ...]:
        with self.mode:
            images = self._images(batch)
            texts = torch.empty(batch, context_length(self.model), device=self.device, dtype=torch.int64)
        ids = torch.arange(batch, device=self.device)  # on a CPU, where they are looked at, they have values
        return images, ids % self.classes, ids % DOMAINS, texts

    def _loss(self, images: Tensor, labels: Tensor, domains: Tensor, texts: Tensor) -> Tensor:
        encoder = ImageEncoder(self.model)
        if not self.captions:
            return self.objective(encoder, self.model, images, labels, domains)["loss"]
        with capture_heads(self.model) if self.method.mmd else nullcontext() as heads:
            features, _ = encoder(images)
        captions = F.normalize(cast(Any, text_encoder(self.model))(texts).float(), dim=-1)
        logits, own = class_logits(features, captions, LOGIT_SCALE), torch.arange(len(images), device=images.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return loss if heads is None else loss + 0.1 * head_mmd(heads, domains, num_domains=DOMAINS)
