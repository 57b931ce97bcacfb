"""A kernel started again, without the Python with which Triton finds out each time which of its compilations is meant.

Triton compiles a kernel anew for other types, alignments, divisibilities by 16, for a 1, a None, other constants. Which
it is here, `facts` say by themselves: the arguments' types, the values of all that are not tensors, and dtype and
alignment of those that are. Where they are equal, so is what Triton makes of them for NVIDIA's chips, for it looks at
nothing else there; on AMD's it also asks whether a tensor takes more than 2 GB. The first launch with some facts is
Triton's own, which returns what it compiled; later ones start that.

Triton's own are also those under launch hooks and other settings that are not the usual ones, of kernels with hooks of
their own, of arguments that `facts` do not cover, and all with a Triton that is built otherwise than 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MOST = 1024  # launches of a kernel that are remembered; then all are forgotten
PLAIN = (bool, int, float, str, type(None))

# What Triton's `run` reads at each launch beside the arguments, and what it is where nobody asked for anything.
USUAL: dict[str, Any] = {
    "runtime.launch_enter_hook.calls": [],
    "runtime.launch_exit_hook.calls": [],
    "runtime.add_stages_inspection_hook": None,
    "runtime.debug": False,
    "compilation.instrumentation_mode": "",
}
LATER: dict[str, Any] = {"compilation.fpsan_homomorphic_casts": False}  # not in 3.6
# Of its code, and the versions it was tried with: another may start kernels with other arguments.
USED = {"device_caches", "packed_metadata", "function", "launch_enter_hook", "launch_exit_hook", "pre_run_hooks"}
TRIED = (3, 6), (3, 9)


def _has(name: str) -> bool:
    try:
        attrgetter(name)(knobs)
    except AttributeError:
        return False
    return True


def _known() -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    code = getattr(JITFunction.run, "__code__", None)
    return TRIED[0] <= version <= TRIED[1] and all(map(_has, USUAL)) and USED <= set(getattr(code, "co_names", ()))


KNOWN = _known()
_read = {**USUAL, **{name: value for name, value in LATER.items() if _has(name)}}
_settings, _usual = attrgetter(*_read), tuple(_read.values())


def as_usual() -> bool:
    """Whether nobody listens to launches, or has changed what kernels are compiled to."""
    try:
        return bool(_settings(knobs) == _usual)
    except AttributeError:  # a hook that somebody put in place of Triton's chain of them
        return False


# --------------------------------------------------------------------------------------------- which compilation


class Places(NamedTuple):
    """Where in arguments of some types are tensors and tuples; `others` takes the rest, all at once."""

    tensors: tuple[int, ...]
    tuples: tuple[int, ...]
    others: Callable[[Any], Any]


_places: dict[tuple[type, ...], Places] = {}


def _found(kinds: tuple[type, ...]) -> Places:
    tensors = tuple(i for i, kind in enumerate(kinds) if issubclass(kind, Tensor))
    tuples = tuple(i for i, kind in enumerate(kinds) if issubclass(kind, tuple))
    others = [i for i in range(len(kinds)) if i not in (*tensors, *tuples)]
    places = _places[kinds] = Places(tensors, tuples, itemgetter(*others) if others else lambda args: None)
    return places


def facts(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All of `args` that Triton may compile for: where they are equal, it is one compilation."""
    kinds = tuple(map(type, args))
    tensors, tuples, others = _places.get(kinds) or _found(kinds)
    own = [kinds, others(args)]
    add = own.append
    for i in tensors:
        x = args[i]
        add(x.dtype)
        add(x.data_ptr() & 15)
    for i in tuples:
        add(facts(args[i]))
    return tuple(own)


def covered(value: Any, tensors: bool = True) -> bool:
    """Whether `facts` say all of an argument; a keyword (`tensors=False`) counts by its value, so may be no tensor."""
    if isinstance(value, tuple):
        return all(covered(item, tensors) for item in value)
    return type(value) in PLAIN or (tensors and isinstance(value, Tensor))


# --------------------------------------------------------------------------------------------------------- starts


Start = Callable[..., None]  # of x, y, z, stream, args
# By the id of Triton's cache for a kernel and a device, which is kept beside so that no other gets its id.
_starts: dict[int, tuple[Any, dict[Any, Start]]] = {}


def start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """`kernel[grid](*args, **meta)`."""
    if not KNOWN or type(kernel) is not JITFunction or kernel.pre_run_hooks or kernel.debug or not as_usual():
        kernel[grid](*args, **meta)
        return
    active = driver.active
    device = active.get_current_device()
    cache = kernel.device_caches[device]
    _, starts = _starts.get(id(cache)) or _starts.setdefault(id(cache), (cache, {}))
    key = (facts(args), *meta, *meta.values())
    try:
        known = starts.get(key)
    except TypeError:  # a constant without a hash
        kernel[grid](*args, **meta)
        return
    if known is None:
        compiled = kernel[grid](*args, **meta)
        if compiled is not None and covered(args) and covered(tuple(meta.values()), tensors=False):
            if len(starts) >= MOST:
                starts.clear()
            starts[key] = _start_of(compiled, kernel, len(args), meta)
        return
    known(*(*grid, 1, 1)[:3], active.get_current_stream(device), args)


def _start_of(compiled: Any, kernel: Any, given: int, meta: dict[str, Any]) -> Start:
    """Starts a compiled kernel with `given` arguments by place; those that follow are the same each time."""
    rest = list(kernel.signature.parameters.values())[given:]
    tail = tuple(meta.get(parameter.name, parameter.default) for parameter in rest)
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    # held: where nobody holds what was compiled, newer Tritons unload the function
    def started(x: int, y: int, z: int, stream: Any, args: tuple[Any, ...], held: Any = compiled) -> None:
        run(x, y, z, stream, function, packed, None, None, None, *args, *tail)

    return started
