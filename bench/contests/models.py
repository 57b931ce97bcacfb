"""OpenCLIP's own models by their configs, with random weights, which cost the same.

The text tower is as small as OpenCLIP lets it be: nobody runs it. Where OpenCLIP is not installed, the same tower is
written out here (a test holds it to OpenCLIP's): GPU machines without a network have torch and little else.
"""

import importlib.util
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from bench.base.towers import Setting

HAS_OPEN_CLIP = importlib.util.find_spec("open_clip") is not None


def clip(setting: Setting, layers: int, device: str, dtype: torch.dtype) -> Any:
    """A frozen CLIP of random weights, the same at every call, whose image tower has `layers` layers."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # at once, not by .to(): so it works on fake tensors too
    try:
        with torch.device(device):
            model = (_open_clip if HAS_OPEN_CLIP else Clip)(setting, layers)
    finally:
        torch.set_default_dtype(before)
    return model.train().requires_grad_(False)


def _open_clip(setting: Setting, layers: int) -> Any:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers, setting.width, setting.head_dim, patch_size=setting.patch, image_size=setting.image)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=64, heads=2, layers=1)
    return CLIP(setting.embed_dim, vision, text)


def blocks_of(model: Any) -> Any:
    return model.visual.transformer.resblocks


class LayerNorm(nn.LayerNorm):
    """OpenCLIP's: answers in its input's dtype, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class Block(nn.Module):
    """OpenCLIP's ResidualAttentionBlock, for self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ls_1, self.ls_2 = nn.Identity(), nn.Identity()
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def attention(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls_1(self.attention(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Visual(nn.Module):
    """OpenCLIP's VisionTransformer, with its parameters' names."""

    def __init__(self, setting: Setting, layers: int) -> None:
        super().__init__()
        width, scale = setting.width, setting.width**-0.5
        self.conv1 = nn.Conv2d(3, width, setting.patch, setting.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(setting.tokens, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        blocks = nn.Sequential(*(Block(width, setting.heads) for _ in range(layers)))
        self.transformer = nn.Sequential(OrderedDict(resblocks=blocks))
        self.proj = nn.Parameter(scale * torch.randn(width, setting.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1).to(x.dtype)
        x = torch.cat((first, x), 1) + self.positional_embedding.to(x.dtype)
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Clip(nn.Module):
    """What of OpenCLIP's CLIP a bench uses."""

    def __init__(self, setting: Setting, layers: int) -> None:
        super().__init__()
        self.visual = Visual(setting, layers)
