"""What an installed fastheads must do, from any folder and without a compiler: python tests/csrc/installed.py

Not collected by pytest: cibuildwheel runs it on each wheel.
"""

import subprocess
import sys

import open_clip
import torch

import fastheads
from fastheads.demo import base
from fastheads.ops import native

assert native.library() is not None, "the wheel has no native library"
model, domains = base.load(), torch.arange(12) % 3
report = fastheads.patch(model)
with fastheads.capture_heads(model) as heads:
    model.encode_image(torch.randn(12, 3, *[open_clip.get_model_config(base.MODEL)["vision_cfg"]["image_size"]] * 2))
loss = fastheads.head_mmd(heads, domains, num_domains=3)
loss.backward()
assert all(theta.grad.isfinite().all() for theta in fastheads.gate_parameters(model))
close = fastheads.head_mmd(heads, domains, num_domains=3, impl="reference")
assert torch.allclose(loss, close, rtol=1e-4), (loss, close)
subprocess.run([sys.executable, "-m", "fastheads.cli", "--help"], check=True)
print(f"{report}\nMMD {loss.item():.4f}, {fastheads.__file__}")
