"""The head attention of `fastheads.reference` in 16 and 32 bits, by the numerics rule of design.md."""

import math

import pytest
import torch
import torch.nn.functional as F
from dense_heads import adapted_weight, dense_attention, make

from fastheads.reference import head_attention


def randn_like(t, seed):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=t.dtype)


LOW = [torch.float32, torch.bfloat16, torch.float16]


def assert_error_within(factor, draws, what):
    """Max and RMS error at most `factor` x that of plain PyTorch, + 1e-6 of the largest value.

    draws: (ours, plain, exact) triples. The maximum is averaged over the draws: a single one hangs
    on how the few values of the largest binade happen to round, and is off by a factor of two in
    one draw of a hundred.
    """

    def rms(error):
        return error.square().mean().sqrt()

    slack = 1e-6 * max(exact.abs().max() for _, _, exact in draws)
    for name, size in (("max", torch.max), ("rms", rms)):
        ours, plain = (sum(size((draw[i].double() - draw[2]).abs()) for draw in draws) / len(draws) for i in range(2))
        assert ours <= factor * plain + slack, f"{what}: {name} error {ours:.3e}, plain PyTorch {plain:.3e}"


def plain_attention(x, w_in, b_in, lora_A, lora_B, gate, H, targets, causal):
    """Ordinary PyTorch in x's dtype: merged weights, F.linear, scaled_dot_product_attention."""
    B, N, D = x.shape
    w = adapted_weight(w_in.float(), lora_A, lora_B, targets, 1.0).to(x.dtype)
    qkv = F.linear(x, w, b_in).reshape(B, N, 3, H, D // H).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(*qkv, is_causal=causal)
    return (o * gate.to(x.dtype)[:, None, None]).transpose(1, 2).reshape(B, N, D)


def plain_lse(p, H, targets, causal):
    """Log-sum-exp in float32 of logits formed in x's dtype from merged weights."""
    B, N, D = p["x"].shape
    w = adapted_weight(p["w_in"].float(), p["lora_A"], p["lora_B"], targets, 1.0)
    y = F.linear(p["x"], w.to(p["x"].dtype), p["b_in"])
    q, k, _ = y.reshape(B, N, 3, H, D // H).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT).float() / (D // H) ** 0.5
    if causal:
        logits = logits.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf)
    return logits.logsumexp(-1)


def lowered(p, dtype):
    """The tensors as a user holds them: x and the base in `dtype`, adapters and gates in float32."""
    return {n: v.to(dtype if n in ("x", "w_in", "b_in") else torch.float32) for n, v in p.items()}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_error_is_that_of_plain_pytorch_in_the_same_dtype(dtype, causal):
    B, N, D, H, targets = 4, 17, 64, 4, ("q", "v")
    draws = {}
    for seed in range(4):
        low = lowered(make(B=B, N=N, D=D, H=H, seed=seed), dtype)
        # float64 starts from the rounded inputs: only the computation is judged
        leaves = [
            {n: cast(v).detach().requires_grad_() for n, v in low.items()}
            for cast in (torch.clone, torch.clone, torch.Tensor.double)
        ]
        ours, plain, exact = leaves
        out = head_attention(**ours, num_heads=H, targets=targets, causal=causal, pool=0)
        o_plain = plain_attention(**plain, H=H, targets=targets, causal=causal)
        w = adapted_weight(exact["w_in"], exact["lora_A"], exact["lora_B"], targets, 1.0)
        o, lse, cls = dense_attention(exact["x"], w, exact["b_in"], H, exact["gate"], causal, pool=0)
        assert out.o.dtype == dtype
        do = randn_like(o, seed=99).to(dtype)
        for y in (out.o, o_plain, o):
            y.backward(do.to(y.dtype))
        draws.setdefault("o", []).append((out.o, o_plain, o))
        for n in low:
            assert ours[n].grad.dtype == low[n].dtype
            draws.setdefault(n, []).append([leaf[n].grad for leaf in leaves])

        ungated = {**low, "gate": torch.ones(H)}
        cls_plain = plain_attention(**ungated, H=H, targets=targets, causal=causal)[:, 0]
        draws.setdefault("cls", []).append((out.cls, cls_plain.reshape(B, H, D // H), cls))
        draws.setdefault("lse", []).append((out.lse, plain_lse(low, H, targets, causal), lse))

    for name, triples in draws.items():
        triples = [[t.detach() for t in triple] for triple in triples]
        if name in ("o", "cls", "lse"):
            assert_error_within(2, triples, name)
        else:
            assert_error_within(3, triples, f"gradient of {name}")  # 3 x for gradients


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_small_deltas_survive_low_precision(dtype, size):
    # Rounding o to bf16 costs about 1e-3 |o| per element against a delta of 1e-3 |o|: the gain over
    # n elements is then uncertain by about 1.6 / sqrt(n), 0.5 % for the 98,304 here; the rule
    # allows 5 %.
    B, N, D, H, targets = 8, 48, 256, 4, ("q", "v")
    p = make(B=B, N=N, D=D, H=H)
    low = lowered(p, dtype)
    del low["gate"]
    w64, A64 = low["w_in"].double(), low["lora_A"].double()
    for t, rows in enumerate((slice(0, D), slice(2 * D, 3 * D))):  # ||Delta|| = size * ||W||, per target
        only = adapted_weight(torch.zeros_like(w64), A64[t : t + 1], p["lora_B"][t : t + 1], (targets[t],), 1.0)
        p["lora_B"][t] *= size * w64[rows].norm() / only.norm()
    low["lora_B"] = p["lora_B"].float()

    exact = {n: v.double() for n, v in low.items()}

    def effect(q):
        stock = head_attention(q["x"], q["w_in"], q["b_in"], num_heads=H).o
        return (head_attention(**q, num_heads=H, targets=targets).o.double() - stock.double()).ravel()

    dy, dy64 = effect(low), effect(exact)  # float64 is held to the dense formula above
    gain = torch.dot(dy, dy64) / dy64.square().sum()
    assert abs(gain - 1) < 0.05, f"gain {gain:.4f}"


def test_float16_logits_beyond_its_range_stay_finite():
    # q k = 65536 > 65504, the largest float16: logits are formed in float32, or they overflow
    # before the softmax
    D = 64
    x = torch.ones(1, 3, D, dtype=torch.float16)
    x[0, 1] = -1
    w_in = torch.cat([torch.eye(D).mul(32), torch.eye(D).mul(32), torch.eye(D)]).half()
    out = head_attention(x, w_in, num_heads=1)
    want = dense_attention(x.double(), w_in.double(), None, 1)
    torch.testing.assert_close(out.o.double(), want[0], rtol=1e-3, atol=1e-3)  # one float16 rounding
    torch.testing.assert_close(out.lse.double(), want[1], rtol=1e-3, atol=0)
