"""Without a GPU, Triton's kernels run in its interpreter; it asks for that before Triton is imported, and is
spared what it does over and over (`tests/helpers/interpreter.py`).

What torch.compile made of an earlier version of an operator is not taken from a cache: its key doesn't know the shapes
that our operators return.
"""

import os

import torch
from interpreter import quicken

os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    quicken()
