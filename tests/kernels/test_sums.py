"""The sums of what the backward kernels leave in parts."""

import math

import pytest
import torch

from fastheads.kernels import sums as module
from fastheads.kernels.sums import sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel doesn't write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(got, exact, parts):
    """Of n sums of 32 numbers or so each: a few roundings of the largest partial sum."""
    assert got.dtype == torch.float32 and got.shape == exact.shape
    most = float(parts.abs().sum(0).max()) if len(parts) else 0.0
    assert float((got.double() - exact).abs().max()) <= 4e-7 * most


@pytest.mark.parametrize("H", [1, 2, 6, 12, 20])
@pytest.mark.parametrize("G", [0, 1, 37, 700])
def test_sums_of_the_gates(G, H):
    gates = draw(G, H)
    dgate, db = sums(gates, None)
    assert db is None
    close(dgate, gates.double().sum(0), gates)


@pytest.mark.parametrize("shape", [(0, 1, 2, 16, 1), (1, 2, 3, 16, 2), (18, 2, 2, 40, 5), (33, 1, 1, 24, 3)])
def test_sums_of_the_up_projection_beside_those_of_the_gates_and_alone(shape):
    gates, parts = draw(9, 6), draw(*shape, seed=1)
    both, alone = sums(gates, parts), sums(None, parts)
    close(both[0], gates.double().sum(0), gates)
    close(both[1], parts.double().sum(0), parts)
    assert alone[0] is None and torch.equal(alone[1], both[1])


def test_the_order_of_the_sums_is_fixed():
    gates, parts = draw(300, 12), draw(40, 2, 2, 16, 3, seed=1)
    first, second = sums(gates, parts), sums(gates, parts)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_nothing_to_add_up_starts_nothing(monkeypatch):
    monkeypatch.setattr(module, "launch", None)
    assert sums(None, None) == (None, None)
