"""The partial sums that the backward kernels leave, added up: the gates' gradient and dB, in one launch.

Always in the same order, in float32: a program has some columns, adds every ROWS-th of their rows, then those sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastheads.kernels import heads
from fastheads.kernels.launch import launch, on_grid, packed
from fastheads.kernels.tiles import cdiv

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128  # of dB
GATES = 4096  # numbers of the gates' gradient at a time, rows of all heads


@triton.jit
def column_sums(p_x, o_c, rows, columns, ROWS: tl.constexpr):
    """Σ over the rows of x `[rows, columns]`, of the columns o_c: ROWS sums of every ROWS-th row, then their sum."""
    o_r = tl.arange(0, ROWS)
    b_sum = tl.zeros([ROWS, o_c.shape[0]], tl.float32)
    for start in range(0, rows, ROWS):
        p_r = p_x + (start + o_r).to(tl.int64)[:, None] * columns
        b_sum += tl.load(p_r + o_c[None, :], mask=(start + o_r < rows)[:, None] & (o_c < columns)[None, :], other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def sums_kernel(
    p_dg_parts, p_theta, p_dgate, rows, p_db_parts, p_db, splits, columns,
    HEAD: tl.constexpr, GATE_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dg `[H]`, or dθ, by the first program, of partial sums `[rows, H]`; dB of `[splits, columns]`, BN a program."""
    i_n = tl.program_id(0)
    if p_dg_parts is not None:
        if i_n == 0:
            o_h = tl.arange(0, HEAD.gates)
            b_dg = column_sums(p_dg_parts, o_h, rows, HEAD.heads, GATE_ROWS)
            tl.store(p_dgate + o_h, heads.theta_gradient(b_dg, p_theta, o_h, HEAD), mask=o_h < HEAD.heads)
        i_n -= 1
    if p_db_parts is not None:
        if i_n >= 0:
            o_n = i_n * BN + tl.arange(0, BN)
            tl.store(p_db + o_n, column_sums(p_db_parts, o_n, splits, columns, BM), mask=o_n < columns)


def sums(
    gates: Tensor | None, parts: Tensor | None, *, gate: Tensor | None = None, gate_form: str = ""
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the gates and of lora_B from their partial sums, float32; None where those are.

    Args:
        gates: `[G, H]`, Σ δ as `attention_bwd` leaves it.
        parts: `[S, T, H, dh, r]`, of dB, as `low_rank_bwd` leaves it.
        gate: `[H]` float32, theta; with it and its gate_form the first gradient is theta's, not the gates'.
    """
    dgate = db = None
    rows, H, splits, columns = 0, 1, 0, 0
    if gates is not None:
        rows, H = gates.shape
        dgate = torch.empty(H, dtype=torch.float32, device=gates.device)
    if parts is not None:
        splits = parts.shape[0]
        db = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
        columns = db.numel()
    if gates is None and parts is None:
        return None, None
    programs = (gates is not None) + cdiv(columns, BLOCK_COLUMNS)
    head = heads.head_of(H, 1, torch.float32, gate_form)  # of it the heads and gates; no column is read
    meta = {"HEAD": head, "GATE_ROWS": max(1, GATES // head.gates), "BM": BLOCK_ROWS, "BN": BLOCK_COLUMNS}
    args = (gates, packed(gate) if gate_form else None, dgate, rows, parts, db, splits, columns)
    launch(sums_kernel, (on_grid(programs, "sums"),), *args, **meta, num_warps=4, num_stages=1)
    return dgate, db
