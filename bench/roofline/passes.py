"""What each way of running the attention module moves and computes: a `Pass` per kernel, from LayerNorm to residual.

Our kernels' products and exponentials are those of their loops, padding included (`loops`), on the chip's
architecture; the peers' are those of whole tiles. Sizes are those of 16-bit training. A `row` is the bytes of one
`[B, N, D]` activation; counted is each tensor's one read and one write of memory, never what caches miss. T = x Aᵀ has
R = T·H·r columns, for q and v.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from bench.base.towers import TARGETS, Setting
from bench.roofline import loops
from bench.roofline.chips import Rates


@dataclass(frozen=True)
class Pass:
    """One kernel, or a few that share their reads. bytes: of device memory; the others: operations; l2: bytes of L2."""

    name: str
    bytes: float = 0
    gemm: float = 0
    attention: float = 0
    exp: float = 0
    l2: float = 0

    def seconds(self, rates: Rates) -> float:
        """The slowest of what it needs, as if all overlapped."""
        return max(
            self.bytes / rates.hbm,
            self.gemm / rates.gemm + self.attention / rates.attention,
            self.exp / rates.exp,
            self.l2 / rates.l2,
        )


DX = "dX of the projection"
DELTAS = (0, 2)  # of q and v


class Run(NamedTuple):
    """saved: bytes that the forward pass keeps for the backward pass."""

    forward: list[Pass]
    backward: list[Pass]
    saved: float


def _around(s: Setting, forward: Sequence[Pass], backward: Sequence[Pass], saved: float = 0) -> Run:
    """Half of a block: its LayerNorm and residual around what is inside."""
    gradients = [Pass("LayerNorm backward", 3 * s.row), Pass("residual's gradient add", 3 * s.row)]
    residual = Pass("residual add", 3 * s.row)
    return Run([Pass("LayerNorm", 2 * s.row), *forward, residual], [*backward, *gradients], saved)


def mlp(s: Setting) -> list[Pass]:
    """The block's other half, frozen, forward and backward: the same in every path, needed for the whole step."""

    def product(name: str) -> Pass:
        return Pass(name, 5 * s.row + 8 * s.weight, gemm=4 * s.product)

    forward = [product("fc1"), Pass("GELU", 8 * s.row), product("fc2")]
    backward = [product("dX of fc2"), Pass("GELU backward", 12 * s.row), product("dX of fc1")]
    run = _around(s, forward, backward)
    return run.forward + run.backward


def module(s: Setting, forward: Sequence[Pass], backward: Sequence[Pass], saved: float) -> Run:
    """The attention module around what lies between its LayerNorm and out_proj."""
    out = Pass("out_proj", 2 * s.row + 2 * s.weight, gemm=s.product)
    return _around(s, [*forward, out], [out, *backward], saved)


def qkv(s: Setting, name: str = "q, k, v projection") -> Pass:
    return Pass(name, 4 * s.row + 6 * s.weight, gemm=3 * s.product)


def _waste(s: Setting) -> float:
    """Scores for each one needed in FlashAttention-2 as torch has it: at head size 64 its tiles are 128 × 128."""
    return (-(-s.tokens // 128) * 128) ** 2 / s.tokens**2


def sdpa(s: Setting) -> Pass:
    waste = _waste(s)
    return Pass("SDPA", 4 * s.row + s.lse, attention=2 * s.attention * waste, exp=s.scores * waste)


def sdpa_backward(s: Setting) -> list[Pass]:
    """Its dQ is summed in a float32 buffer (2 rows): zeroed beside dO ∘ O, added to, rounded in a pass of its own."""
    waste = _waste(s)
    return [
        Pass("SDPA backward: Σ dO ∘ O", 4 * s.row + s.lse),
        Pass("SDPA backward", 8 * s.row + 2 * s.lse, attention=5 * s.attention * waste, exp=s.scores * waste),
        Pass("SDPA backward: dQ rounded", 3 * s.row),
    ]


def _adapted(s: Setting, forward: Sequence[Pass], back: Sequence[Pass], after: Sequence[Pass], saved: float) -> Run:
    """The module by PyTorch's operations, SDPA then the gate, and what adapts q and v.

    forward: after the projection; back, after: before and after the projection's own backward pass.
    """
    gate = [Pass("gate: dO", 2 * s.row), Pass("gate: dO ∘ O", 3 * s.row), Pass("gate: its sum", s.row)]
    attend = [sdpa(s), Pass("gate", 2 * s.row)]
    projection = [Pass("dQ, dK, dV stacked", 6 * s.row), qkv(s, DX)]
    backward = [*gate, *sdpa_backward(s), *back, *projection, *after]
    return module(s, [qkv(s), *forward, *attend], backward, saved)


def floor(s: Setting, rank: int, arch: int = 80) -> Run:
    """The frozen model without a copy or a separate bias: less than this, no path with these products can need."""
    attend = Pass("attention", 4 * s.row + s.lse, attention=2 * s.attention, exp=s.scores)
    # five products; reads q, k, v, o, dO, writes dQ, dK, dV
    back = Pass("attention backward", 8 * s.row + 3 * s.lse, attention=5 * s.attention, exp=s.scores)
    return module(s, [qkv(s), attend], [back, qkv(s, DX)], 5 * s.row + s.lse)


def stock(s: Setting, rank: int, arch: int = 80) -> Run:
    """The frozen model as OpenCLIP 3.3 runs it: nn.MultiheadAttention(batch_first=True), in training.

    Its transposed input keeps the bias out of the product; q, k, v are made contiguous; each part's gradient is written
    into zeros of the size of all three, and these are summed. Copies that only some backends make are not counted.
    """
    copied = [Pass("bias add", 6 * s.row), Pass("q, k, v made contiguous", 6 * s.row)]
    summed = [Pass("dQ, dK, dV each into zeros", 3 * (3 + 2) * s.row), Pass("their sum", 2 * 9 * s.row)]
    backward = [*sdpa_backward(s), *summed, Pass("dQKV made contiguous", 6 * s.row), qkv(s, DX)]
    run = module(s, [qkv(s), *copied, sdpa(s)], backward, 5 * s.row + s.lse)
    return run._replace(backward=[Pass("dO made contiguous", 2 * s.row), *run.backward])


def plain(s: Setting, rank: int, arch: int = 80) -> Run:
    """HA-LoRA and gates as one writes them in PyTorch: projection, low-rank path beside it, SDPA, gate."""
    low, images_up = s.low(rank), 2 * s.batch * TARGETS * s.width * rank
    rows, up, down = TARGETS * s.row, s.up_product(rank), s.low_product(rank)
    forward = [
        Pass("T = x Aᵀ, each target", rows + low, gemm=down),
        Pass("T by heads", 2 * low),
        Pass("T Bᵀ, each target", low + 2 * images_up + rows, gemm=up),
        Pass("scale, each target", 2 * rows),
        Pass("add, each target", 3 * rows),
    ]
    back = [
        Pass("scale's gradient, each target", 2 * rows),
        Pass("its gradient by heads, each target", 2 * rows),
        Pass("dT = dY B, each target", rows + images_up + low, gemm=up),
        Pass("dB, each target", rows + low + 2 * images_up, gemm=up),
        *(Pass(f"{name}, each target", rows + low, gemm=down) for name in ("dA", "dX of the low-rank path")),
    ]
    return _adapted(s, forward, back, [Pass("dX summed", 3 * rows)], 8 * s.row + low + images_up + s.lse)


def merged(s: Setting, rank: int, arch: int = 80) -> Run:
    """W + s·B A formed under autograd, then the projection with a weight that wants its gradient."""
    from_dw = Pass("dA, dB from dW", 42 * s.weight, gemm=4 * TARGETS * s.weight * rank)
    run = _adapted(s, [], [], [qkv(s, "dW"), from_dw], 6 * s.row + 6 * s.weight + s.lse)
    # delta of q and v, beside zeros for k, added, all in float32; rounded
    fold = Pass("W + s·B A", 82 * s.weight, gemm=2 * TARGETS * s.weight * rank)
    return run._replace(forward=[fold, *run.forward])


def factored(s: Setting, rank: int, arch: int = 80) -> Run:
    """The deltas through cuBLAS, in place, in one autograd.Function; the heads' up-projections block-diagonal."""
    rows, low, up = TARGETS * s.row, s.low(rank), s.low_product(rank)
    forward = [Pass("T = x Aᵀ", s.row + low, gemm=up), Pass("y += T Bᵀ, each target", 2 * rows + low, gemm=up)]
    after = [Pass(f"{name}, each target", rows + low, gemm=up) for name in ("U = dY B", "dA", "dB")]
    after.append(Pass("dX += U A, each target", 2 * rows + low, gemm=up))
    return _adapted(s, forward, [], after, 6 * s.row + low + s.lse)


def peft(s: Setting, rank: int, arch: int = 80) -> Run:
    """PEFT 0.21's LoRA on nn.MultiheadAttention: weights merged before and unmerged after each call, dense dW."""
    forward, backward, saved = stock(s, rank)
    merging = [Pass("weights merged and unmerged", 240 * s.weight), Pass("x made contiguous", 2 * s.row)]
    dw = [qkv(s, "dW"), Pass("dW of out_proj", 2 * s.row + 2 * s.weight, gemm=s.product)]
    from_dw = Pass("dA, dB from dW", 80 * s.weight)
    return Run([*merging, *forward], [*backward, *dw, from_dw], saved + s.row + 8 * s.weight)


ATTENTION_BACKWARD = "attention backward with the gate's gradient"


def _fold(s: Setting, rank: int, stored: int) -> Pass:
    """`[W'; A]` or `[W; A]` in 16 bits, from a base stored in `stored` bytes."""
    adapters = 4 * TARGETS * s.width * rank + (4 + 2) * s.columns(rank) * s.width
    return Pass("[W; A] formed", 3 * s.weight * (stored + 2) + adapters)


def _project(s: Setting, rank: int) -> Pass:
    bytes_ = 4 * s.row + s.low(rank) + 6 * s.weight
    return Pass("projection and T, one product", bytes_, gemm=3 * s.product + s.low_product(rank))


def ours(s: Setting, rank: int, arch: int = 80, *, delta: bool) -> Run:
    """One product, then attention with the gate in its epilogue.

    stacked: on `[W'; A]`, the base stored in float32. delta: on `[W; A]`, stored in 16 bits, the deltas added on chip.
    """
    low, deltas, dh, heads = s.low(rank), (DELTAS, rank) if delta else (), s.width // s.heads, s.batch * s.heads
    added, more = (low, s.low_product(rank)) if delta else (0, 0)
    work = loops.attention_fwd(arch, dh, s.tokens, *deltas) * heads
    attend = Pass("attention, gate", 4 * s.row + added + s.lse, attention=work.products, exp=work.exps)
    work = loops.attention_bwd(arch, dh, s.tokens, heads, *deltas) * heads
    of_low_rank = loops.low_rank_bwd(dh, s.batch * s.tokens, TARGETS, s.heads, rank)
    backward = [
        Pass(ATTENTION_BACKWARD, 7 * s.row + 3 * s.lse + added, attention=work.products, exp=work.exps),
        Pass("dB and U = dY B", TARGETS * s.row + 2 * low, attention=of_low_rank.products),
        Pass("dA = Uᵀ x", s.row + low, gemm=s.low_product(rank)),
        Pass(DX, 4 * s.row + added + 6 * s.weight, gemm=3 * s.product + more),
    ]
    forward = [_fold(s, rank, 2 if delta else 4), _project(s, rank), attend]
    return module(s, forward, backward, 5 * s.row + low + s.lse)


def stacked_recompute(s: Setting, rank: int, arch: int = 80) -> Run:
    """`stacked`, keeping LayerNorm's input and lse: the backward pass makes x again, uncounted, and q, k, v."""
    forward, backward, _ = ours(s, rank, arch, delta=False)
    return Run(forward, [_fold(s, rank, 4), _project(s, rank), *backward], s.row + s.lse)


def one_pass(s: Setting, rank: int, arch: int = 80) -> Run:
    """A program per image and head projects too: each reads the whole x of its image and its head's weights from L2."""
    l2 = s.heads * s.row + s.batch * 6 * s.weight
    work = loops.one_pass_fwd(arch, s.width // s.heads, s.tokens, s.heads, DELTAS, rank) * (s.batch * s.heads)
    bytes_ = 2 * s.row + s.lse + 6 * s.weight
    kernel = Pass("projection, attention, gate", bytes_, attention=work.products, exp=work.exps, l2=l2)
    run = module(s, [Pass("W, A in 16 bits", 18 * s.weight), kernel], [], 2 * s.row + s.lse)
    again = [_fold(s, rank, 4), _project(s, rank)]
    return run._replace(backward=[*again, *ours(s, rank, arch, delta=True).backward])


PATHS = {path.__name__: path for path in (floor, stock, plain, factored, merged, peft)}
PATHS |= {"stacked": partial(ours, delta=False), "stacked, recompute": stacked_recompute}
PATHS |= {"delta": partial(ours, delta=True), "one_pass": one_pass}
WORDS = {
    "floor": "frozen, no copies",
    "stock": "frozen, as OpenCLIP runs it",
    "plain": "plain-PyTorch HA-LoRA, SDPA",
    "factored": "factored through cuBLAS",
    "merged": "merged weights, autograd",
    "peft": "PEFT (plain LoRA, no gates)",
}
