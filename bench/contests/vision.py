"""An image tower, or one attention module of it, as a case; and the trials of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.contests.contenders.attentions import EXACT, PLAIN, Attention
from bench.contests.contenders.ways import Way, modules, trained
from bench.contests.contest import Contender, Group, Trial
from bench.contests.models import SETTINGS, Setting, blocks_of

# How a model is run: its weights' dtype, and whether under autocast to bfloat16.
PRECISIONS = {
    "amp": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "fp32": (torch.float32, False),
}
PRECISION_WORDS = {"amp": "bf16 autocast", "bf16": "bf16 weights", "fp32": "float32"}
KINDS = ("block", "model step", "inference")


@dataclass(frozen=True)
class VisionCase:
    """kind: "block" (one layer's attention module, forward and backward), "model step" or "inference" (the tower).

    setting: a key of SETTINGS. ranks: of the layers that are run. tokens: of a block; 0: the setting's.
    closed: heads per layer whose gate is 0, where there are gates.
    """

    kind: str
    setting: str
    batch: int
    device: str
    precision: str
    ranks: tuple[int, ...]
    tokens: int = 0
    closed: int = 0
    draw: int = 0
    exact: bool = False

    @property
    def of(self) -> Setting:
        return SETTINGS[self.setting]

    @property
    def length(self) -> int:
        return self.tokens or self.of.tokens

    @property
    def name(self) -> str:
        parts = [self.of.name, f"batch {self.batch}"]
        parts += [f"{self.tokens} tokens"] if self.tokens else []
        parts += [f"rank {self.ranks[0]}"] if self.kind == "block" else []
        return ", ".join([*parts, self.precision_words])

    @property
    def precision_words(self) -> str:
        return PRECISION_WORDS[self.precision]

    def small(self, draw: int) -> VisionCase:
        """Two images, and of a tower its last three layers: both published ranks are among them."""
        return replace(self, batch=2, ranks=self.ranks[-3:], draw=draw)

    def extra(self) -> dict[str, Any]:
        found = {"setting": self.setting, "batch": self.batch, "tokens": self.length, "precision": self.precision}
        return found | {"ranks": list(self.ranks)}

    def model(self) -> Any:
        """A stock model of its own; in float64 where `exact`, of the weights as the precision rounds them."""
        if self.device == "cpu":
            model = copy.deepcopy(_stock(self.setting, len(self.ranks), self.stored))
        else:  # made in no time, and a copy would lie in the way of the largest batch
            model = self.of.model(len(self.ranks), self.device, self.stored)
        return model.double() if self.exact else model

    @property
    def stored(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    def computing(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=PRECISIONS[self.precision][1] and not self.exact)

    def tensor(self, *shape: int, stream: int, dtype: torch.dtype) -> Tensor:
        """Random numbers of size one as `dtype` rounds them, the same on every device."""
        g = torch.Generator().manual_seed(100 + 10 * self.draw + stream)
        found = torch.randn(*shape, generator=g).to(self.device, dtype)
        return found.double() if self.exact else found


@functools.lru_cache(maxsize=3)
def _stock(setting: str, layers: int, dtype: torch.dtype) -> Any:
    return SETTINGS[setting].model(layers, "cpu", dtype)


# ---------------------------------------------------------------------------------------------------------- trials


def trial(case: VisionCase, way: Way) -> Trial:
    model = way.of(case.model(), case.ranks)
    if case.closed:
        _close_heads(case, way, model)
    kinds = {"block": block_trial, "model step": step_trial, "inference": inference_trial}
    return kinds[case.kind](case, way, model)


def _close_heads(case: VisionCase, way: Way, model: Any) -> None:
    with torch.no_grad():
        for block in blocks_of(model):
            theta = trained(way, block).get("theta")
            if theta is not None:
                theta[: case.closed] = -torch.inf


def block_trial(case: VisionCase, way: Way, model: Any) -> Trial:
    """The attention module from LayerNorm to residual, with gradients to its input and what it trains."""
    block = blocks_of(model)[0]
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16  # of activations
    shape = (case.batch, case.length, case.of.width)
    x = case.tensor(*shape, stream=0, dtype=dtype).requires_grad_()
    dy = case.tensor(*shape, stream=1, dtype=dtype)
    names = trained(way, block)
    own = [p for part in (block.ln_1, block.attn) for p in part.parameters() if p.requires_grad]

    def forward() -> Tensor:
        with case.computing():
            return x + block.ls_1(block.attention(block.ln_1(x)))

    def run() -> Any:
        return torch.autograd.grad(forward(), [x, *own], dy, allow_unused=True)

    def outputs() -> dict[str, Tensor]:
        y = forward()
        grads = torch.autograd.grad(y, [x, *names.values()], dy)
        return {"y": y.detach()} | {f"d{n}": g for n, g in zip(("x", *names), grads, strict=True)}

    def known() -> Iterator[Tensor]:
        yield from (x, dy, *block.parameters(), *block.buffers())

    return Trial(run, outputs, forward, known, case.batch)


def step_trial(case: VisionCase, way: Way, model: Any) -> Trial:
    """A training step of the tower without the optimiser: gradients to what is trained and to the first block's input.

    So that the frozen tower has the same backward pass. Full fine-tuning goes on to the images' weights.
    """
    images = case.tensor(case.batch, 3, case.of.image, case.of.image, stream=0, dtype=case.stored)
    own = [p for p in model.visual.parameters() if p.requires_grad]
    layers = [trained(way, block) for block in blocks_of(model)]
    names = {n: [layer[n] for layer in layers] for n in layers[0]}
    entered: list[Tensor] = []

    def enter(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entered[:] = [args[0] if args[0].requires_grad else args[0].detach().requires_grad_()]
        return (entered[0], *args[1:])

    model.visual.transformer.register_forward_pre_hook(enter)

    def forward() -> Tensor:
        with case.computing():
            return model.visual(images)

    dy = case.tensor(*forward().shape, stream=1, dtype=torch.float32)

    def run() -> Any:
        features = forward()
        return torch.autograd.grad(features, [*entered, *own], dy.to(features.dtype), allow_unused=True)

    def outputs() -> dict[str, Tensor]:
        features = forward()
        wanted = [*entered, *(p for each in names.values() for p in each)]
        dx, *grads = torch.autograd.grad(features, wanted, dy.to(features.dtype))
        found = {"features": features.detach(), "dx": dx}
        for i, name in enumerate(names):
            of_layers = grads[i * len(layers) : (i + 1) * len(layers)]
            found[f"d{name}"] = torch.cat([g.flatten() for g in of_layers])
        return found

    def known() -> Iterator[Tensor]:
        yield from (images, dy, *model.parameters(), *model.buffers())

    return Trial(run, outputs, forward, known, case.batch)


def inference_trial(case: VisionCase, way: Way, model: Any) -> Trial:
    """The tower in evaluation mode, without gradients: stock runs `nn.MultiheadAttention`'s own fast path."""
    images = case.tensor(case.batch, 3, case.of.image, case.of.image, stream=0, dtype=case.stored)
    model.eval()

    def run() -> Tensor:
        with torch.no_grad(), case.computing():
            return model.visual(images)

    return Trial(run, lambda: {"features": run()}, samples=case.batch)


# ---------------------------------------------------------------------------------------------------------- groups


def _standard(case: VisionCase, maths: str, kinds: dict[str, type[Attention]]) -> dict[str, Tensor]:
    def dress(model: Any, ranks: Sequence[int]) -> Any:
        model.visual.requires_grad_(maths == "full")
        return modules(kinds[maths])(model, ranks)

    return trial(case, Way(maths, "", maths, dress)).outputs()


def exact(case: VisionCase, maths: str) -> dict[str, Tensor]:
    """What a case comes to by its mathematics in float64."""
    return _standard(replace(case, exact=True), maths, EXACT)


def plain(case: VisionCase, maths: str) -> dict[str, Tensor]:
    """What plain PyTorch makes of it, in the case's precision."""
    return _standard(case, maths, PLAIN)


def shapes(device: str, size: str, quick: Sequence[tuple[str, int]]) -> list[tuple[str, int, str]]:
    """Setting, batch and precision of a group's cases; `quick`: the quick set's on a CPU."""
    if size == "rehearsal":
        return [("tiny", 2, "amp" if device == "cuda" else "fp32")]
    if device == "cuda":
        return [(key, batch, p) for p in ("amp", "bf16") for key, batch in (("B/16", 256), ("L/14", 128))]
    return [(key, batch, "fp32") for key, batch in ((("B/32", 8), ("B/16", 2)) if size == "full" else quick)]


def group(kind: str, ways: Sequence[Way], cases: Callable[[str, str], Sequence[VisionCase]]) -> Group:
    contenders = tuple(
        Contender(w.name, w.words, functools.partial(_build, way=w), w.maths, w.fault, w.ours, w.slow_start)
        for w in ways
    )
    return Group(kind, "stock", contenders, cases, exact, plain)


def _build(case: VisionCase, way: Way) -> Trial:
    return trial(case, way)
