"""What AdamW takes, and how its learning rates fall: parts of `fit`, and of anyone's loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastheads.model import gate_parameters, is_patched


def parameter_groups(model: nn.Module, *, lr: float, gate_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained, for an optimiser: gates and vectors (norms, biases) without weight decay, which would pull gates
    to uniform; gates by a learning rate of their own."""
    gates = gate_parameters(model) if is_patched(model) else []
    own = {id(p) for p in gates}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": gates, "lr": gate_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Half a cosine from the groups' learning rates to 0 at `steps`; one `step()` after each of the optimiser's."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)))
