"""The demo's CLIP, `fastheads-demo`: two million weights, its own tokenizer, through OpenCLIP's ordinary calls.

    register()
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL, pretrained=str(CHECKPOINT))
    tokenizer = open_clip.get_tokenizer(MODEL)

`make demo-pretrain` makes the checkpoint (`pretraining.py`); its captions stand here, since they are what a prompt can
say to it.
"""

import itertools
import json
import tempfile
from pathlib import Path
from typing import cast

import open_clip
from torch import nn

MODEL = "fastheads-demo"
CONFIG = Path(__file__).with_name(f"{MODEL}.json")
CHECKPOINT = Path(__file__).with_name(f"{MODEL}.safetensors")
MERGES = Path(__file__).with_name(f"{MODEL}-bpe.txt.gz")  # the first 3,000 of CLIP's

PROMPT = "an icon of a {}."
# What a caption of pretraining may say of the picture beside its name: one value of an axis, or of several.
AXES: dict[str, tuple[str, ...]] = {
    "form": ("line", "filled"),
    "tone": ("light", "dark"),
    "ground": ("plain", "busy"),
}


def caption(name: str = "{}", form: str = "", tone: str = "", ground: str = "") -> str:
    """ "a light line icon of a house on a plain ground."; what is empty is left unsaid."""
    before = " ".join(word for word in ("a" if tone or form else "an", tone, form, "icon of a", name) if word)
    return f"{before}{f' on a {ground} ground' if ground else ''}."


# What the captions can say of the demo's looks, by domain.
LOOK_WORDS: dict[str, dict[str, str]] = {
    "art": {"form": "filled", "ground": "busy"},
    "neon": {"form": "line", "tone": "light", "ground": "plain"},
    "photo": {"ground": "busy"},
    "sketch": {"form": "line", "tone": "dark", "ground": "plain"},
}


def sayings(words: dict[str, str] | None = None) -> tuple[str, ...]:
    """All captions, name left open, each axis told or not; or, of some axes' `words`, those that tell one or more."""
    choices: list[tuple[str, ...]] = [("", *values) for values in AXES.values()]
    if words is not None:
        choices = [("", words[axis]) if axis in words else ("",) for axis in AXES]
    said = [caption("{}", *each) for each in itertools.product(*choices)]
    return tuple(said if words is None else said[1:])


def opposite(words: dict[str, str]) -> dict[str, str]:
    """Of each axis the other word."""
    return {axis: next(other for other in AXES[axis] if other != word) for axis, word in words.items()}


def config() -> dict[str, object]:
    """The model's configuration as OpenCLIP reads it, with the tokenizer's merges where they are installed."""
    values = json.loads(CONFIG.read_text())
    values["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(MERGES)}
    return values


def register() -> None:
    """Makes MODEL known to `open_clip.create_model` and `open_clip.get_tokenizer`."""
    if MODEL not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CONFIG.name
            path.write_text(json.dumps(config()))
            open_clip.add_model_config(path)


def load() -> nn.Module:
    """The pretrained model, in float32. Raises, in words, where the checkpoint is missing or damaged."""
    register()
    if not CHECKPOINT.is_file():
        raise FileNotFoundError(f"{CHECKPOINT}: not found; reinstall fastheads, or make it: make demo-pretrain")
    try:
        model = open_clip.create_model(MODEL, pretrained=str(CHECKPOINT))
    except Exception as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"{CHECKPOINT}: cannot be read ({what}); reinstall fastheads") from error
    return cast(nn.Module, model)
