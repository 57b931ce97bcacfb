"""What one attention layer asks of a GPU, and of the host: device operations, arguments of launches, host time.

    python -m bench.launches                     some two minutes, no GPU
    python -m bench.launches --json bench/results/launches.json --doc docs/performance.md

Beside it the frozen `nn.MultiheadAttention` of the same block; both forward, and backward to their input and to what is
trained. Counted is what would start something on a GPU, at the shapes as they are, and nothing is computed: PyTorch's
operations but views and allocations (one of them may be several kernels: attention's backward pass is three), and our
launches. Timed is the host, on a CPU, on tensors so small that to compute takes little beside calling for it, which
costs on a GPU about as much; by the thread's own time, so that other processes do not count. Our launches go

- nowhere ("stubbed"): all but Triton;
- through Triton's `run`, or ours (`kernels/direct.py`), to a driver that does nothing: all but CUDA's own share.
"""

import argparse
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastheads
from bench.base.mocked import mocked
from bench.base.results import Row, by_case, environment, read, write
from bench.base.tables import table, write_block
from bench.base.timing import compare
from bench.base.towers import SETTINGS, Setting
from bench.contests.models import blocks_of, clip
from fastheads.kernels import attention_bwd, attention_fwd, fold, low_rank, mmd_small, one_pass
from fastheads.kernels.launch import launch, launching
from fastheads.ops import dispatch, fused

GROUP = "launches"
FORMS = ("stacked", "delta", "one_pass")
KERNELS = (attention_bwd, attention_fwd, fold, low_rank, mmd_small, one_pass)
# One image of eight tokens, two heads of sixteen: what is timed.
TINY = Setting("a tiny layer", "", 28, 14, 32, 16, 1, 16)
# Operations that start nothing on a GPU, views apart, and those that are made of several.
ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")
WAITS = "_local_scalar_dense"  # of .item(): for the GPU
MADE_OF = {
    "constant_pad_nd": ("fill_", "copy_"),
    "select_backward": ("zero_", "copy_"),
    "slice_backward": ("zero_", "copy_"),
}


@dataclass(frozen=True)
class Layer:
    """What is measured: a form, or "stock". autocast: to bfloat16; captured: the pooled token's heads are asked for."""

    form: str
    setting: Setting
    batch: int
    rank: int = 2
    autocast: bool = True
    captured: bool = True
    gate: str | None = "softmax"
    stored: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        how = "bf16 autocast" if self.autocast else str(self.stored).removeprefix("torch.")
        return f"{self.setting.name}, batch {self.batch}, {how}"

    def passes(self) -> tuple[Callable[[], Tensor], Callable[[Tensor], Any]]:
        """Forward, and backward of what that returned. On a CPU to be called, and run, `as_on_a_gpu`."""
        model = clip(self.setting, 1, self.device, self.stored)
        if self.form != "stock":
            config = fastheads.HeadConfig(rank=(self.rank,), gate=self.gate)
            fastheads.patch(model, config, impl=self.form)
        attention = blocks_of(model)[0].attn
        if self.form != "stock" and self.captured:
            attention.heads.recorder = SimpleNamespace(pool=0, add=lambda layer, heads: None)
        shape = (self.batch, self.setting.tokens, self.setting.width)
        # LayerNorm before the layer leaves float32 under autocast, and its output gets the gradient of its own dtype.
        x = torch.zeros(shape, dtype=self.stored, device=self.device, requires_grad=True)
        wanted = [x, *(p for p in attention.parameters() if p.requires_grad)]
        dy = torch.zeros(shape, dtype=torch.bfloat16 if self.autocast else self.stored, device=self.device)

        def forward() -> Tensor:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                return attention(x, x, x, need_weights=False)[0]

        return forward, lambda y: torch.autograd.grad(y, wanted, dy)

    def step(self) -> Callable[[], Any]:
        forward, backward = self.passes()
        return lambda: backward(forward())


@contextmanager
def as_on_a_gpu(arch: int = 80) -> Iterator[None]:
    """Inside, Triton's forms take CPU tensors, and tiles for `arch`; products of 16 bits may have float32 outputs."""
    wide, fused._wide = fused._wide, lambda x: x.dtype.itemsize == 2
    before, architectures = dispatch.INTERPRETING, [(m, m.architecture) for m in KERNELS if hasattr(m, "architecture")]
    dispatch.INTERPRETING = True
    dispatch._remembered.cache_clear()
    for module, _ in architectures:
        module.architecture = lambda x: arch
    try:
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("mm.dtype", lambda a, b, out_dtype: (a @ b).to(out_dtype), "CPU")
            yield
    finally:
        fused._wide = wide
        dispatch.INTERPRETING = before
        dispatch._remembered.cache_clear()
        for module, found in architectures:
            module.architecture = found


# ---------------------------------------------------------------------------------------------------------- counts


class Operations(TorchDispatchMode):
    """`seen`: what would start something on a GPU, by name, our kernels as `kernel(arguments)`.

    computing: whether PyTorch's operations run too.
    """

    def __init__(self, computing: bool = False) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.computing = computing

    def launched(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        self.seen.append(f"{name}({_arguments(args)})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastheads":
            with self:  # into the operator, past the dispatcher, which would come back here
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        with self:
            composed = func.decompose(*args, **kwargs)
        if composed is not NotImplemented:
            return composed
        name = func.overloadpacket.__name__
        returns = any("Tensor" in str(r.type) for r in func._schema.returns)
        if func.is_view or name in ALLOCATES or not (returns or name == WAITS):
            return func(*args, **kwargs)
        self.seen += MADE_OF.get(name, (name,))
        if self.computing:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0]
        args, kwargs = tree_map_only(Tensor, lambda t: _like(t, "meta"), (args, kwargs))
        made = func(*args, **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})})
        return tree_map_only(Tensor, lambda t: _like(t, "cpu"), made)


def _like(t: Tensor, device: str) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


def _arguments(args: Sequence[Any]) -> int:
    """Of a launch: those of its tuples are arguments too; constants are not."""
    return sum(_arguments(a) if isinstance(a, tuple) else 1 for a in args)


def operations(layer: Layer, computing: bool = False) -> tuple[list[str], list[str]]:
    """Device operations of the forward and of the backward pass, in order."""
    with as_on_a_gpu():
        forward, backward = layer.passes()
        ahead, back = Operations(computing), Operations(computing)
        with launching(ahead.launched), ahead:
            y = forward()
        with launching(back.launched), back:
            backward(y)
    return ahead.seen, back.seen


# ----------------------------------------------------------------------------------------------------------- times


def _nothing(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    pass


def _by_triton(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    kernel[grid](*args, **meta)


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "stubbed": lambda: launching(_nothing),
    "Triton's run": lambda: launching(_by_triton),
    "ours": nullcontext,
}


def host_times(
    autocast: bool, rounds: int, forms: Sequence[str] = FORMS, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Seconds of a step on the host, in turn: "stock", and for each form and way "form, way"."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set, and the interpreter launches nothing: start Python without it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layer = Layer("stock", TINY, 1, autocast=autocast, device=device)
    try:
        with _no_gpu() if device == "cpu" else nullcontext():
            runs = {"stock": layer.step()}
            for form, way in itertools.product(forms, WAYS):
                runs[f"{form}, {way}"] = _inside(WAYS[way], replace(layer, form=form).step())
            return compare(runs, "thread", rounds=rounds, sample_seconds=0.02)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_gpu() -> Iterator[None]:
    with as_on_a_gpu(), mocked(80, listen=False), _plain_products():
        yield


@contextmanager
def _plain_products() -> Iterator[None]:
    """Without oneDNN, which at each bfloat16 product looks up what it made for the shape: nothing a GPU's host does."""
    (before,) = torch.backends.mkldnn.set_flags(_enabled=False)[:1]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before)


def _inside(way: Callable[[], AbstractContextManager[Any]], step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        with way():
            step()

    return run


def launch_times(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of each of our launches alone, by kernel(arguments) and way, without a GPU."""
    found: dict[str, tuple[Any, ...]] = {}

    def keep(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        found[f"{kernel.__name__}({_arguments(args)})"] = kernel, grid, args, meta

    with _no_gpu():
        for form in FORMS:
            with launching(keep):
                Layer(form, TINY, 1).step()()

        def again(kernel: Any, grid: tuple[int, ...], args: Any, meta: Any) -> Callable[[], Any]:
            return lambda: launch(kernel, grid, *args, **meta)

        times = {}
        for name, launched in found.items():
            runs = {way: _inside(inside, again(*launched)) for way, inside in WAYS.items() if way != "stubbed"}
            times[name] = compare(runs, "thread", rounds=rounds, sample_seconds=0.005)
    return times


# ---------------------------------------------------------------------------------------------------------- report


def counted(layers: Sequence[Layer]) -> list[Row]:
    rows: list[Row] = []
    for layer in layers:
        case = f"operations: {layer.name}"
        try:
            forward, backward = operations(layer)
        except ValueError as error:  # the form refuses the shape
            rows.append(Row(GROUP, case, layer.form, "not run", why=str(error)))
            continue
        extra = {"count": len(forward) + len(backward), "forward": forward, "backward": backward}
        rows.append(Row(GROUP, case, layer.form, extra=extra))
    return rows


def timed(autocast: bool, rounds: int, device: str = "cpu") -> list[Row]:
    times = host_times(autocast, rounds, device=device)
    case = f"host time: {Layer('stock', TINY, 1, autocast=autocast).name}"
    of = {"baseline": "stock"}
    return [
        Row(GROUP, case, name, seconds=took, ratio=took["median"] / times["stock"]["median"], **of)
        for name, took in times.items()
    ]


def launched(rounds: int) -> list[Row]:
    rows = []
    for name, times in launch_times(rounds).items():
        base = times["Triton's run"]["median"]
        of = {"group": GROUP, "case": f"launch: {name}", "baseline": "Triton's run"}
        rows += [Row(contender=way, seconds=took, ratio=took["median"] / base, **of) for way, took in times.items()]
    return rows


def measure(rounds: int) -> list[Row]:
    towers = itertools.product((SETTINGS["B/16"], SETTINGS["B/32"]), (True, False), ("stock", *FORMS))
    layers = [Layer(form, setting, 64, autocast=autocast) for setting, autocast, form in towers]
    return [*counted(layers), *launched(rounds), *timed(True, rounds), *timed(False, rounds)]


def report(rows: Sequence[Row]) -> str:
    lines = []
    for (_, case), own in by_case(rows).items():
        own = [r for r in own if r.status == "ok"]
        if case.startswith("operations"):
            cells = [[r.contender, *(len(r.extra[p]) for p in ("forward", "backward")), r.extra["count"]] for r in own]
            lines += [f"{case}:", "", table(["", "forward", "backward", "both"], cells), ""]
            for r in own:
                lines += [f"- {r.contender}: " + "; ".join(_counts(r.extra[p]) for p in ("forward", "backward"))]
        else:
            cells = [[r.contender, f"{r.median * 1e6:,.1f}", f"{r.ratio:.2f}"] for r in own]
            lines += [f"{case}:", "", table(["", "µs", f"/ {own[0].baseline}"], cells)]
        lines.append("")
    return "\n".join(lines)


def _counts(seen: Sequence[str]) -> str:
    return ", ".join(name if n == 1 else f"{n} × {name}" for name, n in Counter(seen).items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="fills the tables in this document")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing, read a result")
    parser.add_argument("--rounds", type=int, default=41)
    given = parser.parse_args(argv)
    where, rows = read(given.source) if given.source else (environment("cpu"), measure(given.rounds))
    print(report(rows))
    if given.json:
        write(given.json, where, rows)
    if given.doc:
        write_block(given.doc, "launches", report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
