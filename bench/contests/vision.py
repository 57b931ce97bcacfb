"""An image tower, or one attention module of it, as a case; and the trials of it."""

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from bench.base.towers import BATCHES, SETTINGS, Setting
from bench.contests.attentions import EXACT, PLAIN, modules, trained
from bench.contests.contest import Contender, Group, Trial, training_trial
from bench.contests.models import blocks_of, clip

Dress = Callable[[Any, Sequence[int]], Any]  # a stock model and its layers' ranks → the model
# How a model is run: its weights' dtype, whether under autocast to bfloat16, and that in words.
PRECISIONS = {
    "amp": (torch.float32, True, "bf16 autocast"),
    "bf16": (torch.bfloat16, False, "bf16 weights"),
    "fp32": (torch.float32, False, "float32"),
    "bf16 qkv": (torch.bfloat16, False, "bf16"),  # where no weight takes part
}


@dataclass(frozen=True)
class VisionCase:
    """kind: "block" (one layer's attention module, forward and backward), "model step" or "inference" (the tower), or
    "attention" (without its projections).

    setting: a key of SETTINGS. ranks: of the layers that are run. tokens: of a layer; 0: the setting's.
    closed: heads per layer whose gate is 0, where there are gates, which then are frozen.
    to_images: a step's gradients go on to the images.
    """

    kind: str
    setting: str
    batch: int
    device: str
    precision: str
    ranks: tuple[int, ...]
    tokens: int = 0
    closed: int = 0
    to_images: bool = False
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
        return ", ".join([*parts, PRECISIONS[self.precision][2]])

    def small(self, draw: int) -> "VisionCase":
        """Two images, and of a tower its last three layers: both published ranks are among them."""
        return replace(self, batch=2, ranks=self.ranks[-3:], draw=draw)

    def extra(self) -> dict[str, Any]:
        found = {"setting": self.setting, "batch": self.batch, "tokens": self.length, "precision": self.precision}
        return found | {"ranks": list(self.ranks)}

    def model(self) -> Any:
        """A stock model of its own; in float64 where `exact`, of the weights as the precision rounds them."""
        if self.device == "cpu" and detect_fake_mode() is None:
            model = copy.deepcopy(_stock(self.of, len(self.ranks), self.stored))
        else:  # made in no time; on a GPU a copy would lie in the way of the largest batch
            model = clip(self.of, len(self.ranks), self.device, self.stored)
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

    def images(self) -> Tensor:
        return self.tensor(self.batch, 3, self.of.image, self.of.image, stream=0, dtype=self.stored)


@functools.lru_cache(maxsize=3)
def _stock(setting: Setting, layers: int, dtype: torch.dtype) -> Any:
    return clip(setting, layers, "cpu", dtype)


def trial(case: VisionCase, dress: Dress, maths: str) -> Trial:
    model = dress(case.model(), case.ranks)
    layers = [trained(block.attn, maths) for block in blocks_of(model)]
    for layer in layers if case.closed else ():
        theta = layer.pop("theta", None)
        if theta is not None:
            theta.requires_grad_(False)[: case.closed] = -torch.inf
    if case.kind == "inference":
        return _inference_trial(case, model)
    return (_block_trial if case.kind == "block" else _step_trial)(case, model, layers)


def _block_trial(case: VisionCase, model: Any, layers: Sequence[dict[str, Tensor]]) -> Trial:
    """The attention module from LayerNorm to residual, with gradients to its input and what it trains."""
    block = blocks_of(model)[0]
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16  # of activations
    shape = (case.batch, case.length, case.of.width)
    x = case.tensor(*shape, stream=0, dtype=dtype).requires_grad_()
    dy = case.tensor(*shape, stream=1, dtype=dtype)
    named = {"x": [x], **{name: [parameter] for name, parameter in layers[0].items()}}
    others = [p for part in (block.ln_1, block.attn) for p in part.parameters() if p.requires_grad]

    def forward() -> Tensor:
        with case.computing():
            return x + block.ls_1(block.attention(block.ln_1(x)))

    of = {"result": "y", "others": others, "samples": case.batch}
    return training_trial(forward, dy, lambda: named, lambda: (x, dy, *block.parameters(), *block.buffers()), **of)


def _step_trial(case: VisionCase, model: Any, layers: Sequence[dict[str, Tensor]]) -> Trial:
    """A training step of the tower without the optimiser: gradients to what is trained and to the first block's input.

    So that the frozen tower has the same backward pass. Full fine-tuning goes on to the images' weights.
    """
    images, entered = case.images().requires_grad_(case.to_images), list[Tensor]()
    named = {name: [layer[name] for layer in layers] for name in layers[0]}
    others = [p for p in (images, *model.visual.parameters()) if p.requires_grad]

    def enter(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entered[:] = [args[0] if args[0].requires_grad else args[0].detach().requires_grad_()]
        return (entered[0], *args[1:])

    model.visual.transformer.register_forward_pre_hook(enter)

    def forward() -> Tensor:
        with case.computing():
            return model.visual(images)

    dy = case.tensor(*forward().shape, stream=1, dtype=torch.float32)
    of = {"result": "features", "others": others, "samples": case.batch, "named": lambda: {"x": entered, **named}}
    return training_trial(forward, dy, known=lambda: (images, dy, *model.parameters(), *model.buffers()), **of)


def _inference_trial(case: VisionCase, model: Any) -> Trial:
    """The tower in evaluation mode, without gradients: stock runs `nn.MultiheadAttention`'s own fast path."""
    images = case.images()
    model.eval()

    def run() -> Tensor:
        with torch.no_grad(), case.computing():
            return model.visual(images)

    return Trial(run, lambda: {"features": run()}, samples=case.batch)


def standard(case: VisionCase, maths: str) -> Trial:
    def dress(model: Any, ranks: Sequence[int]) -> Any:
        model.visual.requires_grad_(maths == "full")
        return modules((EXACT if case.exact else PLAIN)[maths])(model, ranks)

    return trial(case, dress, maths)


def cases(kind: str, device: str, size: str, quick: Sequence[tuple[str, int]]) -> list[VisionCase]:
    """Of a group. quick: setting and batch of the quick set's on a CPU."""
    shapes, precisions = quick, ("fp32",)
    if device == "cuda":
        shapes, precisions = tuple(BATCHES.items()), ("bf16 qkv",) if kind == "attention" else ("amp", "bf16")
    elif size == "full":
        shapes = (("B/32", 1), ("B/32", 8), ("B/32", 32), ("B/16", 2))
    if size == "rehearsal":
        shapes, precisions = (("tiny", 2),), precisions[:1]
    found = []
    for precision, (key, batch) in itertools.product(precisions, shapes):
        setting, case = SETTINGS[key], VisionCase(kind, key, batch, device, precision, SETTINGS[key].ranks())
        if kind == "block":  # at both published ranks
            found += [replace(case, ranks=(rank,)) for rank in ((2, 8) if size == "full" else (8,))]
        else:
            found.append(replace(case, tokens=setting.tokens) if kind == "attention" else case)
    return found


def group(kind: str, contenders: tuple[Contender, ...], quick: Sequence[tuple[str, int]]) -> Group:
    of = functools.partial(cases, kind, quick=quick)
    return Group(kind, "stock", contenders, of, standard)
