"""Which tile row a shape gets: every shape has one, what it keeps on chip fits there, pieces and chunks cover it."""

import itertools

import pytest
import torch

from fastheads.kernels.launch import dot_precision
from fastheads.kernels.tiles import (
    BACKWARD,
    FAMILY,
    FORWARD,
    ONE_PASS,
    SHARED,
    Row,
    chunks_of,
    pieces_of,
    row_for,
    up_to_16,
)

CHIPS = [0, 80, 86, 89, 90, 100, 120]


def tiles_of(arch, head_dim, length, dtype, deltas=0, rank=0):
    return row_for(FORWARD, arch, head_dim, length, dtype, deltas=deltas, rank=rank).tiles(length)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("deltas", [0, 2, 3])
def test_every_shape_has_a_row(deltas, arch):
    for head_dim in (16, 64, 72, 80, 88, 104, 112, 128):
        for length in (1, 50, 65, 77, 197, 257, 272, 273, 577, 4096):
            for dtype in (torch.bfloat16, torch.float32):
                tiles = tiles_of(arch, head_dim, length, dtype, deltas)
                assert tiles.chunks or tiles.block_n >= 16
                assert not tiles.chunks or length <= 272
                assert not tiles.tail or 0 < length % tiles.block_m <= tiles.tail


@pytest.mark.parametrize("arch", CHIPS)
def test_every_backward_and_one_pass_has_a_row(arch):
    for head_dim in (16, 64, 72, 80, 88, 104, 112, 128):
        for length in (1, 16, 17, 50, 65, 77, 197, 257, 272, 273, 577, 4096):
            for dtype in (torch.bfloat16, torch.float32):
                for deltas, masked, spread in itertools.product((0, 2, 3), (False, True), (False, True)):
                    given = {"deltas": deltas, "rank": 8, "masked": masked, "spread": spread}
                    tiles = row_for(BACKWARD, arch, head_dim, length, dtype, **given).tiles(length)
                    assert tiles.chunks or min(tiles.block_n, tiles.key_m, tiles.key_n) >= 16
                    assert not tiles.chunks or tiles.chunks[-1][0] < length <= sum(tiles.chunks[-1])
                    assert not (spread and length > 80 and (tiles.one_launch or tiles.chunks))
                    for tail, block in ((tiles.tail, tiles.block_m), (tiles.key_tail, tiles.key_n)):
                        whole = tiles.one_launch or tiles.chunks
                        assert not tail or (whole and 0 < length % block <= tail < block)
                if length <= 272:
                    tiles = row_for(ONE_PASS, arch, head_dim, length, dtype).tiles(length)
                    assert tiles.chunks[-1][0] < length <= sum(tiles.chunks[-1]) and tiles.block_n >= 16


def test_keys_on_chip_take_no_second_sweep():
    with pytest.raises(ValueError, match=r"Row\(block_m=64, .*chunk=64\): .* chunk or key"):
        Row(64, 32, (32, 64), chunk=64).tiles(50)
    assert Row(64, chunk=64).tiles(50).chunks


def test_every_family_has_tables_or_takes_the_row_for_unknown_chips():
    assert set(FAMILY.values()) == set(SHARED)
    for table in (FORWARD, BACKWARD, ONE_PASS):
        assert {0, "float32", 80, 90} <= set(table) <= {0, "float32", *SHARED}
    # an 89 is an 86; of a 75 nothing is known
    assert row_for(FORWARD, 89, 64, 50, torch.bfloat16) == row_for(FORWARD, 86, 64, 50, torch.bfloat16)
    assert row_for(FORWARD, 75, 64, 50, torch.bfloat16) == FORWARD[0][0]


def test_what_stays_on_chip_is_what_fits_there():
    # an A100's block has 163 KB; what queries and up-projections need beside keys and values came to 32 KB at most
    for head_dim in (16, 64, 72, 80):
        for length in (50, 197, 257, 272):
            for deltas, rank in ((0, 0), (2, 8), (2, 64), (3, 16), (3, 32), (3, 64)):
                tiles = tiles_of(80, head_dim, length, torch.bfloat16, deltas, rank)
                columns = 2 * up_to_16(head_dim) + deltas * max(16, rank)
                assert sum(rows for _, rows in tiles.chunks) * columns * 2 <= 131 * 1024
    assert (
        not tiles_of(80, 64, 257, torch.bfloat16, 3, 64).chunks and tiles_of(80, 64, 257, torch.bfloat16, 3, 32).chunks
    )


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_products_of_float32_follow_pytorchs_setting_of_tf32(precision):
    # read by the new name: the old one raises where the new one was set
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        assert dot_precision(torch.float32) == precision
        assert dot_precision(torch.float16) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("head_dim", range(1, 129))
def test_pieces_cover_the_head_and_no_padding_of_sixteen(head_dim):
    pieces = pieces_of(head_dim)
    assert [first for first, _ in pieces] == [sum(w for _, w in pieces[:i]) for i in range(len(pieces))]
    assert all(width >= 16 and width & (width - 1) == 0 for _, width in pieces)
    assert head_dim <= sum(width for _, width in pieces) == up_to_16(head_dim) < head_dim + 16


@pytest.mark.parametrize("length", [1, 16, 17, 50, 65, 77, 145, 197, 226, 257, 272])
def test_chunks_cover_the_keys_in_a_few_powers_of_two(length):
    chunks = chunks_of(length)
    assert [first for first, _ in chunks] == [sum(rows for _, rows in chunks[:i]) for i in range(len(chunks))]
    assert all(rows >= 16 and rows & (rows - 1) == 0 for _, rows in chunks)
    # All but the last are full: only the last is masked.
    assert chunks[-1][0] < length <= sum(chunks[-1])
    assert len(chunks) <= 4
