"""What our kernels' loops compute, padding included: counted from the tiles that the launchers pick.

A program multiplies and exponentiates whole tiles: of 197 tokens it makes 208 rows or 256, as its tiles say.
`tests/bench/roofline/test_loops.py` runs the kernels and counts the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastheads.kernels.low_rank import BLOCK_ROWS, PROGRAMS
from fastheads.kernels.tiles import BACKWARD, FORWARD, ONE_PASS, Tiles, dot_width, is_spread, row_for, up_to_16
from fastheads.ops import mmd_cpu, mmd_triton
from fastheads.ops.mmd_panels import panels, workspace

DTYPE = torch.bfloat16


class Work(NamedTuple):
    """Of one head of one image: operations of products (a multiplication and an addition are two), exponentials."""

    products: int = 0
    exps: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.products + other.products, self.exps + other.exps)

    def __mul__(self, times: int) -> "Work":
        return Work(self.products * times, self.exps * times)


def product(m: int, n: int, k: int) -> Work:
    """`[m, k] @ [k, n]`."""
    return Work(2 * m * n * k)


def blocks(rows: int, block: int) -> list[int]:
    """`rows` as a loop over whole blocks takes them."""
    return [block] * -(-rows // block)


def _low(parts: Sequence[int], rank: int) -> list[int]:
    """The columns that the deltas of q, k and v stand in, 0 where there is none."""
    return [dot_width(rank) if part in parts else 0 for part in range(3)]


def _swept(length: int, block: int, tail: int) -> list[int]:
    """Rows in whole blocks, and what is left over in one of its own where there is a tail."""
    return blocks(length - (length % block if tail else 0), block) + [tail] * bool(tail)


def _attend(queries: Sequence[int], keys: Sequence[int], s_columns: int, v_columns: int) -> Work:
    """The online softmax: scores and weighted values of every block with every block; a factor for what was before."""
    pairs, rescaled = sum(queries) * sum(keys), sum(queries) * len(keys)
    return product(pairs, 1, s_columns + v_columns) + Work(exps=pairs + rescaled)


def attention_fwd(arch: int, head_dim: int, length: int, parts: Sequence[int] = (), rank: int = 0) -> Work:
    """parts: which of q, k, v (0, 1, 2) have a delta that the kernel adds."""
    row = row_for(FORWARD, arch, head_dim, length, DTYPE, deltas=len(parts), rank=rank)
    tiles, columns = row.tiles(length), up_to_16(head_dim)
    queries = _swept(length, tiles.block_m, tiles.tail)
    keys = [rows for _, rows in tiles.chunks] or blocks(length, tiles.block_n)
    q, k, v = _low(parts, rank)
    of_keys = product(sum(keys), q, columns)
    if q and k:
        of_keys += product(k, q, columns) * len(keys) + product(sum(keys), q, k)
    loaded = len(queries) if not tiles.chunks else 1  # keys that stream are loaded for every block of queries
    work = _attend(queries, keys, columns + q + k, columns + v)
    return work + product(sum(queries), k + v, columns) + of_keys * loaded


def one_pass_fwd(arch: int, head_dim: int, length: int, heads: int, parts: Sequence[int] = (), rank: int = 0) -> Work:
    """Projection and attention; every head projects the whole width."""
    tiles, columns = row_for(ONE_PASS, arch, head_dim, length, DTYPE).tiles(length), up_to_16(head_dim)
    queries, keys = _swept(length, tiles.block_m, tiles.tail), [rows for _, rows in tiles.chunks]
    width = sum(blocks(heads * head_dim, tiles.block_n))
    work = _attend(queries, keys, columns, columns)
    for low, rows in zip(_low(parts, rank), (sum(queries), sum(keys), sum(keys)), strict=True):
        work += product(rows, columns + low, width) + product(rows, columns, low)
    return work


def backward_tiles(arch: int, head_dim: int, length: int, heads: int, parts: Sequence[int] = ()) -> Tiles:
    """heads: of the whole batch."""
    given: dict[str, Any] = {"deltas": len(parts), "spread": is_spread(length, heads)}
    return row_for(BACKWARD, arch, head_dim, length, DTYPE, **given).tiles(length)


def backward_counts(tiles: Tiles) -> tuple[int, int]:
    """Products `[N, dh] × [dh, N]` and exponentials `[N, N]` of the form that kernels/attention_bwd.py takes."""
    return (5, 1) if tiles.chunks else (9, 3)


def attention_bwd(arch: int, head_dim: int, length: int, heads: int, parts: Sequence[int] = (), rank: int = 0) -> Work:
    """heads: of the whole batch. The forms are those of kernels/attention_bwd.py."""
    given: dict[str, Any] = {"deltas": len(parts), "spread": is_spread(length, heads)}
    tiles, columns = row_for(BACKWARD, arch, head_dim, length, DTYPE, **given).tiles(length), up_to_16(head_dim)
    q, k, v = _low(parts, rank)
    queries, keys = _swept(length, tiles.block_m, tiles.tail), [rows for _, rows in tiles.chunks]
    of_queries = product(sum(queries), columns, q)
    if keys:  # S, dP, dQ, dK, dV
        pairs = sum(queries) * sum(keys)
        return of_queries + product(pairs, 5, columns) + Work(exps=pairs) + product(sum(keys), k + v, columns)
    keys = blocks(length, tiles.block_n)
    pairs = sum(queries) * sum(keys)  # S, dP; then again, and dQ
    work = of_queries + product(pairs, 5, columns) + Work(exps=2 * pairs)
    work += product(sum(keys), k + v, columns) * (2 * len(queries))
    keys, queries = _swept(length, tiles.key_n, tiles.key_tail), blocks(length, tiles.key_m)
    pairs = sum(keys) * sum(queries)  # S, dP, dV, dK
    work += product(pairs, 4, columns) + Work(exps=pairs)
    return work + product(sum(keys), k + v, columns) + product(sum(queries), columns, q) * len(keys)


def low_rank_bwd(head_dim: int, rows: int, targets: int, heads: int, rank: int) -> Work:
    """dB and U of a whole batch of `rows` tokens, all targets and heads."""
    cut = len(blocks(rows, BLOCK_ROWS))
    steps = -(-cut // max(1, PROGRAMS // (targets * heads)))
    computed = sum(blocks(cut, steps)) * BLOCK_ROWS  # the last program goes on where there are no rows
    head, low = (dot_width(n) for n in (head_dim, rank))
    return product(2 * computed, head, low) * (targets * heads)


def mmd_pairs(samples: int, width: int, device: str = "cpu", itemsize: int = 4) -> int:
    """Pairs of samples whose distance a sweep over one set of them forms, on a "cpu" or on a GPU ("cuda").

    A block on the diagonal is made whole: where there is one all N² pairs, of many more samples half of them.
    """
    size = samples * width * itemsize
    if device == "cpu":
        side = mmd_cpu.side_of(workspace(mmd_cpu.SHARE * size), width)
        rows = mmd_cpu.blocks(0, samples, side)
        return sum((e - i) * (samples - i) for i, e in rows)
    cuts, _ = panels(1, samples, samples, mmd_triton.room_for(size), mmd_triton.BLOCK, True)
    return sum((e - i) * (samples - i) for i, e in cuts)
