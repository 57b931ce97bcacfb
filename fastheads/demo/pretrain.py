"""A tiny CLIP for the demo, pretrained in about two minutes on a CPU.

:func:`pretrain` teaches an OpenCLIP model to match drawings of handwritten digits with captions that
name the digit and, mostly, the style. It sees the pretraining digits in ``digits.STYLES`` only, so the
demo's four domains are new to it in both their looks and their handwriting. The checkpoint is a stock
OpenCLIP state dict::

    register()
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL, pretrained=str(path))
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor

from fastheads.demo import digits
from fastheads.files import whole

Progress = Callable[[int, int, float], None]

MODEL = "fastheads-demo"
CONFIG = Path(__file__).with_name(f"{MODEL}.json")

PROMPT = "a picture of the digit {}."
_STYLE_TEMPLATES = {
    "blocks": "a mosaic of the digit {}.",
    "chalk": "a chalk drawing of the digit {}.",
    "noise": "a noisy picture of the digit {}.",
    "stamp": "a rubber stamp of the digit {}.",
    "stripes": "a striped pattern with the digit {}.",
}
TEMPLATES: tuple[str, ...] = (PROMPT, "a handwritten {}.", *_STYLE_TEMPLATES.values())


@dataclass(frozen=True)
class Recipe:
    """How the checkpoint is made; every field is part of its file name's hash."""

    steps: int = 920
    small: float = 0.8  # share of the steps on half-size images
    batch: int = 64
    views: int = 1  # drawings of each pretraining digit in each style
    shift: int = 2  # pixels, at most, by which a drawing is moved in a batch
    lr: float = 2e-3  # of the first stage
    full_lr: float = 1e-3  # of the stage at full size
    logit_scale: float = 30.0  # at the start; it moves little in so few steps
    warmup: float = 0.1  # share of a stage's steps
    weight_decay: float = 0.1
    seed: int = 0
    digits_seed: int = 0


def register() -> None:
    """Make ``MODEL`` known to ``open_clip.create_model`` and ``open_clip.get_tokenizer``."""
    if MODEL not in open_clip.list_models():
        open_clip.add_model_config(CONFIG)


def pretrain(
    cache_dir: str | os.PathLike[str],
    *,
    steps: int = Recipe.steps,
    seed: int = 0,
    digits_seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Train the demo's CLIP, unless ``cache_dir`` has it already, and return the checkpoint's path.

    Args:
        cache_dir: where ``fastheads-demo-<hash>.safetensors`` is kept; created if need be.
        steps: training steps, a fixed number so that the result doesn't depend on the clock.
        seed: of the initial weights, the drawings and the batches.
        digits_seed: of :func:`digits.partition`. Must be the seed the domains were written with, or
            pretraining sees digits of the domains.
        progress: called after every step with (step, steps, loss).
    """
    recipe = Recipe(steps=steps, seed=seed, digits_seed=digits_seed)
    path = Path(cache_dir).expanduser() / f"{MODEL}-{_recipe_hash(recipe)}.safetensors"
    if path.is_file():
        return path
    state = _train(recipe, progress)
    with whole(path) as fresh:
        save_file(state, fresh)
    return path


def _recipe_hash(recipe: Recipe) -> str:
    described = {
        "config": json.loads(CONFIG.read_text()),
        "recipe": asdict(recipe),
        "templates": TEMPLATES,
        "digits": digits.fingerprint(recipe.digits_seed),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def _train(recipe: Recipe, progress: Progress | None) -> dict[str, Tensor]:
    """Train from scratch in two stages; returns the state dict. Leaves torch's random state alone.

    First the image tower alone, on half-size images, which have a quarter of the tokens (as in CLIPA,
    arXiv 2305.07017). The text tower stands still as in LiT (arXiv 2111.07991): where it moved from the
    start, the styles were learned but the classes still stood at chance after 250 steps; with it locked
    they had left chance by step 200. Then both towers at full size, after the positions have been
    interpolated.
    """
    pool = _Pool(recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    small, full = _new_model(recipe.seed, digits.SIZE // 2), _new_model(recipe.seed, digits.SIZE)
    small.lock_text_tower()
    small.logit_scale.data.fill_(math.log(recipe.logit_scale))
    split = round(recipe.small * recipe.steps)
    _train_stage(small, pool, recipe, range(split), recipe.lr, generator, progress)
    state = small.state_dict()
    resize_pos_embed(state, full)
    full.load_state_dict(state)
    full_steps = range(split, recipe.steps)
    _train_stage(full, pool, recipe, full_steps, recipe.full_lr, generator, progress)
    return {name: value.contiguous() for name, value in full.state_dict().items()}


def _new_model(seed: int, size: int) -> open_clip.CLIP:
    config = json.loads(CONFIG.read_text())
    config["vision_cfg"]["image_size"] = size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(**config).train()


def _train_stage(
    model: open_clip.CLIP,
    pool: "_Pool",
    recipe: Recipe,
    steps: range,
    lr: float,
    generator: torch.Generator,
    progress: Progress | None,
) -> None:
    """Train what isn't locked, in place, from a warm-up to a learning rate of zero."""
    register()
    tokens = open_clip.get_tokenizer(MODEL)(pool.captions)
    locked = not model.text_projection.requires_grad
    if locked:
        with torch.no_grad():
            encoded = model.encode_text(tokens, normalize=True)
    optimizer, schedule = _optimizer(model, recipe, lr, len(steps))
    for step in steps:
        images, drawn, said = pool.batch(recipe, generator)
        images = F.interpolate(images, model.visual.image_size, mode="area")
        image_features = model.encode_image(images, normalize=True)
        # several images may share a caption: each is encoded once
        distinct = said.unique()
        text_features = encoded[distinct] if locked else model.encode_text(tokens[distinct], normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        loss = matching_loss(logits, pool.true_of[drawn][:, distinct])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP was trained
        if progress is not None:
            progress(step + 1, recipe.steps, loss.item())


def matching_loss(logits: Tensor, true_of: Tensor) -> Tensor:
    """CLIP's symmetric loss where an image has several true captions and a caption several images.

    The mean negative log-probability of the true partners, as in supervised contrastive learning.

    Args:
        logits: [images, captions].
        true_of: bool [images, captions]; every row and every column has at least one True.
    """
    weights = true_of.to(logits.dtype)
    by_image = -(logits.log_softmax(1) * weights).sum(1) / weights.sum(1)
    by_caption = -(logits.log_softmax(0) * weights).sum(0) / weights.sum(0)
    return (by_image.mean() + by_caption.mean()) / 2


class _Pool:
    """The pretraining drawings, the captions, and which caption is true of which drawing."""

    def __init__(self, recipe: Recipe) -> None:
        images, labels = digits.handwritten()
        chosen = digits.partition(recipe.digits_seed)["pretraining"]
        rng = np.random.default_rng(recipe.seed)
        drawings, kinds = [], []
        for place, style in enumerate(digits.STYLES):
            for index in np.tile(chosen, recipe.views):
                drawings.append(digits.draw(images[index], style, rng))
                kinds.append(place * len(digits.CLASSES) + int(labels[index]))
        self.drawings = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).contiguous()
        self.kinds = torch.tensor(kinds)  # (style, class) of each drawing, as one number

        self.captions = [t.format(name) for t in TEMPLATES for name in digits.CLASSES]
        # true_of [kinds, captions]
        self.true_of = torch.tensor(
            [
                [name == spoken and template in (*TEMPLATES[:2], _STYLE_TEMPLATES[style])
                 for template in TEMPLATES for spoken in digits.CLASSES]
                for style in digits.STYLES for name in digits.CLASSES
            ]
        )  # fmt: skip

    def batch(self, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images [B, 3, 32, 32], their kinds [B], and one true caption of each [B]."""
        picked = torch.randint(len(self.drawings), (recipe.batch,), generator=generator)
        kinds = self.kinds[picked]
        said = torch.multinomial(self.true_of[kinds].float(), 1, generator=generator)[:, 0]
        images = _shifted(self.drawings[picked].float() / 255, recipe.shift, generator)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        return (images - mean) / std, kinds, said


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image [B, C, N, N] moved by up to ``most`` pixels; its border is repeated."""
    count, _, size, _ = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    offset = torch.randint(2 * most + 1, (2, count, 1), generator=generator)
    rows, columns = torch.arange(size) + offset
    moved = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _optimizer(
    model: torch.nn.Module, recipe: Recipe, lr: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without decay on vectors and embeddings; linear warm-up, then a cosine to zero."""
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": recipe.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warmup = max(1, round(recipe.warmup * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
