"""What our kernels' loops compute, padding included: counted from the tiles that the launchers pick.

A program multiplies and exponentiates whole tiles: of 197 tokens it makes 208 rows or 256, as its tiles say.
`tests/bench/roofline/test_loops.py` runs the kernels and counts the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

import bench.base.checkout  # noqa: F401
from fastheads.kernels.attend import Tiles, low_form, pieces_of
from fastheads.kernels.attention_bwd import tile_for, whole_blocks
from fastheads.kernels.attention_fwd import tiles_of
from fastheads.kernels.low_rank import BLOCK_ROWS, PROGRAMS
from fastheads.kernels.one_pass import one_pass_tiles
from fastheads.ops.mmd import panel_rows

DTYPE = torch.bfloat16


class Work(NamedTuple):
    """Of one head of one image: operations of products (a multiplication and an addition are two), exponentials."""

    products: int = 0
    exps: int = 0

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(self.products + other.products, self.exps + other.exps)

    def __mul__(self, times: object) -> Work:
        assert isinstance(times, int)
        return Work(self.products * times, self.exps * times)


def product(m: int, n: int, k: int) -> Work:
    """`[m, k] @ [k, n]`."""
    return Work(2 * m * n * k)


def blocks(rows: int, block: int) -> list[int]:
    """`rows` as a loop over whole blocks takes them."""
    return [block] * -(-rows // block)


def columns_of(head_dim: int) -> int:
    """A head's columns, as its tiles have them."""
    return sum(width for _, width in pieces_of(head_dim))


def _low(parts: Sequence[int], rank: int) -> tuple[int, int, int]:
    """The columns that the deltas of q, k and v stand in, 0 where there is none."""
    form = low_form(tuple(parts), rank, False)
    q, k, v = (form.tile if target >= 0 else 0 for target in form.targets)
    return q, k, v


def _queries(tiles: Tiles, length: int) -> list[int]:
    rest = length % tiles.block_m if tiles.tail else 0
    return blocks(length - rest, tiles.block_m) + [tiles.tail] * bool(tiles.tail)


def _attend(queries: Sequence[int], keys: Sequence[int], s_columns: int, v_columns: int) -> Work:
    """The online softmax: scores and weighted values of every block with every block; a factor for what was before."""
    pairs, rescaled = sum(queries) * sum(keys), sum(queries) * len(keys)
    return product(pairs, 1, s_columns + v_columns) + Work(exps=pairs + rescaled)


def attention_fwd(arch: int, head_dim: int, length: int, parts: Sequence[int] = (), rank: int = 0) -> Work:
    """parts: which of q, k, v (0, 1, 2) have a delta that the kernel adds."""
    tiles, columns = tiles_of(arch, head_dim, length, DTYPE, len(parts), rank), columns_of(head_dim)
    queries = _queries(tiles, length)
    keys = [rows for _, rows in tiles.chunks] or blocks(length, tiles.block_n)
    if not parts:
        return _attend(queries, keys, columns, columns)
    q, k, v = _low(parts, rank)
    work = _attend(queries, keys, columns + q + k, columns + v)
    for rows in queries:
        work += product(rows, k, columns) + product(rows, columns, v)
    loaded = len(queries) if not tiles.chunks else 1  # keys that stream are loaded for every block of queries
    for rows in keys:
        work += product(rows, q, columns) * loaded
        if q and k:
            work += (product(k, q, columns) + product(rows, q, k)) * loaded
    return work


def one_pass_fwd(arch: int, head_dim: int, length: int, heads: int, parts: Sequence[int] = (), rank: int = 0) -> Work:
    """Projection and attention; every head projects the whole width."""
    tiles, columns = one_pass_tiles(arch, head_dim, length, DTYPE), columns_of(head_dim)
    queries, keys = _queries(tiles, length), [rows for _, rows in tiles.chunks]
    low = _low(parts, rank) if parts else (0, 0, 0)
    width = sum(blocks(heads * head_dim, tiles.block_n))
    work = _attend(queries, keys, columns, columns)
    for part, rows in ((0, sum(queries)), (1, sum(keys)), (2, sum(keys))):
        work += product(rows, columns + low[part], width) + product(rows, columns, low[part])
    return work


def _swept(length: int, block: int) -> list[int]:
    """Rows in whole blocks, and what is left over, up to 16 of them, in one of 16."""
    whole = whole_blocks(length, block)
    return blocks(whole, block) + blocks(length - whole, 16)


def attention_bwd(arch: int, head_dim: int, length: int, heads: int, parts: Sequence[int] = (), rank: int = 0) -> Work:
    """heads: of the whole batch. The query sweep makes delta and dQ, the key sweep dK and dV."""
    tile, columns = tile_for(arch, head_dim, length, heads, bool(parts), False, False), columns_of(head_dim)
    q_low, k_low, v_low = _low(parts, rank) if parts else (0, 0, 0)
    if tile.whole:
        queries, keys2 = _swept(length, tile.q), _swept(length, tile.k2)
    else:
        queries, keys2 = blocks(length, tile.q), blocks(length, tile.k2)
    keys, queries2 = [rows for _, rows in tile.chunks] or blocks(length, tile.k), blocks(length, tile.q2)
    work = Work()
    for rows in queries:
        work += product(rows, columns, q_low)
        pairs = rows * sum(keys)
        if tile.chunks:  # S, dP, dS K of keys that stay on chip
            work += product(pairs, 3, columns) + Work(exps=pairs)
        else:  # S, dP; then again, and dS K
            work += product(pairs, 5, columns) + Work(exps=2 * pairs)
            work += product(2 * sum(keys), columns, k_low) + product(2 * sum(keys), columns, v_low)
    if tile.chunks:
        work += product(sum(keys), columns, k_low) + product(sum(keys), columns, v_low)
    for rows in keys2:  # S, dP, P^T dO, dS^T Q
        pairs = rows * sum(queries2)
        work += product(pairs, 4, columns) + Work(exps=pairs)
        work += product(rows, columns, k_low) + product(rows, columns, v_low)
        work += product(sum(queries2), columns, q_low)
    return work


def low_rank_bwd(head_dim: int, rows: int, targets: int, heads: int, rank: int) -> Work:
    """dB and U of a whole batch of `rows` tokens, all targets and heads."""
    cut = len(blocks(rows, BLOCK_ROWS))
    steps = -(-cut // max(1, PROGRAMS // (targets * heads)))
    computed = sum(blocks(cut, steps)) * BLOCK_ROWS  # the last program goes on where there are no rows
    return product(2 * computed, _padded(head_dim), _padded(rank)) * (targets * heads)


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def mmd_pairs(samples: int, device: str = "cpu") -> int:
    """Pairs of samples whose distance a sweep over one set of them forms, on a "cpu" or on a GPU ("cuda").

    A panel's own square is made whole: of up to 2,048 samples, which are one panel, all N² pairs; of many more, half.
    """
    height = panel_rows(samples, 64 if device == "cpu" else 128)
    return sum(min(height, samples - i) * (samples - i) for i in range(0, samples, height))
