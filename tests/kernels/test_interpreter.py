"""The quickened interpreter (`tests/helpers/interpreter.py`) computes what Triton's own does, bit for bit."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve()


def digest() -> str:
    """Of the outputs and gradients of each form, masked and pooled, and of the MMD's one launch."""
    from problems import INPUTS, Case

    import fastheads
    from fastheads.ops import head_attention

    found = hashlib.sha256()
    case = Case(N=9, pool=0, mask="bool", mask_shape=(9, 9), targets=("q", "v"))
    for impl, dtype in (("stacked", torch.float32), ("delta", torch.float16), ("one_pass", torch.float32)):
        tensors = {n: None if t is None else t.requires_grad_() for n, t in case.tensors(dtype, device="cpu").items()}
        out = head_attention(**tensors, **case.options("cpu"), impl=impl)
        wanted = [tensors[n] for n in INPUTS if tensors[n] is not None]
        for t in (*out, *torch.autograd.grad(out.o, wanted, case.gradient(dtype, "cpu"))):
            found.update(t.detach().numpy().tobytes())
    x = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = fastheads.mmd(x, torch.arange(12) % 3, num_domains=3, impl="triton")
    for t in (loss, *torch.autograd.grad(loss, x)):
        found.update(t.detach().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_the_same_bits_as_tritons_own():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "helpers"), str(HERE.parents[2])])}
    own = subprocess.run([sys.executable, str(HERE)], env=env, capture_output=True, text=True, timeout=300)
    assert own.returncode == 0, own.stderr
    assert digest() == own.stdout.strip()


if __name__ == "__main__":
    from interpreter import keep_booleans
    from triton.runtime import interpreter

    keep_booleans(interpreter)  # without which Triton 3.9's refuses the kernels
    print(digest())
