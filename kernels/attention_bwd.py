"""Backward of gated attention: dQ, dK, dV and the gate's gradient from qkv, the log-sum-exp and dO alone.

    P = exp(S - lse)      dP = dO Vᵀ (dO not gated)      delta_i = Σ_j P_ij dP_ij      dgate_h = Σ_{b,i} delta_i
    dS = g P (dP - delta) / sqrt(dh)                     dQ = dS K      dK = dSᵀ Q      dV = g Pᵀ dO

Nothing here reads the output: delta comes from a whole key row, so dgate is right at g = 0 too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastheads.kernels.attend import pieces_of
from fastheads.kernels.attention_bwd_kernels import attention_bwd_kernel
from fastheads.kernels.launch import architecture, dot_precision, launch, on_grid, packed, rows_of, strides
from fastheads.kernels.low_rank import LowRank


class Tile(NamedTuple):
    """Blocks of the query sweep (q × k) and of the key sweep (q2 × k2).

    whole: one program per (image, head) makes both sweeps; else two launches, a program per block of queries or keys.
    chunks: only where whole: all keys on chip in these chunks, and the query sweep is one pass; (): two passes.
    """

    whole: bool
    q: int
    k: int
    q2: int
    k2: int
    warps: int = 4
    stages: int = 1
    chunks: tuple[tuple[int, int], ...] = ()


# Blocks per (architecture, with a delta or mask) for a head_dim up to so much: where the heads fill the chip, and
# spread over it. Chosen by compiling for 16 bits (bench.compile_report): nothing of OpenCLIP's own sizes spills. Other
# chips take an A100's.
WHOLE: dict[tuple[int, bool], dict[int, Tile]] = {
    (80, False): {
        64: Tile(True, 64, 32, 32, 64, stages=2),
        80: Tile(True, 64, 32, 32, 64),
        112: Tile(True, 64, 16, 16, 32),
        128: Tile(True, 64, 32, 32, 64),
    },
    (80, True): {
        64: Tile(True, 64, 32, 32, 64),
        80: Tile(False, 64, 16, 16, 64, stages=2),
        128: Tile(False, 64, 16, 16, 64),
    },
    (90, False): {
        64: Tile(True, 64, 64, 64, 64),
        80: Tile(True, 64, 32, 32, 64),
        112: Tile(True, 64, 16, 16, 64),
        128: Tile(True, 64, 32, 32, 64),
    },
    (90, True): {64: Tile(True, 64, 64, 32, 64), 80: Tile(True, 64, 16, 16, 64), 128: Tile(False, 64, 16, 16, 64)},
}
LONG: dict[tuple[int, bool], dict[int, Tile]] = {
    (80, False): {
        64: Tile(False, 64, 32, 32, 64, stages=2),
        80: Tile(False, 64, 32, 32, 64),
        128: Tile(False, 64, 16, 16, 64),
    },
    (80, True): {
        64: Tile(False, 64, 32, 32, 64),
        80: Tile(False, 64, 16, 16, 64, stages=2),
        128: Tile(False, 64, 16, 16, 64),
    },
    (90, False): {
        64: Tile(False, 64, 64, 64, 64, stages=2),
        80: Tile(False, 64, 64, 32, 64, stages=2),
        128: Tile(False, 64, 16, 16, 64),
    },
    (90, True): {64: Tile(False, 64, 64, 64, 64, stages=2), 128: Tile(False, 64, 16, 16, 64)},
}
# A text tower with adapters on an A100, head_dim up to 64: with a delta and a mask, more keys at a time spill.
MASKED_DELTA = Tile(True, 64, 16, 16, 64)
# All keys on chip: head_dim up to 64, this many keys
AT_ONCE = {
    64: Tile(True, 64, 32, 32, 64, chunks=((0, 64),)),
    80: Tile(True, 64, 32, 32, 64, chunks=((0, 64), (64, 16))),
}


def tile_for(arch: int, head_dim: int, length: int, heads: int, delta: bool, masked: bool, wide: bool) -> Tile:
    """heads: of the whole batch. Fewer than two for each SM of an A100 leave it idle, unless their blocks are spread.
    wide: float32, whose tiles take twice the registers."""
    spread = length > 272 or (length > 80 and heads < 2 * 108)
    if wide:
        return Tile(not spread, 32, 32, 32, 32)
    if head_dim <= 64 and length <= 80 and not delta and not (masked and arch == 90):
        return AT_ONCE[64 if length <= 64 else 80]
    if head_dim <= 64 and delta and masked and not spread and arch != 90:
        return MASKED_DELTA
    rows = (LONG if spread else WHOLE)[arch if arch in (80, 90) else 80, delta or masked]
    return next(tile for most, tile in rows.items() if head_dim <= most)


def whole_blocks(length: int, block: int) -> int:
    """How many rows to take in whole blocks: what is left, up to 16 rows, would leave most of one more empty."""
    return length - length % block if length % block <= 16 else length


def attention_bwd(
    do: Tensor,
    qkv: Tensor,
    lse: Tensor,
    *,
    num_heads: int,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    delta: LowRank | None = None,
    out: Tensor | None = None,
    _tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gated attention: dqkv `[B, N, 3D]` in qkv's dtype, dgate `[H]` float32 (None without a gate).

    Args:
        do: `[B, N, D]`, gradient of the gated output, any strides and float dtype.
        qkv: `[B, N, 3D]`, float16, bfloat16 or float32; a view, its last dimension contiguous.
        lse: `[B, H, N]` float32: natural log-sum-exp of the scaled, masked scores; -inf: nothing seen.
        gate: `[H]` float32.
        mask: broadcasts to `[B, H, N, N]`; boolean with True = masked, or additive.
        delta: what the heads' q, k, v have beside qkv. The gradient is that of their sum.
        out: `[B, N, 3D]` view to write dqkv to, its last dimension contiguous; None: allocated.
    """
    rows_of(qkv=qkv, out=out, low=None if delta is None else delta.low)
    B, N, D = do.shape
    H, dh = num_heads, D // num_heads
    lse, gate = lse.contiguous(), packed(gate)
    dqkv = torch.empty((B, N, 3 * D), dtype=qkv.dtype, device=qkv.device) if out is None else out
    tile = _tile or tile_for(
        architecture(qkv), dh, N, B * H, delta is not None, mask is not None, qkv.dtype == torch.float32
    )
    query_blocks = 1 if tile.whole else triton.cdiv(N, tile.q)
    delta_rows, lse_rows = torch.empty((2, B, H, N), dtype=torch.float32, device=qkv.device).unbind()
    partial = torch.empty((B, H, query_blocks), dtype=torch.float32, device=qkv.device)
    kind = 0
    s_mask: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.expand(B, H, N, N)
        s_mask = mask.stride()
        mask = mask.view(torch.uint8) if kind == 1 else mask
    slots: tuple[int, ...] = (-1, -1, -1)
    rank = 0
    if delta is not None:
        slots = tuple(delta.parts.index(p) if p in delta.parts else -1 for p in range(3))
        rank = delta.up.shape[-1]
        delta = delta._replace(up=delta.up.contiguous())

    whole_q, whole_k = whole_blocks(N, tile.q), whole_blocks(N, tile.k2)

    def sweep(which: int, blocks: int) -> None:
        low = qkv if delta is None else delta.low
        launch(
            attention_bwd_kernel,
            (on_grid(B * H * blocks, "attention_bwd"),),
            do,
            *strides(do, 0, 1, 2),
            qkv,
            *strides(qkv, 0, 1),
            lse,
            lse if gate is None else gate,
            lse if mask is None else mask,
            *s_mask,
            low,
            *strides(low, 0, 1),
            lse if delta is None else delta.up,
            0.0 if delta is None else float(delta.scale),
            delta_rows,
            lse_rows,
            dqkv,
            *strides(dqkv, 0, 1),
            partial,
            dh**-0.5,
            N,
            blocks,
            whole_q,
            whole_k,
            H=H,
            DH=dh,
            PIECES=pieces_of(dh),
            LOW=tuple(rank if s >= 0 else 0 for s in slots),
            SLOTS=slots,
            SHARED=delta is not None and delta.shared,
            R=max(16, triton.next_power_of_2(rank)),
            GATE=gate is not None,
            MASK=kind,
            CAUSAL=causal,
            PREC=dot_precision(qkv.dtype),
            SWEEP=which,
            BQ=tile.q,
            BK=tile.k,
            BQ2=tile.q2,
            BK2=tile.k2,
            CHUNKS=tile.chunks,
            TAIL_Q=whole_q < N,
            TAIL_K=whole_k < N,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    if tile.whole:
        sweep(0, 1)
    else:
        sweep(1, query_blocks)
        sweep(2, triton.cdiv(N, tile.k2))
    return dqkv, None if gate is None else partial.sum((0, 2))
