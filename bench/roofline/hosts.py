"""Other libraries' attention by the model: what each host's own stock module, frozen, and its patched one need.

As `passes`, per layer and at rank 2. What a host does to q and k (norms, rotary positions) is the same for both; its
passes are those of the host's own PyTorch.
"""

from collections.abc import Sequence
from typing import NamedTuple

from bench.base.tables import table
from bench.base.towers import SHAPES, Setting
from bench.roofline.chips import Chip
from bench.roofline.costs import seconds
from bench.roofline.passes import ATTENTION_BACKWARD, DX, Pass, Run, module, ours, qkv, sdpa, sdpa_backward, stock

RANK = 2


class Between(NamedTuple):
    """What a host does to q and k, in rows that are read or written: forward, and backward."""

    name: str
    forward: int
    backward: int


# LayerNorm of q and of k: reads and writes each; backward reads two and writes one.
NORMS = Between("norms of q and k", 2 * 2, 2 * 3)
# Of each: x negated by halves (1) and interleaved (2), times sin (2), x times cos (2), their sum (3), the first token
# before it (2); backward times cos and sin (2 + 2), out of the interleaving, into zeros (8), summed (3), out of the
# tokens, into zeros (3).
ROTARY = Between("rotary positions", 2 * 12, 2 * 18)


class Host(NamedTuple):
    """three: whether q, k and v are products of their own in the stock module."""

    three: bool = False
    between: Between | None = None


HOSTS: dict[str, Host | None] = {
    "nn.MultiheadAttention": None,  # `passes.stock`
    "timm Attention, OpenCLIP Attention": Host(),
    "timm Attention, q and k norms": Host(between=NORMS),
    "timm EvaAttention, rotary": Host(three=True, between=ROTARY),
    "timm AttentionRope, rotary": Host(between=ROTARY),
    "CLIPAttention, SiglipAttention": Host(three=True),
}


def frozen(host: Host | None, s: Setting) -> Run:
    """The stock module, whose q, k and v are views of one product, or three products."""
    if host is None:
        return stock(s, RANK)
    if host.three:
        each = Pass("q, k or v projection", 2 * s.row + 2 * s.weight, gemm=s.product)
        project, back = [each] * 3, [each] * 3 + [Pass("dX summed", 2 * 3 * s.row)]
    else:
        project, back = [qkv(s)], [Pass("dQ, dK, dV stacked", 6 * s.row), qkv(s, DX)]
    forward, backward = _between(host, s)
    return module(s, [*project, *forward, sdpa(s)], [*sdpa_backward(s), *backward, *back], 0)


def patched(host: Host | None, s: Setting, arch: int) -> Run:
    """`stacked`; in two halves where something is between: T by itself, q, k and v packed, their gradients too."""
    run = ours(s, RANK, arch, delta=False)
    if host is None or host.between is None:
        return run
    forward, backward = _between(host, s)
    norm, fold, _, *after = run.forward
    low = Pass("T = x Aᵀ", s.row + s.low(RANK), gemm=s.low_product(RANK))
    packed = Pass("q, k, v packed", 6 * s.row)
    at = [p.name for p in run.backward].index(ATTENTION_BACKWARD) + 1
    back = [*run.backward[:at], *backward, Pass("dQ, dK, dV packed", 6 * s.row), *run.backward[at:]]
    return run._replace(forward=[norm, fold, low, qkv(s), *forward, packed, *after], backward=back)


def _between(host: Host, s: Setting) -> tuple[list[Pass], list[Pass]]:
    own = host.between
    return ([Pass(own.name, own.forward * s.row)], [Pass(own.name, own.backward * s.row)]) if own else ([], [])


def host_table(chips: Sequence[Chip]) -> str:
    """Predicted times of the patched module over its own stock one, frozen, forward and backward."""
    rows = []
    for shape in SHAPES.values():
        for name, host in HOSTS.items():
            cells = []
            for chip in chips:
                runs = (patched(host, shape, chip.arch), frozen(host, shape))
                own, theirs = (seconds((*run.forward, *run.backward), chip.reached) for run in runs)
                cells.append(f"{own / theirs:.2f} ({1e3 * own:.2f})")
            rows.append([shape.name, name, *cells])
    return table(["shape", "host, predicted", *(f"{c.name} (ms)" for c in chips)], rows)
