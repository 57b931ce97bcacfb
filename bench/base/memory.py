"""What a forward pass leaves alive for its backward pass, the most memory a call takes, and how much there is."""

import contextlib
import ctypes
import gc
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Allocations(TorchDispatchMode):
    """Every storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out


def held_bytes(run: Callable[[], Tensor], known: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes of the storages that `run` allocates and that live on while its result does, without the result itself.

    Whatever autograd keeps is among them, however it is kept: saved tensors whole (a view keeps all it is a view of),
    attributes of a context, arguments of a checkpoint. `known()`, asked after `run`: tensors that exist anyway
    (inputs, parameters; PEFT makes its weights anew in each forward pass).
    """
    with _Allocations() as seen:
        result = run()
    anyway = {t.untyped_storage()._cdata for t in known()}
    anyway.add(result.untyped_storage()._cdata)
    return sum(size for key, (ref, size) in seen.storages.items() if key not in anyway and not ref.expired())


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
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def resident_bytes(run: Callable[[], Any]) -> int:
    """The most that `run` adds to this process's resident size, whoever allocates it. Linux."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what is free and still held would be taken again unseen: glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # else the peak so far stands, lower than what follows
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _kilobytes("self/status", "VmRSS")
    run()
    return 1024 * (_kilobytes("self/status", "VmHWM") - before)


def available_bytes() -> int:
    """What a program can have without anything being pushed out. Linux."""
    return 1024 * _kilobytes("meminfo", "MemAvailable")


def _kilobytes(file: str, key: str) -> int:
    lines = Path("/proc", file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
