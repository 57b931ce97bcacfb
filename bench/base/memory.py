"""What a forward pass leaves alive for its backward pass, and the most memory a call takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
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
    with _Allocations() as seen:
        result = run()
    anyway = {t.untyped_storage()._cdata for t in known}
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


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most that PyTorch's allocator held while `run` ran, beyond what it held before.

    On a CPU summed up from the allocations that the profiler sees: exact, but without what libraries take for
    themselves. Call `run` once before, for what only a first call allocates.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler's cycles, of which there is one
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
