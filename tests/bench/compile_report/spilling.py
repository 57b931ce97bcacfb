"""A kernel that cannot keep what it needs in registers. Run by test_offline.py in a process without the interpreter."""

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from bench.compile_report.offline import compiling
from fastheads.kernels.launch import launch


@triton.jit
def spilling_kernel(p_x, p_y, N, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    # [BLOCK, BLOCK], all live at once in one warp
    b_x = tl.load(p_x + o_x[:, None] * N + o_x[None, :])
    b_y = tl.dot(b_x, b_x)
    b_z = tl.dot(tl.trans(b_x), b_y.to(b_x.dtype))
    b_w = tl.dot(b_x, b_z.to(b_x.dtype))
    tl.store(p_y + o_x[:, None] * N + o_x[None, :], b_y + b_z + b_w)


def spill(block: int) -> None:
    x = torch.empty(block, block, dtype=torch.bfloat16, device="meta")
    launch(spilling_kernel, (1,), x, torch.empty(block, block, device="meta"), block, BLOCK=block, num_warps=1)


if __name__ == "__main__":
    before = driver._active
    for arch in (80, 90):
        for block in (16, 64):
            with compiling(arch) as compiled:
                spill(block)
            (found,) = compiled
            print(
                f"sm_{arch} {block} {found.registers} {found.mma + found.wgmma} {found.constexprs} {found.problems()}"
            )
    assert driver._active is before
    assert not spilling_kernel.device_caches
