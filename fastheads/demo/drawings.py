"""What pretraining learns from: drawings of designers whose work no domain shows, without near copies of it."""

from collections import defaultdict

import numpy as np
import torch

from fastheads.demo import fonts, icons

FAMILIES = ("codicon", "fontawesome5", "fontawesome6", "material6")  # material5 holds the same drawings as material6
MASK = 64  # pixels of the drawings' masks


class Drawings:
    """What is learned from: masks uint8 `[G, 64, 64]`, each one's name, and how often each is to be drawn."""

    def __init__(self) -> None:
        found, masks = [], []
        for glyph in fonts.glyphs(FAMILIES):
            drawn = fonts.mask(glyph, MASK)
            if drawn is not None:
                found.append(glyph)
                masks.append(drawn)
        compared = [small for glyph in found if (small := fonts.mask(glyph, icons.SIDE)) is not None]
        kept = np.flatnonzero(~icons.near_copies(np.stack(compared)))
        self.glyphs = [found[i] for i in kept]
        self.masks = torch.from_numpy(np.stack([masks[i] for i in kept]))
        self.names = sorted({glyph.word for glyph in self.glyphs})
        index = {name: i for i, name in enumerate(self.names)}
        self.labels = torch.tensor([index[glyph.word] for glyph in self.glyphs])
        # What several designers draw is seen more often, or a name would be one drawing.
        designers = defaultdict(set)
        for glyph in self.glyphs:
            designers[glyph.word].add(glyph.designer)
        self.designers = torch.tensor([len(designers[name]) for name in self.names])
        by_name = torch.tensor([0.0, 0.5, 10.0, 20.0, 20.0])[self.designers]
        self.weights = (by_name / torch.bincount(self.labels))[self.labels]
