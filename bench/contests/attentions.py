"""Attention modules to be measured against, written from their definitions; each stands in OpenCLIP's block as its own.

- `frozen`, `full`: the model's attention, its weights frozen or trained.
- `ha-lora`: a low-rank delta of its own for each head's query and value, and a gate per head. What fastheads computes.
- `lora qkvo`: plain LoRA on the input and the output projection, which is what PEFT documents for this module.
- `lora qv`: plain LoRA on the query and the value projection, which is what CLIP-LoRA offers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contests.models import blocks_of
from fastheads import reference
from fastheads.reference import softmax_gate

PARTS = (0, 2)  # q and v


def adapters(maths: str, width: int, heads: int, rank: int, layer: int) -> dict[str, Tensor]:
    """The trained numbers of one layer, float32 on the CPU, the same at every call and for every contender.

    ha-lora: lora_A `[2, H, r, D]`, lora_B `[2, H, dh, r]`, theta `[H]`. lora qkvo: in_A, out_A `[r, D]`,
    in_B `[3D, r]`, out_B `[D, r]`. lora qv: lora_A `[2, r, D]`, lora_B `[2, D, r]`.
    """
    g = torch.Generator().manual_seed(1000 * rank + layer)

    def down(*shape: int) -> Tensor:
        return (torch.rand(*shape, rank, width, generator=g) * 2 - 1) * width**-0.5

    def up(*shape: int) -> Tensor:
        return 0.02 * torch.randn(*shape, rank, generator=g)

    if maths == "ha-lora":
        theta = 0.1 * torch.randn(heads, generator=g)
        return {"lora_A": down(2, heads), "lora_B": up(2, heads, width // heads), "theta": theta}
    if maths == "lora qkvo":
        return {"in_A": down(), "in_B": up(3 * width), "out_A": down(), "out_B": up(width)}
    if maths == "lora qv":
        return {"lora_A": down(2), "lora_B": up(2, width)}
    return {}


def trained(attn: Any, maths: str) -> dict[str, Tensor]:
    """What of an attention is trained, whoever's it is, by the names that `adapters` gives it."""
    if maths == "full":
        return {"w_in": attn.in_proj_weight, "w_out": attn.out_proj.weight}
    if hasattr(attn, "base_layer"):  # PEFT's, with the output projection's inside
        layers = {"in": attn, "out": attn.base_layer.out_proj}
        each = ((of, side) for of in layers for side in "AB")
        return {f"{of}_{side}": getattr(layers[of], f"lora_{side}")["default"].weight for of, side in each}
    owner = attn if isinstance(attn, Attention) else getattr(attn, "heads", None)
    return {} if owner is None else {n: p for n, p in owner.named_parameters(recurse=False) if p.requires_grad}


def modules(kind: "type[Attention]") -> Callable[[Any, Sequence[int]], Any]:
    """Puts a `kind` in the place of every attention of the image tower."""

    def dress(model: Any, ranks: Sequence[int]) -> Any:
        for layer, (block, rank) in enumerate(zip(blocks_of(model), ranks, strict=True)):
            block.attn = kind(block.attn, rank, layer)
        return model

    return dress


def split(qkv: Tensor, heads: int) -> list[Tensor]:
    """q, k, v, each `[B, H, N, dh]`, views of `[B, N, 3D]`."""
    return [part.transpose(1, 2) for part in qkv.unflatten(2, (3, heads, -1)).unbind(2)]


def joined(o: Tensor) -> Tensor:
    """Heads `[B, H, N, dh]` as `[B, N, D]`."""
    return o.transpose(1, 2).flatten(2)


def gated(o: Tensor, gate: Tensor) -> Tensor:
    """Heads `[B, H, N, dh]`, each times its gate, as `[B, N, D]`."""
    return joined(o * gate.to(o.dtype).view(1, -1, 1, 1))


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As SDPA has it; xformers wants `[B, N, H, dh]`."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


class Attention(nn.Module):
    """A layer's attention by plain PyTorch, called as OpenCLIP 3.3 calls it; its weights are the original module's."""

    maths = "frozen"
    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, original: Any, rank: int, layer: int) -> None:
        super().__init__()
        self.num_heads, self.rank = original.num_heads, rank
        self.in_proj_weight, self.in_proj_bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj = original.out_proj
        weight = self.in_proj_weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for name, value in adapters(self.maths, original.embed_dim, self.num_heads, rank, layer).items():
            self.register_parameter(name, nn.Parameter(value.to(weight.device, dtype)))

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.out_proj(self.heads(query)), None

    def heads(self, x: Tensor) -> Tensor:
        """Heads `[B, N, D]`, concatenated, of x `[B, N, D]`."""
        return joined(self.attend(*split(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.num_heads)))

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class Plain(Attention):
    """HA-LoRA as one writes it in PyTorch: projection, the low-rank path beside it, SDPA, gate."""

    maths = "ha-lora"

    def heads(self, x: Tensor) -> Tensor:
        return gated(self.attend(*self.project(x)), softmax_gate(self.theta))

    def project(self, x: Tensor) -> list[Tensor]:
        each = split(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.num_heads)
        dtype = each[0].dtype
        for t, part in enumerate(PARTS):
            low = torch.einsum("bnd,hrd->bhnr", x, self.lora_A[t].to(dtype))
            each[part] = each[part] + 1.0 * (low @ self.lora_B[t].to(dtype).mT)
        return each


class XFormers(Plain):
    attend = staticmethod(xformers_attention)


class Reference(Plain):
    """The formula in `fastheads.reference`; in float64 what all others are held to."""

    def heads(self, x: Tensor) -> Tensor:
        tensors = (x, self.in_proj_weight, self.in_proj_bias, self.lora_A, self.lora_B)
        return reference.head_attention(*tensors, num_heads=self.num_heads, gate=softmax_gate(self.theta)).o


class Compiled(Reference):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.compiled = torch.compile(super().heads, fullgraph=True)

    def heads(self, x: Tensor) -> Tensor:
        return self.compiled(x)


class Merged(Plain):
    """W + s·B A formed under autograd, in float32, rounded once; then the stock projection, with a dense dW."""

    def project(self, x: Tensor) -> list[Tensor]:
        dtype = self.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            for_q, for_v = torch.einsum("thdr,thrk->thdk", self.lora_B, self.lora_A).flatten(1, 2).unbind(0)
            weight = self.in_proj_weight + torch.cat((for_q, torch.zeros_like(for_q), for_v))
        return split(F.linear(x, weight.to(dtype), self.in_proj_bias.to(dtype)), self.num_heads)


class _Factored(torch.autograd.Function):
    """y = x Wᵀ + b, then y_q += T_q B_qᵀ and y_v += T_v B_vᵀ in place; T = x Aᵀ.

    U = dY_q B_q, dY_v B_v;  dA = Uᵀ x;  dB = dYᵀ T (its diagonal blocks are the heads');  dX = dY W, += U A in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor, a: Tensor, up: Tensor) -> Tensor:
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


class Factored(Plain):
    """The deltas factored through cuBLAS in one autograd.Function with in-place products, in unsloth's way."""

    def project(self, x: Tensor) -> list[Tensor]:
        B, N, D = x.shape
        dtype, (T, H, dh, r) = self.compute_dtype(x), self.lora_B.shape
        diagonal = torch.eye(H, device=x.device).view(1, H, 1, H, 1)
        up = (self.lora_B.unsqueeze(3) * diagonal).reshape(T, H * dh, H * r).to(dtype)
        weights = (t.to(dtype) for t in (self.in_proj_weight, self.in_proj_bias, self.lora_A.flatten(1, 2)))
        with torch.autocast(x.device.type, enabled=False):
            y = _Factored.apply(x.to(dtype).reshape(B * N, D), *weights, up)
        return split(y.view(B, N, 3 * D), H)


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x Aᵀ Bᵀ, in what the products come to."""
    low = F.linear(x, a.to(x.dtype))
    return F.linear(low, b.to(low.dtype))


class LoraQKVO(Attention):
    """y = (W + B A) x for the input and the output projection."""

    maths = "lora qkvo"

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias) + low_rank(query, self.in_A, self.in_B)
        o = joined(self.attend(*split(qkv, self.num_heads)))
        return self.out_proj(o) + low_rank(o, self.out_A, self.out_B), None


class LoraQV(Attention):
    """y = (W + B A) x for the query and the value projection."""

    maths = "lora qv"

    def heads(self, x: Tensor) -> Tensor:
        each = list(F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        for t, part in enumerate(PARTS):
            each[part] = each[part] + low_rank(x, self.lora_A[t], self.lora_B[t])
        return joined(self.attend(*split(torch.cat(each, -1), self.num_heads)))


class ClipLora(LoraQV):
    """CLIP-LoRA's way without dropout (loralib/layers.py, LinearLoRA): the delta is added to the weight before the
    product and taken from it again, past autograd, before the backward pass reads it. A product per projection.
    """

    def heads(self, x: Tensor) -> Tensor:
        each = []
        for part, (weight, bias) in enumerate(
            zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        ):
            if part not in PARTS:
                each.append(F.linear(x, weight, bias))
                continue
            t = PARTS.index(part)
            delta = (self.lora_B[t] @ self.lora_A[t]).to(weight.dtype)
            weight = weight.detach() + delta
            each.append(F.linear(x, weight, bias))
            weight.data -= delta.detach()
        return joined(self.attend(*(y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in each)))


PLAIN = {kind.maths: kind for kind in (Attention, Plain, LoraQKVO, LoraQV)} | {"full": Attention}
EXACT = {**PLAIN, "ha-lora": Reference}
