"""Small models to test with, and what several test files compare models by. Not a test file.

MODELS are OpenCLIP's own classes with small configs, every parameter moved off its initial value (so that no bias, norm
or head scale is invisible). `Attention` stands in for the one of OpenCLIP's development branch, which is not released:
the same names, call and mask convention, nothing else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastheads

EMBED, VOCAB, CONTEXT, EOT = 24, 50, 12, 49


# ------------------------------------------------------------------------------------- the development branch


class Attention(nn.Module):
    """The development branch's call: `attn(x, k_x, v_x, attn_mask)`, boolean masks True = keep."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        scaled_cosine: bool = False,
        scale_heads: bool = False,
        inner_norm: bool = False,
        cross: bool = False,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.logit_scale_max = num_heads, math.log(100.0)
        weights = [nn.Parameter(torch.randn(dim, dim) * dim**-0.5) for _ in range(3)]
        if cross:
            self.in_proj_weight = None
            self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = weights
        else:
            self.in_proj_weight = nn.Parameter(torch.cat([w.detach() for w in weights]))
            self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.ln_q = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.ln_k = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0))) if scaled_cosine else None
        self.head_scale = nn.Parameter(torch.ones(num_heads, 1, 1)) if scale_heads else None
        self.ln_inner = nn.LayerNorm(dim) if inner_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.out_proj = nn.Linear(dim, dim)
        self.out_drop = nn.Dropout(0.0)

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        k_x = x if k_x is None else k_x
        v_x = k_x if v_x is None else v_x
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        projected = [
            F.linear(*each).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in zip((x, k_x, v_x), weights, self.in_proj_bias.chunk(3), strict=True)
        ]
        q, k, v = projected
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(len(x), self.num_heads, *attn_mask.shape[1:])
        scale = None
        if self.logit_scale is not None:
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=self.logit_scale_max).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
        q, k = self.ln_q(q), self.ln_k(k)
        dropout = self.attn_drop.p if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=scale)
        if self.head_scale is not None:
            o = o * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(o.transpose(1, 2).flatten(2))))


class DevelopmentBlock(nn.Module):
    """A block of OpenCLIP's `Transformer` that calls its attention as the development branch does."""

    def __init__(self, dim: int, num_heads: int, **options: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, **options)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(dim, 2 * dim))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * dim, dim))

    def get_weight_dtype(self) -> torch.dtype:
        return self.mlp.c_fc.weight.dtype

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        x = q_x + self.attn(self.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------------------------- the models


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def disturb(model: nn.Module, size: float = 0.05) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape).to(p.dtype), alpha=size)
    return model


def clip(cls: type = CLIP, *, layers: int = 3, vision: Any = (), text: Any = (), seed: int = 0) -> nn.Module:
    """A tiny OpenCLIP model: image tower 4 heads × 16, 17 tokens; text tower 2 layers of 2 heads × 16, 12 tokens."""
    sizes = {"layers": layers, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 8, "mlp_ratio": 2.0}
    words = {"layers": 2, "width": 32, "heads": 2, "context_length": CONTEXT, "vocab_size": VOCAB, "eos_id": EOT}
    with seeded(seed):
        vision_cfg, text_cfg = CLIPVisionCfg(**sizes | dict(vision)), CLIPTextCfg(**words | dict(text))
        return disturb(cls(EMBED, vision_cfg, text_cfg))


def custom(**options: bool) -> nn.Module:
    """Both towers of OpenCLIP 3.3.0's own `Attention` blocks."""
    options = {"block_type": "custom", **options}
    return clip(vision=options, text=options)


def development(**options: bool) -> nn.Module:
    """Both towers of the development branch's blocks; the text tower's mask boolean, True = keep."""
    model: Any = clip()
    with seeded(1):
        for transformer, heads in ((model.visual.transformer, 4), (model.transformer, 2)):
            blocks = [DevelopmentBlock(transformer.width, heads, **options) for _ in transformer.resblocks]
            transformer.resblocks = disturb(nn.ModuleList(blocks))
    model.attn_mask = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    return model


def vit(cls: Any = VisionTransformer, *, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny vision transformer of timm's: 3 layers of 4 heads × 16, 17 tokens with the class token."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
    with seeded(seed):
        return disturb(cls(**sizes, num_classes=EMBED, **options))


def with_timm(cls: Any = VisionTransformer, **options: Any) -> nn.Module:
    """An OpenCLIP model whose image tower is timm's."""
    model: Any = clip(CustomTextCLIP)
    with seeded(1):
        model.visual = disturb(TimmModel("test_vit", EMBED, image_size=32, pool="token", proj="linear"))
    model.visual.trunk = vit(cls, **options)
    model.visual.trunk.reset_classifier(0)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": clip,
    "custom_text": lambda: clip(CustomTextCLIP, vision={"pool_type": "avg"}, text={"pool_type": "eos"}),
    "cls_embedding": lambda: clip(CustomTextCLIP, vision={"attentional_pool": True}, text={"embed_cls": True}),
    "attention": custom,
    "attention_qk_norm": lambda: custom(qk_norm=True),
    "attention_scale_heads": lambda: custom(scale_heads=True),
    "attention_inner_norm": lambda: custom(scale_attn_inner=True),
    "development": development,
    "development_qk_norm": lambda: development(qk_norm=True),
    "development_cosine": lambda: development(scaled_cosine=True),
    "development_scale_heads": lambda: development(scale_heads=True),
    "development_inner_norm": lambda: development(inner_norm=True),
    "timm": with_timm,
    "timm_qk_norm": lambda: with_timm(qk_norm=True, qkv_bias=False, global_pool="avg", init_values=0.5),
    "timm_rotary": lambda: with_timm(Eva, use_rot_pos_emb=True, global_pool="token"),
    "timm_parts_inner_norm": lambda: with_timm(Eva, qkv_fused=False, scale_attn_inner=True, global_pool="token"),
}
ALL = ("q", "v", "o", "mlp")
UNGATED = tuple(name for name in MODELS if name.endswith("inner_norm"))  # gates would not fold
BOTH = ("visual", "text")
PARTS = ["q_proj.weight", "k_proj.weight", "v_proj.weight"]

CONFIGS = {
    "default": fastheads.HeadConfig(towers=BOTH),
    "qkv_alpha_sigmoid": fastheads.HeadConfig(rank=3, targets=("q", "k", "v"), alpha=6.0, gate="sigmoid", towers=BOTH),
    "shared_down": fastheads.HeadConfig(rank=2, targets=("v", "q"), per_head=False, towers=BOTH),
    "k_only_no_gate": fastheads.HeadConfig(rank=1, targets=("k",), gate=None, towers=BOTH),
    "o_and_mlp": fastheads.HeadConfig(rank=2, targets=("o", "v", "mlp"), alpha=4.0, towers=BOTH),
    "shared_o_no_projection": fastheads.HeadConfig(targets=("fc2", "o"), per_head=False, gate="sigmoid", towers=BOTH),
    "gates_only": fastheads.HeadConfig(rank=0, towers=BOTH),
    "last_layer": fastheads.HeadConfig(rank=4, layers=(-1,), towers=BOTH),
    "ranks": fastheads.HeadConfig(rank=(8, 0), targets=("q", "v", "fc1"), layers=(1, 0), towers=BOTH),
}


def default_config(name: str, **options: Any) -> fastheads.HeadConfig:
    """A config that `MODELS[name]` takes."""
    return fastheads.HeadConfig(**{"gate": None if name in UNGATED else "softmax", **options})


def images(batch: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def texts(batch: int = 3, seed: int = 0) -> Tensor:
    """Captions of different lengths: words, the end token (the highest id), padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, EOT, (batch, CONTEXT), generator=generator)
    for row, end in enumerate(torch.randint(3, CONTEXT - 1, (batch,), generator=generator).tolist()):
        ids[row, end], ids[row, end + 1 :] = EOT, 0
    return ids


def features(model: Any, tower: str = "visual", batch: int = 3, seed: int = 0) -> Tensor:
    """`[B, E]` of the tower, in the model's dtype."""
    if tower == "text":
        return model.encode_text(texts(batch, seed))
    return model.encode_image(images(batch, seed=seed).to(next(model.visual.parameters()).dtype))


def attentions(model: Any, tower: str = "visual") -> list[Any]:
    owner = model.visual if tower == "visual" else getattr(model, "text", model)
    blocks = owner.trunk.blocks if hasattr(owner, "trunk") else owner.transformer.resblocks
    return [block.attn for block in blocks]


def fill_adapters(model: nn.Module, size: float = 0.1, seed: int = 5) -> nn.Module:
    """As if trained: lora_B and theta filled with noise."""
    with seeded(seed), torch.no_grad():
        for p in (*fastheads.lora_parameters(model), *fastheads.gate_parameters(model)):
            p.add_(torch.randn(p.shape).to(p.dtype), alpha=size if p.dim() > 1 else 0.5)
    return model


def patched(
    name: str = "clip",
    config: fastheads.HeadConfig | None = None,
    *,
    size: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """`MODELS[name]` with adapters as if trained, the same ones every time."""
    model = MODELS[name]().to(dtype)
    with seeded(9):
        fastheads.patch(model, config or default_config(name, towers=BOTH), **options)
    return fill_adapters(model, size)


# ---------------------------------------------------------------------------------------------- comparisons


def relative(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|, in float64."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


MERGED = "_fastheads_adapted"  # what merge leaves on a model, for wise_ft


def snapshot(model: Any) -> dict[str, Any]:
    """All that "the model is as it was" means."""
    inner = model if isinstance(model, nn.Module) else nn.Module()
    return {
        "state": {k: v.clone() for k, v in inner.state_dict().items() if isinstance(v, Tensor)},
        "dtypes": {k: v.dtype for k, v in inner.state_dict().items() if isinstance(v, Tensor)},
        "keys": list(inner.state_dict()),
        "classes": {name: type(m) for name, m in inner.named_modules()},
        "attributes": {name: sorted(set(m.__dict__) - {MERGED}) for name, m in inner.named_modules()},
        "flags": {name: p.requires_grad for name, p in inner.named_parameters()},
        "objects": {name: id(p) for name, p in inner.named_parameters()},
        "modes": {name: m.training for name, m in inner.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in inner.named_modules()},
    }


def assert_unchanged(model: Any, before: dict[str, Any], *, values: bool = True) -> None:
    now = snapshot(model)
    for what in before:
        if what != "state":
            assert now[what] == before[what], what
    if values:
        for name, tensor in before["state"].items():
            assert torch.equal(now["state"][name].nan_to_num(), tensor.nan_to_num()), name


# -------------------------------------------------------------------------------------------- the oracle


def dense_weights(
    model: Any, adapters: dict[str, Tensor], config: fastheads.HeadConfig, tower: str
) -> dict[str, Tensor]:
    """The weights a stock model needs to compute what the patched one does, written out head by head in float64.

    `adapters` (as `adapter_state_dict` names them) may require gradients: the result is differentiable in them.
    """
    prefix = {"visual": "visual.", "text": "text." if hasattr(model, "text") else ""}[tower]
    state = model.state_dict()
    out = {}
    for layer, attention in enumerate(attentions(model, tower)):
        timm = hasattr(attention, "qkv")
        path = f"{prefix}{'trunk.blocks' if timm else 'transformer.resblocks'}.{layer}.attn."
        own = ["in_proj_weight"] if not timm else ["qkv.weight"] if attention.qkv is not None else PARTS
        own, out_name = [path + name for name in own], path + ("proj.weight" if timm else "out_proj.weight")
        mlp = path.removesuffix("attn.") + "mlp."
        linears = {"o": out_name, "fc1": mlp + ("fc1" if timm else "c_fc") + ".weight"}
        linears["fc2"] = mlp + ("fc2" if timm else "c_proj") + ".weight"
        theta, A, B = (adapters.get(f"{path}heads.{n}") for n in ("theta", "lora_A", "lora_B"))
        H = attention.num_heads
        w_in, w_out = torch.cat([state[name] for name in own]).double(), state[out_name].double()
        D = w_in.shape[1]
        dh = D // H
        if A is not None and B is not None:
            rank, projections = A.shape[2], [t for t in config.targets if t in "qkv"]
            s = 1.0 if config.alpha is None else config.alpha / rank
            rows = []
            for part in "qkv":
                for h in range(H):
                    block = w_in["qkv".index(part) * D + h * dh : "qkv".index(part) * D + (h + 1) * dh]
                    if part in projections:
                        t = projections.index(part)
                        block = block + s * B[t, h].double() @ A[t, h if config.per_head else 0].double()
                    rows.append(block)
            w_in = torch.cat(rows)
        for target, name in linears.items():
            A, B = (adapters.get(f"{name.removesuffix('weight')}heads.{n}") for n in ("lora_A", "lora_B"))
            if A is None or B is None:
                continue
            s = 1.0 if config.alpha is None else config.alpha / A.shape[1]
            own_heads = H if target == "o" and config.per_head else 1
            width = A.shape[2]
            assert (len(A), len(B)) == (own_heads, own_heads)
            blocks = [
                state[name].double()[:, h * width : (h + 1) * width] + s * B[h].double() @ A[h].double()
                for h in range(own_heads)
            ]
            if target == "o":
                w_out = torch.cat(blocks, 1)
            else:
                out[name] = torch.cat(blocks, 1)
        if theta is not None:
            theta = theta.double()
            if config.gate == "softmax":
                gate = H * theta.exp() / theta.exp().sum()
            else:
                gate = 2 / (1 + (-theta).exp())
            w_out = torch.cat([w_out[:, h * dh : (h + 1) * dh] * gate[h] for h in range(H)], 1)
        out |= dict(zip(own, w_in.chunk(len(own)), strict=True)) | {out_name: w_out}
    return out


def stock_copy(patched: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A stock float64 model with the patched one's base weights."""
    stock = build().double()
    stock.load_state_dict({k: v.double() for k, v in fastheads.base_state_dict(patched).items()})
    return stock.train(patched.training)


class TowerOf(nn.Module):
    """`features(model, tower)` as a module's forward, for `torch.func.functional_call` and torch.compile."""

    def __init__(self, model: nn.Module, tower: str) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        return model.encode_text(x) if self.tower == "text" else model.encode_image(x)

    def inputs(self, batch: int = 3, seed: int = 0) -> Tensor:
        ids = texts(batch, seed)
        return ids if self.tower == "text" else images(batch, seed=seed).to(next(self.model.visual.parameters()).dtype)


def oracle(patched: nn.Module, build: Callable[[], nn.Module], config: fastheads.HeadConfig, tower: str) -> Any:
    """A float64 stock model run with `dense_weights`: its features, and the adapters they are differentiable in."""
    adapters = {k: v.detach().clone().requires_grad_() for k, v in fastheads.adapter_state_dict(patched).items()}
    stock = TowerOf(stock_copy(patched, build), tower)
    dense = {f"model.{k}": v for k, v in dense_weights(patched, adapters, config, tower).items()}
    return torch.func.functional_call(stock, dense, (stock.inputs(),)), adapters


# ------------------------------------------------------------------------------------------------ processes


def ddp_gradients(rank: int, folder: str) -> None:
    """One of two DDP processes: backward on its half of the batch; rank 0 writes the gradients down."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = patched("clip", fastheads.HeadConfig())
    model.forward = lambda image: model.encode_image(image)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(images(4)[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/gradients.pt")
    dist.destroy_process_group()
