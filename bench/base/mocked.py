"""Triton on a machine without a GPU: it specialises, compiles and starts kernels as ever, and nothing runs.

    with mocked(90) as gpu:
        kernel[grid](...)
    gpu.launches[0].args

What such a launch takes is all that it costs on the host, but for the CUDA driver's share.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Devices of their own: what Triton keeps of a kernel it keeps per device, so that nothing of it is met again.
_devices = itertools.count(1000, 10)


class Launch(NamedTuple):
    """One launch. kernel: what was compiled, Triton's source of it, with signature, attributes and constants."""

    kernel: Any
    grid: tuple[int, int, int]
    stream: int
    args: tuple[Any, ...]


@contextmanager
def mocked(arch: int = 80, *, listen: bool = True) -> Iterator[Any]:
    """Inside, Triton takes a GPU of compute capability `arch` for there. Yields it: device, stream, launches.

    listen: whether `launches` are kept. `device` and `stream`, the current ones, may be set.
    """
    gpu = SimpleNamespace(device=next(_devices), stream=0, launches=[])

    class Listening:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.kernel = src

        def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            _, _, metadata, entering, leaving, *args = rest
            for hook in (entering, leaving):
                if hook is not None:
                    hook(metadata)
            gpu.launches.append(Launch(self.kernel, (x, y, z), stream, tuple(args)))

    class Silent:
        def __init__(self, src: Any, metadata: Any) -> None:
            pass

        def __call__(self, *args: Any) -> None:
            pass

    gpu.get_current_target = lambda: GPUTarget("cuda", arch, 32)
    gpu.get_current_device = lambda: gpu.device
    gpu.get_current_stream = lambda device: gpu.stream
    gpu.launcher_cls = Listening if listen else Silent
    gpu.utils = SimpleNamespace(
        load_binary=lambda *args: (1, 2, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        unload_module=lambda *args: None,
    )
    before = driver._active
    driver.set_active(gpu)
    try:
        yield gpu
    finally:
        driver._active = before
