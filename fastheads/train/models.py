"""Models by name: OpenCLIP's, "timm:NAME", a Hugging Face folder; with weights or without; how images are prepared."""

from __future__ import annotations

import difflib
import json
import logging
import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastheads.files import whole
from fastheads.hosts.vision import head_of, image_size, text_encoder

if TYPE_CHECKING:
    from fastheads.train.data.batches import Transform

TIMM = "timm:"
# Of a Hugging Face folder: how images are prepared; a tokenizer's tokens, one of these; all that may belong to one.
PROCESSOR = "preprocessor_config.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
TOKENIZER = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "merges.txt", "added_tokens.json")


@contextmanager
def silent() -> Iterator[None]:
    """Without what the libraries log of what they then raise, and what nobody asked."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def has_text(name: str) -> bool:
    """Whether the model classifies by text: OpenCLIP's, and a Hugging Face folder of both towers. Of others the image
    side is taken, with a linear head."""
    if not is_folder(name):
        return not name.startswith(TIMM)
    try:
        config = json.loads((Path(name).expanduser() / "config.json").read_text())
        heads = [kind for kind in config.get("architectures") or () if kind.endswith("ForImageClassification")]
    except (OSError, ValueError, AttributeError):
        return False  # what is wrong with it is told when it is loaded
    return "text_config" in config and not heads


def is_folder(name: str) -> bool:
    """Whether a name is that of a Hugging Face folder, and not of a model that a folder here is called like."""
    path = Path(name).expanduser()
    return path.is_dir() and (os.sep in name or (path / "config.json").is_file())


def _holds_its_own(name: str) -> bool:
    """Whether OpenCLIP finds a model's weights with the model: "hf-hub:…", "local-dir:…"."""
    return ":" in name and not name.startswith(TIMM)


def default_weights(name: str) -> str:
    """The weights of a model for which none are named: a tag; "" for a folder, or a hub's, which holds its own."""
    if is_folder(name) or _holds_its_own(name):
        return ""
    return _timm_name(name)[1] if name.startswith(TIMM) else "openai"


def build(name: str, classes: int = 1000, size: int | None = None) -> nn.Module:
    """The model of that name without values, on the meta device; `classes` of its linear head, if it has one.

    Raises ValueError for a name that is none.
    """
    with silent(), torch.device("meta"):
        if is_folder(name):
            if size:
                raise ValueError(f"image_size: got {size}, but a Hugging Face model has its own")
            auto, config = _huggingface(name, classes)
            return _checked(name, auto.from_config(config))
        if name.startswith(TIMM):
            return _checked(name, _timm(_timm_name(name)[0], size, num_classes=classes))
        import open_clip

        check_open_clip(name)
        model: nn.Module = open_clip.create_model(name, device="meta", force_image_size=size, load_weights=False)
        return model


def load(name: str, weights: str | None, classes: int = 1000, size: int | None = None) -> tuple[nn.Module, Any]:
    """A model with weights (a tag or a file; None or "": random ones), and its tokenizer, None where it has no text.

    A linear head has `classes` rows: those of the weights, or zeros where they have another number. size: another image
    size than the model's own.

    Raises ValueError, naming the argument as the command line does: what goes wrong, in words.
    """
    if is_folder(name) or not has_text(name):
        build(name, classes, size)  # says what can't be built before weights are sought
        if not is_folder(name):
            return _load_timm(name, weights, classes, size), None
        tokenizer = _Tokenizer(name) if has_text(name) else None
        return _load_huggingface(name, weights, classes), tokenizer
    import open_clip

    with _explaining(name, weights, "the path of a checkpoint you have"), silent():
        if weights and _holds_its_own(name):  # OpenCLIP would ignore the others
            model = open_clip.create_model(name, force_image_size=size, load_weights=False)
            open_clip.load_checkpoint(model, weights)
        else:
            model = open_clip.create_model(name, pretrained=weights, force_image_size=size)
    return model, open_clip.get_tokenizer(name)


@contextmanager
def _explaining(name: str, weights: str | None, bring: str) -> Iterator[None]:
    """Whatever a library raises for weights, in words."""
    try:
        yield
    except Exception as e:
        reason = textwrap.shorten(str(e) or type(e).__name__, 300, placeholder=" …")
        if weights and Path(weights).is_file():
            raise ValueError(f"pretrained: {weights} does not fit {name}: {reason}") from e
        raise ValueError(
            f"pretrained: could not get the weights {weights!r} of {name} ({reason}); without a network, give "
            f"--pretrained {bring}"
        ) from e


def _checked(name: str, model: nn.Module, empty: bool = False) -> nn.Module:
    """A vision model, which must have one linear head; `empty`: with zeros in it. One with a text tower needs none."""
    head = head_of(model)
    if text_encoder(model) is not None:
        return model
    if head is None or head.bias is None:
        raise ValueError(f"model: {name} is a {type(model).__name__}, which does not classify by one linear head")
    if empty:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return model


def _unlike(name: str, whose: str, known: Sequence[str]) -> ValueError:
    lower = {other.lower(): other for other in known}
    begun = [other for other in lower if other.startswith(name.lower())]
    close = [lower[other] for other in begun[:5] or difflib.get_close_matches(name.lower(), lower, n=5)]
    return ValueError(f"model: {whose} has no {name!r}; it has {', '.join([*close, 'others'])} …")


def is_file(weights: str | None) -> bool:
    """Whether the weights named are a file. Raises ValueError for what looks like a path and is none."""
    if not weights or Path(weights).is_file():
        return bool(weights)
    if Path(weights).exists():
        raise ValueError(f"pretrained: {weights} is not a file")
    if os.sep in weights or Path(weights).suffix:
        raise ValueError(f"pretrained: {weights} does not exist")
    return False


# ------------------------------------------------------------------------------------------------- OpenCLIP


def check_open_clip(name: str) -> None:
    """That OpenCLIP has a model of that name, or can ask a hub or folder for it. Raises ValueError."""
    import open_clip

    if name not in open_clip.list_models() and ":" not in name:
        raise _unlike(name, "OpenCLIP", open_clip.list_models())


def with_activation(name: str, weights: str | None) -> str:
    """OpenCLIP's name of the model with the activation its weights want: it only warns where they were trained with
    QuickGELU and the model named has none. Others as they are. Raises ValueError for a name or a tag that is none."""
    if name.startswith(TIMM) or is_folder(name):
        return name
    import open_clip

    check_open_clip(name)
    if not weights or is_file(weights):
        return name
    if _holds_its_own(name):
        raise ValueError(f"pretrained: got {weights!r}, but {name} holds its own weights; takes a file in their place")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags:
        has = f"it has {', '.join(tags)}, or give" if tags else "give"
        raise ValueError(f"pretrained: {name} has no weights {weights!r}; {has} the path of a checkpoint you have")
    quick = open_clip.get_pretrained_cfg(name, weights).get("quick_gelu", False)
    if quick and not open_clip.get_model_config(name).get("quick_gelu", False):
        return f"{name}-quickgelu"
    return name


# ----------------------------------------------------------------------------------------------------- timm


def _timm_name(name: str) -> tuple[str, str]:
    """timm's name of a model, and the tag behind it, or its default one. Raises ValueError for a name that is none."""
    import timm

    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    if not timm.is_model(architecture):
        raise _unlike(architecture, "timm", timm.list_models())
    return architecture, tag or getattr(timm.get_pretrained_cfg(architecture), "tag", "") or ""


def _timm(architecture: str, size: int | None, **options: Any) -> nn.Module:
    import timm

    options |= {"img_size": size} if size else {}
    try:
        return timm.create_model(architecture, **options)
    except TypeError as e:
        if "img_size" in str(e):
            raise ValueError(f"image_size: got {size}, but timm's {architecture} takes none") from e
        raise


def _load_timm(name: str, weights: str | None, classes: int, size: int | None) -> nn.Module:
    import timm

    architecture, _ = _timm_name(name)
    options: dict[str, Any] = {"num_classes": classes}
    bring, file = "", is_file(weights)
    if weights and not file:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        if weights not in tags:
            has = f"it has {', '.join(tags)}, or give" if tags else "give"
            raise ValueError(f"pretrained: {name} has no weights {weights!r}; {has} a file")
        config: Any = timm.get_pretrained_cfg(f"{architecture}.{weights}")
        bring = f"its model.safetensors, of https://huggingface.co/timm/{architecture}.{weights}"
        options = {"pretrained": True, "pretrained_cfg": weights, "num_classes": config.num_classes}
    with _explaining(name, weights, bring), silent():
        if file:
            # As many classes as the file has: only then does timm refuse a file of another model.
            config, state = timm.get_pretrained_cfg(architecture), timm.models.load_state_dict(str(weights))
            rows = state.get(f"{config.classifier}.weight", ())
            overlay = {"file": weights, "num_classes": len(rows)}
            options = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": len(rows)}
        model: Any = _timm(architecture, size, **options)
    other = options["num_classes"] != classes
    if other:
        model.reset_classifier(classes)
    return _checked(name, model, empty=other)


# --------------------------------------------------------------------------------------------- Hugging Face


@contextmanager
def _without_bars() -> Iterator[None]:
    """`silent`, and without transformers' own progress bars."""
    from transformers.utils import logging as own

    shown = own.is_progress_bar_enabled()
    own.disable_progress_bar()
    try:
        with silent():
            yield
    finally:
        if shown:
            own.enable_progress_bar()


def _huggingface(folder: str, classes: int) -> tuple[Any, Any]:
    """The class of transformers that makes a folder's model, and its config, for so many classes where it has a linear
    head. Raises ValueError in words."""
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(f"model: {folder} has no config.json; takes a folder that transformers' save_pretrained wrote")
    try:
        import transformers
    except ImportError as e:
        raise ValueError(f"model: {folder} is a Hugging Face folder, which needs: pip install 'fastheads[hf]'") from e
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        transformers.AutoModelForImageClassification._model_mapping[type(config)]
    except (OSError, ValueError, KeyError) as e:
        reason = textwrap.shorten(str(e), 200, placeholder=" …")
        raise ValueError(
            f"model: {folder} is no CLIP or SigLIP that transformers classifies images by ({reason})"
        ) from e
    if config.model_type == "siglip2":
        raise ValueError(
            f"model: {folder} is a SigLIP 2 of images of any shape (NaFlex), which takes patches and a mask in place "
            "of images; train takes images of one size, as SigLIP 2's other models do"
        )
    if has_text(folder):
        return transformers.AutoModel, config
    if config.num_labels != classes:  # the classes' names would be lost
        config.num_labels = classes
    return transformers.AutoModelForImageClassification, config


def _load_huggingface(folder: str, weights: str | None, classes: int) -> nn.Module:
    auto, config = _huggingface(folder, classes)
    path = Path(folder).expanduser()
    if weights:
        raise ValueError(f"pretrained: got {weights!r}, but {folder} is a folder that holds its own weights")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise ValueError(f"model: {folder} has no weights; bring the model.safetensors that belongs to its config.json")
    try:
        with _without_bars():
            model, info = auto.from_pretrained(
                path,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
            )
    except Exception as e:
        reason = textwrap.shorten(str(e) or type(e).__name__, 300, placeholder=" …")
        raise ValueError(f"model: the weights in {folder} do not fit its config.json: {reason}") from e
    keys = [*info["missing_keys"], *info["mismatched_keys"]]
    other = {key if isinstance(key, str) else key[0] for key in keys}
    foreign = sorted(name for name in other if not name.startswith("classifier."))
    if foreign:
        raise ValueError(f"model: the weights in {folder} do not fit its config.json, first at {foreign[0]!r}")
    return _checked(folder, model, empty=bool(other))


class _Tokenizer:
    """The tokenizer of a Hugging Face folder, called as OpenCLIP's: ids `[n, N]` of n texts, as long as its model takes
    them. Raises ValueError, naming the file to bring, where there is none or another model's."""

    def __init__(self, folder: str) -> None:
        import transformers

        path = Path(folder).expanduser()
        if not any((path / name).is_file() for name in VOCABULARIES):
            raise ValueError(
                f"model: {folder} has no tokenizer for its text tower; bring the {VOCABULARIES[0]} and "
                "tokenizer_config.json that belong to its config.json"
            )
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True).text_config
        try:
            with silent():
                self.own: Any = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as e:
            reason = textwrap.shorten(str(e) or type(e).__name__, 300, placeholder=" …")
            raise ValueError(f"model: the tokenizer in {folder} can't be read: {reason}") from e
        self.length: int = config.max_position_embeddings
        # 2 is what old configurations of CLIP say, whose end token is the largest; SigLIP takes the last token
        end = config.eos_token_id if config.model_type == "clip_text_model" and config.eos_token_id != 2 else None
        ids = self(["a photo"])
        if int(ids.max()) >= config.vocab_size or (end is not None and not bool((ids == end).any())):
            raise ValueError(
                f"model: the tokenizer in {folder} has other tokens than its config.json says (vocab_size "
                f"{config.vocab_size}, eos_token_id {config.eos_token_id}); bring its own {VOCABULARIES[0]}"
            )

    def __call__(self, texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": self.length}
        ids: Tensor = self.own(texts, return_tensors="pt", **options)["input_ids"]
        return ids


# -------------------------------------------------------------------------------------------------- writing


def save(model: nn.Module, path: Path) -> Path:
    """Writes a model's weights under their stock names: a file, or for a Hugging Face model a folder, of that name
    without its ending, with all that `from_pretrained` needs. Returns which."""
    if hasattr(model, "save_pretrained"):
        return _save_huggingface(model, path.parent / path.name.removesuffix(".safetensors"))
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    with whole(path) as temporary:
        save_file(tensors, temporary)
    return path


def _save_huggingface(model: Any, folder: Path) -> Path:
    with _without_bars():
        model.save_pretrained(folder)
    for name in (PROCESSOR, *(TOKENIZER if text_encoder(model) is not None else ())):
        own = Path(model.config._name_or_path) / name
        if own.is_file() and not (folder / name).exists():
            shutil.copy(own, folder)
    return folder


def how_to_load(name: str, model: nn.Module, path: Path, size: int | None) -> str:
    """The call that loads what `save` wrote, in the library it is for."""
    head = head_of(model)
    if is_folder(name):
        return f"transformers.{type(model).__name__}.from_pretrained({str(path)!r})"
    if head is None:
        options = f", force_image_size={size}" if size else ""
        if _holds_its_own(name):
            made = f"model = open_clip.create_model({name!r}, load_weights=False{options})"
            return f"{made}; open_clip.load_checkpoint(model, {str(path)!r})"
        return f"open_clip.create_model({name!r}, pretrained={str(path)!r}{options})"
    options = f"num_classes={head.out_features}" + (f", img_size={size}" if size else "")
    return f"timm.create_model({_timm_name(name)[0]!r}, {options}, checkpoint_path={str(path)!r})"


# --------------------------------------------------------------------------------------------------- images


def transforms(model: nn.Module) -> tuple[Transform, Transform]:
    """(training, evaluation) transforms, by the model's own size, mean, std, interpolation and way to resize.

    Raises ValueError for a Hugging Face model whose folder lacks preprocessor_config.json.
    """
    from fastheads.train.data.batches import clip_transforms

    inner: Any = model
    if hasattr(inner, "pretrained_cfg"):
        import timm

        config = timm.data.resolve_model_data_config(inner) | {"input_size": (3, *image_size(inner))}
        evaluation, about = timm.data.create_transform(**config), config
    elif hasattr(inner, "visual"):
        import open_clip

        config = open_clip.transform.PreprocessCfg(**getattr(inner.visual, "preprocess_cfg", {}))
        config.size = image_size(inner)
        evaluation, about = open_clip.transform.image_transform_v2(config, is_train=False), vars(config)
    else:
        processor = _Processor(inner.config._name_or_path)
        evaluation, about = processor, processor.about()
    mode = about["interpolation"] if about["interpolation"] != "random" else "bicubic"
    return clip_transforms(image_size(inner), about["mean"], about["std"], interpolation=mode, evaluation=evaluation)


class _Processor:
    """The image processor of a Hugging Face folder as a transform."""

    def __init__(self, folder: str) -> None:
        import transformers

        if not (Path(folder) / PROCESSOR).is_file():
            raise ValueError(
                f"model: {folder} has no {PROCESSOR}, which says how its images are prepared; "
                "bring the one that belongs to its config.json"
            )
        self.own: Any = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def about(self) -> dict[str, Any]:
        """Mean, std and interpolation."""
        from PIL import Image

        mode = Image.Resampling(self.own.resample).name.lower()
        return {"mean": self.own.image_mean, "std": self.own.image_std, "interpolation": mode}

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.own(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels
