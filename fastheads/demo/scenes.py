"""What pretraining makes of a drawing: a picture in random colours, posed, outlined, textured, before clutter.

The looks of the demo's domains (`looks.py`) are not among them.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

_LUMA = torch.tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)
_SMALLEST_CONTRAST = 0.2


class Scenes:
    """Pictures of masks `[B, 64, 64]`, drawn from one generator.

    hardness: 0 … 1. Learning starts at 0, with small turns and bright figures on dark, plain grounds: where it began
    at 1, nothing was learned.
    """

    def __init__(self, size: int, generator: Generator, hardness: float = 1.0) -> None:
        self.size = size
        self.generator = generator
        self.hardness = hardness

    def __call__(self, masks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Masks uint8 `[B, 64, 64]` -> pictures `[B, 3, size, size]`, 0 … 1, and values of each axis `[B]`, or -1."""
        figure, outlined = self._strokes(self._posed(masks[:, None].float() / 255))
        above, below = self._colours(len(masks))
        ground, cluttered = self._ground(below, masks)
        above = self._textured(above, 0.4, 0.2)
        share = F.interpolate(figure, self.size, mode="area")
        pictures = ground * (1 - share) + above * share
        blurred = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
        pictures = torch.where(self._chance(len(masks), 0.2), blurred, pictures)
        grain = 0.15 * self._normal(*pictures.shape) * self._uniform(len(masks), 1, 1, 1)
        pictures = pictures + grain * self._chance(len(masks), 0.4 * self.hardness)
        # What there is to say of them.
        solid = (-F.max_pool2d(-figure, 7, 1, 3)).sum((1, 2, 3)) / figure.sum((1, 2, 3)).clamp(min=1)
        form = torch.where(outlined | (solid < 0.04), 0, torch.where(solid > 0.25, 1, -1))
        lighter = ((above - ground) * _LUMA * share).sum((1, 2, 3)) / share.sum((1, 2, 3)).clamp(min=1)
        tone = torch.where(lighter > 0.15, 0, torch.where(lighter < -0.15, 1, -1))
        return pictures.clamp(0, 1), {"form": form, "tone": tone, "ground": cluttered.long()}

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _chance(self, count: int, probability: float) -> Tensor:
        return self._uniform(count, 1, 1, 1) < probability

    def _posed(self, masks: Tensor) -> Tensor:
        """Turned, scaled, stretched, sheared and moved; at 48 pixels for pictures of 32, else at 64."""
        count, gentle = len(masks), 0.3 + 0.7 * self.hardness
        angle = 0.45 * gentle * (2 * self._uniform(count) - 1)
        zoom = 1 / (1 - 0.4 * self.hardness + (0.1 + 0.4 * self.hardness) * self._uniform(count))
        stretch = 1 + 0.15 * (2 * self._uniform(count) - 1)
        shear = 0.15 * (2 * self._uniform(count) - 1)
        move = 0.22 * gentle * (2 * self._uniform(count, 2) - 1)
        rows = [
            torch.stack([angle.cos() * zoom * stretch, -angle.sin() * zoom + shear, move[:, 0]], 1),
            torch.stack([angle.sin() * zoom, angle.cos() * zoom / stretch, move[:, 1]], 1),
        ]
        side = 64 if self.size > 40 else 48
        grid = F.affine_grid(torch.stack(rows, 1), [count, 1, side, side], align_corners=False)
        return F.grid_sample(masks, grid, align_corners=False)

    def _strokes(self, figure: Tensor) -> tuple[Tensor, Tensor]:
        """Some drawings as their outline, some bolder, some thinner; and which are outlines, `[B]`."""
        bold = F.max_pool2d(figure, 3, 1, 1)
        thin = -F.max_pool2d(-figure, 3, 1, 1)
        outline = (F.max_pool2d(bold, 3, 1, 1) - thin).clamp(0, 1)
        kind = self._uniform(len(figure), 1, 1, 1)
        thinner = 0.7 * thin + 0.3 * figure
        drawn = torch.where(kind < 0.15, outline, torch.where(kind < 0.3, bold, figure))
        return torch.where((kind >= 0.3) & (kind < 0.36), thinner, drawn), kind[:, 0, 0, 0] < 0.15

    def _colours(self, count: int) -> tuple[Tensor, Tensor]:
        """Of figure and ground, `[B, 3, 1, 1]` each, apart in lightness."""
        above, below = self._uniform(count, 3, 1, 1), self._uniform(count, 3, 1, 1)
        for _ in range(4):
            close = ((above - below) * _LUMA).sum(1, keepdim=True).abs() < _SMALLEST_CONTRAST
            above = torch.where(close, self._uniform(count, 3, 1, 1), above)
            below = torch.where(close, self._uniform(count, 3, 1, 1), below)
        easy = ~self._chance(count, self.hardness)
        return torch.where(easy, 0.6 + 0.4 * above, above), torch.where(easy, 0.4 * below, below)

    def _noise(self, count: int, cells: int, channels: int = 3) -> Tensor:
        return F.interpolate(self._uniform(count, channels, cells, cells), self.size, mode="bilinear")

    def _textured(self, colours: Tensor, blended: float, mottled: float) -> Tensor:
        """Colours that drift across the picture, and smaller spots, in the given shares of the pictures."""
        count = len(colours)
        for cells, share, depth in ((3, blended, 0.8), (9, mottled, 0.65)):
            strength = depth * self._uniform(count, 1, 1, 1) * self._chance(count, share * self.hardness)
            colours = colours + (self._noise(count, cells) - 0.5) * strength
        return colours

    def _ground(self, colours: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The ground, with pieces of other drawings, edges and spots on it in half of the pictures: which, `[B]`."""
        count = len(colours)
        ground = self._textured(colours, 0.5, 0.4)
        cluttered = self._chance(count, 0.5 * self.hardness)
        clutter = ground
        for _ in range(2):
            others = masks[torch.randperm(count, generator=self.generator), None].float() / 255
            zoom = 0.3 + 1.7 * self._uniform(count)
            angle = 6.3 * self._uniform(count)
            move = 1.6 * self._uniform(count, 2) - 0.8
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
            pose = torch.cat([turn * zoom[:, None, None], move[..., None]], 2)
            grid = F.affine_grid(pose, [count, 1, self.size, self.size], align_corners=False)
            shape = F.grid_sample(others, grid, padding_mode="reflection", align_corners=False)
            colour = colours + 0.9 * (self._uniform(count, 3, 1, 1) - 0.5)
            clutter = clutter * (1 - shape) + colour * shape
        spots = (self._noise(count, 12) - 0.5) * self._uniform(count, 1, 1, 1)
        rough = self._uniform(count, 1, 1, 1) * 0.3 * (self._uniform(count, 3, self.size, self.size) - 0.5)
        clutter = clutter + spots + rough
        return torch.where(cluttered, clutter, ground).clamp(0, 1), cluttered[:, 0, 0, 0]
