"""The bandwidths of the MMD's kernels: presets under the names of their conventions, and the gammas they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastheads.reference.precision import autocast_off, centre, less

_OF = ("nothing", "mean square", "mean square of pairs")


@dataclass(frozen=True)
class Preset:
    """A convention of the MMD under a name.

    of: what the bandwidths are of: "nothing" (numbers are the gammas), "mean square" (gamma = 1 / (2 number σ²)), or
    "mean square of pairs" (gamma = 1 / (number bw)); see `kernel_gammas`. numbers: in order of growing gamma.
    estimator: its own. powers: how each kernel follows from the one before: 0 is an exponential of its own, 2 or 10
    that power of the one before, whose gamma is exactly that many times larger. Powers multiply the relative error of
    an exponential: no chain is longer than 10. Raises ValueError where these don't fit together.
    """

    of: str
    numbers: tuple[float, ...]
    estimator: str
    powers: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, takes in (("of", _OF), ("estimator", ("biased", "unbiased"))):
            if getattr(self, name) not in takes:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; takes {', '.join(map(repr, takes))}")
        if len(self.powers) != len(self.numbers) or any(power not in (0, 2, 10) for power in self.powers):
            raise ValueError(f"powers: got {self.powers}; takes 0, 2 or 10 for each of {len(self.numbers)} numbers")
        gammas = self.numbers if self.of == "nothing" else [1 / number for number in self.numbers]
        for u, power in enumerate(self.powers):
            if power and (u == 0 or not math.isclose(gammas[u], power * gammas[u - 1], rel_tol=1e-12)):
                raise ValueError(
                    f"powers: got {power} at {u}, where gamma is not {power} times the one before; takes 0"
                )


PRESETS = {
    "domainbed": Preset("nothing", (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3), "biased", (0, 10, 0, 10, 0, 10, 0)),
    "adaptive": Preset("mean square", (2.0, 1.0, 0.5, 0.25, 0.125), "unbiased", (0, 2, 2, 0, 2)),  # TLlib
    "dan": Preset("mean square of pairs", (16.0, 8.0, 4.0, 2.0, 1.0), "biased", (0, 2, 2, 0, 2)),  # the common snippet
}


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """`[U]` in like's dtype on its device, by fills: a tensor made of a list is copied from the host, which waits."""
    return torch.stack([like.new_full((), value) for value in values])


def from_centre(x: Tensor, counted: Tensor | None) -> Tensor:
    """`‖x_i − c‖²`, `[L, N]`."""
    return less(x, centre(x, counted)).square_().sum(-1) if x.shape[1] else x.new_zeros(x.shape[:2])


def kernel_gammas(features: Tensor, kernel: str | Sequence[float] | Tensor, counted: Tensor | None = None) -> Tensor:
    """The bandwidths γ `[L, U]` of a preset, detached, for features `[L, N, D]`, at least float32.

    counted: `[N]`, the samples they are taken over; None: all.

    - `"domainbed"`: 1e-3 … 1e3, seven values.
    - `"adaptive"` (TLlib): `γ_u = 1 / (2 α_u σ²)`, α from 2 down to 1/8; σ² the mean squared distance over all pairs of
      all samples, the zero diagonal included.
    - `"dan"` (the common snippet): `γ_i = 1 / (bw·2^i)`, i = 4 … 0, `bw = Σd² / (n² − n) / 4`.
    - numbers: these, for every layer.

    `Σd² = 2n Σ‖x_i − x̄‖²` needs no pass over pairs. It is bounded below by what the features' own rounding resolves, so
    that identical features give a finite kernel.
    """
    with torch.no_grad(), autocast_off(features):
        x = features.detach()
        L, n, _ = x.shape
        like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        if isinstance(kernel, Tensor):
            return kernel.detach().to(like).reshape(1, -1).expand(L, -1)
        if not isinstance(kernel, str):
            return constants(kernel, like).expand(L, -1)
        if kernel not in PRESETS:
            takes = ", ".join(map(repr, PRESETS))
            raise ValueError(f"kernel: got {kernel!r}; takes {takes} or a sequence of gammas")
        preset = PRESETS[kernel]
        numbers = constants(preset.numbers, like)
        if preset.of == "nothing":
            return numbers.expand(L, -1)
        size: Tensor | int = max(n, 1)
        # [2, L, N] of each sample as it is and centred; no copy of all features but one
        squares = torch.stack((torch.linalg.vector_norm(x, dim=-1, dtype=like.dtype).square(), from_centre(x, counted)))
        if counted is not None:
            squares = squares.masked_fill(~counted, 0)
            size = counted.sum().clamp_min(1).to(like.dtype)
        eps, (raw, spread) = torch.finfo(like.dtype).eps, squares.sum(-1)
        floor = eps * eps * raw / size + torch.finfo(torch.float32).tiny * 1e6
        mean_square = torch.maximum(2 / size * spread, floor)  # [L]
        if preset.of == "mean square":
            return 1 / (2 * mean_square.unsqueeze(-1) * numbers)
        pairs = size / (size - 1).clamp_min(1) if isinstance(size, Tensor) else size / max(size - 1, 1)
        return 1 / (mean_square.unsqueeze(-1) * pairs / 4 * numbers)
