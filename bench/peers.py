"""Other ways to the same mathematics, to be measured against: each replaces the attention of a stock OpenCLIP tower.

A peer is a module called as OpenCLIP 3.3 calls its attention, with that layer's frozen weights and trainable adapters
of the published shape. All but PEFT's compute HA-LoRA (a down-projection per head) with gates; PEFT's has one
down-projection for all heads and no gates, and adapts the output projection as well: that is what it offers for
nn.MultiheadAttention.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastheads.reference import softmax_gate

PARTS = (0, 2)  # q and v


class Peer(nn.Module):
    """The frozen weights of an attention layer, and lora_A `[T, H, r, D]`, lora_B `[T, H, dh, r]`, theta `[H]`."""

    def __init__(self, attention: Any, rank: int, gated: bool = True) -> None:
        super().__init__()
        self.num_heads, self.rank, width = attention.num_heads, rank, attention.embed_dim
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        device, T, H = self.in_proj_weight.device, len(PARTS), self.num_heads
        a = torch.empty(T, H, rank, width, device=device).uniform_(-(width**-0.5), width**-0.5)
        b = torch.randn(T, H, width // H, rank, device=device) * 0.02
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.theta = nn.Parameter(0.1 * torch.randn(H, device=device)) if gated else None

    def heads(self, x: Tensor) -> Tensor:
        """Gated heads `[B, N, D]` of x `[B, N, D]`."""
        raise NotImplementedError

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.out_proj(self.heads(query)), None

    def split(self, y: Tensor) -> list[Tensor]:
        """q, k, v, each `[B, H, N, dh]`, views of `[B, N, 3D]`."""
        B, N, _ = y.shape
        return [p.transpose(1, 2) for p in y.view(B, N, 3, self.num_heads, -1).unbind(2)]

    def gated(self, o: Tensor) -> Tensor:
        """`[B, H, N, dh]`, each head times its gate, as `[B, N, D]`."""
        if self.theta is not None:
            o = o * softmax_gate(self.theta).to(o.dtype).view(1, -1, 1, 1)
        return o.transpose(1, 2).flatten(2)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class Plain(Peer):
    """As one writes it in PyTorch: projection, the low-rank path beside it, SDPA, gate."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def heads(self, x: Tensor) -> Tensor:
        each = self.split(F.linear(x, self.in_proj_weight, self.in_proj_bias))
        dtype = each[0].dtype
        for t, part in enumerate(PARTS):
            low = torch.einsum("bnd,hrd->bhnr", x, self.lora_A[t].to(dtype))
            each[part] = each[part] + 1.0 * (low @ self.lora_B[t].to(dtype).mT)
        q, k, v = each
        return self.gated(self.attend(q, k, v))


class XFormers(Plain):
    """`Plain` with xformers' memory_efficient_attention, which wants `[B, N, H, dh]`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


class Merged(Peer):
    """W + s·B A formed under autograd, in float32, rounded once; then the stock projection, with a dense dW."""

    def heads(self, x: Tensor) -> Tensor:
        for_q, for_v = torch.einsum("thdr,thrk->thdk", self.lora_B, self.lora_A).flatten(1, 2).unbind(0)
        weight = self.in_proj_weight + torch.cat((for_q, torch.zeros_like(for_q), for_v))
        dtype = self.compute_dtype(x)
        bias = None if self.in_proj_bias is None else self.in_proj_bias.to(dtype)
        q, k, v = self.split(F.linear(x, weight.to(dtype), bias))
        return self.gated(F.scaled_dot_product_attention(q, k, v))


class _Factored(torch.autograd.Function):
    """y = x Wᵀ + b, then y_q += T_q B_qᵀ and y_v += T_v B_vᵀ in place; T = x Aᵀ.

    U = dY_q B_q, dY_v B_v;  dA = Uᵀ x;  dB = dYᵀ T (its diagonal blocks are the heads');  dX = dY W, += U A in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, up: Tensor) -> Tensor:
        """x `[M, D]`; a `[T, H·r, D]`, up `[T, D, H·r]` block-diagonal, both in x's dtype."""
        D = w.shape[1]
        y = F.linear(x, w, bias)
        low = F.linear(x, a.flatten(0, 1)).unflatten(1, a.shape[:2])
        for t, part in enumerate(PARTS):
            y[:, part * D : (part + 1) * D].addmm_(low[:, t], up[t].T)
        ctx.save_for_backward(x, w, a, up, low)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, up, low = ctx.saved_tensors
        dy, D = grads[0], w.shape[1]
        dx = dy @ w
        da, dup = torch.empty_like(a), torch.empty_like(up)
        for t, part in enumerate(PARTS):
            d = dy[:, part * D : (part + 1) * D]
            u = d @ up[t]
            torch.mm(u.T, x, out=da[t])
            torch.mm(d.T, low[:, t], out=dup[t])
            dx.addmm_(u, a[t])
        return dx, None, None, da, dup


class Factored(Peer):
    """The deltas factored through cuBLAS in one autograd.Function with in-place products, in unsloth's way."""

    def heads(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        dtype, (T, H, dh, r) = self.compute_dtype(x), self.lora_B.shape
        diagonal = torch.eye(H, device=x.device).view(1, H, 1, H, 1)
        up = (self.lora_B.unsqueeze(3) * diagonal).reshape(T, H * dh, H * r).to(dtype)
        bias = None if self.in_proj_bias is None else self.in_proj_bias.to(dtype)
        flat = x.to(dtype).reshape(B * N, D)
        with torch.autocast(x.device.type, enabled=False):
            y = _Factored.apply(flat, self.in_proj_weight.to(dtype), bias, self.lora_A.flatten(1, 2).to(dtype), up)
        q, k, v = self.split(y.view(B, N, 3 * D))
        return self.gated(F.scaled_dot_product_attention(q, k, v))


PEERS: dict[str, type[Peer]] = {"plain": Plain, "xformers": XFormers, "factored": Factored, "merged": Merged}


def blocks_of(model: Any) -> Any:
    """The residual blocks of the image tower."""
    return model.visual.transformer.resblocks


def with_peer(model: Any, name: str, ranks: list[int]) -> Any:
    """Replaces the attention of every block of the image tower, in place."""
    for block, rank in zip(blocks_of(model), ranks, strict=True):
        block.attn = PEERS[name](block.attn, rank)
    return model


def with_peft(model: Any, ranks: list[int]) -> Any:
    """PEFT's LoRA on every attention module of the image tower, in place."""
    import peft

    pattern = {f"visual.transformer.resblocks.{i}.attn": rank for i, rank in enumerate(ranks)}
    config = peft.LoraConfig(
        r=min(ranks), lora_alpha=min(ranks), target_modules=list(pattern), rank_pattern=pattern, alpha_pattern=pattern
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return wrapped.base_model.model


def why_not(name: str, device: str) -> str:
    """Why a peer cannot run here, in words; empty where it can."""
    if name == "peft" and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    if name != "xformers":
        return ""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import memory_efficient_attention

            q = torch.zeros(1, 16, 1, 64, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
            memory_efficient_attention(q, q, q)
    except Exception as error:
        return f"xformers has no attention for this device: {str(error).strip().splitlines()[0]}"
    return ""


def check_peer(name: str, width: int = 64, heads: int = 4) -> float:
    """Largest difference of a peer's heads from the reference's, in float64: rounding, if it is the same maths."""
    from fastheads import reference

    peer = PEERS[name](nn.MultiheadAttention(width, heads, batch_first=True), 3).double()
    x = torch.randn(2, 9, width, dtype=torch.float64)
    with torch.no_grad():
        assert peer.theta is not None
        gate = softmax_gate(peer.theta)
        right = reference.head_attention(
            x, peer.in_proj_weight, peer.in_proj_bias, peer.lora_A, peer.lora_B, num_heads=heads, gate=gate
        )
        return float((peer.heads(x) - right.o).abs().max())
