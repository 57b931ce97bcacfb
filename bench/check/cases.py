"""The cases of `bench.check`: small, on a CPU, by public names. A factory does what is not timed, its result is timed.

A base commit that lacks what a case uses fails in the factory or the first call, and is named for it.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]
torch.set_num_threads(int(os.environ.get("FASTHEADS_CHECK_THREADS", "1")))


def _import() -> float:
    started = time.perf_counter()
    import fastheads  # noqa: F401

    return time.perf_counter() - started


def importing() -> Run:
    """`import fastheads` where torch is there already, in a fork of this process."""
    if "fastheads" in sys.modules:
        raise RuntimeError("fastheads is imported already; this case must be the first")

    def run() -> float:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(_import)

    return run


def operator(backward: bool) -> Run:
    """`fastheads::head_attention`, impl "cpu": 8 × 50 tokens, width 384, 6 heads, rank 8."""
    from fastheads.ops import head_attention

    torch.manual_seed(0)
    B, N, D, H, r = 8, 50, 384, 6, 8
    x = torch.randn(B, N, D, requires_grad=True)
    w, b = torch.randn(3 * D, D) / D**0.5, torch.zeros(3 * D)
    lora_a = torch.randn(2, H, r, D) / D**0.5
    lora_b = torch.randn(2, H, D // H, r) * 0.02
    trained = [x, lora_a.requires_grad_(), lora_b.requires_grad_(), torch.ones(H, requires_grad=True)]
    do = torch.randn(B, N, D)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            o = head_attention(x, w, b, lora_a, lora_b, num_heads=H, gate=trained[3], impl="cpu").o
        if backward:
            torch.autograd.grad(o, trained, do)

    return run


def tower(training: bool) -> Run:
    """The image tower of a small OpenCLIP, 4 layers of width 256, 8 images of 50 tokens, patched."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    import fastheads

    torch.manual_seed(0)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=64, heads=2, layers=1)
    model = CLIP(64, CLIPVisionCfg(4, 256, 64, patch_size=8, image_size=56), text)
    fastheads.patch(model)
    model.train(training)
    images = torch.randn(8, 3, 56, 56)

    def run() -> None:
        with torch.set_grad_enabled(training):
            features = model.encode_image(images)
        if training:
            features.square().mean().backward()

    return run


def mmd(layers: int, samples: int, width: int) -> Run:
    """The adaptive MMD of three domains, forward and backward, by the native kernels."""
    import fastheads

    torch.manual_seed(0)
    x = torch.randn(layers, samples, width, requires_grad=True)
    domains = torch.arange(3).repeat_interleave(samples // 3)

    def run() -> None:
        fastheads.mmd(x, domains, num_domains=3, impl="cpu").backward()

    return run


CASES: dict[str, Callable[[], Run]] = {
    "import fastheads": importing,
    "operator, forward": lambda: operator(False),
    "operator, forward and backward": lambda: operator(True),
    "tower, inference": lambda: tower(False),
    "tower, training step": lambda: tower(True),
    "mmd, 12 × 36 × 768": lambda: mmd(12, 36, 768),
    "mmd, 768 × 768": lambda: mmd(1, 768, 768),
}
