"""The towers that are measured against each other: a stock OpenCLIP model each, patched or given a peer's attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bench.checkout  # noqa: F401
import fastheads
from bench import peers
from bench.shapes import SHAPES, Shape


@dataclass(frozen=True)
class Setting:
    """A tower and a batch. The text tower is as small as OpenCLIP lets it be: nobody runs it."""

    name: str
    batch: int
    image: int
    patch: int
    width: int
    head_dim: int
    layers: int

    @property
    def shape(self) -> Shape:
        """What the roofline calls it."""
        tokens = (self.image // self.patch) ** 2 + 1
        return Shape(self.name, self.batch, tokens, self.width, self.width // self.head_dim, self.layers)

    def model(self, layers: int, device: str, dtype: torch.dtype) -> Any:
        """A frozen CLIP of random weights whose image tower has `layers` layers."""
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        vision = CLIPVisionCfg(layers, self.width, self.head_dim, patch_size=self.patch, image_size=self.image)
        text = CLIPTextCfg(context_length=8, vocab_size=64, width=64, heads=2, layers=1)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # at once, not by .to(): so it works on fake tensors too
        try:
            with torch.device(device):
                model = CLIP(512, vision, text)
        finally:
            torch.set_default_dtype(before)
        return model.train().requires_grad_(False)


SETTINGS = {
    "B/16": Setting(SHAPES["B/16"].name, 256, 224, 16, 768, 64, 12),
    "L/14": Setting(SHAPES["L/14"].name, 128, 224, 14, 1024, 64, 24),
    "tiny": Setting("a tiny tower, batch 4", 4, 32, 8, 64, 32, 3),
}

OURS = ("stacked", "delta", "one_pass", "cpu", "reference")
VARIANTS = ("stock", *OURS, "stacked, recompute", "plain", "factored", "merged", "peft", "xformers")
WORDS = {
    "stock": "stock OpenCLIP, frozen",
    "plain": "plain-PyTorch HA-LoRA and gates over SDPA",
    "factored": "factored through cuBLAS, in unsloth's way",
    "merged": "merged weights through autograd",
    "peft": "PEFT LoRA on nn.MultiheadAttention",
    "xformers": "plain, with xformers' attention",
}
# How a model is run: its weights' dtype, and whether under autocast to bfloat16.
PRECISIONS = {"amp": (torch.float32, True), "bf16": (torch.bfloat16, False), "fp32": (torch.float32, False)}


class UnavailableError(Exception):
    """A variant that cannot run here; its text says why."""


def build(name: str, setting: Setting, ranks: list[int], device: str, precision: str) -> Any:
    """A model of `len(ranks)` layers run as `name` says; raises UnavailableError."""
    model = setting.model(len(ranks), device, PRECISIONS[precision][0])
    if name == "stock":
        return model
    reason = peers.why_not(name, device)
    if reason:
        raise UnavailableError(reason)
    torch.manual_seed(1)
    if name in peers.PEERS:
        return peers.with_peer(model, name, ranks)
    if name == "peft":
        try:
            return peers.with_peft(model, ranks)
        except Exception as error:
            raise UnavailableError(f"PEFT refused it: {str(error).strip().splitlines()[0]}") from error
    impl, _, recompute = name.partition(", ")
    try:
        fastheads.patch(model, fastheads.HeadConfig(rank=tuple(ranks)), impl=impl, recompute=bool(recompute))
    except (ValueError, ImportError) as error:
        raise UnavailableError(str(error)) from error
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("lora_B"):
                p.normal_(std=0.02)
            if key.endswith("theta"):
                p.normal_(std=0.1)
    return model


@contextlib.contextmanager
def computing(device: str, precision: str) -> Iterator[None]:
    with torch.autocast(device, torch.bfloat16, enabled=PRECISIONS[precision][1]):
        yield


@dataclass
class Step:
    """Forward, and forward with backward, of one variant: what is timed."""

    forward: Callable[[], Tensor]
    both: Callable[[], Any]
    known: list[Tensor]  # what exists beside: input, parameters, buffers


def module_step(block: Any, setting: Setting, device: str, precision: str) -> Step:
    """The attention module from LayerNorm to residual, with gradients to its input and its adapters."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    s = setting.shape
    x = torch.randn(s.batch, s.tokens, s.width, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x).detach()
    wanted = [x, *(p for n, p in block.named_parameters() if p.requires_grad)]

    def forward() -> Tensor:
        with computing(device, precision):
            return x + block.ls_1(block.attention(block.ln_1(x)))

    def both() -> Any:
        return torch.autograd.grad(forward(), wanted, dy, allow_unused=True)

    return Step(forward, both, [x, dy, *block.parameters(), *block.buffers()])


def tower_step(model: Any, setting: Setting, device: str, precision: str) -> Step:
    """A training step of the image tower without the optimiser: gradients to adapters and to the first block's input.

    So that the frozen tower has the same backward pass.
    """
    dtype = PRECISIONS[precision][0]
    images = torch.randn(setting.batch, 3, setting.image, setting.image, device=device, dtype=dtype)
    params = [p for p in model.visual.parameters() if p.requires_grad]
    entered: list[Tensor] = []

    def enter(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entered[:] = [args[0].detach().requires_grad_()]
        return (entered[0], *args[1:])

    model.visual.transformer.register_forward_pre_hook(enter)

    def forward() -> Tensor:
        with computing(device, precision):
            return model.visual(images).float().square().mean()

    def both() -> Any:
        loss = forward()
        return torch.autograd.grad(loss, [*entered, *params], allow_unused=True)

    return Step(forward, both, [images, *model.parameters(), *model.buffers()])
