"""What each way of running the attention module moves and computes: a `Pass` per kernel, from LayerNorm to residual.

Our kernels' products and exponentials are those of their loops, padding included (`loops`), on the chip's
architecture; the peers' are those of whole tiles. Sizes are those of 16-bit training. A `row` is the bytes of one
`[B, N, D]` activation; counted is each tensor's one read and one write of memory, never what caches miss. T = x Aᵀ has
R = T·H·r columns, for q and v.
"""

from __future__ import annotations

from bench.base.shapes import TARGETS, Pass, Shape
from bench.roofline import loops
from bench.roofline.loops import Work

# ------------------------------------------------------------------------------------- what all have in common


def _norm(s: Shape) -> Pass:
    return Pass("LayerNorm", 2 * s.row)


def _out(s: Shape) -> Pass:
    return Pass("out_proj", 2 * s.row + 2 * s.weight, gemm=s.product)


def _residual(s: Shape) -> Pass:
    return Pass("residual add", 3 * s.row)


def _norm_backward(s: Shape) -> list[Pass]:
    return [Pass("LayerNorm backward", 3 * s.row), Pass("residual's gradient add", 3 * s.row)]


def _qkv(s: Shape) -> Pass:
    return Pass("q, k, v projection", 4 * s.row + 6 * s.weight, gemm=3 * s.product)


def _qkv_backward(s: Shape) -> Pass:
    return Pass("dX of the projection", 4 * s.row + 6 * s.weight, gemm=3 * s.product)


def rounded(n: int, block: int) -> int:
    """n rows as a kernel computes them, in whole blocks."""
    return -(-n // block) * block


def _attend_ideal(s: Shape) -> Pass:
    return Pass("attention", 4 * s.row + s.lse, attention=2 * s.attention, exp=s.scores)


def _attend_backward_ideal(s: Shape) -> Pass:
    """Five products; reads q, k, v, o, dO, writes dQ, dK, dV."""
    return Pass("attention backward", 8 * s.row + 3 * s.lse, attention=5 * s.attention, exp=s.scores)


# FlashAttention-2 as torch has it, at head size 64: 128 queries × 128 keys, forward and backward.
FLASH = (128, 128)


def _waste(s: Shape, tile: tuple[int, int]) -> float:
    """Scores computed, in whole tiles, for each one needed."""
    return rounded(s.tokens, tile[0]) * rounded(s.tokens, tile[1]) / s.tokens**2


def _sdpa(s: Shape) -> Pass:
    waste = _waste(s, FLASH)
    return Pass("SDPA", 4 * s.row + s.lse, attention=2 * s.attention * waste, exp=s.scores * waste)


def _sdpa_backward(s: Shape) -> list[Pass]:
    """Its dQ is summed in a float32 buffer (2 rows): zeroed beside dO ∘ O, added to, rounded in a pass of its own."""
    waste = _waste(s, FLASH)
    return [
        Pass("SDPA backward: Σ dO ∘ O", 4 * s.row + s.lse),
        Pass("SDPA backward", 8 * s.row + 2 * s.lse, attention=5 * s.attention * waste, exp=s.scores * waste),
        Pass("SDPA backward: dQ rounded", 3 * s.row),
    ]


def mlp(s: Shape) -> tuple[list[Pass], list[Pass]]:
    """The block's other half, frozen: the same in every path, needed for the whole training step."""
    forward = [
        _norm(s),
        Pass("fc1", 5 * s.row + 8 * s.weight, gemm=4 * s.product),
        Pass("GELU", 8 * s.row),
        Pass("fc2", 5 * s.row + 8 * s.weight, gemm=4 * s.product),
        _residual(s),
    ]
    backward = [
        Pass("dX of fc2", 5 * s.row + 8 * s.weight, gemm=4 * s.product),
        Pass("GELU backward", 12 * s.row),
        Pass("dX of fc1", 5 * s.row + 8 * s.weight, gemm=4 * s.product),
        *_norm_backward(s),
    ]
    return forward, backward


# ------------------------------------------------------------------------------------------------------ peers


def floor(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """The frozen model without a copy or a separate bias: less than this, no path with these products can need."""
    forward = [_norm(s), _qkv(s), _attend_ideal(s), _out(s), _residual(s)]
    backward = [_out(s), _attend_backward_ideal(s), _qkv_backward(s), *_norm_backward(s)]
    return forward, backward, 5 * s.row + s.lse


def stock(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """The frozen model as OpenCLIP 3.3 runs it: nn.MultiheadAttention(batch_first=True), in training.

    Its transposed input keeps the bias out of the product; q, k, v are made contiguous; each part's gradient is written
    into zeros of the size of all three, and these are summed. Copies that only some backends make are not counted.
    """
    forward = [
        _norm(s),
        _qkv(s),
        Pass("bias add", 6 * s.row),
        Pass("q, k, v made contiguous", 6 * s.row),
        _sdpa(s),
        _out(s),
        _residual(s),
    ]
    backward = [
        Pass("dO made contiguous", 2 * s.row),
        _out(s),
        *_sdpa_backward(s),
        Pass("dQ, dK, dV each into zeros", 3 * (3 + 2) * s.row),
        Pass("their sum", 2 * 9 * s.row),
        Pass("dQKV made contiguous", 6 * s.row),
        _qkv_backward(s),
        *_norm_backward(s),
    ]
    return forward, backward, 5 * s.row + s.lse


def _gate_backward(s: Shape) -> list[Pass]:
    return [Pass("gate: dO", 2 * s.row), Pass("gate: dO ∘ O", 3 * s.row), Pass("gate: its sum", s.row)]


def plain(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """HA-LoRA and gates as one writes them in PyTorch: projection, low-rank path beside it, SDPA, gate."""
    low, images_up = s.low(rank), 2 * s.batch * TARGETS * s.width * rank
    forward = [
        _norm(s),
        _qkv(s),
        Pass("T = x Aᵀ, each target", TARGETS * s.row + low, gemm=s.low_product(rank)),
        Pass("T by heads", 2 * low),
        Pass("T Bᵀ, each target", low + 2 * images_up + TARGETS * s.row, gemm=s.up_product(rank)),
        Pass("scale, each target", TARGETS * 2 * s.row),
        Pass("add, each target", TARGETS * 3 * s.row),
        _sdpa(s),
        Pass("gate", 2 * s.row),
        _out(s),
        _residual(s),
    ]
    backward = [
        _out(s),
        *_gate_backward(s),
        *_sdpa_backward(s),
        Pass("scale's gradient, each target", TARGETS * 2 * s.row),
        Pass("its gradient by heads, each target", TARGETS * 2 * s.row),
        Pass("dT = dY B, each target", TARGETS * s.row + images_up + low, gemm=s.up_product(rank)),
        Pass("dB, each target", TARGETS * s.row + low + 2 * images_up, gemm=s.up_product(rank)),
        Pass("dA, each target", TARGETS * s.row + low, gemm=s.low_product(rank)),
        Pass("dX of the low-rank path, each target", TARGETS * s.row + low, gemm=s.low_product(rank)),
        Pass("dQ, dK, dV stacked", 6 * s.row),
        _qkv_backward(s),
        Pass("dX summed", TARGETS * 3 * s.row),
        *_norm_backward(s),
    ]
    return forward, backward, 8 * s.row + low + images_up + s.lse


def merged(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """W + s·B A formed under autograd, then the projection with a weight that wants its gradient."""
    fold = 82 * s.weight  # delta of q and v, beside zeros for k, added, all in float32; rounded
    forward = [
        Pass("W + s·B A", fold, gemm=2 * TARGETS * s.weight * rank),
        _norm(s),
        _qkv(s),
        _sdpa(s),
        Pass("gate", 2 * s.row),
        _out(s),
        _residual(s),
    ]
    backward = [
        _out(s),
        *_gate_backward(s),
        *_sdpa_backward(s),
        Pass("dQ, dK, dV stacked", 6 * s.row),
        _qkv_backward(s),
        Pass("dW", 4 * s.row + 6 * s.weight, gemm=3 * s.product),
        Pass("dA, dB from dW", 42 * s.weight, gemm=4 * TARGETS * s.weight * rank),
        *_norm_backward(s),
    ]
    return forward, backward, 6 * s.row + 6 * s.weight + s.lse


def factored(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """The deltas through cuBLAS, in place, in one autograd.Function; the heads' up-projections block-diagonal."""
    low, up = s.low(rank), s.low_product(rank)
    forward = [
        _norm(s),
        _qkv(s),
        Pass("T = x Aᵀ", s.row + low, gemm=up),
        Pass("y += T Bᵀ, each target", TARGETS * 2 * s.row + low, gemm=up),
        _sdpa(s),
        Pass("gate", 2 * s.row),
        _out(s),
        _residual(s),
    ]
    backward = [
        _out(s),
        *_gate_backward(s),
        *_sdpa_backward(s),
        Pass("dQ, dK, dV stacked", 6 * s.row),
        _qkv_backward(s),
        Pass("U = dY B, each target", TARGETS * s.row + low, gemm=up),
        Pass("dA, each target", TARGETS * s.row + low, gemm=up),
        Pass("dB, each target", TARGETS * s.row + low, gemm=up),
        Pass("dX += U A, each target", TARGETS * 2 * s.row + low, gemm=up),
        *_norm_backward(s),
    ]
    return forward, backward, 6 * s.row + low + s.lse


def peft(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """PEFT 0.21's LoRA on nn.MultiheadAttention: weights merged before and unmerged after each call, dense dW."""
    forward, backward, saved = stock(s, rank)
    merging = Pass("weights merged and unmerged", 240 * s.weight)
    forward = [merging, Pass("x made contiguous", 2 * s.row), *forward]
    dw = [
        Pass("dW", 4 * s.row + 6 * s.weight, gemm=3 * s.product),
        Pass("dW of out_proj", 2 * s.row + 2 * s.weight, gemm=s.product),
        Pass("dA, dB from dW", 80 * s.weight),
    ]
    return forward, [*backward, *dw], saved + s.row + 8 * s.weight


# ------------------------------------------------------------------------------------------------------- ours

# Products [N, dh] × [dh, N] and exponentials [N, N] of attention's backward pass, as kernels/attention_bwd.py does it
# for more than 80 keys: Σ P ∘ dP first (S, dP), then dQ (S, dP, dS K), then dK and dV (S, dP, Pᵀ dO, dSᵀ Q).
BACKWARD_PRODUCTS, BACKWARD_EXPS = 9, 3
ATTENTION_BACKWARD = "attention backward with the gate's gradient"
DELTAS = (0, 2)  # of q and v


def _all_heads(s: Shape, work: Work) -> Work:
    return work * (s.batch * s.heads)


def _fold(s: Shape, rank: int, stored: int) -> Pass:
    """`[W'; A]` or `[W; A]` in 16 bits, from a base stored in `stored` bytes."""
    adapters = 4 * TARGETS * s.width * rank + (4 + 2) * s.columns(rank) * s.width
    return Pass("[W; A] formed", 3 * s.weight * (stored + 2) + adapters)


def _ours_attend(s: Shape, arch: int, rank: int = 0) -> Pass:
    """Attention with the gate in its epilogue, and the deltas of `rank` where it adds them."""
    deltas = (DELTAS, rank) if rank else ()
    work = _all_heads(s, loops.attention_fwd(arch, s.width // s.heads, s.tokens, *deltas))
    low = s.low(rank) if rank else 0
    return Pass("attention, gate", 4 * s.row + low + s.lse, attention=work.products, exp=work.exps)


def _project(s: Shape, rank: int) -> Pass:
    low = s.low(rank)
    return Pass(
        "projection and T, one product", 4 * s.row + low + 6 * s.weight, gemm=3 * s.product + s.low_product(rank)
    )


def _low_rank_backward(s: Shape, rank: int) -> list[Pass]:
    low = s.low(rank)
    work = loops.low_rank_bwd(s.width // s.heads, s.batch * s.tokens, TARGETS, s.heads, rank)
    return [
        Pass("dB and U = dY B", TARGETS * s.row + 2 * low, attention=work.products),
        Pass("dA = Uᵀ x", s.row + low, gemm=s.low_product(rank)),
    ]


def _ours_backward(s: Shape, rank: int, arch: int, delta: bool) -> list[Pass]:
    low, deltas = (s.low(rank), (DELTAS, rank)) if delta else (0, ())
    work = _all_heads(s, loops.attention_bwd(arch, s.width // s.heads, s.tokens, s.batch * s.heads, *deltas))
    sweeps = Pass(ATTENTION_BACKWARD, 7 * s.row + 3 * s.lse + low, attention=work.products, exp=work.exps)
    more = s.low_product(rank) if delta else 0
    dx = Pass("dX of the projection", 4 * s.row + low + 6 * s.weight, gemm=3 * s.product + more)
    return [_out(s), sweeps, *_low_rank_backward(s, rank), dx, *_norm_backward(s)]


def stacked(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """One product on `[W'; A]`, attention with the gate in its epilogue; the base stored in float32."""
    forward = [_norm(s), _fold(s, rank, 4), _project(s, rank), _ours_attend(s, arch), _out(s), _residual(s)]
    return forward, _ours_backward(s, rank, arch, delta=False), 5 * s.row + s.low(rank) + s.lse


def stacked_recompute(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """`stacked`, keeping x, the projection's input and the log-sum-exp: the backward pass projects again."""
    forward, backward, _ = stacked(s, rank, arch)
    return forward, [_fold(s, rank, 4), _project(s, rank), *backward], 2 * s.row + s.lse


def delta(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """One product on `[W; A]`, W untouched; the attention kernel adds the delta on chip; the base stored in 16 bits."""
    attend = _ours_attend(s, arch, rank)
    forward = [_norm(s), _fold(s, rank, 2), _project(s, rank), attend, _out(s), _residual(s)]
    return forward, _ours_backward(s, rank, arch, delta=True), 5 * s.row + s.low(rank) + s.lse


def one_pass(s: Shape, rank: int, arch: int = 80) -> tuple[list[Pass], list[Pass], float]:
    """A program per image and head projects too: each reads the whole x of its image and its head's weights from L2."""
    l2 = s.heads * s.row + s.batch * 6 * s.weight
    work = _all_heads(s, loops.one_pass_fwd(arch, s.width // s.heads, s.tokens, s.heads, DELTAS, rank))
    bytes_ = 2 * s.row + s.lse + 6 * s.weight
    kernel = Pass("projection, attention, gate", bytes_, attention=work.products, exp=work.exps, l2=l2)
    forward = [_norm(s), Pass("W, A in 16 bits", 18 * s.weight), kernel, _out(s), _residual(s)]
    backward = [_fold(s, rank, 4), _project(s, rank), *_ours_backward(s, rank, arch, delta=True)]
    return forward, backward, 2 * s.row + s.lse


PATHS = {
    "floor": floor,
    "stock": stock,
    "plain": plain,
    "factored": factored,
    "merged": merged,
    "peft": peft,
    "stacked": stacked,
    "stacked, recompute": stacked_recompute,
    "delta": delta,
    "one_pass": one_pass,
}
WORDS = {
    "floor": "frozen, no copies",
    "stock": "frozen, as OpenCLIP runs it",
    "plain": "plain-PyTorch HA-LoRA, SDPA",
    "factored": "factored through cuBLAS",
    "merged": "merged weights, autograd",
    "peft": "PEFT (plain LoRA, no gates)",
}
