"""HeadConfig: what is adapted, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PROJECTIONS = ("q", "k", "v")
LINEARS = ("o", "fc1", "fc2")  # whose deltas their own linear layers add
TARGETS = (*PROJECTIONS, *LINEARS, "mlp")
TOWERS = ("visual", "text")
GATES = ("softmax", "sigmoid", None)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class HeadConfig:
    """Per-head LoRA and gates of a tower's attention layers. Immutable; every value is checked when it is made.

    Args:
        rank: rank of the deltas: one for all selected layers, or one per selected layer. 0: gates only.
        targets: what has a delta, of "q", "k", "v", "o" (the output projection), "fc1" and "fc2" (the MLP's linear
            layers in order; "mlp" is both).
        alpha: the delta's scale is `alpha / rank`; None: 1.
        dropout: probability of dropping an element of the low-rank path's input, while training.
        per_head: every head has a down-projection of its own (HA-LoRA), and on "o" an up-projection too; False: all
            heads share one (plain LoRA). The MLP has no heads: there it is plain LoRA.
        gate: `"softmax"` (H · softmax(theta)), `"sigmoid"` (2 · sigmoid(theta)) or None for LoRA only.
        layers: indices of the adapted layers, negative ones from the end; None: all.
        towers: of "visual", "text".

    Raises:
        TypeError, ValueError: naming the argument.
    """

    rank: int | tuple[int, ...] = 2
    targets: tuple[str, ...] = ("q", "v")
    alpha: float | None = None
    dropout: float = 0.0
    per_head: bool = True
    gate: str | None = "softmax"
    layers: tuple[int, ...] | None = None
    towers: tuple[str, ...] = ("visual",)

    def __post_init__(self) -> None:
        for name in ("rank", "targets", "layers", "towers"):
            value = getattr(self, name)
            if isinstance(value, (list, range)):
                object.__setattr__(self, name, tuple(value))
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        if not ranks or not all(_integer(r) for r in ranks):
            raise TypeError(f"rank: got {self.rank!r}; takes an integer, or one integer per selected layer")
        if any(r < 0 for r in ranks):
            raise ValueError(f"rank: got {self.rank!r}; takes integers ≥ 0 (0: gates only)")
        if isinstance(self.targets, tuple):
            parts = (("fc1", "fc2") if target == "mlp" else (target,) for target in self.targets)
            object.__setattr__(self, "targets", tuple(part for each in parts for part in each))
        self._check_names("targets", TARGETS)
        self._check_names("towers", TOWERS)
        if self.gate not in GATES:
            raise ValueError(f'gate: got {self.gate!r}; takes "softmax", "sigmoid" or None')
        if self.gate is None and not any(ranks):
            raise ValueError("rank: got 0 with gate=None, which leaves nothing to train; give a rank or a gate")
        if self.alpha is not None and not (isinstance(self.alpha, (int, float)) and math.isfinite(self.alpha)):
            raise ValueError(f"alpha: got {self.alpha!r}; takes a finite number, or None for a scale of 1")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout!r}; takes a probability in [0, 1)")
        if not isinstance(self.per_head, bool):
            raise TypeError(f"per_head: got {self.per_head!r}; takes True or False")
        if self.layers is not None:
            if not isinstance(self.layers, tuple) or not self.layers or not all(_integer(i) for i in self.layers):
                raise TypeError(f"layers: got {self.layers!r}; takes None for all, or a sequence of layer indices")
            if isinstance(self.rank, tuple) and len(self.rank) != len(self.layers):
                raise ValueError(f"rank: got {len(self.rank)} ranks for {len(self.layers)} layers; one rank per layer")

    def _check_names(self, name: str, allowed: Sequence[str]) -> None:
        value = getattr(self, name)
        if not isinstance(value, tuple) or not value:
            raise TypeError(f"{name}: got {value!r}; takes a sequence of {', '.join(map(repr, allowed))}")
        for item in value:
            if item not in allowed:
                raise ValueError(f"{name}: got {item!r}; takes {', '.join(map(repr, allowed))}")
        if len(set(value)) != len(value):
            raise ValueError(f"{name}: got {value!r}; names each at most once")

    @classmethod
    def hap(cls, depth: int, **options: Any) -> HeadConfig:
        """The published ranks for a tower of `depth` layers: 2, and 8 in the last two."""
        if not _integer(depth) or depth < 1:
            raise ValueError(f"depth: got {depth!r}; takes the number of layers, an integer ≥ 1")
        return cls(rank=tuple(2 if i < depth - 2 else 8 for i in range(depth)), **options)

    @property
    def projections(self) -> tuple[str, ...]:
        """The targets among "q", "k", "v", in their order."""
        return tuple(target for target in self.targets if target in PROJECTIONS)

    @property
    def linears(self) -> tuple[str, ...]:
        """The targets among "o", "fc1", "fc2", in their order."""
        return tuple(target for target in self.targets if target in LINEARS)

    def scale(self, rank: int) -> float:
        """s of a layer of that rank."""
        return 1.0 if self.alpha is None or rank == 0 else self.alpha / rank

    def layer_ranks(self, depth: int, tower: str = "visual") -> dict[int, int]:
        """Selected layer → rank, for a tower of `depth` layers. Raises ValueError where they don't fit it."""
        chosen = range(depth) if self.layers is None else self.layers
        indices = []
        for i in chosen:
            if not -depth <= i < depth:
                raise ValueError(f"layers: got {i}; the {tower} tower has layers 0 … {depth - 1}")
            indices.append(i % depth)
        if len(set(indices)) != len(indices):
            raise ValueError(f"layers: got {self.layers!r}; names each layer at most once")
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,) * len(indices)
        if len(ranks) != len(indices):
            raise ValueError(
                f"rank: got {len(ranks)} ranks for the {len(indices)} selected layers of the {tower} tower; "
                "give one integer, or one per layer"
            )
        return dict(sorted(zip(indices, ranks, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadConfig:
        """The config of `to_dict`. Raises ValueError for an unknown key."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"config: unknown keys {sorted(unknown)}; made by a newer fastheads?")
        return cls(**values)
