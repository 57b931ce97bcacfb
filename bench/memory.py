"""What a forward pass leaves alive for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for item in found:
            yield from _tensors(item)


class _Allocations(TorchDispatchMode):
    """Every storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out


def held_bytes(run: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that `run` allocates and that live on while its result does, without the result itself.

    Whatever autograd keeps is among them, however it is kept: saved tensors whole (a view keeps all it is a view of),
    attributes of a context, arguments of a checkpoint. `known`: tensors that exist anyway (inputs, parameters).
    """
    anyway = {t.untyped_storage()._cdata for t in known}
    with _Allocations() as seen:
        result = run()
    anyway.add(result.untyped_storage()._cdata)
    return sum(size for key, (ref, size) in seen.storages.items() if key not in anyway and not ref.expired())


def saved_bytes(run: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd was given through `saved_tensors_hooks`, `known` excepted."""
    anyway = {t.untyped_storage()._cdata for t in known}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        alive.append(storage)  # so that no other storage gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(size for key, size in sizes.items() if key not in anyway)
