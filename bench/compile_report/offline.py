"""Compiles Triton launches for a GPU that is not there.

    with compiling(80) as compiled:                      # 80: A100, 90: H100 and H200
        attention_fwd(torch.empty(..., device="meta"), ...)
    compiled[0].registers

Tensors on "meta" have shapes, strides and dtypes, and nothing else: a launcher that reads no values runs on them as it
would on a GPU, and each launch is specialised and compiled exactly as it would be there.
"""

import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastheads.kernels.launch import launching
from fastheads.kernels.tiles import FAMILY, SHARED

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel as it was specialised and compiled. Bytes are per thread (stack, local) or per block (shared)."""

    kernel: str
    arch: int
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    local: int
    shared: int
    mma: int  # mma.sync instructions in the PTX, tcgen05.mma on sm_100
    wgmma: int  # wgmma instructions
    dots: bool  # whether the source asks for a tl.dot at all
    hash: str

    @property
    def spills(self) -> int:
        """Bytes of stack and local memory a thread needs because its registers did not suffice."""
        return self.stack + self.local

    def problems(self) -> list[str]:
        """What makes this unfit to be a default, in words."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > SHARED[FAMILY[self.arch]]:
            found.append(f"needs {self.shared} bytes of shared memory; sm_{self.arch} has {SHARED[FAMILY[self.arch]]}")
        if self.dots and not self.mma + self.wgmma:
            found.append("has products, and no tensor-core instruction")
        return found


@contextmanager
def compiling(arch: int, found: Callable[[Any, int, Any], Any] | None = None) -> Iterator[list[Any]]:
    """Inside, every launch is compiled for sm_`arch` and added to the list instead of being run, as a `Compiled`.

    found: of a kernel, `arch` and what Triton compiled, makes what is added in its place.

    Raises RuntimeError where Triton's interpreter is on, which replaces the compiler.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set, and the interpreter compiles nothing: start Python without it")
    if arch not in FAMILY:
        raise ValueError(f"arch: got {arch!r}; takes {', '.join(map(str, FAMILY))}")
    out: list[Any] = []
    before = driver._active
    caches: dict[Any, Any] = {}

    def run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if kernel not in caches:
            # What a kernel was compiled to is kept per device number; ours belongs to another GPU.
            caches[kernel] = kernel.device_caches
            kernel.device_caches = defaultdict(kernel.create_binder)
        out.append((found or described)(kernel, arch, kernel.run(*args, grid=grid, warmup=True, **meta)))

    # A driver that knows what to compile for and has nothing to run it on.
    none = {
        "get_current_device": lambda: 0,
        "get_current_stream": lambda device: 0,
        "set_current_device": lambda _: None,
    }
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, 32), **none))
    try:
        with launching(run):
            yield out
    finally:
        driver._active = before
        for kernel, cache in caches.items():
            kernel.device_caches = cache


def described(kernel: Any, arch: int, compiled: Any) -> Compiled:
    """constexprs: the kernel's `tl.constexpr` arguments; not what Triton made constants of itself (None, 1)."""
    own = {kernel.params[path[0]]: value for path, value in compiled.src.constants.items() if len(path) == 1}
    ptx, usage, made = compiled.asm["ptx"], resource_usage(compiled.asm["cubin"]), compiled.metadata
    found = {name: usage[key] for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))}
    found |= {name: getattr(made, name) for name in ("num_warps", "num_stages", "shared")}
    instructions = {"mma": r"\b(?:mma\.sync|tcgen05\.mma)\b", "wgmma": r"\bwgmma\.mma_async"}
    found |= {name: len(re.findall(pattern, ptx)) for name, pattern in instructions.items()}
    found["constexprs"] = {param.name: _plain(value) for param, value in own.items() if param.is_constexpr}
    return Compiled(kernel.fn.__name__, arch, dots="tt.dot " in compiled.asm["ttir"], hash=compiled.hash, **found)


def _plain(value: Any) -> Any:
    """A constexpr as JSON holds it: a NamedTuple as a dictionary, other tuples as text."""
    value = getattr(value, "value", value)
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL … of a cubin's one kernel, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
