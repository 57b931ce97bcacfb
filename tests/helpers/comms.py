"""Counts what the collectives of a training step carry, in a process of a distributed test. Not a test file."""

import json

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Carried(TorchDispatchMode):
    """Bytes by collective: summed, gathered from all, summed in shares, handed on."""

    def __init__(self):
        super().__init__()
        self.bytes = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0, "broadcast": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            kind, whole = {
                "allreduce_": ("all_reduce", 0),
                "broadcast_": ("broadcast", 0),
                "allgather_": ("all_gather", 0),
                "_allgather_base_": ("all_gather", 0),
                "_reduce_scatter_base_": ("reduce_scatter", 1),
            }[name]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tree_leaves(args[whole]))
        return func(*args, **(kwargs or {}))


def communicate_on_rank(rank, world, folder, batch):
    """A step in DDP, in FSDP2 with all of the tower cut and with whole adapters, and an MMD over all ranks; rank 0
    writes what each carried."""
    from standins import images, patched

    import fastheads
    from fastheads.train.sharding import average_gradients, shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    counted = {}
    for kind in ("ddp", "fsdp", "fsdp adapters", "mmd"):
        model = patched("clip", fastheads.HeadConfig())
        model.forward = run = model.encode_image
        if kind == "ddp":
            run = torch.nn.parallel.DistributedDataParallel(model)
        trained = [p for p in model.parameters() if p.requires_grad] if kind == "fsdp adapters" else []
        if kind.startswith("fsdp"):
            shard(model, whole=trained)
        with fastheads.capture_heads(model) as heads, Carried() as carried:
            features = run(images(batch))
            if kind == "mmd":
                domains = torch.arange(batch) % 2
                fastheads.head_mmd(heads, domains, group=dist.group.WORLD, estimator="biased").backward()
            else:
                features.square().mean().backward()
                average_gradients(trained)
        counted[kind] = carried.bytes
    if rank == 0:
        (folder / "counted.json").write_text(json.dumps(counted))
    dist.destroy_process_group()
