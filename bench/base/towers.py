"""The image towers that are measured and modelled: their numbers, and the sizes that follow from them at a batch."""

from dataclasses import dataclass, replace

TARGETS = 2  # q and v


@dataclass(frozen=True)
class Setting:
    """A model's image tower. config: OpenCLIP's name of it; "" where it is ours. batch: of a `shape`."""

    name: str
    config: str
    image: int
    patch: int
    width: int
    head_dim: int
    layers: int
    embed_dim: int = 512
    batch: int = 0

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    def ranks(self) -> tuple[int, ...]:
        """The published ones, one per layer: 2, and 8 in the last two."""
        return (2,) * (self.layers - 2) + (8,) * 2

    def shape(self, batch: int) -> "Setting":
        return replace(self, name=f"{self.name}, batch {batch}", batch=batch)

    @property
    def row(self) -> int:
        """Bytes of a `[B, N, D]` activation in 16 bits."""
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


SETTINGS = {
    "tiny": Setting("a tiny tower", "", 32, 8, 64, 32, 3),
    "B/32": Setting("ViT-B/32", "ViT-B-32", 224, 32, 768, 64, 12),
    "B/16": Setting("ViT-B/16", "ViT-B-16", 224, 16, 768, 64, 12),
    "L/14": Setting("ViT-L/14", "ViT-L-14", 224, 14, 1024, 64, 24, 768),
    "L/14-336": Setting("ViT-L/14 at 336", "ViT-L-14-336", 336, 14, 1024, 64, 24, 768),
    "H/14": Setting("ViT-H/14", "ViT-H-14", 224, 14, 1280, 80, 32, 1024),
}
BATCHES = {"B/16": 256, "L/14": 128}  # of the towers that the targets on a GPU are about
SHAPES = {key: SETTINGS[key].shape(batch) for key, batch in BATCHES.items()}
