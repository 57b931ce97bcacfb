"""How the demo's CLIP is made: `make demo-pretrain`, hours on a CPU, resumable; the checkpoint is in the package.

From the drawings of designers whose work no domain of the demo shows, without near copies of those it shows:

1. the image tower learns the drawings' names against a table of word vectors, on pictures of 32 pixels (a quarter of
   the tokens, as in CLIPA, arXiv 2305.07017), from easy pictures to hard ones;
2. the same at 48 pixels, the positions interpolated;
3. the text tower learns to say what the table says, for every caption;
4. it is matched with pictures, the image tower locked (LiT, arXiv 2111.07991, locks the same one), so that what a
   caption tells beside the name has a meaning of its own for every name.

A caption may tell form, tone and ground beside the name (`base.AXES`): each has a vector in the table too.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor, nn

from fastheads.demo import drawings, fonts
from fastheads.demo.base import AXES, CHECKPOINT, CONFIG, MODEL, caption, config, register
from fastheads.demo.drawings import Drawings
from fastheads.demo.scenes import Scenes
from fastheads.files import whole, write_whole
from fastheads.train.progress import Bars

EVERY = 50  # steps that one line of the log tells of


@dataclass(frozen=True)
class Recipe:
    """All that the checkpoint depends on; its hash stands in the checkpoint."""

    small_steps: int = 9_000
    full_steps: int = 4_000
    text_steps: int = 1_200
    matched_steps: int = 1_200
    small: int = 32  # pixels
    batch: int = 128
    lr: float = 1.5e-3
    text_lr: float = 2e-3
    matched_lr: float = 5e-4
    weight_decay: float = 0.1
    warmup: float = 0.04  # share of the steps
    ramp: float = 0.35  # share of the steps after which the pictures are as hard as they get
    table_std: float = 0.03  # of the word vectors at the start; with 1 nothing was learned
    logit_scale: float = 16.0
    said: float = 0.4  # how often a caption tells the value of an axis
    matched_said: float = 0.8  # in the last stage: as captions in the wild, which seldom leave out what one sees
    text_pull: float = 4.0  # towards what the table says
    matched_pull: float = 1.0
    axis_weight: float = 0.3
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(self.stages.values())

    @property
    def stages(self) -> dict[str, int]:
        """Stage -> its steps, in order."""
        return {name: getattr(self, f"{name}_steps") for name in ("small", "full", "text", "matched")}


def recipe_hash(recipe: Recipe) -> str:
    described = {
        "config": json.loads(CONFIG.read_text()),
        "recipe": dataclasses.asdict(recipe),
        "axes": AXES,
        "caption": caption(),
        "wheel": fonts.WHEEL,
        "families": drawings.FAMILIES,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


class Words(nn.Module):
    """The table of word vectors: a name is the mean of its words, a caption the name plus what it tells."""

    def __init__(self, names: list[str], width: int, std: float) -> None:
        super().__init__()
        split = [name.split("-") for name in names]
        vocabulary = {word: i for i, word in enumerate(sorted({word for words in split for word in words}))}
        self.table = nn.EmbeddingBag(len(vocabulary), width, mode="mean")
        self.axes = nn.ParameterDict({axis: torch.zeros(len(values), width) for axis, values in AXES.items()})
        self.register_buffer("words", torch.tensor([vocabulary[word] for words in split for word in words]), False)
        offsets = np.cumsum([0] + [len(words) for words in split[:-1]])
        self.register_buffer("offsets", torch.from_numpy(offsets), False)
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        nn.init.normal_(self.table.weight, std=std)
        for values in self.axes.values():
            nn.init.normal_(values, std=std)

    def names(self) -> Tensor:
        return self.table(self.words, self.offsets)

    def told(self, values: dict[str, Tensor]) -> Tensor:
        """The sum of the told values' vectors, `[B, width]`; values `[B]` an axis, -1: not told."""
        padded = {axis: F.pad(table, (0, 0, 0, 1)) for axis, table in self.axes.items()}
        return torch.stack([padded[axis][values[axis]] for axis in self.axes]).sum(0)


def _logits(features: Tensor, names: Tensor, told: Tensor) -> Tensor:
    """Cosines of features `[B, D]` with the captions names[n] + told[b]: `[B, N]`."""
    squared = names.square().sum(1) + 2 * told @ names.T + told.square().sum(1, keepdim=True)
    return (features @ names.T + (features * told).sum(1, keepdim=True)) / squared.clamp(min=1e-12).sqrt()


def _model(size: int, seed: int) -> open_clip.CLIP:
    values: dict[str, Any] = {**config(), "vision_cfg": {**config()["vision_cfg"], "image_size": size}}  # type: ignore[dict-item]
    values["text_cfg"] = {k: v for k, v in values["text_cfg"].items() if k != "tokenizer_kwargs"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(**values).train()


class Run:
    """The state of a run, and its steps."""

    def __init__(self, recipe: Recipe, drawings: Drawings) -> None:
        self.recipe = recipe
        self.drawings = drawings
        self.step = 0
        self.models = {size: _model(size, recipe.seed) for size in (recipe.small, 48)}
        width = self.models[48].visual.output_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.words = Words(drawings.names, width, recipe.table_std)
        self.words.logit_scale.data.fill_(math.log(recipe.logit_scale))
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        self.tokens: dict[tuple[str, ...], Tensor] = {}
        self.optimizer = self._optimizer()

    @property
    def stage(self) -> str:
        return self._place()[0]

    def _place(self) -> tuple[str, int]:
        """The stage, and the step within it."""
        step, stages = self.step, list(self.recipe.stages.items())
        while step >= stages[0][1] and len(stages) > 1:
            step -= stages.pop(0)[1]
        return stages[0][0], step

    @property
    def model(self) -> open_clip.CLIP:
        return self.models[self.recipe.small if self.stage == "small" else 48]

    def _optimizer(self) -> torch.optim.AdamW:
        if self.stage in ("text", "matched"):
            kept = [p for name, p in self.model.named_parameters() if not name.startswith("visual") and p.ndim]
            return torch.optim.AdamW(kept, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
        named = list(self.model.visual.named_parameters())
        decayed = [p for name, p in named if p.ndim > 1 and "embedding" not in name]
        plain = [p for name, p in named if not (p.ndim > 1 and "embedding" not in name)]
        groups = [
            {"params": decayed, "weight_decay": self.recipe.weight_decay},
            {"params": [*plain, *self.words.parameters()], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))

    def _enter(self) -> None:
        """What a new stage begins with."""
        if self.stage == "full":
            state = self.models[self.recipe.small].state_dict()
            resize_pos_embed(state, self.model)
            self.model.load_state_dict(state)
        self.optimizer = self._optimizer()

    def _rate(self) -> float:
        """Warm-up, then a cosine to zero: over both image stages, and over each text stage."""
        recipe = self.recipe
        stage, step = self._place()
        if stage in ("small", "full"):
            share, rate = self.step / (recipe.small_steps + recipe.full_steps), recipe.lr
        else:
            share = step / recipe.stages[stage]
            rate = recipe.text_lr if stage == "text" else recipe.matched_lr
        if stage == "full":  # fresh moments
            rate *= min(1.0, (step + 1) / 50)
        return rate * min(1.0, (share + 1e-6) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * share))

    def advance(self) -> dict[str, float]:
        """One step; its loss, and the share of names that came first."""
        stage, step = self._place()
        if step == 0 and self.step:
            self._enter()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        generator = torch.Generator().manual_seed(1_000_003 * self.recipe.seed + self.step)
        losses = {"text": self._of_text, "matched": self._of_pairs}
        loss, right = losses.get(stage, self._of_images)(generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.words.logit_scale.clamp_(max=math.log(100))  # as CLIP was trained
        self.step += 1
        return {"loss": loss.item(), "accuracy": right.item()}

    def _told(self, values: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The values that captions tell; -1 for the others."""
        said = self.recipe.matched_said if self.stage == "matched" else self.recipe.said
        return {
            axis: torch.where(torch.rand(len(each), generator=generator) < said, each, -1)
            for axis, each in values.items()
        }

    def _pictures(self, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A batch, normalised; its names, and what there is to say of it."""
        recipe, pool = self.recipe, self.drawings
        hardness = min(1.0, self.step / (recipe.ramp * (recipe.small_steps + recipe.full_steps)))
        picked = torch.multinomial(pool.weights, recipe.batch, replacement=True, generator=generator)
        pictures, values = Scenes(self.model.visual.image_size[0], generator, hardness)(pool.masks[picked])
        return (pictures - self.mean) / self.std, pool.labels[picked], values

    def _of_images(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        pictures, labels, values = self._pictures(generator)
        features = F.normalize(self.model.visual(pictures), dim=-1)
        scale, names = self.words.logit_scale.exp(), self.words.names()
        logits = scale * _logits(features, names, self.words.told(self._told(values, generator)))
        loss = F.cross_entropy(logits, labels)
        for axis, each in values.items():
            clear = each >= 0
            if clear.any():
                said = F.normalize(names[labels[clear], None] + self.words.axes[axis], dim=-1)
                cosines = torch.einsum("bd,bvd->bv", features[clear], said)
                loss = loss + recipe.axis_weight * F.cross_entropy(scale * cosines, each[clear]) * clear.float().mean()
        return loss, (logits.argmax(1) == labels).float().mean()

    def _of_text(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        weights = torch.where(self.drawings.designers > 1, 25.0, 1.0)
        picked = torch.multinomial(weights, 2 * self.recipe.batch, replacement=True, generator=generator)
        drawn = {axis: torch.randint(len(values), (len(picked),), generator=generator) for axis, values in AXES.items()}
        told = self._told(drawn, generator)
        with torch.no_grad():
            names, said = self.words.names(), self.words.told(told)
            wanted = F.normalize(names[picked] + said, dim=-1)
        features = F.normalize(self.model.encode_text(self._encoded(picked, told)), dim=-1)
        logits = 20 * _logits(features, names, said)
        loss = F.cross_entropy(logits, picked) + self.recipe.text_pull * (1 - (features * wanted).sum(1)).mean()
        return loss, (logits.argmax(1) == picked).float().mean()

    def _of_pairs(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures against the batch's captions, and each against its own caption with one value turned over."""
        pictures, labels, values = self._pictures(generator)
        told = self._told(values, generator)
        turned = {axis: each.clone() for axis, each in told.items()}
        same = torch.ones(len(labels), dtype=torch.bool)  # captions of which no value is turned over yet
        for place in torch.rand(len(AXES), len(labels), generator=generator).argsort(0):
            for axis, each in enumerate(turned.values()):
                here = same & (place == axis) & (each >= 0)
                each[here] = 1 - each[here]
                same &= ~here
        with torch.no_grad():
            features = F.normalize(self.model.visual(pictures), dim=-1)
            wanted = F.normalize(self.words.names()[labels] + self.words.told(told), dim=-1)
        tokens = torch.cat((self._encoded(labels, told), self._encoded(labels, turned)))
        captions = F.normalize(self.model.encode_text(tokens), dim=-1)
        count = len(labels)
        logits = self.words.logit_scale.exp().detach() * features @ captions.T
        own = torch.eye(count, dtype=torch.bool)
        namesake = (labels[:, None] == labels) & ~own
        barred = torch.cat((namesake, namesake | own & same[:, None]), 1)
        logits = logits.masked_fill(barred, -torch.inf)
        target = torch.arange(count)
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)
        loss = loss + self.recipe.matched_pull * (1 - (captions[:count] * wanted).sum(1)).mean()
        return loss, (logits.argmax(1) == target).float().mean()

    def _encoded(self, picked: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Tokens of the captions `[B, context]`."""
        if not self.tokens:
            tokenizer = open_clip.get_tokenizer(MODEL)
            spoken = [name.replace("-", " ") for name in self.drawings.names]
            self.tokens = {words: tokenizer([caption(name, *words) for name in spoken]) for words in _sayings()}
        rows = zip(picked.tolist(), *(told[axis].tolist() for axis in AXES), strict=True)
        return torch.stack([self.tokens[_words(*values)][name] for name, *values in rows])

    def state_dict(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "step": self.step,
            "models": {size: model.state_dict() for size, model in self.models.items()},
            "words": self.words.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["recipe"] != dataclasses.asdict(self.recipe):
            raise ValueError("the run was begun with another recipe: name another --out")
        # The optimizer is that of the last step taken.
        self.step = max(0, state["step"] - 1)
        self.optimizer = self._optimizer()
        self.step = state["step"]
        for size, model in self.models.items():
            model.load_state_dict(state["models"][size])
        self.words.load_state_dict(state["words"])
        self.optimizer.load_state_dict(state["optimizer"])


def _words(*values: int) -> tuple[str, ...]:
    return tuple("" if v < 0 else of[v] for v, of in zip(values, AXES.values(), strict=True))


def _sayings() -> Iterator[tuple[str, ...]]:
    """Every choice of values, told or not."""
    for place in np.ndindex(*(len(values) + 1 for values in AXES.values())):
        yield _words(*(int(i) - 1 for i in place))


def pretrain(out: Path, recipe: Recipe, *, save_every: int = 250, until: int | None = None) -> Path:
    """Trains, or goes on training, in `out`, and writes the checkpoint there; returns its path.

    `out/log.jsonl`: a line for every EVERY steps; `out/state.pt`: where a killed run goes on.
    """
    register()
    state, log = out / "state.pt", out / "log.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, Drawings())
    if state.is_file():
        run.load_state_dict(torch.load(state, weights_only=True))
    lines = log.read_text().splitlines() if log.is_file() else []
    lines = [line for line in lines if json.loads(line)["step"] <= run.step]
    sums: dict[str, float] = defaultdict(float)
    began = time.perf_counter()
    with Bars() as bars:
        report = bars.watch("pretraining a small CLIP on icons")
        while run.step < min(recipe.steps, until or recipe.steps):
            stage = run.stage
            for key, value in run.advance().items():
                sums[key] += value
            if run.step % EVERY == 0:
                means = {key: round(value / EVERY, 5) for key, value in sums.items()}
                scale = round(run.words.logit_scale.exp().item(), 3)
                seconds = round(time.perf_counter() - began)
                lines.append(
                    json.dumps({"step": run.step, "stage": stage, **means, "logit_scale": scale, "s": seconds})
                )
                report({"step": run.step, "steps": recipe.steps, "loss": means["loss"]})
                sums.clear()
            if run.step % save_every == 0 or run.step == recipe.steps:
                with whole(state) as fresh:
                    torch.save(run.state_dict(), fresh)
                write_whole(log, ("\n".join(lines) + "\n").encode())
    return save(run, out / CHECKPOINT.name)


def save(run: Run, path: Path) -> Path:
    """A stock OpenCLIP state dict in half precision, its recipe's hash among the file's metadata."""
    model = run.models[48]
    model.logit_scale.data.copy_(run.words.logit_scale.data)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    with whole(path) as fresh:
        save_file(weights, fresh, metadata={"recipe": recipe_hash(run.recipe), "steps": str(run.step)})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastheads.demo.pretraining", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-pretraining"))
    parser.add_argument("--until", type=int, help="stop after this many steps in all")
    args = parser.parse_args()
    print(pretrain(args.out, Recipe(), until=args.until))


if __name__ == "__main__":
    main()
