"""FSDP2: the image tower's weights lie cut over the processes, and come together block by block where they are used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastheads.hosts import find_tower
from fastheads.hosts.vision import image_tower


def shard(model: nn.Module, whole: Iterable[Tensor] = ()) -> None:
    """Cuts a model's image tower over the processes, in place, but for the parameters in `whole`.

    Adapters and gates are such: they are small, torch would cut them along a first dimension of two, and the MMD reads
    the gates outside of their blocks. What is whole `average_gradients` takes care of.

    Raises TypeError for a tower without blocks.
    """
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    tower, kept = image_tower(model), cast(set[nn.Parameter], set(whole))
    outer = tower.children() if hasattr(model, "get_image_features") else (tower,)  # where it is no module of the model
    for module in (*find_tower(model, "visual").blocks, *outer):
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """The gradients of parameters that are whole on every process become their mean, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def like(whole: Tensor, other: Tensor) -> Tensor:
    """A whole tensor where `other` lies: on its device, and cut as that is."""
    whole = whole.to(other.device)
    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)
