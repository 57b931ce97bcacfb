"""Where a model keeps its attention layers, and which token its features come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.hosts.wrappers import unwrap

REFUSED = {
    "ModifiedResNet": "a ResNet tower (it has one attention layer, a pooling one)",
    "HFTextEncoder": "a Hugging Face text tower",
}


@dataclass(frozen=True)
class Tower:
    """One tower of a model: its name, its attention modules in order, and how its tokens are pooled.

    `pool`: `"first"`, `"last"`, `"mean"` (of the tokens after the first `prefix`), `"argmax"`, `"eos"`, or `"none"`
    where no token stands for the whole.
    `embedding` is the module whose input are the token ids (text towers that pool by them), `eos` their end token.
    rotary: whether queries and keys are turned by their positions.
    """

    name: str
    module: nn.Module
    attentions: tuple[nn.Module, ...]
    pool: str
    embedding: nn.Module | None = None
    eos: int | None = None
    rotary: bool = False
    prefix: int = 1

    def token_index(self, ids: Tensor) -> Tensor:
        """`[B]` index of the pooled token from the token ids `[B, N]`, as OpenCLIP's text_global_pool."""
        if self.pool == "argmax":
            return ids.argmax(-1)
        return torch.eq(ids, self.eos if self.eos is not None else -1).int().argmax(-1)


def find_tower(model: nn.Module, name: str) -> Tower:
    """The tower `name` ("visual" or "text") of an OpenCLIP model; an image tower or a timm model alone is its own.

    Looks inside the tower's own wrappers, as `model.visual = torch.compile(model.visual)` makes one. Raises TypeError
    for a model without such a tower, and for Hugging Face and ResNet towers and others that are no transformers.
    """
    if name == "visual":
        tower: Any = getattr(model, "visual", None)
        if tower is None and any(hasattr(model, part) for part in ("conv1", "patch_embed", "trunk")):
            tower = model
    else:
        tower = getattr(model, "text", None)
        if tower is None and hasattr(model, "token_embedding"):
            tower = model  # OpenCLIP's CLIP keeps the text tower's parts itself
    if not isinstance(tower, nn.Module):
        raise TypeError(
            f"model: {type(model).__name__} has no {name} tower; takes an OpenCLIP model "
            "(open_clip.create_model …), or an image tower or a vision transformer of timm's alone"
        )
    tower = unwrap(tower)
    kind = REFUSED.get(type(tower).__name__)
    if kind:
        raise TypeError(
            f"model: its {name} tower is {kind}, which fastheads does not patch yet; "
            "takes transformers of OpenCLIP's own (ViT-B-32, ViT-B-16, ViT-L-14 …) and of timm's"
        )
    transformer, trunk = getattr(tower, "transformer", None), unwrap(getattr(tower, "trunk", tower))
    blocks: Any = getattr(trunk, "blocks", None)  # timm's, OpenCLIP's TimmModel around it or not
    if isinstance(transformer, nn.Module):
        blocks = getattr(unwrap(transformer), "resblocks", None)
    found = [getattr(unwrap(block), "attn", None) for block in blocks or ()]
    attentions = tuple(unwrap(attention) for attention in found if isinstance(attention, nn.Module))
    if not attentions or len(attentions) < len(found):
        what = type(tower).__name__ if trunk is tower else f"{type(tower).__name__} around {type(trunk).__name__}"
        raise TypeError(f"model: its {name} tower ({what}) has no transformer.resblocks[i].attn or blocks[i].attn")
    pool: str
    if name == "visual":
        if transformer is None:
            rotary, prefix = getattr(trunk, "rope", None) is not None, getattr(trunk, "num_prefix_tokens", 0)
            return Tower(name, tower, attentions, _pool_of_timm(trunk), rotary=rotary, prefix=prefix)
        pool = {"tok": "first", "avg": "mean"}.get(getattr(tower, "pool_type", "tok"), "none")
        return Tower(name, tower, attentions, "mean" if getattr(tower, "attn_pool", None) is not None else pool)
    pool = str(getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "argmax"))
    if getattr(tower, "cls_emb", None) is not None:
        pool = "last"
    eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    embedding: Any = tower.token_embedding
    return Tower(name, tower, attentions, pool, embedding, eos)


def _pool_of_timm(trunk: Any) -> str:
    """A mean stands for attentional pooling too."""
    return {"token": "first", "avg": "mean", "map": "mean"}.get(getattr(trunk, "global_pool", ""), "none")
