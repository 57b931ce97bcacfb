"""The largest batch that fits, by the ledger; on a GPU tried once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from fastheads.hosts.vision import checkpoint_blocks, image_size, image_tower
from fastheads.train.experiment import device
from fastheads.train.logs import free_memory
from fastheads.train.loop import prepare
from fastheads.train.methods import ImageEncoder, Method
from fastheads.train.planning import Step
from fastheads.train.ranks import local_processes
from fastheads.train.recipe import Recipe


def room() -> int:
    """Bytes that this process may take: of its GPU what is free, else its share of the memory the system has left."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(device())[0]
    return free_memory() // local_processes()


def largest_batch(model: nn.Module, method: Method, recipe: Recipe, precision: str) -> int:
    """The largest batch of one process in one part whose training step fits, 0 where none does.

    By the ledger (`fastheads plan`); on a GPU a step of it is run, and where the memory runs out, of three quarters.
    """
    gpu, takes = torch.cuda.is_available(), room()
    kept = sum(t.numel() * t.element_size() for t in model.state_dict().values())  # the model is there already
    step = Step(
        model,
        method=method.id,
        config=method.config_for(model, **recipe.adapter),
        precision="fp32" if precision == "no" else "amp-bf16",
        recompute=recipe.recompute,
        checkpointing=recipe.checkpointing,
        impl="auto" if gpu else "cpu",
    )
    batch = step.largest(takes + kept)
    return that_fits(batch, lambda size: _try(model, method, recipe, precision, size)) if gpu else batch


def that_fits(batch: int, attempt: Callable[[int], None]) -> int:
    """`batch`, or the first of its three quarters, and so on, of which `attempt` doesn't run out of a GPU's memory."""
    while batch > 0:
        try:
            attempt(batch)
            return batch
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            batch = 3 * batch // 4
    return 0


def _try(model: nn.Module, method: Method, recipe: Recipe, precision: str, batch: int) -> None:
    own = copy.deepcopy(model).train()
    prepare(own, method, recompute=recipe.recompute, fixed_head=recipe.fixed_head, **recipe.adapter)
    if recipe.checkpointing:
        checkpoint_blocks(image_tower(own))
    images = torch.zeros(batch, 3, *image_size(own), device=device())
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(images.device.type, dtype, enabled=precision != "no"):
        features, _ = ImageEncoder(own)(images)
    features.float().square().sum().backward()
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=0.0)
    optimizer.step()
