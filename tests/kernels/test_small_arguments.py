"""Every launcher reads its small tensors (gates, bandwidths …) from any layout, and refuses rows it cannot read."""

import math

import pytest
import torch
from summed import attention_bwd, low_rank_bwd

from fastheads.kernels.attention_fwd import attention_fwd
from fastheads.kernels.dropout import dropout
from fastheads.kernels.fold import fold
from fastheads.kernels.low_rank import LowRank
from fastheads.kernels.mmd import Points, mmd_tile
from fastheads.kernels.mmd_small import mmd_small
from fastheads.kernels.one_pass import one_pass_fwd

B, N, H, DH, RANK, L, S = 3, 5, 2, 16, 2, 2, 3
D = H * DH
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def large():
    """What is large, drawn again for each call: some of it is written."""
    return {
        "qkv": draw(B, N, 3 * D),
        "low": draw(B, N, 2 * H * RANK),
        "do": draw(B, N, D),
        "w": draw(3 * D, D),
        "x": draw(L, 6, D),
    }


def delta(up):
    return LowRank(large()["low"], up, (0, 2), 1.5, False)


def attention_forward(gate, pool, up):
    return attention_fwd(large()["qkv"], num_heads=H, gate=gate, pool=pool, delta=delta(up))


def attention_backward(lse, gate, up):
    return attention_bwd(large()["do"], large()["qkv"], lse, num_heads=H, gate=gate, delta=delta(up))


def low_rank_backward(up):
    u = torch.full_like(large()["low"], math.nan)
    return low_rank_bwd(large()["qkv"], delta(up), u), u


def folded(b_in, lora_A, lora_B, b_out):
    options = {"num_heads": H, "parts": (0, 2), "scale": 1.5, "shared": False, "merge": True, "dtype": torch.float32}
    return fold(large()["w"], b_in, lora_A, lora_B, large()["w"][:D], b_out, **options)


def dropped(seed):
    return (dropout(large()["do"], 0.4, seed),)


def one_pass(b_in, lora_B, gate, pool):
    low = (draw(2, H, RANK, D), lora_B)
    return one_pass_fwd(
        large()["do"], large()["w"], b_in, *low, num_heads=H, parts=(0, 2), scale=1.5, gate=gate, pool=pool
    )


def panel(x2, dom, gammas, coeff):
    x, out = large()["x"], draw(L, 6, 6)
    points, given = Points(x, x2, dom), {"gammas": gammas, "powers": (0, 2), "coeff": coeff}
    return mmd_tile(points, points, x.new_zeros(L, x.shape[2]), num_domains=S, itself=True, out=out, **given), out


def small_mmd(dom, gammas, gate):
    options = {"preset": None, "powers": (0, 2), "estimator": "biased"}
    return mmd_small(large()["x"], dom, num_domains=S, gammas=gammas, gate=gate, **options)


GATE, UP, POOL = draw(H, seed=1), draw(2, H, DH, RANK, seed=2), torch.tensor([4, 0, 2], device=DEVICE)
DOMAINS = torch.tensor([0, 2, 1, 1, 0, 2], device=DEVICE)
GAMMAS = torch.tensor([[0.02, 0.04], [0.01, 0.02]], device=DEVICE)
# launcher: its small tensors, packed
LAUNCHERS = {
    attention_forward: {"gate": GATE, "pool": POOL, "up": UP},
    attention_backward: {"lse": draw(B, H, N, seed=3) + 9, "gate": GATE, "up": UP},
    low_rank_backward: {"up": UP},
    folded: {
        "b_in": draw(3 * D, seed=5),
        "lora_A": draw(2, H, RANK, D, seed=4),
        "lora_B": UP,
        "b_out": draw(D, seed=9),
    },
    dropped: {"seed": torch.tensor([7], device=DEVICE)},
    one_pass: {"b_in": draw(3 * D, seed=5), "lora_B": UP, "gate": GATE, "pool": POOL},
    panel: {"x2": draw(L, 6, seed=6) ** 2, "dom": DOMAINS, "gammas": GAMMAS, "coeff": draw(L, S, S, seed=7)},
    small_mmd: {"dom": DOMAINS, "gammas": GAMMAS, "gate": draw(L, H, seed=8)},
}


def every_second(t):
    """t with twice its strides: between its elements stand others, which nobody may read."""
    wide = torch.full((*t.shape, 2), 77, dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


def odd_offset(t):
    """t from an odd element of its storage on, which no load of 16 bytes may assume aligned."""
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


def one_for_all(t):
    """t's first element in every place, of stride 0."""
    return t.flatten()[0].expand(t.shape)


LAYOUTS = [every_second, odd_offset, one_for_all]
ARGUMENTS = [
    pytest.param(launcher, name, id=f"{launcher.__name__}-{name}")
    for launcher, all_ in LAUNCHERS.items()
    for name in all_
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("launcher, name", ARGUMENTS)
def test_small_tensors_may_have_any_layout(launcher, name, layout):
    packed = LAUNCHERS[launcher]
    given = layout(packed[name])
    if layout is not odd_offset and given.numel() > 1:
        assert not given.is_contiguous()
    got = launcher(**{**packed, name: given})
    expected = launcher(**{**packed, name: given.clone(memory_format=torch.contiguous_format)})
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other) and not one.isnan().any()


ROWS = {
    "qkv": lambda t: attention_fwd(t(B, N, 3 * D), num_heads=H),
    "low": lambda t: attention_fwd(large()["qkv"], num_heads=H, delta=LowRank(t(B, N, 8), UP, (0, 2), 1.0, False)),
    "out": lambda t: attention_bwd(large()["do"], large()["qkv"], draw(B, H, N), num_heads=H, out=t(B, N, 3 * D)),
    "dqkv": lambda t: low_rank_bwd(t(B, N, 3 * D), delta(UP), large()["low"]),
    "w_in": lambda t: one_pass_fwd(large()["do"], t(3 * D, D), None, None, None, num_heads=H),
    "lora_A": lambda t: one_pass_fwd(
        large()["do"], large()["w"], None, t(2, H, RANK, D), UP, num_heads=H, parts=(0, 2)
    ),
    "x": lambda t: dropout(t(B, N, D), 0.4, torch.tensor([7], device=DEVICE)),
}


@pytest.mark.parametrize("name", ROWS)
def test_large_tensors_whose_rows_are_not_contiguous_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name}: .* stride 2; .* contiguous rows"):
        ROWS[name](lambda *shape: every_second(draw(*shape)))


@pytest.mark.parametrize("index", [-1, N, 2**40])
@pytest.mark.parametrize("launcher", [attention_forward, one_pass])
def test_a_token_that_is_not_there_is_not_a_number(launcher, index):
    packed = LAUNCHERS[launcher]
    expected = launcher(**packed)[2]
    got = launcher(**{**packed, "pool": torch.tensor([4, index, 2], device=DEVICE)})[2]
    assert got[1].isnan().all() and torch.equal(got[::2], expected[::2])
