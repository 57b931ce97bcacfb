"""Every host's attention, patched, beside its own stock attention frozen: forward and backward; the goal is 1.02 ×."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastheads
from bench.contests import vision
from bench.contests.attentions import adapters
from bench.contests.contenders.towers import missing
from bench.contests.contest import Contender, Group, Trial, refusals, training_trial
from bench.contests.vision import VisionCase
from fastheads.hosts import host_of
from fastheads.reference import softmax_gate


def _multihead(width: int, heads: int) -> nn.Module:
    return nn.MultiheadAttention(width, heads, batch_first=True)


def _openclip(width: int, heads: int) -> nn.Module:
    from open_clip.transformer import Attention

    return Attention(width, heads)


def _timm(width: int, heads: int) -> nn.Module:
    from timm.layers import Attention

    return Attention(width, heads, qkv_bias=True)


def _timm_norms(width: int, heads: int) -> nn.Module:
    from timm.layers import Attention

    return Attention(width, heads, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)


def _eva(width: int, heads: int) -> nn.Module:
    from timm.models.eva import EvaAttention

    return EvaAttention(width, heads, qkv_fused=False, num_prefix_tokens=1, scale_norm=False)


def _rope(width: int, heads: int) -> nn.Module:
    from timm.layers import AttentionRope

    return AttentionRope(width, heads, num_prefix_tokens=1)


def _huggingface(family: str, width: int, heads: int) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}VisionConfig")(hidden_size=width, num_attention_heads=heads)
    config._attn_implementation = "sdpa"
    module = getattr(transformers.models, family.lower())
    attention: nn.Module = getattr(getattr(module, f"modeling_{family.lower()}"), f"{family}Attention")(config)
    return attention


class Host(NamedTuple):
    """make: of width and heads. package: that has it. call: the module's, of x and positions `[N − 1, 2·dh]`."""

    make: Callable[[int, int], nn.Module]
    package: str
    call: Callable[[Any, Tensor, Tensor], Tensor] = lambda module, x, rope: module(x)


def _turned(module: Any, x: Tensor, rope: Tensor) -> Tensor:
    return module(x, rope=rope)  # type: ignore[no-any-return]


HOSTS = {
    "nn.MultiheadAttention": Host(_multihead, "torch", lambda module, x, _: module(x, x, x, need_weights=False)[0]),
    "OpenCLIP Attention": Host(_openclip, "open_clip"),
    "timm Attention": Host(_timm, "timm"),
    "timm Attention, q and k norms": Host(_timm_norms, "timm"),
    "timm EvaAttention, rotary": Host(_eva, "timm", _turned),
    "timm AttentionRope, rotary": Host(_rope, "timm", _turned),
    "CLIPAttention": Host(functools.partial(_huggingface, "CLIP"), "transformers", lambda module, x, _: module(x)[0]),
    "SiglipAttention": Host(
        functools.partial(_huggingface, "Siglip"), "transformers", lambda module, x, _: module(x)[0]
    ),
}


@dataclass(frozen=True)
class HostCase(VisionCase):
    """A layer of a tower of this size, as a host has it."""

    host: str = ""

    @property
    def name(self) -> str:
        return f"{self.host}: {super().name}"

    def extra(self) -> dict[str, Any]:
        return super().extra() | {"host": self.host}


def trial(case: HostCase, maths: str, patched: bool = False) -> Trial:
    """maths: "ha-lora", or "frozen". Not `patched`: by the stock module, into whose weights adapters are folded."""
    host, (width, heads) = HOSTS[case.host], (case.of.width, case.of.heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = host.make(width, heads).to(case.device, case.stored).train().requires_grad_(False)
    module = module.double() if case.exact else module
    x, dy = (case.tensor(case.batch, case.length, width, stream=i, dtype=case.stored) for i in range(2))
    rope = case.tensor(case.length - 1, 2 * width // heads, stream=2, dtype=case.stored)
    wide = torch.float64 if case.exact else torch.float32
    own = {n: value.to(case.device, wide) for n, value in adapters(maths, width, heads, case.ranks[0], 0).items()}
    if patched:
        with refusals():
            fastheads.patch(_one_layer(module), fastheads.HeadConfig(rank=case.ranks[0]))
        for name, value in own.items():
            own[name] = module.heads.get_parameter(name)
            own[name].data.copy_(value)
    x.requires_grad_()
    named = {"x": [x], **{name: [value.requires_grad_()] for name, value in own.items()}}

    def forward() -> Tensor:
        with case.computing():
            if patched or not own:
                return host.call(module, x, rope)
            return host.call(_Folded(module, own), x, rope)

    known = (x, dy, rope, *module.parameters(), *module.buffers())
    return training_trial(forward, dy, lambda: named, lambda: known, result="y", samples=case.batch)


def _one_layer(attention: nn.Module) -> nn.Module:
    """As little of a model as `patch` takes."""
    model: Any = nn.Module()
    model.visual, model.visual.transformer, block = nn.Module(), nn.Module(), nn.Module()
    block.attn, model.visual.transformer.resblocks = attention, nn.ModuleList([block])
    return model


class _Folded:
    """A stock module called with weights into which deltas and gates are folded, differentiable in them."""

    def __init__(self, module: nn.Module, own: dict[str, Tensor]) -> None:
        host: Any = host_of(module)
        names = {id(p): name for name, p in module.named_parameters()}
        stored, w_out = host.weights(module), host.output(module).weight
        for_q, for_v = (own["lora_B"] @ own["lora_A"]).flatten(1, 2)
        delta = torch.cat((for_q, torch.zeros_like(for_q), for_v)).split([len(w) for w in stored])
        self.module, columns = module, softmax_gate(own["theta"]).repeat_interleave(w_out.shape[1] // len(own["theta"]))
        self.weights = {names[id(w)]: w + part for w, part in zip(stored, delta, strict=True)}
        self.weights[names[id(w_out)]] = w_out * columns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self.weights, args, kwargs)


def _contender(name: str, words: str, patched: bool, maths: str) -> Contender:
    build = functools.partial(trial, patched=patched, maths=maths)
    return Contender(name, words, build, maths, ours=patched, why_not=lambda case: missing(HOSTS[case.host].package))


def _cases(device: str, size: str) -> Sequence[HostCase]:
    """At rank 2, which most layers have: of rank 8 the products alone are a tenth of the attention's."""
    shapes = [case for case in vision.cases("block", device, size, quick=[("B/32", 8)]) if case.ranks == (8,)]
    return [HostCase(**{**vars(case), "ranks": (2,)}, host=host) for case in shapes for host in HOSTS]


STOCK = _contender("stock", "its own attention, frozen", False, "frozen")
OURS = _contender("auto", "fastheads", True, "ha-lora")
GROUP = Group("hosts", "stock", (STOCK, OURS), _cases, trial)


def test_hosts(compete, case, contender):
    compete(GROUP, case, contender)
