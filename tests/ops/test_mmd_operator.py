"""`kernel_sums` and `mmd_fused` as operators: autograd, compile, autocast, strides, threads, repetition, memory."""

import contextlib

import pytest
import torch
from mmd_cases import BF16, F16, F32, F64, close, gammas_of, leaf
from mmd_formulas import labels, randn
from mmd_ranks import in_a_loaders_worker
from processes import on_ranks
from torch.autograd import gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bench.base.memory import peak_bytes
from fastheads import reference
from fastheads.kernels.launch import launching
from fastheads.losses import mmd
from fastheads.losses.samples import bandwidths
from fastheads.ops import kernel_sums, mmd_fused, mmd_panels
from fastheads.ops import mmd as module

# ---- as an operator -----------------------------------------------------------------------------


def test_gradients_are_the_derivatives(backend):
    x, y, gammas = leaf(randn(2, 5, 3)), leaf(randn(2, 4, 3, seed=1)), gammas_of(2)
    dx, dy = labels(2, 3), labels(3, 1)
    assert gradcheck(lambda x: kernel_sums(x, dx, None, None, 2, gammas, impl="cpu"), [x])
    assert gradcheck(lambda x, y: kernel_sums(x, dx, y, dy, 2, gammas, impl="cpu"), [x, y])
    coeff = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=F64)
    assert gradcheck(lambda x: mmd_fused(x, dx, gammas, coeff, impl="cpu"), [x])


def test_opcheck(backend):
    x, y, dx, dy = leaf(randn(2, 5, 3)), leaf(randn(2, 4, 3, seed=1)), labels(2, 3), labels(3, 1)
    gammas, chain, coeff = gammas_of(2), [0, 0, 0], torch.eye(2, dtype=F64).expand(2, -1, -1)
    sums, fused = torch.ops.fastheads.kernel_sums.default, torch.ops.fastheads.mmd_fused.default
    for x_ in (x, leaf(x.half())):
        torch.library.opcheck(sums, (x_, dx, None, None, 2, gammas.to(F32), chain, 0, "cpu"))
        torch.library.opcheck(fused, (x_, dx, None, None, 2, gammas.to(F32), chain, coeff, 0, True, "cpu"))
    torch.library.opcheck(sums, (x, dx, y, dy, 2, gammas, chain, 1, "cpu"))
    torch.library.opcheck(fused, (x, dx, y.detach(), dy, 2, gammas, chain, coeff, None, True, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kernel, reduction", [("adaptive", "mean"), ("domainbed", "none"), ((0.1, 0.5), "mean")])
def test_compiles_in_one_graph(kernel, reduction, dynamic):
    def loss(x, dom):
        return mmd(x, dom, num_domains=3, kernel=kernel, reduction=reduction).nansum()

    torch._dynamo.reset()  # or the cases share a limit of recompilations
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    dom = labels(4, 5, 3)
    for n in (12, 9) if dynamic else (12,):
        x = leaf(randn(2, n, 4))
        got, want = compiled(x, dom[:n]), loss(x, dom[:n])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        close(*(torch.autograd.grad(v, x)[0] for v in (got, want)))


def test_autocast_changes_nothing(backend):
    x, dom = leaf(randn(2, 30, 6, dtype=F32)), labels(12, 18)
    want = mmd(x, dom)
    (gradient,) = torch.autograd.grad(want, x)
    with torch.autocast("cpu", dtype=BF16):
        got = mmd(x, dom)
        K = kernel_sums(x, dom, None, None, 2, gammas_of(2, dtype=F32))
        (inside,) = torch.autograd.grad(K.sum(), x, retain_graph=True)
    assert torch.equal(got, want) and torch.equal(torch.autograd.grad(got, x)[0], gradient)
    (outside,) = torch.autograd.grad(K.sum(), x)
    assert torch.equal(inside, outside)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one layer expanded": lambda x: x[:1].expand(3, -1, -1),
    "one sample expanded": lambda x: x[:, :1].expand(-1, 12, -1),
    "one feature expanded": lambda x: x[..., :1].expand(-1, -1, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_untouched_inputs(layout, backend):
    x, dom = LAYOUTS[layout](randn(3, 12, 4)), labels(5, 7)
    before, version = x.clone(), x._version
    K = kernel_sums(x, dom, None, None, 2, gammas_of(3), impl="cpu")
    close(K, reference.kernel_sums(before, dom, before, dom, 2, gammas_of(3), 0))
    base = x.detach().requires_grad_()
    dK = torch.ones((), dtype=F64).expand(3, 2, 2)  # and an incoming gradient of stride 0
    K = kernel_sums(base, dom, None, None, 2, gammas_of(3), impl="cpu")
    (got,) = torch.autograd.grad(K, base, dK)
    own = leaf(before)
    (want,) = torch.autograd.grad(reference.kernel_sums(own, dom, own, dom, 2, gammas_of(3), 0), own, dK)
    assert (got - want).abs().max() <= 1e-12 * want.abs().max() + 1e-13
    assert torch.equal(x, before) and x._version == version


def test_gradients_may_come_in_transposed(backend):
    x, y, dx, dy = leaf(randn(1, 6, 3)), leaf(randn(1, 8, 3, seed=1)), labels(2, 4), labels(5, 3)
    dK = randn(1, 2, 2, seed=2).mT
    for a, b in zip(
        torch.autograd.grad(kernel_sums(x, dx, y, dy, 2, gammas_of(1), impl="cpu"), (x, y), dK),
        torch.autograd.grad(kernel_sums(x, dx, y, dy, 2, gammas_of(1), impl="reference"), (x, y), dK),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_the_references(reduction, backend):
    x, dom = leaf(randn(6, 3)), labels(3, 3)
    loss = mmd(x, dom, kernel=[0.2], reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph.*reference"):
        torch.autograd.grad(loss, x, create_graph=True)
    assert gradgradcheck(lambda x: mmd(x, dom, kernel=[0.2], reduction=reduction, impl="reference").sum(), [x])


def test_two_backward_passes_of_one_loss(backend):
    x, dom = leaf(randn(8, 3)), labels(3, 5)
    loss = mmd(x, dom)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_gradient_is_computed_where_none_is_asked_for(backend):
    x, dom = randn(8, 3), labels(3, 5)
    assert not mmd(x, dom).requires_grad
    with torch.no_grad():
        assert torch.equal(mmd(leaf(x), dom), mmd(x, dom))
    torch.testing.assert_close(mmd(leaf(x), dom).detach(), mmd(x, dom), rtol=1e-14, atol=0)


def test_checkpointing_recomputes_the_same_gradient(backend):
    x, dom = leaf(randn(8, 3)), labels(3, 5)
    want = torch.autograd.grad(mmd(x.tanh(), dom), x)[0]
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(lambda x: mmd(x.tanh(), dom), x, use_reentrant=reentrant)
        loss.backward()
        close(x.grad, want)
        x.grad = None


# ---- the same twice, and on any number of threads -----------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_results_repeat_bit_for_bit(dtype, backend, panels):
    dom = labels(60, 30, 75)
    x = leaf(randn(2, 165, 20, dtype=dtype))

    def run():
        loss = mmd(x, dom, kernel="domainbed")
        return loss, torch.autograd.grad(loss, x)[0], mmd(x, dom, reduction="none")

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_the_loss_is_the_same_on_any_number_of_threads(threads, panels):
    # The matrix products are the library's, which may sum in another order on more threads: rounding, no more.
    dom, x = labels(60, 30, 75), leaf(randn(2, 165, 20))
    found = []
    for n in (1, 2, 3):
        threads(n)
        loss = mmd(x, dom, kernel="domainbed")
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-13, atol=0)
        close(gradient, found[0][1], 1e-13)


def test_a_data_loaders_worker_computes_on_one_thread():
    on_ranks(
        in_a_loaders_worker, 1
    )  # a process of its own: forked from this one, with all its threads, a worker may hang


# ---- memory -------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """What the operations inside return: float32s of the largest storage, and bytes alive at once at the most."""

    def __init__(self):
        super().__init__()
        self.largest, self.peak, self._storages = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.largest = max(self.largest, storage.nbytes() // 4)
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out


def forward_and_backward(N, impl):
    """One step of N samples of 4 features, seen from inside: an operator hides from a mode what it calls."""
    x, dom = leaf(randn(N, 4, dtype=F32)), torch.arange(N) % 3
    if impl == "reference":
        mmd(x, dom, kernel="domainbed", impl=impl).backward()
        return
    gammas, powers = bandwidths(x.detach()[None], "domainbed")
    coeff = torch.eye(3, dtype=F64).expand(1, -1, -1)
    seen = (x.detach()[None], dom, None, None, 3, gammas, list(powers), coeff, None, True, impl)
    _, _, dx, _ = module._mmd_fused(*seen)
    assert dx.shape == (1, N, 4)


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_nothing_of_n_times_n_is_allocated(impl, monkeypatch):
    """In blocks of a fixed size memory grows with N, not with N²."""
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's launchers want tensors on the GPU")
    limit = 2**15
    monkeypatch.setattr(mmd_panels, "WORKSPACE", limit)
    monkeypatch.setattr(reference.mmd, "BLOCK", limit)
    peaks = []
    for N in (300, 600):
        with Live() as live:
            forward_and_backward(N, impl)
        assert live.largest <= max(limit, 128 * N)  # a panel of Triton's has 128 rows at the least, the others' 64
        peaks.append(live.peak)
    assert peaks[1] < 2.5 * peaks[0], peaks  # twice as much, and what is not whole panels; N² would be four times


# Of the features' bytes, beyond them and their gradient. Of 4,096 rows a GPU's and a CPU's sweeps take the pairs on and
# above the diagonal alone, whose sums are float32: twice the bytes of 16-bit features.
MOST = {((12, 36), 4): 1.2, ((12, 36), 2): 1.2, ((1, 4096), 4): 1.2, ((1, 4096), 2): 2.2}


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(12, 36), (1, 4096)], ids=str)
def test_a_step_takes_little_more_memory_than_features_and_gradient(shape, dtype, impl):
    """By what the allocator hands out in loss and backward pass; of a GPU's kernels by what they would be given."""
    if impl == "triton" and (torch.cuda.is_available() or (shape, dtype) == ((12, 36), F16)):
        pytest.skip("mmd_small keeps a float16 gradient in float32")
    x, dom = leaf(randn(*shape, 768, dtype=F32).to(dtype)), torch.arange(shape[1]) % 3

    def step():
        x.grad = None
        with launching(lambda *args, **options: None) if impl == "triton" else contextlib.nullcontext():
            mmd(x, dom, num_domains=3, impl=impl).backward()

    step()
    x.grad = None
    size = x.numel() * dtype.itemsize
    assert peak_bytes(step, "cpu") / size - 1 <= MOST[shape, dtype.itemsize]


def test_little_is_saved_for_the_backward_pass():
    for impl in ("cpu", "reference"):
        x, dom, saved = leaf(randn(1500, 4, dtype=F32)), torch.arange(1500) % 3, []

        def pack(t, saved=saved):
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference.mmd, "BLOCK", 2**17)
            mmd(x, dom, kernel="domainbed", impl=impl)
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
        assert sum(held.values()) <= 40 * x.numel() * 4, impl


# ---- the blocked reference ----------------------------------------------------------------------


def reference_results(x, y, offset, second):
    S, dom_x, dom_y = 2, torch.arange(x.shape[1]) % 2, torch.arange(y.shape[1]) % 2
    a = leaf(x)
    b = a if offset == "itself" else leaf(y)
    K = reference.kernel_sums(a, dom_x, b, dom_x if b is a else dom_y, S, gammas_of(2), 0 if b is a else offset)
    leaves = [a] if b is a else [a, b]
    grads = torch.autograd.grad((K * randn(2, S, S, seed=5)).sum(), leaves, create_graph=second)
    found = [K, *grads]
    if second:
        found += torch.autograd.grad(sum((g * g).sum() for g in grads), leaves)
    return found


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("offset", ["itself", None, 2])
@pytest.mark.parametrize("block", [1, 2 * 13 * 4, 2 * 13 * 10])
def test_blocks_of_the_reference_change_nothing(block, offset, second, monkeypatch):
    x, y = randn(2, 11, 3), randn(2, 13, 3, seed=1)
    if offset == 2:
        x = y[:, 2:13]
    want = reference_results(x, y, offset, second)
    monkeypatch.setattr(reference.mmd, "BLOCK", block)
    for i, (a, b) in enumerate(zip(reference_results(x, y, offset, second), want, strict=True)):
        close(a, b, what=f"result {i}")


def test_blocks_of_the_reference_without_gradients(monkeypatch):
    x, dom = randn(2, 11, 3), labels(5, 6)
    want = reference.kernel_sums(x, dom, x, dom, 2, gammas_of(2), 0)
    monkeypatch.setattr(reference.mmd, "BLOCK", 1)
    with torch.no_grad():
        close(reference.kernel_sums(x, dom, x, dom, 2, gammas_of(2), 0), want)
    close(reference.kernel_sums(x, dom, x, dom, 2, gammas_of(2), 0), want)


def test_blocks_of_the_reference_pass_gradcheck(monkeypatch):
    monkeypatch.setattr(reference.mmd, "BLOCK", 1)
    x, dom = leaf(randn(1, 5, 2)), labels(2, 3)
    assert gradgradcheck(lambda x: reference.kernel_sums(x, dom, x, dom, 2, gammas_of(1), 0), [x])
