"""The ledger of a training step: what it holds in memory, counted on tensors that have shapes and no values.

The step is the real one: the model's own forward, autograd's nodes, the operators with what they allocate inside. Its
tensors are fake (`torch._subclasses.FakeTensorMode`), so that any batch costs nothing, and a GPU's step is counted
where there is none.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import GraphExecGroup

from fastheads.ops import fused, halves

_FORWARD = torch.ops.fastheads.head_attention.default
_BACKWARD = torch.ops.fastheads.head_attention_backward.default
_OPERATORS: dict[Any, Callable[..., Any]] = {
    _FORWARD: fused.forward_filled,
    _BACKWARD: fused.backward_filled,
    **halves.OPERATORS,
}


@dataclass(frozen=True)
class Ledger:
    """Bytes of one training step on its device.

    saved: what the forward pass leaves alive for the backward pass, by the part of the model that made it, the images
    among them. peak: what is alive when it is most, likewise; "backward" are gradients and what they are made with. The
    model itself is in neither.
    """

    saved: dict[str, int]
    peak: dict[str, int]


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors that there are, each storage once."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def fake_copy(model: nn.Module, mode: FakeTensorMode, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `model` whose parameters and buffers are fake tensors on `device`, floating ones in `dtype`."""
    memo: dict[int, Any] = {}
    with mode:
        for own in (*model.parameters(), *model.buffers()):
            kind = dtype if dtype is not None and own.is_floating_point() else own.dtype
            made = torch.empty_strided(own.shape, own.stride(), dtype=kind, device=device)
            memo[id(own)] = nn.Parameter(made, own.requires_grad) if isinstance(own, nn.Parameter) else made
        return copy.deepcopy(model, memo)


# ------------------------------------------------------------------------------------------------------ counting


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations made on `device` and that are alive, by who made them: `now`, and at the
    `peak`.

    there: tensors that are there before, and of which operations return views.
    """

    def __init__(self, device: str, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.device = device
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.maker = ""
        self._known = {t.untyped_storage()._cdata for t in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATORS and args[-1] == "cpu":
            with self, torch.no_grad():  # into the operator, whose parts are PyTorch's
                out: Any = _OPERATORS[func](*args)
            return out
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device:
                self.add(leaf.untyped_storage())
        inside = _workspace(func, args) if func in _OPERATORS else 0
        if self.now.total() + inside > self.peak.total():
            self.peak = self.now + Counter({self.maker: inside})
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now[self.maker] += storage.nbytes()
        weakref.finalize(storage, self._gone, storage._cdata, self.maker, storage.nbytes())

    def _gone(self, key: int, maker: str, size: int) -> None:
        self._known.discard(key)
        self.now[maker] -= size


def _workspace(func: Any, args: Any) -> int:
    """Bytes that Triton's forms hold at most inside the operator, beside what it returns; partial sums are left out.

    Forward: W' (and W_out) as they are multiplied, q, k, v and T where they are not kept, the heads before W_out.
    Backward: the same weights, the gradients of q, k, v and U, those of the heads, and q, k, v, T where not kept.
    """
    if func in halves.OPERATORS:
        return halves.workspace(func, args)
    backward = func is _BACKWARD
    x, w_in, _, lora_A, _, _, w_out = args[backward : backward + 7]
    (B, N, D), impl = x.shape, args[-1]
    columns = 3 * D + (0 if lora_A is None else lora_A.numel() // D)
    if backward:
        dtype, projected = x.dtype, args[fused.TENSORS + 2 : fused.TENSORS + 4]
        kept = sum(t.shape[-1] for t in projected if t is not None)
        rows = columns + max(0, columns - kept)
    else:
        dtype, kept = args[fused.TENSORS + 4], args[fused.TENSORS + 3] in fused.KEPT
        rows = 0 if kept or impl == "one_pass" else columns
    cast = w_in.dtype != dtype
    weights = columns * D if cast or (lora_A is not None and (backward or impl != "one_pass")) else 0
    if w_out is not None:
        rows, weights = rows + D, weights + cast * D * D
    return int((weights + B * N * rows) * dtype.itemsize)


class _FusedAttention(TorchFunctionMode):
    """PyTorch's own attention as a GPU runs it, which it would not choose for fake tensors: no scores in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].device.type == "cpu":
            return func(*args, **kwargs)
        return _attention(*args, **kwargs)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    attend: Any = torch.ops.aten._scaled_dot_product_efficient_attention
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    out: Tensor = attend(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)[0]
    return out


@torch.no_grad()
def _backward(waiting: dict[Any, list[Tensor | None]]) -> None:
    """Runs autograd's nodes, the latest first, as its engine does, which wants the GPU to be there.

    waiting: the loss's node and its gradient; emptied, so that what a node saved is given back once it has run.
    """
    holders: dict[Any, list[Any]] = {}  # a node written in Python lives as long as one that leads to it
    while waiting:
        node = max(waiting, key=lambda n: n._sequence_nr())
        gradients, held = waiting.pop(node), holders.pop(node, [])
        if hasattr(node, "variable"):  # a leaf
            node.variable.grad = _sum(node.variable.grad, gradients[0])
            continue
        edges = node.next_functions
        if hasattr(node, "apply"):  # written in Python: of its inputs only tensors have edges
            found = [g for g, need in zip(node.apply(*gradients), node.needs_input_grad, strict=True) if need]
            edges = [edge for edge in edges if edge[0] is not None]
        else:
            one_or_more = node(*gradients)
            found = list(one_or_more) if isinstance(one_or_more, tuple) else [one_or_more]
            del one_or_more
        gradients.clear()
        for (after, index), gradient in zip(edges, found, strict=True):
            if after is not None and gradient is not None:
                takes = after._input_metadata
                slots = waiting.setdefault(after, [None] * len(takes))
                slots[index] = _sum(slots[index], _as(gradient, takes[index]))
                del slots
                if hasattr(after, "apply"):
                    holders.setdefault(after, []).extend([*held, node])
        del found, after, gradient, edges, node  # or they would live on while the next node runs


def _as(gradient: Tensor, takes: Any) -> Tensor:
    """A gradient in the shape and dtype that a node takes it in, as the engine hands it on."""
    gradient = gradient if gradient.shape == takes.shape else gradient.sum_to_size(takes.shape)
    return gradient.to(takes.dtype)


def _sum(before: Tensor | None, own: Tensor | None) -> Tensor | None:
    return own if before is None or own is None else before + own


@contextmanager
def _autocast(
    device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, cache_enabled: bool | None = None
) -> Iterator[None]:
    """torch.autocast, which would not come on for a GPU that is not there; caching is left as it is."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, enabled)
    torch.set_autocast_dtype(device_type, dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


@contextmanager
def _checkpoints() -> Iterator[None]:
    """Inside, torch.utils.checkpoint computes again as in a backward pass of the engine: once, and under autocast."""
    before = torch.amp.autocast
    setattr(torch.amp, "autocast", _autocast)  # noqa: B010
    try:
        with GraphExecGroup():
            yield
    finally:
        setattr(torch.amp, "autocast", before)  # noqa: B010


# Of OpenCLIP's blocks, timm's and Hugging Face's: where they stand, and what is made inside a part of one belongs to
BLOCKS = ("resblocks", "blocks", "layers")
PARTS = {"attn": "attention", "mlp": "MLP", "ln_1": "attention", "ln_2": "MLP", "norm1": "attention", "norm2": "MLP"}
PARTS |= {"self_attn": "attention", "layer_norm1": "attention", "layer_norm2": "MLP"}


def _part(name: str) -> str | None:
    """The part of the model that a module's tensors are told under; None: that of the module around it.

    A model without a text tower, or of Hugging Face's, is "visual" itself.
    """
    path = name.split(".")
    if "text_model" in path:
        return "text tower" if path[-1] == "text_model" else None
    if path[0] != "visual":
        return "text tower" if name in ("text", "transformer", "token_embedding", "ln_final") else None
    stack = next((path.index(name) for name in BLOCKS if name in path), None)
    if stack is None:
        return "ends of the tower" if len(path) == 1 or path[-1] == "vision_model" else None
    inside = path[stack + 1 :]
    return "residual stream" if len(inside) == 1 else PARTS.get(inside[-1]) if len(inside) == 2 else None


@contextmanager
def _told_apart(model: nn.Module, alive: _Alive) -> Iterator[None]:
    """Inside, `alive` hears which part of the model is running."""
    around: list[str] = []

    def enter(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            around.append(alive.maker)
            alive.maker = part

        return hook

    def leave(*_: Any) -> None:
        alive.maker = around.pop()

    handles = []
    for name, module in model.named_modules():
        part = _part(name if hasattr(model, "visual") else f"visual.{name}".rstrip("."))
        if part is not None:
            handles.append(module.register_forward_pre_hook(enter(part)))
            handles.append(module.register_forward_hook(leave, always_call=True))  # a checkpoint stops where it may
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count(
    model: nn.Module,
    inputs: Callable[[], tuple[Any, ...]],
    loss: Callable[..., Tensor],
    *,
    mode: FakeTensorMode,
    device: str,
    autocast: torch.dtype | None = None,
    there: Iterable[Tensor] = (),
) -> Ledger:
    """The ledger of `loss(*inputs()).backward()` for a fake `model` (`fake_copy`).

    there: tensors beside the model's that the step finds and leaves, as a classifier.
    autocast: the dtype that the loss is computed under. Gradients flow as autograd's engine lets them, node by node;
    hooks on tensors and `autograd.grad` are not for fake tensors.
    """
    alive = _Alive(device, (*model.parameters(), *model.buffers(), *there))
    with ExitStack() as around:
        if device != "cpu":  # on a CPU domain ids are looked at, and are real
            around.enter_context(mode)
        for context in (_FusedAttention(), alive, _told_apart(model, alive)):
            around.enter_context(context)
        alive.maker = "images"
        given = inputs()
        alive.maker = "losses"
        with _autocast(device, autocast, enabled=autocast is not None):
            value = loss(*given)
        waiting: dict[Any, list[Tensor | None]] = {value.grad_fn: [torch.ones_like(value)]}
        del value
        saved = dict(+alive.now)
        alive.maker = "backward"
        with _checkpoints():
            _backward(waiting)
    model.zero_grad()
    return Ledger(saved, dict(alive.peak))
