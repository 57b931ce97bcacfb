"""Without a GPU, Triton's kernels run in its interpreter, which is asked for before Triton is imported and spared what
it does over and over (`helpers/interpreter.py`). What a test draws is the same whatever ran before it.

What torch.compile made of an earlier version of an operator is not taken from a cache: its key doesn't know the shapes
that our operators return.
"""

import os

import pytest
import torch
from interpreter import quicken

os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    quicken()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
