"""Triton's interpreter without what it does over and over: the same bits in three fifths of the time; and with masks
made of scalars, which Triton 3.9's refuses.

Not a test file. Of a Triton whose interpreter is built otherwise nothing is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

PARTS = ("_patch_lang", "GridExecutor", "_LangPatchScope", "_get_np_dtype")


def quicken() -> None:
    """To be called once, before the first kernel is launched."""
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:  # no Triton on this system
        return
    if all(hasattr(interpreter, name) for name in PARTS):
        patch_once_per_launch(interpreter)
        remember_dtypes(interpreter)
        keep_booleans(interpreter)
    if hasattr(core, "_type_for_tuple_values"):
        remember_shapes(core)


def patch_once_per_launch(interpreter: Any) -> None:
    """The language is made ready once per launch and module, not again at each call of a function in a kernel."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    ready: set[str] = set()

    def patch_lang(fn: Callable[..., Any]) -> Any:
        module = fn.__globals__["__name__"]
        if module in ready:
            return interpreter._LangPatchScope()
        ready.add(module)
        return patch(fn)

    @functools.wraps(launch)
    def call(*args: Any, **kwargs: Any) -> Any:
        ready.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def remember_dtypes(interpreter: Any) -> None:
    """NumPy's dtype of each of Triton's, looked up in a table that is not written anew each time."""
    find, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = np_dtype


def keep_booleans(interpreter: Any) -> None:
    """A block of one comparison's answer holds booleans. Triton goes by the type of what was compared, makes it int32,
    and since 3.9 refuses that as a mask."""
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, block: Any, scalar: Any) -> Any:
        if scalar.data.dtype == bool:
            scalar = interpreter.TensorHandle(scalar.data, interpreter.tl.int1)
        return splat(self, block, scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat


def remember_shapes(core: Any) -> None:
    """One type for all shapes of the same numbers: every tensor has two."""
    find, known = core._type_for_tuple_values, {}

    def type_of(values: list[Any], fields: Any = None) -> Any:
        key = tuple([v.value if type(v) is core.constexpr else v for v in values])
        if fields is not None or not all(type(v) is int for v in key):
            return find(values, fields)
        if key not in known:
            known[key] = find(values)
        return known[key]

    core._type_for_tuple_values = type_of
