"""Head attention by hand, for the tests of the reference: weights, heads, masks and softmaxes built head by head in
float64. Nothing here shares code with the library. Not a test file.

Tolerances in float64 are 1e-12: a few hundred additions of numbers near one, 2.2e-16 each, with a wide margin.
"""

import math

import torch

EXACT = dict(rtol=1e-12, atol=1e-12)
ROW_OF = {"q": 0, "k": 1, "v": 2}  # which D rows of w_in [3D, D]


def make(B=2, N=5, D=12, H=3, r=2, targets=("q", "v"), shared=False, bias=True, seed=0):
    """Float64 inputs with every term of order one, gates included."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    T, heads_A = len(targets), 1 if shared else H
    return dict(
        x=rand(B, N, D),
        w_in=rand(3 * D, D) / D**0.5,
        b_in=rand(3 * D) if bias else None,
        lora_A=rand(T, heads_A, r, D) / D**0.5,
        lora_B=rand(T, H, D // H, r) / r**0.5,
        gate=torch.rand(H, generator=g, dtype=torch.float64) + 0.5,
    )


def adapted_weight(w_in, lora_A, lora_B, targets, scale):
    """W + s * Delta, one head and one target at a time: w_in [3D, D] -> [3D, D]."""
    w = w_in.clone()
    D = w.shape[1]
    for t, target in enumerate(targets):
        T, H, dh, r = lora_B.shape
        for h in range(H):
            down = lora_A[t, h if lora_A.shape[1] == H else 0]
            first = ROW_OF[target] * D + h * dh
            w[first : first + dh] = w[first : first + dh] + scale * (lora_B[t, h] @ down)
    return w


def dense_attention(x, w, b_in, num_heads, gate=None, causal=False, mask=None, pool=None):
    """Loops over images and heads; mask as in head_attention. Returns o, lse, cls."""
    B, N, D = x.shape
    dh = D // num_heads
    b = torch.zeros(3 * D, dtype=x.dtype) if b_in is None else b_in
    blocked = torch.zeros(B, num_heads, N, N, dtype=torch.bool)
    added = torch.zeros(B, num_heads, N, N, dtype=x.dtype)
    if mask is not None and mask.dtype == torch.bool:
        blocked = blocked | mask
    elif mask is not None:
        added = added + mask
    if causal:
        for i in range(N):
            blocked[:, :, i, i + 1 :] = True
    o, lse, cls = [], [], []
    for n in range(B):
        o_n, lse_n, cls_n = [], [], []
        for h in range(num_heads):
            rows = [slice(s * D + h * dh, s * D + (h + 1) * dh) for s in range(3)]
            q, k, v = (x[n] @ w[s].T + b[s] for s in rows)
            logits = q @ k.T / math.sqrt(dh) + added[n, h]
            logits = logits.masked_fill(blocked[n, h], -math.inf)
            o_h = torch.softmax(logits, dim=-1) @ v
            lse_n.append(torch.logsumexp(logits, dim=-1))
            o_n.append(o_h if gate is None else gate[h] * o_h)
            if isinstance(pool, torch.Tensor):
                cls_n.append(o_h[int(pool[n])])
            elif isinstance(pool, int):
                cls_n.append(o_h[pool])
            elif pool is not None:
                first = 1 if pool == "mean" else pool.start
                cls_n.append(sum(o_h[i] for i in range(first, N)) / (N - first))
        o.append(torch.cat(o_n, dim=-1))
        lse.append(torch.stack(lse_n))
        if pool is not None:
            cls.append(torch.stack(cls_n))
    return torch.stack(o), torch.stack(lse), torch.stack(cls) if cls else None


def check_all(actual, expected, **tolerance):
    for name, want in zip(("o", "lse", "cls"), expected, strict=True):
        got = getattr(actual, name)
        if want is None:
            assert got is None, name
        else:
            torch.testing.assert_close(got, want, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def random_mask(kind, shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.rand(*shape, generator=g) < 0.4
    hidden[..., 0] = False  # every query sees token 0, so no row is empty, causal or not
    if kind == "bool":
        return hidden
    added = torch.randn(*shape, generator=g, dtype=torch.float64)
    return added.masked_fill(hidden, -math.inf) if kind == "additive_inf" else added
