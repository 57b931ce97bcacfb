"""How a launch is cut up: one table per kernel and family of chips, for launchers, compile report and tuner alike.

A table's rows are tried from the top, and the first that takes the problem is used. All were chosen with the compiler
only, in bf16, without deltas and with those of q and v at rank 8. For 80 and 90 nothing of OpenCLIP's own sizes spills
(`python -m bench.compile_report`), nor for 86 and 120 at head sizes 64 and 80; 100 has one row a pass. A GPU has the
last word: `python -m bench.tune` prints rows to paste.
"""

import functools
from typing import NamedTuple

import torch

# A block's shared memory in bytes (CUDA C++ Programming Guide, table of compute capabilities). Keys and values on chip
# leave BESIDE of it to queries and up-projections.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
BESIDE = 35 * 1024
# Which family's rows a chip takes; others take those of 0: chips that nobody has looked at, and the interpreter.
FAMILY = {80: 80, 87: 80, 86: 86, 89: 86, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120}
LONGEST_ON_CHIP = 272  # keys: 257 tokens, and what a multiple of 16 adds
TAIL, ANY = 16, 1 << 30


def cdiv(n: int, size: int) -> int:
    """Blocks of `size` that n takes. (Triton's own costs the host some µs a call, for it also runs in kernels.)"""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is 1 or more."""
    return 1 << (n - 1).bit_length()


def up_to_16(n: int) -> int:
    """n, up to a multiple of 16: the columns of a head and the rows of its keys as tiles have them."""
    return -(-n // 16) * 16


def dot_width(n: int) -> int:
    """The side of the smallest tile that holds n and that tl.dot takes."""
    return max(16, next_power_of_2(n))


class Tiles(NamedTuple):
    """How a launch is cut up.

    chunks: (first row, rows) of the keys, all kept on chip; none: keys stream by, block_n at a time.
    block_m: queries at a time; block_n: keys that stream, or in one_pass columns of x.
    key_m, key_n: of the backward's second sweep: queries that stream by, keys at a time.
    tail, key_tail: queries of the last block, keys of the second sweep's last, where so few are left; 0: as the others.
    one_launch: where keys stream, both sweeps of the backward in one program per (image, head); else two launches, a
        program per block.
    """

    chunks: tuple[tuple[int, int], ...]
    block_m: int
    block_n: int
    key_m: int
    key_n: int
    tail: int
    key_tail: int
    one_launch: bool
    warps: int
    stages: int


class Row(NamedTuple):
    """A row of a table. block_m, block_n, key (key_m, key_n), one_launch, warps, stages: as in Tiles. chunk:
    keys on chip in chunks of up to so many; 0: they stream. tail: up to 16 queries that are left over get a block of
    their own (always where one_launch).

    The most it takes: columns of a head, length, deltas (how many of q, k, v have one). Whether it takes a mask
    (masked), and a backward whose heads are spread over the chip.
    """

    block_m: int
    block_n: int = 0
    key: tuple[int, int] = (0, 0)
    chunk: int = 0
    one_launch: bool = False
    tail: bool = False
    warps: int = 4
    stages: int = 1
    columns: int = ANY
    length: int = ANY
    deltas: int = 3
    masked: bool = True
    spread: bool = True

    def __repr__(self) -> str:
        """As it stands in a table: without what it has by default."""
        told = (f"{name}={value}" for name, value in self._asdict().items() if value != self._field_defaults.get(name))
        return f"Row({', '.join(told)})"

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (a row is a tuple)
    def tiles(self, length: int) -> Tiles:
        """For so many tokens: no more queries on chip than there are, and chunks that add up to little more."""
        if self.chunk and self.key[1]:
            raise ValueError(f"{self}: keys that stay on chip take no second sweep: chunk or key")
        m = min(self.block_m, dot_width(length)) if self.chunk else self.block_m
        chunks = chunks_of(length, self.chunk) if self.chunk else ()
        # Of queries and of keys: TAIL where so few are left over in the last block, else 0.
        tail, key_tail = (TAIL if size > TAIL and 0 < length % size <= TAIL else 0 for size in (m, self.key[1] or 1))
        if not self.one_launch:
            tail, key_tail = tail if self.tail else 0, 0
        return Tiles(chunks, m, self.block_n, *self.key, tail, key_tail, self.one_launch, self.warps, self.stages)


Table = dict[int | str, tuple[Row, ...]]

# Where a block has 99 KB, more keys on chip would leave an SM one block of four warps.
_FORWARD_99_KB = (
    Row(64, chunk=128, columns=64, length=80),
    Row(64, 64, stages=2, deltas=0),
    Row(64, 32, stages=2, columns=80),
    Row(64, 16, stages=2),
)
# No tail where the head's last tile is 16 wide: every warp would do all of it, and 16 queries cost what 64 do. Of 80
# columns more keys on chip spill. sm_90 keeps the addresses of what is on chip in registers: three deltas, or two at 80
# columns, are too many.
FORWARD: Table = {
    "float32": (Row(64, 32, warps=8, columns=64), Row(64, 16, warps=8)),
    0: (Row(64, 32),),
    80: (
        Row(64, chunk=128, tail=True, columns=64, length=LONGEST_ON_CHIP),
        Row(64, chunk=128, columns=80, length=80),
        Row(128, 64, stages=2, columns=64, length=1280, deltas=0),  # causal, of 4,096, it spills 32 bytes
        Row(128, 64, warps=8, stages=3, columns=64, deltas=0),
        Row(128, 32, warps=8, stages=2, columns=64),
        Row(64, 64, stages=2, columns=80, deltas=0),
        Row(64, 32, stages=2, columns=112, deltas=0),
        Row(64, 64, stages=2, deltas=0),
        Row(64, 32, stages=3, columns=80),
        Row(64, 16, stages=2),
    ),
    86: _FORWARD_99_KB,
    90: (
        Row(64, chunk=128, columns=64, length=208, deltas=2),
        Row(64, chunk=128, columns=64, length=LONGEST_ON_CHIP, deltas=0),
        Row(64, chunk=64, columns=64, length=LONGEST_ON_CHIP, deltas=2),
        Row(64, chunk=128, columns=80, length=208, deltas=0),
        Row(64, chunk=128, columns=80, length=80),
        Row(64, 64, stages=2, length=LONGEST_ON_CHIP),
        Row(128, 64, warps=8, stages=3, columns=64, deltas=0),
        Row(128, 64, warps=8, stages=2),
    ),
    100: (Row(64, 32, stages=2),),
    120: _FORWARD_99_KB,
}

# All keys on chip, with their gradients: 16 queries at a time where deltas or a mask take registers.
_AT_ONCE = (
    Row(32, chunk=64, tail=True, columns=64, length=80, deltas=0, masked=False),
    Row(16, chunk=64, columns=64, length=80),
)
_AT_ONCE_80 = (
    *_AT_ONCE,
    Row(32, chunk=256, tail=True, warps=8, columns=64, length=240, deltas=0, masked=False, spread=False),
    Row(16, chunk=256, warps=8, columns=64, length=256, masked=False, spread=False),
)
# Both sweeps in one program per head, or in two launches. By the machine code (`bench.machine_code`) shared memory is
# what holds them up, not products: so rows are wide, for 16 queries a warp read all keys for themselves, 32 half of it.
_whole = functools.partial(Row, one_launch=True, spread=False)
_SWEEPS_80 = (
    _whole(128, 64, (32, 128), warps=8, columns=64, length=LONGEST_ON_CHIP, deltas=0, masked=False),
    Row(128, 32, (32, 128), stages=2, columns=64, deltas=0, masked=False, spread=False),
    _whole(128, 64, (32, 128), warps=8, columns=64, masked=False),
    _whole(64, 32, (32, 64), columns=64, length=LONGEST_ON_CHIP, deltas=0),
    _whole(128, 32, (32, 128), warps=8, columns=80, length=LONGEST_ON_CHIP, deltas=0, masked=False),
    _whole(64, 16, (16, 32), columns=96, length=LONGEST_ON_CHIP, deltas=0, masked=False),
    _whole(64, 16, (16, 16), columns=112, length=LONGEST_ON_CHIP, deltas=0, masked=False),
    _whole(64, 32, (32, 64), length=LONGEST_ON_CHIP, deltas=0, masked=False),
    Row(64, 32, (32, 64), stages=2, columns=64, deltas=0, masked=False),
    Row(64, 32, (32, 64), columns=64),
    Row(64, 32, (32, 64), columns=80, deltas=0, masked=False),
    Row(64, 16, (16, 64), stages=2, columns=80),
    Row(64, 16, (16, 64)),
)
BACKWARD: Table = {
    "float32": (_whole(32, 32, (32, 32), length=LONGEST_ON_CHIP), Row(32, 32, (32, 32))),
    0: (*_AT_ONCE, *_SWEEPS_80),
    80: (*_AT_ONCE_80, *_SWEEPS_80),
    86: (*_AT_ONCE, *_SWEEPS_80),
    90: (
        Row(64, chunk=64, columns=64, length=64, deltas=0, masked=False),
        *_AT_ONCE,
        _whole(64, 64, (32, 64), columns=64, deltas=0, masked=False),
        Row(16, chunk=256, warps=8, columns=64, length=256, masked=False, spread=False),
        _whole(128, 32, (32, 128), warps=8, columns=64, masked=False),
        _whole(64, 64, (32, 64), columns=64, length=LONGEST_ON_CHIP),
        _whole(128, 32, (32, 128), warps=8, columns=80, length=LONGEST_ON_CHIP, deltas=0, masked=False),
        _whole(64, 16, (16, 64), columns=80, length=LONGEST_ON_CHIP),
        _whole(64, 16, (16, 64), columns=112, length=LONGEST_ON_CHIP, deltas=0, masked=False),
        _whole(64, 32, (32, 64), length=LONGEST_ON_CHIP, deltas=0, masked=False),
        Row(64, 64, (64, 64), stages=2, columns=64),
        Row(64, 64, (32, 64), stages=2, columns=80, deltas=0, masked=False),
        Row(64, 16, (16, 64)),
    ),
    # Triton 3.6 fails on what has blocks of 16 rows there: two launches, without any.
    100: (Row(64, 32, (32, 64)),),
    120: (_AT_ONCE[1], *_SWEEPS_80[:2], _whole(64, 32, (32, 64), columns=64, masked=False), *_SWEEPS_80[3:]),
}

# What stands against BACKWARD's row for heads of 64 columns, 81 to 272 tokens, no deltas, until a GPU has said which is
# faster (`python -m bench.tune --open`). On an A100 five products at once, in one block of eight warps an SM, against
# nine in wide blocks, or in narrow ones that load ahead; on Hopper nine in three blocks against five at once.
OPEN_BACKWARD: Table = {
    80: (
        Row(128, 32, (32, 128), stages=2),
        _whole(128, 64, (32, 128), warps=8),
        _whole(64, 32, (32, 64), stages=2),
    ),
    90: (
        Row(32, chunk=256, tail=True, warps=8, length=240),
        _whole(64, 64, (64, 64)),  # all of it wgmma
        _whole(64, 32, (32, 64), stages=2),
    ),
}

# At head size 64 nothing spills up to 80 tokens; of 197 and 257, with deltas of rank 8 and without, 197 without them on
# sm_80 (8 bytes) and 257 with them on sm_90 (40). At 80 with deltas 77 tokens spill 16 bytes on sm_80 and 128 on sm_90,
# 197 spill 80 and 72. block_n: where one block of keys leaves registers for it, more of x is under way at a time.
ONE_PASS: Table = {
    "float32": (Row(64, 32, chunk=64, warps=8, stages=2),),
    0: (Row(64, 32, chunk=64, stages=2),),
    80: (
        Row(64, 64, chunk=64, stages=3, columns=64, length=64),
        Row(64, 32, chunk=64, stages=2, tail=True, length=80),
        Row(64, 32, chunk=64, stages=2),
    ),
    90: (Row(64, 64, chunk=64, stages=3, columns=64, length=80), Row(64, 32, chunk=64, stages=2)),
}


# The MMD's panels by precision: rows, columns, features at a time, warps, stages. No row spills at widths that 16
# divides, nor needs more than 99 KB.
_MMD_MANY = (128, 32, 32, 8, 3)  # of many bandwidths or domains, on every chip
_MMD_SAFE = {"tf32x3": _MMD_MANY, "tf32": (128, 64, 32, 8, 3)}
_MMD_WIDE = {"tf32x3": (128, 64, 32, 8, 3), "tf32": (128, 64, 32, 8, 3)}
MMD = {0: _MMD_SAFE, 90: _MMD_WIDE, 100: {"tf32x3": _MMD_MANY, "tf32": _MMD_MANY}}
MMD_BANDWIDTHS, MMD_DOMAINS = 5, 16  # few bandwidths; domains at a time
# How the weights pull: rows, columns at a time, features, warps, stages. Norms: rows, features at a time.
MMD_PULL = (64, 32, 64, 4, 3)
MMD_NORMS = {"BN": 32, "BD": 64, "num_warps": 4}

# Of the small batch by samples, padded: features at a time, rows of the kernel matrix at a time, warps, stages. No row
# spills but that of 128 on a 120, with gates: 40 bytes, the fewest of six with eight warps.
_MMD_SMALL = {16: (64, 16, 4, 2), 32: (64, 32, 4, 2), 64: (32, 32, 8, 2), 128: (16, 32, 8, 1)}
_MMD_SMALL_90 = _MMD_SMALL | {128: (16, 16, 8, 1)}
MMD_SMALL = {0: _MMD_SMALL, 90: _MMD_SMALL_90, 100: _MMD_SMALL_90, 120: _MMD_SMALL_90}


def mmd_tiles(arch: int, precision: str, bandwidths: int, blocks: int) -> dict[str, int]:
    """Options of `mmd_tile_kernel`'s launch; blocks: of domains."""
    few = blocks == 1 and bandwidths <= MMD_BANDWIDTHS
    row = MMD.get(FAMILY.get(arch, 0), _MMD_SAFE)[precision] if few else _MMD_MANY
    return dict(zip(("BM", "BN", "BD", "num_warps", "num_stages"), row, strict=True))


def mmd_pull_tiles() -> dict[str, int]:
    """Options of `mmd_pull_kernel`'s launch."""
    return dict(zip(("BM", "BN", "BD", "num_warps", "num_stages"), MMD_PULL, strict=True))


def mmd_small_tiles(arch: int, samples: int) -> dict[str, int]:
    """Options of `mmd_small_kernel`'s launch."""
    rows = dot_width(samples)
    row = (rows, *MMD_SMALL.get(FAMILY.get(arch, 0), _MMD_SMALL)[rows])
    return dict(zip(("BN", "BD", "BR", "num_warps", "num_stages"), row, strict=True))


def row_for(
    table: Table, arch: int, head_dim: int, length: int, dtype: torch.dtype, *,
    deltas: int = 0, rank: int = 0, masked: bool = False, spread: bool = False,
) -> Row:  # fmt: skip
    """The first row of the chip's family that takes the problem, else its last. arch: of `launch.architecture`."""
    family, columns = FAMILY.get(arch, 0), up_to_16(head_dim)
    # Bytes of all keys, values and T, 16 bits each; asked of the forward pass alone, for the others' rows say a length.
    on_chip = 2 * up_to_16(length) * (2 * columns + deltas * dot_width(rank))

    def takes(row: Row) -> bool:
        fits = not row.chunk or table is not FORWARD or on_chip <= SHARED.get(family, 0) - BESIDE
        other = (row.masked or not masked) and (row.spread or not spread)
        return fits and other and columns <= row.columns and length <= row.length and deltas <= row.deltas

    rows = table["float32"] if dtype == torch.float32 else table.get(family, table[0])
    return next((row for row in rows if takes(row)), rows[-1])


def is_spread(length: int, heads: int) -> bool:
    """Whether a backward takes a program per block of each head, not one per head: where that would leave an A100's 108
    SMs with fewer than two each, or of long ones with fewer than six, so that much of the last round would be idle.
    heads: of the whole batch."""
    return length > 80 and heads < (2 if length <= LONGEST_ON_CHIP else 6) * 108


def one_pass_fits(length: int, head_dim: int, dtype: torch.dtype, room: int = 96 * 1024) -> bool:
    """Whether one_pass takes so many tokens: a head's keys and values into `room` bytes, beside what projects them."""
    return length <= LONGEST_ON_CHIP and 2 * up_to_16(length) * up_to_16(head_dim) * dtype.itemsize <= room


def pieces_of(head_dim: int) -> tuple[tuple[int, int], ...]:
    """(first column, columns) of the tiles of a head: powers of two that add up to head_dim, or little more."""
    pieces, first = [], 0
    rest = up_to_16(head_dim)
    while rest:
        width = 1 << (rest.bit_length() - 1)
        pieces.append((first, width))
        first, rest = first + width, rest - width
    return tuple(pieces)


def chunks_of(length: int, largest: int = 128) -> tuple[tuple[int, int], ...]:
    """(first row, rows) of the chunks of keys: largest ones, then one or two smaller powers of two."""
    chunks, first = [], 0
    rest = up_to_16(length)
    while rest:
        rows = min(largest, 1 << (rest.bit_length() - 1))
        if rows < largest and (rest - rows).bit_count() > 1:
            rows *= 2
        chunks.append((first, rows))
        first, rest = first + rows, max(rest - rows, 0)
    return tuple(chunks)
