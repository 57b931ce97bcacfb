"""LoRA dropout: one mask per call, drawn again in the backward pass, on the low-rank path's input alone."""

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, INPUTS, TRITON, Case, close, device_of, exact_results, leaves, made, results

from fastheads.ops import cpu, dispatch, fused, head_attention

# which implementations drop, asked of themselves
IMPLS = tuple(name for name in DTYPES if dispatch.IMPLEMENTATIONS[name].dropout)
EVERY = pytest.mark.parametrize("impl", IMPLS)
CASE = Case(N=18, H=2, targets=("v", "q"), pool=None, size=1.0)
P = 0.4


def kept_elements(impl, x, seed):
    """The mask of a call after `torch.manual_seed(seed)`: the implementation's own dropout, of ones."""
    torch.manual_seed(seed)
    drawn = torch.randint(2**63 - 1, (1,), device=x.device)
    return (cpu if impl == "cpu" else fused._kernels()).dropout(torch.ones_like(x), P, drawn)


@EVERY
@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_gradients_are_those_of_one_mask(impl, recompute, monkeypatch):
    case = Case(N=18, H=2, targets=("v", "q", "k"), pool=0, size=1.0, shared=recompute)
    tensors, do, options = made(case, impl)
    options["dropout_p"] = P
    mask = kept_elements(impl, tensors["x"], seed=3)
    torch.manual_seed(3)
    got = results(head_attention, tensors, do, **options, impl=impl, recompute=recompute)
    monkeypatch.setattr(F, "dropout", lambda x, p=0.0, *_: x if p == 0 else x * mask.to(x.dtype))
    right = exact_results(tensors, do, **options)
    for name, t in got.items():
        close(t, right[name], 2e-5, name)  # float32's rounding; another mask is off by tenths


@EVERY
def test_the_mask_is_a_fair_draw(impl):
    x = torch.ones(4, 33, 72, device=device_of(impl))
    kept = kept_elements(impl, x, seed=0)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / torch.tensor(1 - P))}
    n = x.numel()
    share = lambda t: float((t != 0).double().mean())  # noqa: E731
    noise = (P * (1 - P) / n) ** 0.5
    assert abs(share(kept) - (1 - P)) < 5 * noise
    # images, tokens, neighbours in a row and seeds are dropped independently of each other
    other = kept_elements(impl, x, seed=1)
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1]), (kept, other)):
        assert abs(share(a * b) - (1 - P) ** 2) < 10 * noise


@EVERY
def test_dropout_follows_the_generator_and_changes_with_every_call(impl):
    tensors, _, options = made(CASE, impl)
    options |= {"dropout_p": P, "impl": impl}
    torch.manual_seed(5)
    first, second = (head_attention(**tensors, **options).o for _ in range(2))
    torch.manual_seed(5)
    again = head_attention(**tensors, **options).o
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@EVERY
def test_dropout_zero_is_none_and_draws_nothing(impl):
    tensors, _, options = made(CASE, impl)
    expected = head_attention(**tensors, **options, impl=impl).o
    before = torch.get_rng_state()
    assert torch.equal(head_attention(**tensors, **options, dropout_p=0.0, impl=impl).o, expected)
    assert torch.equal(torch.get_rng_state(), before)
    # without deltas there is nothing to drop
    bare = tensors | {"lora_A": None, "lora_B": None}
    plain = head_attention(**bare, **options, impl=impl).o
    assert torch.equal(head_attention(**bare, **options, dropout_p=P, impl=impl).o, plain)
    assert torch.equal(torch.get_rng_state(), before)


@EVERY
def test_dropout_of_nearly_everything_stays_finite(impl):
    tensors, do, options = made(CASE, impl)
    got = results(head_attention, tensors, do, **options, dropout_p=0.999, impl=impl)
    assert all(bool(torch.isfinite(t).all()) for t in got.values())


@EVERY
def test_dropout_is_unbiased_where_the_output_is_linear(impl):
    # with v alone adapted, o is linear in the low-rank path: its mean over masks is o without dropout
    case = Case(B=1, N=6, H=1, dh=16, targets=("v",), pool=None, size=1.0)
    tensors, _, options = made(case, impl)
    options["impl"] = impl
    draws = 400 if impl == "cpu" or device_of(impl) == "cuda" else 60
    torch.manual_seed(0)
    found = torch.stack([head_attention(**tensors, **options, dropout_p=P).o for _ in range(draws)]).double()
    expected = head_attention(**tensors, **options).o.double()
    noise = found.std(0) / draws**0.5
    assert float(noise.max()) > 0
    # 96 normal deviates: the largest is over 5 once in 20,000 draws
    assert float(((found.mean(0) - expected) / noise).abs().max()) < 5


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(impl, reentrant):
    from torch.utils.checkpoint import checkpoint

    tensors, do, options = made(CASE, impl)

    def gradients(wrap):
        own = leaves(tensors)
        torch.manual_seed(11)
        o = wrap(lambda *t: head_attention(*t[:5], gate=t[5], **options, dropout_p=P, impl=impl).o, *own.values())
        o.backward(do)
        return [own[n].grad for n in INPUTS]

    plain = gradients(lambda f, *t: f(*t))
    found = gradients(lambda f, *t: checkpoint(f, *t, use_reentrant=reentrant))
    for a, b, name in zip(found, plain, INPUTS, strict=True):
        assert torch.equal(a, b), name


@EVERY
def test_dropout_of_a_strided_input(impl):
    tensors, do, options = made(CASE, impl)
    torch.manual_seed(2)
    expected = results(head_attention, tensors, do, **options, dropout_p=P, impl=impl)
    buffer = torch.full((2, 18, 64), float("nan"), device=do.device)
    buffer[..., ::2] = tensors["x"]
    own = leaves(tensors) | {"x": buffer[..., ::2].requires_grad_()}
    torch.manual_seed(2)
    o = head_attention(**own, **options, dropout_p=P, impl=impl).o
    close(o, expected["o"], 2e-5, "o")
    for name, grad in zip(INPUTS, torch.autograd.grad(o, [own[n] for n in INPUTS], do), strict=True):
        close(grad, expected[f"d{name}"], 2e-5, name)


@pytest.mark.parametrize("impl", [name for name in TRITON if name not in IMPLS])
def test_forms_without_dropout_say_so(impl):
    tensors, _, options = made(CASE, impl)
    with pytest.raises(ValueError, match=f"impl: '{impl}' cannot compute this layer: it has no LoRA dropout"):
        head_attention(**tensors, **options, dropout_p=P, impl=impl)
