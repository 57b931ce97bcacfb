"""Where a model keeps its attention layers, and which token its features come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.hosts.wrappers import unwrap

REFUSED = {"ModifiedResNet": "a ResNet tower (it has one attention layer, a pooling one)"}
# Under which names OpenCLIP's and Hugging Face's models keep a tower, and by what one is known that stands alone
# (OpenCLIP's CLIP keeps the text tower's parts itself).
NAMES = {"visual": ("visual", "vision_model"), "text": ("text", "text_model")}
_ALONE = {
    "visual": ("conv1", "patch_embed", "trunk", "stages", "embeddings.patch_embedding"),
    "text": (
        "token_embedding",
        "embeddings.token_embedding",
        "embeddings.word_embeddings",
        "transformer.embeddings.word_embeddings",
        "transformer.embed_tokens",
    ),
}
# Where a tower keeps its blocks, and a block its attention: OpenCLIP, Hugging Face's CLIP; timm, timm inside OpenCLIP,
# and there the last of FastViT's stages; BERT, and BERT, M2M-100 and T5 inside OpenCLIP.
_BOTH = {"transformer.resblocks": "attn", "encoder.layers": "self_attn"}
_BLOCKS = {
    "visual": _BOTH
    | {
        "blocks": "attn",
        "trunk.blocks": "attn",
        "stages": "token_mixer",
        "trunk.stages": "token_mixer",
    },
    "text": _BOTH
    | {
        "encoder.layer": "attention.self",
        "transformer.encoder.layer": "attention.self",
        "transformer.layers": "self_attn",
        "transformer.block": "layer.0.SelfAttention",
    },
}
# And a block its MLP's linear layers: OpenCLIP; timm and Hugging Face.
MLP = {"fc1": ("mlp.c_fc", "mlp.fc1"), "fc2": ("mlp.c_proj", "mlp.fc2")}


@dataclass(frozen=True)
class Tower:
    """One tower of a model: its name, its blocks and their attention modules in order, and how its tokens are pooled.

    `path`: under which name the model keeps it; "" for itself.
    `pool`: `"first"`, `"last"`, `"mean"` (of the tokens after the first `prefix`), `"argmax"`, `"eos"`, or `"none"`
    where no token stands for the whole.
    `embedding` is the module whose input are the token ids (text towers that pool by them), `eos` their end token.
    rotary: whether queries and keys are turned by their positions.
    """

    name: str
    path: str
    module: nn.Module
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    pool: str
    embedding: nn.Module | None = None
    eos: int | None = None
    rotary: bool = False
    prefix: int = 1

    def mlp(self, layer: int, target: str) -> nn.Module | None:
        """The part "fc1" or "fc2" of a block's MLP; None where it has none."""
        found = (_inside(self.blocks[layer], path) for path in MLP[target])
        return next((part for part in found if isinstance(part, nn.Module)), None)

    def token_index(self, ids: Tensor) -> Tensor:
        """`[B]` index of the pooled token from the token ids `[B, N]`, as OpenCLIP's text_global_pool."""
        if self.pool == "argmax":
            return ids.argmax(-1)
        return torch.eq(ids, self.eos if self.eos is not None else -1).int().argmax(-1)


def find_tower(model: nn.Module, name: str) -> Tower:
    """The tower `name` ("visual" or "text") of a model of OpenCLIP's or Hugging Face's; a tower or a model of timm's
    alone is its own.

    Looks inside the tower's own wrappers, as `model.visual = torch.compile(model.visual)` makes one. Raises TypeError
    for a model without such a tower, and for towers that are no transformers.
    """
    path = next((own for own in NAMES[name] if getattr(model, own, None) is not None), "")
    tower: Any = getattr(model, path) if path else model
    if not isinstance(tower, nn.Module) or not (path or any(_inside(model, part) is not None for part in _ALONE[name])):
        raise TypeError(
            f"model: {type(model).__name__} has no {name} tower; takes an OpenCLIP model "
            "(open_clip.create_model …), Hugging Face's CLIP or SigLIP, timm's vision transformers, or a tower alone"
        )
    tower = unwrap(tower)
    kind = REFUSED.get(type(tower).__name__)
    if kind:
        raise TypeError(
            f"model: its {name} tower is {kind}, which fastheads does not patch yet; "
            "takes transformers of OpenCLIP's own (ViT-B-32, ViT-B-16, ViT-L-14 …), timm's, CLIP and SigLIP"
        )
    places = _BLOCKS[name]
    where = next((blocks for blocks in places if _inside(tower, blocks) is not None), "")
    blocks: Any = list(_inside(tower, where)) if where else []
    if where.endswith("stages"):
        blocks = [b for stage in blocks for b in _inside(stage, "blocks") or () if type(b).__name__ == "AttentionBlock"]
    found = [_inside(block, places[where]) for block in blocks]
    attentions = tuple(attention for attention in found if isinstance(attention, nn.Module))
    if not attentions or len(attentions) < len(found):
        trunk = _inside(tower, "trunk")
        what = type(tower).__name__ + (f" around {type(trunk).__name__}" if trunk is not None else "")
        raise TypeError(f"model: its {name} tower ({what}) {_why_none(tower, found, places)}")
    other = _of_timm if name == "visual" else _of_encoder
    about = {"transformer.resblocks": _of_openclip, "encoder.layers": _of_huggingface}.get(where, other)(tower, name)
    if where == "encoder.layers" and hasattr(model, "classifier"):  # Hugging Face's head takes the mean of the patches
        about |= {"pool": "mean", "prefix": int(about["pool"] == "first")}
    return Tower(name, path, tower, tuple(blocks), attentions, **about)


def _why_none(tower: nn.Module, found: list[Any], places: dict[str, str]) -> str:
    """Why no attention was found, or not in every block; found: a block's, or None."""
    kinds = {type(module).__name__ for module in tower.modules()}
    if any("WindowAttention" in kind for kind in kinds):
        return "attends in windows; takes attention over all tokens"
    if not found and not any("Attention" in kind for kind in kinds):
        return "has no attention, so no heads to adapt"
    known = ", ".join(f"{at}[i].{attention}" for at, attention in places.items())
    return f"keeps no attention where it is looked for: {known}"


def _inside(module: Any, path: str) -> Any:
    """A part of a module, through wrappers; None where it is not there."""
    for part in path.split("."):
        module = getattr(unwrap(module), part, None) if isinstance(module, nn.Module) else None
    return unwrap(module) if isinstance(module, nn.Module) else module


def _of_openclip(tower: Any, name: str) -> dict[str, Any]:
    if name == "visual":
        if getattr(tower, "attn_pool", None) is not None:
            return {"pool": "mean"}
        return {"pool": {"tok": "first", "avg": "mean"}.get(getattr(tower, "pool_type", "tok"), "none")}
    pool = str(getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "argmax"))
    if getattr(tower, "cls_emb", None) is not None:
        pool = "last"
    eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    return {"pool": pool, "embedding": tower.token_embedding, "eos": eos}


def _of_timm(tower: Any, name: str) -> dict[str, Any]:
    """A mean stands for attentional pooling too."""
    trunk = _inside(tower, "trunk") or tower
    pool = {"token": "first", "avg": "mean", "map": "mean"}.get(getattr(trunk, "global_pool", ""), "none")
    rotary = getattr(trunk, "rope", None) is not None
    return {"pool": pool, "rotary": rotary, "prefix": getattr(trunk, "num_prefix_tokens", 0)}


def _of_huggingface(tower: Any, name: str) -> dict[str, Any]:
    if name == "visual":
        first = hasattr(tower.embeddings, "class_embedding")
        return {"pool": "first"} if first else {"pool": "mean", "prefix": 0}
    eos = getattr(tower, "eos_token_id", None)  # SigLIP's text tower has none, and takes the last token
    # 2 is what old configurations of CLIP say, whose end token is the largest
    pool = "last" if eos is None else "argmax" if eos == 2 else "eos"
    return {"pool": pool, "embedding": tower.embeddings.token_embedding, "eos": eos}


def _of_encoder(tower: Any, name: str) -> dict[str, Any]:
    """Of OpenCLIP's `HFTextEncoder`, whose mean leaves padding out, or of such an encoder alone."""
    pooler = type(getattr(tower, "pooler", None)).__name__
    return {"pool": "none" if pooler in ("MeanPooler", "MaxPooler", "NoneType") else "first"}
