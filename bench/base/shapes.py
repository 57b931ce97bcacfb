"""What is counted: a tower's shape with the sizes that follow from it, and a pass over memory."""

from __future__ import annotations

from dataclasses import dataclass

from bench.roofline.chips import Rates

TARGETS = 2  # q and v


@dataclass(frozen=True)
class Shape:
    """A tower's attention: batch, tokens, width, heads, layers."""

    name: str
    batch: int
    tokens: int
    width: int
    heads: int
    layers: int

    def ranks(self) -> list[int]:
        """The published ranks, one per layer: 2, and 8 in the last two."""
        return [2] * (self.layers - 2) + [8] * 2

    @property
    def row(self) -> int:
        return self.batch * self.tokens * self.width * 2

    @property
    def product(self) -> int:
        """Operations of a `[B·N, D] × [D, D]` product."""
        return 2 * self.batch * self.tokens * self.width**2

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.tokens**2

    @property
    def attention(self) -> int:
        """Operations of one of attention's products, `[N, dh] × [dh, N]` for all images and heads."""
        return 2 * self.scores * self.width // self.heads

    @property
    def lse(self) -> int:
        return 4 * self.batch * self.tokens * self.heads

    @property
    def weight(self) -> int:
        """Elements of a `[D, D]` weight."""
        return self.width**2

    def columns(self, rank: int) -> int:
        """R."""
        return TARGETS * self.heads * rank

    def low(self, rank: int) -> int:
        """Bytes of T, `[B, N, R]`."""
        return 2 * self.batch * self.tokens * self.columns(rank)

    def low_product(self, rank: int) -> int:
        """Operations of x Aᵀ, or of dA = Uᵀ x."""
        return self.low(rank) * self.width

    def up_product(self, rank: int) -> int:
        """Operations of T Bᵀ head by head, or of dB, or of U = dY B."""
        return 2 * self.batch * self.tokens * TARGETS * self.width * rank


SHAPES = {
    "B/16": Shape("ViT-B/16, batch 256", 256, 197, 768, 12, 12),
    "L/14": Shape("ViT-L/14, batch 128", 128, 257, 1024, 16, 24),
}


@dataclass(frozen=True)
class Pass:
    """One kernel, or a few that share their reads. bytes: of device memory; the others: operations; l2: bytes of L2."""

    name: str
    bytes: float = 0
    gemm: float = 0
    attention: float = 0
    exp: float = 0
    l2: float = 0

    def seconds(self, rates: Rates) -> float:
        """The slowest of what it needs, as if all overlapped."""
        return max(
            self.bytes / rates.hbm,
            self.gemm / rates.gemm + self.attention / rates.attention,
            self.exp / rates.exp,
            self.l2 / rates.l2,
        )
