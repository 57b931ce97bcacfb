"""Random problems against the numerics rule: every implementation, forward and every gradient, in all its dtypes."""

import pytest
from problems import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GPU,
    LENGTHS,
    LONG,
    SMALL_LENGTHS,
    TRITON,
    Case,
    assert_numerics,
    count,
    random_case,
)

# (x, the base's weights as stored, autocast), as users mix them
MIXES = [
    (F64, None, None),
    (F32, None, None),
    (BF16, None, None),
    (F16, None, None),
    (F32, F32, BF16),
    (F32, BF16, BF16),
    (F32, BF16, None),
    (BF16, F32, None),
    (F32, F32, F16),
    (F16, F32, None),
]
CPU_PROBLEMS, AT_A_TIME = max(200, count(200)), 10
# The interpreter takes a second for a problem that a GPU does not notice.
TRITON_PROBLEMS = count(200 if GPU else 12)
WIDE = {"head_dims": (16, 24, 32, 64, 72, 80, 88, 104, 112, 128)}


def mix_of(impl, number):
    """Problem `number`'s dtypes, among those that `impl` computes in here."""
    mine = [m for m in MIXES if (m[2] or m[0]) in DTYPES[impl]]
    return mine[number % len(mine)]


def check(impl, number, **kind):
    dtype, stored, cast = mix_of(impl, number)
    assert_numerics(
        random_case(number, **kind), impl, dtype, stored=stored, cast=cast, draws=6 if GPU or impl == "cpu" else 4
    )


@pytest.mark.parametrize("first", range(0, CPU_PROBLEMS, AT_A_TIME))
def test_random_problems_on_the_cpu(first):
    for number in range(first, first + AT_A_TIME):
        check("cpu", number)


@pytest.mark.parametrize("impl", TRITON)
@pytest.mark.parametrize("number", range(TRITON_PROBLEMS))
def test_random_problems_in_triton(impl, number):
    if GPU:
        check(impl, number, lengths=LENGTHS)
    else:
        check(impl, number, lengths=SMALL_LENGTHS, width=128, most=2)


# What chance may leave out: the corners of the contract, one by one.
CORNERS = {
    "one token": Case(N=1, B=4, H=3),
    "one head": Case(H=1, N=19, B=3),
    "head size 8 x 9": Case(dh=72),
    "head size 80": Case(dh=80, targets=("q", "k", "v")),
    "head size 88": Case(dh=88, targets=("k", "v")),
    "head size 104": Case(dh=104, shared=True),
    "head size 112": Case(dh=112, targets=("v", "q")),
    "head size 128, rank 8": Case(dh=128, H=1, rank=8),
    "rank 16": Case(rank=16, targets=("q", "k", "v")),
    "rank 20": Case(rank=20, targets=("v", "k")),
    "shared down-projection of three targets in another order": Case(shared=True, targets=("v", "q", "k"), rank=3),
    "no delta, no gate, no bias": Case(rank=0, gate=None, bias=False),
    "gates alone": Case(rank=0),
    "delta alone": Case(gate=None, targets=("k",)),
    "large delta": Case(size=3.0, targets=("q", "k", "v")),
    "negative scale": Case(scale=-1.5),
    "two chunks, causal": Case(N=65, causal=True, B=1),
    "boolean mask per image, causal": Case(N=33, mask="bool", mask_shape=(2, 1, 33, 33), causal=True),
    "mask of one key row": Case(N=20, mask="additive", mask_shape=(20,)),
    "mask per head": Case(N=20, mask="float", mask_shape=(2, 20, 20)),
    "mask per query": Case(N=20, mask="float", mask_shape=(1, 1, 20, 1)),
    "scalar mask": Case(N=20, mask="float", mask_shape=(1,)),
}


def corners():
    """(implementation, corner): in the interpreter, stacked and one_pass see a third; tests/kernels has them too."""
    found = []
    for impl in DTYPES:
        for i, corner in enumerate(CORNERS):
            always = GPU or impl in ("cpu", "delta") or i % 3 == (impl == "one_pass")
            found.append(pytest.param(impl, corner, marks=() if always else LONG))
    return found


@pytest.mark.parametrize(("impl", "corner"), corners())
def test_corners(impl, corner):
    case = CORNERS[corner]
    dtypes = [d for d in DTYPES[impl] if d != F16] if impl == "cpu" or GPU else [F32]
    for dtype in dtypes:
        assert_numerics(case, impl, dtype, draws=6 if impl == "cpu" or GPU else 4)


LENGTHS_OF_CLIP = [(impl, N) for impl in DTYPES for N in (50, 197, 257, 273) if (impl, N) != ("one_pass", 273)]


@pytest.mark.parametrize("dh", [64, 80])
@pytest.mark.parametrize(
    ("impl", "N"),
    [pytest.param(*p, marks=() if p == ("delta", 50) or p[0] == "cpu" else LONG) for p in LENGTHS_OF_CLIP],
)
def test_lengths_of_vision_transformers(impl, N, dh):
    case = Case(N=N, dh=dh, B=1, H=2, gate=None, pool="mean", rank=8)
    assert_numerics(case, impl, F16 if impl != "cpu" else BF16, draws=2)


def test_the_oracle_and_the_rule_tell_wrong_from_right(monkeypatch):
    # each of these is a plausible slip of an implementation; the grid must not let it pass
    import problems

    right = problems.head_attention

    def slip(change):
        def wrong(**kwargs):
            return right(**change(kwargs))

        monkeypatch.setattr(problems, "head_attention", wrong)
        with pytest.raises(AssertionError, match=r"over|off by|finite"):
            for number in (1, 10, 21, 30):
                assert_numerics(
                    Case(B=3, N=24, H=3, seed=number, causal=True, targets=("v", "q"), size=0.1), "cpu", BF16
                )

    slip(lambda k: k | {"scale": 1.1 * k["scale"]})
    slip(lambda k: k | {"gate": k["gate"].detach()[[1, 0, 2]] + 0 * k["gate"]})
    slip(lambda k: k | {"targets": k["targets"][::-1]})
    slip(lambda k: k | {"causal": False})
    slip(lambda k: k | {"x": k["x"] * 1.01})
