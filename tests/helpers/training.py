"""Short runs, and what they leave. Not a test file."""

import dataclasses

from fastheads.train.recipe import Recipe
from fastheads.train.state import trainable

RECIPE = Recipe(
    steps=8, per_domain=2, lr=5e-3, gate_lr=5e-2, mmd_weight=0.1, evaluate_every=4, save_every=3, cache=True
)


ONE_STEP = dataclasses.replace(RECIPE, steps=1, evaluate_every=1, save_every=1)


def weights(model):
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def stopped_at(step):
    """A run's `report` that ends it there, as a kill would: InterruptedError."""

    def report(values):
        if values["step"] == step:
            raise InterruptedError

    return report
