"""What no CUDA graph can hold, seen without a GPU, and a graph that replays on a CPU. Not a test file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastheads.kernels.launch import launching

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
aten = torch.ops.aten


class NoHostTrips(TorchDispatchMode):
    """Raises where the host would read `device`'s values, or send some: `tolist`, boolean indices, tensors of lists.

    A dispatch mode sees nothing of what an operator does inside. Ours are run on fake CUDA tensors, which have no
    values to wait for; their launches are noted, and what they return is zeros.

    seen: operations and launches in order, with shapes, dtypes and numbers: all that a graph of them would hold.
    """

    READS = {
        aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten.is_nonzero,
        aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    }  # fmt: skip

    def __init__(self, device: str = DEVICE) -> None:
        super().__init__()
        self.device = device
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastheads":
            return self.inside(func, args)
        if func.namespace != "aten":  # what a tensor is asked, and a profiler told
            return func(*args, **kwargs)
        with self:
            composed = func.decompose(*args, **kwargs)  # inside an operator nothing is yet
        if composed is not NotImplemented:
            return composed
        name, read = func.overloadpacket, args and getattr(args[0], "device", None)
        assert name not in self.READS or read.type != self.device, f"{func}: the host waits for its result"
        assert name is not aten.lift_fresh, "a tensor is made of Python numbers: a copy from the host"
        if name in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            assert all(i is None or i.dtype == torch.int64 for i in args[1]), "a boolean index: the host counts it"
        out = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        devices = {t.device.type for t in (*given, *made)}
        assert devices <= {self.device}, f"{func}: a copy between host and GPU, on {devices}"
        self.seen.append((str(func), described((args, kwargs))))
        return out

    def inside(self, func: Any, args: Any) -> Any:
        with FakeTensorMode(), NoHostTrips("cuda") as own, launching(own.launched):
            made = func._op_dk(torch._C.DispatchKey.CUDA, *tree_map_only(Tensor, lambda t: like(t, "cuda"), args))
        self.seen += own.seen
        return tree_map_only(Tensor, lambda t: like(t, self.device).zero_(), made)

    def launched(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        self.seen.append((kernel.fn.__name__, grid, described((args, meta))))


def like(t: Tensor, device: str) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


def described(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype), tree)


class Graph(TorchDispatchMode):
    """A `torch.cuda.CUDAGraph` for a CPU: `replay` runs what ran inside, on the same tensors, with the same numbers.

    As capture runs nothing, what was written inside is put back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.before += [(t, t.clone()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for t, value in reversed(self.before):
            t.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.copy_(new)


@contextmanager
def captured() -> Iterator[NoHostTrips]:
    """What runs inside may do what capture allows, and must name the device of all that it makes."""
    with torch.device("meta"), NoHostTrips() as trips:
        yield trips


def as_on_a_gpu(monkeypatch: Any) -> None:
    """Values are not looked at, and fake CUDA tensors find a GPU."""
    for module in ("fastheads.losses.mmd_loss", "fastheads.ops.head_attention"):
        monkeypatch.setattr(sys.modules[module], "looked_at", lambda values: False)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


def graphs_on_a_cpu(monkeypatch: Any) -> None:
    """Puts `Graph` where PyTorch has CUDA's graphs; streams are nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, instead in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph, **mode: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
