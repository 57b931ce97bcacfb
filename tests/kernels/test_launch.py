"""How kernels are started: one grid axis, which holds 2³¹ − 1 programs where the other two hold 65,535."""

import pytest
import torch
from problems import TRITON, Case

from fastheads.kernels.launch import launching, on_grid
from fastheads.ops import fused


@pytest.mark.parametrize("impl", TRITON)
def test_more_images_and_heads_than_a_second_axis_holds_are_on_the_first(impl):
    # the numbers of it are in tests/ops/test_gpu.py: the interpreter takes minutes for 66,000 programs
    grids = []
    case = Case(B=33_000, N=1, H=2, dh=16)
    tensors, do = case.tensors(torch.float16), case.gradient(torch.float16)
    with launching(lambda kernel, grid, *args, **meta: grids.append(grid)):
        inputs, problem = (*tensors.values(), None, None, None, None), (2, [0, 2], 1.0, False, 0.0, "", impl)
        kept = fused.forward(*inputs, None, "token", 0, "projections", torch.float16, *problem)
        needed = [True, False, False, True, True, True]
        fused.backward(do, *inputs, kept[1], *kept[3:6], needed, torch.float16, *problem)
    assert all(len(grid) == 1 for grid in grids)
    assert sum(grid[0] == 66_000 for grid in grids) >= 2  # forward and backward, a program for each


def test_more_programs_than_a_launch_holds_are_refused_in_words():
    assert on_grid(2**31 - 1, "attention_fwd") == 2**31 - 1
    with pytest.raises(ValueError, match=r"attention_fwd: 2,147,483,648 programs.*split the batch"):
        on_grid(2**31, "attention_fwd")
