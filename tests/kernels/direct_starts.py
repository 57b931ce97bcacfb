"""What test_direct.py checks, in a process without the interpreter: each function that takes `gpu` is a check.

`python tests/kernels/direct_starts.py NAME …` prints JSON: what went wrong in each, "" for nothing.
"""

import gc
import json
import random
import sys
import threading
import traceback
import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from bench.base.mocked import mocked
from fastheads.kernels import direct
from fastheads.kernels.launch import launch


class Form(NamedTuple):
    rows: int
    more: tuple[int, ...] = ()


@triton.jit
def small_kernel(p_x, p_y, n, scale, pair, FORM: tl.constexpr = None, WIDE: tl.constexpr = False):
    pass


@triton.jit
def hashless_kernel(p_x, FORMS: tl.constexpr):
    pass


X = torch.zeros(64)
OFF = X[1:]
LIKE: dict = dict(p_x=X, p_y=X, n=32, scale=0.5, pair=(X, 3), FORM=Form(16), WIDE=False)
# What of it changes, and whether that asks for another compilation.
OTHERS = {
    "alignment": (dict(p_x=OFF), True),
    "alignment, as before": (dict(p_x=X[4:]), False),
    "dtype": (dict(p_x=X.half()), True),
    "None for a tensor": (dict(p_y=None), True),
    "divisibility": (dict(n=33), True),
    "divisibility, as before": (dict(n=48), False),
    "one": (dict(n=1), True),
    "64 bits": (dict(n=2**32), True),
    "unsigned 64 bits": (dict(n=2**63), True),
    "a boolean": (dict(n=True), True),
    "an integer for a float": (dict(scale=1), True),
    "another float": (dict(scale=1.0), False),
    "a tensor in a tuple": (dict(pair=(OFF, 3)), True),
    "an integer in a tuple": (dict(pair=(X, 1)), True),
    "an integer in a tuple, as before": (dict(pair=(X, 5)), False),
    "None in a tuple": (dict(pair=(None, 3)), True),
    "None for a tuple": (dict(pair=None), True),
    "a longer tuple": (dict(pair=(X, 3, 3)), True),
    "a constant": (dict(FORM=Form(16, (1,))), True),
    "a constant flag": (dict(WIDE=True), True),
    "warps": (dict(num_warps=8), True),
    "stages": (dict(num_stages=2), True),
    "registers": (dict(maxnreg=64), True),
}


def begin(kernel, grid=(3,), **named):
    """By place what is not a constant, as the launchers here do it."""
    args = [named.pop(name) for name in ("p_x", "p_y", "n", "scale", "pair") if name in named]
    launch(kernel, grid, *args, **named)


def triton_runs(kernel):
    """Counts the launches that go through Triton's `run`."""
    runs = []
    own = kernel.run
    kernel.run = lambda *args, **meta: (runs.append(1), own(*args, **meta))[1]
    return runs


def the_second_launch_starts_what_the_first_compiled(gpu):
    runs = triton_runs(small_kernel)
    begin(small_kernel, (5, 2), **LIKE)
    gpu.stream = 7
    begin(small_kernel, **(LIKE | dict(p_x=X[16:])))
    del small_kernel.run
    first, second = gpu.launches
    assert len(runs) == 1
    assert first.grid == (5, 2, 1) and second.grid == (3, 1, 1)
    assert (first.stream, second.stream) == (0, 7)
    assert second.kernel is first.kernel
    assert second.args[0].data_ptr() == X[16:].data_ptr() and second.args[1] is X
    assert second.args[2:] == (32, 0.5, (X, 3), Form(16), False) == first.args[2:]


def what_is_left_out_takes_its_default(gpu):
    few = {name: value for name, value in LIKE.items() if name not in ("FORM", "WIDE")}
    for _ in range(2):
        begin(small_kernel, **few)
    first, second = gpu.launches
    assert first.args[5:] == second.args[5:] == (None, False)


def another_specialisation_starts_another_kernel(gpu):
    """Both ways through each change, each launch against the one that Triton itself makes of the same arguments."""
    for name, (change, compiles) in OTHERS.items():
        compiled = []
        for named in (LIKE, LIKE | change) * 2:
            begin(small_kernel, **named)
            small_kernel[(3,)](**named)
            ours, own = gpu.launches[-2:]
            assert ours.kernel is own.kernel and ours.grid == own.grid, name
            assert all(a is b or a == b for a, b in zip(ours.args, own.args, strict=True)), name
            compiled.append(ours.kernel)
        assert (compiled[0] is not compiled[1]) == compiles, name
        assert compiled[2:] == compiled[:2], name


def equal_facts_are_equal_specialisations(gpu):
    """On random pairs of argument lists, by Triton's own binder; and most pairs that differ little are met."""
    r = random.Random(0)
    tensors = [X, OFF, X[4:], X.half(), X.half()[1:], X.double(), torch.zeros(4, dtype=torch.int64), X.bfloat16()]
    numbers = [0, 1, 2, 8, 15, 16, 17, 32, 160, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63]
    plain = [*numbers, 0.0, 1.0, 16.0, 0.5, True, False, None]

    def value(depth=0):
        kind = r.random()
        if kind < 0.4:
            return r.choice(tensors)
        if kind < 0.85 or depth == 2:
            return r.choice(plain)
        return tuple(value(depth + 1) for _ in range(r.randint(0, 3)))

    begin(small_kernel, **LIKE)
    binder = small_kernel.device_caches[gpu.device][4]

    def specialised(args):
        return repr(binder(*args, FORM=None, WIDE=False, debug=False)[1])

    equal = 0
    for _ in range(20_000):
        one = [value() for _ in range(5)]
        other = [value() if r.random() < 0.15 else x for x in one]
        if direct.facts(tuple(one)) == direct.facts(tuple(other)):
            equal += 1
            assert specialised(one) == specialised(other), (one, other)
    assert 2_000 < equal < 18_000


def equal_keys_are_of_equal_types(gpu):
    for one, other in ((1, True), (1, 1.0), (0, False), (16, 16.0)):
        assert direct.facts((one,)) != direct.facts((other,))
        assert direct.facts(((X, one),)) != direct.facts(((X, other),))


def launch_hooks_are_called(gpu):
    begin(small_kernel, **LIKE)
    begin(small_kernel, **LIKE)
    heard = []
    entering, leaving = (lambda metadata: heard.append("in")), (lambda metadata: heard.append("out"))
    knobs.runtime.launch_enter_hook.add(entering)
    knobs.runtime.launch_exit_hook.add(leaving)
    try:
        begin(small_kernel, **LIKE)
        assert heard == ["in", "out"]
    finally:
        knobs.runtime.launch_enter_hook.remove(entering)
        knobs.runtime.launch_exit_hook.remove(leaving)
    begin(small_kernel, **LIKE)
    assert heard == ["in", "out"] and len(gpu.launches) == 4


def a_hook_in_place_of_the_chain_is_called(gpu):
    begin(small_kernel, **LIKE)
    heard, before = [], knobs.runtime.launch_enter_hook
    knobs.runtime.launch_enter_hook = heard.append
    try:
        begin(small_kernel, **LIKE)
    finally:
        knobs.runtime.launch_enter_hook = before
    assert len(heard) == 1


def a_hook_before_a_run_is_called(gpu):
    begin(small_kernel, **LIKE)
    heard = []
    small_kernel.add_pre_run_hook(lambda *args, **meta: heard.append(args))
    try:
        begin(small_kernel, **LIKE)
    finally:
        small_kernel.pre_run_hooks.clear()
    assert len(heard) == 1


def a_debug_setting_compiles_anew(gpu):
    begin(small_kernel, **LIKE)
    runs = triton_runs(small_kernel)
    knobs.runtime.debug = True
    try:
        begin(small_kernel, **LIKE)
    finally:
        knobs.runtime.debug = False
        del small_kernel.run
    assert len(runs) == 1


def each_device_has_its_own(gpu):
    begin(small_kernel, **LIKE)
    gpu.device += 1
    runs = triton_runs(small_kernel)
    begin(small_kernel, **LIKE)
    begin(small_kernel, **LIKE)
    del small_kernel.run
    assert len(runs) == 1


def threads_start_the_same(gpu):
    def work():
        for n in range(200):
            begin(small_kernel, **(LIKE | dict(n=n)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.launches) == 800
    for launched in gpu.launches:
        n = launched.args[2]
        assert launched.kernel.signature["n"] == ("constexpr" if n == 1 else "i32")
        assert bool(launched.kernel.attrs.get((2,))) == (n % 16 == 0)


def no_tensor_is_kept(gpu):
    x = torch.zeros(32)
    begin(small_kernel, **(LIKE | dict(p_x=x, pair=(x, 3))))
    begin(small_kernel, **(LIKE | dict(p_x=x, pair=(x, 3))))
    gpu.launches.clear()
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def a_tensor_by_keyword_goes_through_triton(gpu):
    runs = triton_runs(small_kernel)
    for _ in range(2):
        launch(small_kernel, (1,), X, n=3, p_y=X, scale=0.5, pair=(X, 3))
    del small_kernel.run
    assert len(runs) == len(gpu.launches) == 2


def a_constant_without_a_hash_goes_through_triton_and_is_its_error(gpu):
    try:
        launch(hashless_kernel, (1,), X, FORMS=[1])
    except TypeError as error:
        assert "unhashable" in str(error)
    else:
        raise AssertionError("Triton takes lists now: it may be left to it, but is worth a look")


def what_is_remembered_has_an_end(gpu):
    most, direct.MOST = direct.MOST, 8
    try:
        for n in range(100):
            begin(small_kernel, **(LIKE | dict(n=n)))
    finally:
        direct.MOST = most
    (starts,) = [starts for cache, starts in direct._starts.values() if cache is small_kernel.device_caches[gpu.device]]
    assert len(starts) <= 8 and len(gpu.launches) == 100


def what_triton_forgot_is_compiled_again(gpu):
    begin(small_kernel, **LIKE)
    small_kernel.device_caches.clear()
    runs = triton_runs(small_kernel)
    begin(small_kernel, **LIKE)
    del small_kernel.run
    assert len(runs) == 1


def another_triton_launches_by_itself(gpu):
    direct.KNOWN = False
    runs = triton_runs(small_kernel)
    try:
        for _ in range(3):
            begin(small_kernel, **LIKE)
    finally:
        direct.KNOWN = True
        del small_kernel.run
    assert len(runs) == len(gpu.launches) == 3


def this_triton_is_known(gpu):
    assert direct.KNOWN and direct.as_usual() and type(small_kernel) is JITFunction


def an_empty_grid_starts_nothing(gpu):
    begin(small_kernel, (0,), **LIKE)
    assert not gpu.launches


if __name__ == "__main__":
    said = {}
    for name in sys.argv[1:]:
        with mocked() as there:
            try:
                globals()[name](there)
                said[name] = ""
            except Exception:
                said[name] = traceback.format_exc()
    json.dump(said, sys.stdout)
