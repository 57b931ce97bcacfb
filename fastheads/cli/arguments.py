"""The options of the command line."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

DATA = (
    "images as DIR/<domain>/<class>/<image> (PACS, VLCS …), a .csv or .json list of path, domain, class, or a DIR that "
    "shards wrote"
)

ADAPTER = "runs/train/sketch/seed0/hap/adapter"  # where train writes one, in examples

# Shells complete a path by these of shtab's functions.
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}

MODEL = "ViT-B-16"
OWN = "openai, or timm's own"  # the weights of a model for which none are named


Outcome = tuple[Mapping[str, Any], int]  # what a command found, as `--json` prints it, and its exit code


class InputError(ValueError):
    """Bad input: one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse's, but what is wrong is told in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        if message.endswith("required: COMMAND"):
            own = next(a for a in self._actions if isinstance(a, argparse._SubParsersAction))
            message = f"a command is missing; takes {', '.join(own.choices)}"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; takes an integer ≥ {least}")
        return value

    return convert


def _norms_or_every(text: str) -> int | str:
    return text if text == "norms" else _whole(1)(text)


def _finite(text: str) -> float:
    try:
        return float(text) if math.isfinite(float(text)) else -1.0
    except ValueError:
        return -1.0


def _number(text: str) -> float:
    if (value := _finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; takes a finite number ≥ 0")
    return value


def _rate(text: str) -> float:
    if (value := _finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; takes a finite number > 0")
    return value


def _images(text: str) -> int | str:
    return text if text == "auto" else _whole(1)(text)


def _decay(text: str) -> float:
    if not 0 <= (value := _finite(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; takes a number from 0 on and below 1")
    return value


def _path(text: str) -> Path:
    """A path whose `~` is the user's home, also where the shell has left it (in quotes, after "=")."""
    return Path(os.path.expanduser(text))


def _model_options(parser: argparse.ArgumentParser, *, pretrained: str, of_adapter: bool = False) -> None:
    """of_adapter: what isn't named is the base of `--adapter`; see `training.base_of_adapter`."""
    group, default = parser.add_argument_group("the base model"), MODEL
    if of_adapter:
        default, pretrained = f"the adapter's base; without one {MODEL}", f"the adapter's base's, else {pretrained}"
    group.add_argument(
        "--model",
        type=os.path.expanduser,
        default=None if of_adapter else MODEL,
        metavar="NAME",
        help=f"OpenCLIP's name (default: {default}), or a folder of Hugging Face's CLIP or SigLIP; timm:NAME, or such "
        "a folder of an image tower: with a linear head instead of text",
    )
    group.add_argument(
        "--pretrained",
        type=os.path.expanduser,
        default=None,
        metavar="TAG|FILE",
        help=f"a tag of OpenCLIP's or timm's for its weights, or a local checkpoint (default: {pretrained})",
    )
    group.add_argument(
        "--image-size", type=_whole(1), default=None, metavar="N", help="other than the model's own, N × N pixels"
    )


def _data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the data")
    group.add_argument("--data", required=True, type=_path, metavar="DIR|FILE", help=DATA)
    group.add_argument(
        "--class-names",
        type=_path,
        default=None,
        metavar="FILE",
        help="what prompts call the classes: JSON {class: name}, or a line each in the order of their names (default: "
        'their names, "_" as space)',
    )
    group.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default="stop",
        help="stop before anything is loaded (the default), or decode every image first and leave out what can't be",
    )
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help='template of the classifier, {} for the class; repeat for an ensemble (default: "a photo of a {}.")',
    )
    group.add_argument("--workers", type=_whole(0), default=2, metavar="N", help="loader processes (default: 2)")
    group.add_argument("--batch-size", type=_whole(1), default=256, metavar="N", help="of evaluation (default: 256)")


def _adapter_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--adapter", type=_path, required=required, default=None, metavar="DIR", help="written by train (…/adapter)"
    )
    parser.add_argument(
        "--any-base", action="store_true", help="take the adapter on another base than the one it was trained on"
    )


def _domain_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--target",
        nargs="+",
        default=["all"],
        metavar="DOMAIN",
        help='held out in turn, or "all": each that is no source (the default)',
    )
    parser.add_argument(
        "--sources", nargs="+", default=None, metavar="DOMAIN", help="learned from (default: all but the target)"
    )


def _split_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--split-by",
        choices=("image", "folder"),
        default="image",
        help="what the 80/20 splits keep whole; folder: images in one folder below their class, of one object, say, "
        "stay on one side (default: image)",
    )


def _again_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--recompute",
        nargs="?",
        type=_norms_or_every,
        const=1,
        default=0,
        metavar="K",
        help="less memory: compute the heads again in the backward pass, of all layers or every K-th; "
        '"norms": no more than LayerNorm\'s output',
    )
    parser.add_argument("--checkpointing", action="store_true", help="less memory: compute whole blocks again")


def _targets_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--targets",
        nargs="+",
        default=None,
        metavar="T",
        help="of LoRA: q, k, v, o (the output projection), mlp, or fc1 or fc2 of it (default: q v)",
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as for train: ViT-B-16, timm:NAME …")
    parser.add_argument("--batch", type=_whole(1), required=True, metavar="N", help="images in a step")
    parser.add_argument("--gpu", default="A100-80", metavar="GPU", help="A100-40, A100-80 (the default) or H100")
    parser.add_argument(
        "--method", default="hap", metavar="M", help="fine-tune, car-ft, lora, ha-lora, dig, hap (the default)"
    )
    parser.add_argument(
        "--rank",
        "--ranks",
        nargs="+",
        type=_whole(0),
        default=None,
        metavar="R",
        help="of LoRA: one for all layers, or one for each (default: the method's)",
    )
    _targets_option(parser)
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "amp-bf16"),
        default="amp-bf16",
        help="of weights and products; amp-bf16 (the default) is train's bf16: autocast over float32 weights",
    )
    _again_options(parser)
    parser.add_argument(
        "--impl",
        default="auto",
        metavar="NAME",
        help="stacked, delta, one_pass, reference; cpu: a step on a CPU (default: what a GPU would get)",
    )
    parser.add_argument("--classes", type=_whole(1), default=345, metavar="N", help="of the classifier (default: 345)")
    parser.add_argument(
        "--captions", action="store_true", help="a caption for each image instead, encoded in the step: CLIP's loss"
    )


def _cache_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cache-images",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep decoded images in memory, or not (default: where they take less than half of what is free)",
    )


def parser(kind: type[Parser] = Parser) -> argparse.ArgumentParser:
    """The parser of the whole command line, from which shtab makes a shell's completion."""
    main = kind(
        prog="fastheads",
        description="Adapt CLIP's attention heads to domains it has not seen.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    demo = commands.add_parser(
        "demo",
        help="every method on icons in four looks; minutes on a CPU, no download",
        description="Adapts a small CLIP, which comes with fastheads, by every method on icons in three looks, tests "
        "it on a fourth that it never saw, and writes a report. Needs no download and no GPU.",
        epilog="example: fastheads demo --target neon",
    )
    demo.add_argument(
        "--target", default=None, metavar="DOMAIN", help="held out: art, neon, photo, sketch (the default)"
    )
    demo.add_argument("--full", action="store_true", help="hold out every domain, with three seeds")
    demo.add_argument(
        "--tune",
        action="store_true",
        help="choose learning rates and lambda instead, for every domain on the three others, held out in turn",
    )
    demo.add_argument(
        "--steps", type=_whole(1), default=None, metavar="N", help="training steps per method (default: as tuned)"
    )
    demo.add_argument("--out", type=_path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    check = commands.add_parser(
        "check",
        help="what images there are, and which can't be read",
        description="Lists the images by domain and class, says what is skipped, and decodes every one. Exit code 1 "
        "where some can't be read.",
        epilog="example: fastheads check data/PACS",
    )
    check.add_argument("data", type=_path, metavar="DATA", help=DATA)

    shards = commands.add_parser(
        "shards",
        help="pack images into WebDataset shards with an index",
        description="Packs images, as they are, into .tar files that whoever reads WebDataset reads, with an index by "
        "which train draws from them as from the folder: the same batches in the same order.",
        epilog="example: fastheads shards data/PACS data/PACS-shards",
    )
    shards.add_argument("data", type=_path, metavar="DATA", help=DATA)
    shards.add_argument("out", type=_path, metavar="OUT", help="a new folder, for --data")

    bench = commands.add_parser(
        "bench-data",
        help="images a second that the loader brings, beside a plain one",
        description="Times training batches of each DATA, of what is kept decoded in memory, and of torchvision's "
        "ImageFolder with a plain DataLoader, in turn. No model.",
        epilog="example: fastheads bench-data data/PACS data/PACS-shards",
    )
    bench.add_argument("data", nargs="+", type=_path, metavar="DATA", help=DATA)
    bench.add_argument("--workers", type=_whole(0), default=2, metavar="N", help="loader processes (default: 2)")
    bench.add_argument("--batch", type=_whole(1), default=64, metavar="N", help="images in a batch (default: 64)")
    bench.add_argument("--image-size", type=_whole(1), default=224, metavar="N", help="N × N pixels (default: 224)")
    bench.add_argument(
        "--batches", type=_whole(1), default=20, metavar="N", help="of each in a round, of which there are 5 (20)"
    )

    _plan_options(
        commands.add_parser(
            "plan",
            help="does a training step fit into a GPU's memory, and which batch still does",
            description="Counts what a training step holds, on tensors without values: no GPU, no weights, no data. "
            "A GPU's numbers are counted, not measured.",
            epilog="example: fastheads plan ViT-B-16 --batch 1024 --gpu A100-80",
        )
    )

    train = commands.add_parser(
        "train",
        help="leave one domain out of a folder of images, adapt, test on it",
        description="Adapts a model on all domains but one and tests it on that one (DomainBed's protocol: "
        "the checkpoint is chosen on the sources' held-out images). A killed run goes on when started again.",
        epilog="example: fastheads train --model ViT-B-16 --pretrained openai --data data/PACS --target sketch",
    )
    _model_options(train, pretrained=OWN)
    _data_options(train)
    group = train.add_argument_group("the experiment")
    _domain_options(group)
    group.add_argument(
        "--method",
        nargs="+",
        default=["hap"],
        metavar="M",
        help="zero-shot, linear-probe, fine-tune, car-ft, lora, ha-lora, dig, hap (default: hap)",
    )
    group.add_argument("--seed", nargs="+", type=_whole(0), default=[0], metavar="N", help="one run each (default: 0)")
    _split_option(group)
    group.add_argument("--out", type=_path, default=Path("runs/train"), metavar="DIR", help="default: runs/train")
    group = train.add_argument_group("the training")
    count = _whole(1)
    group.add_argument(
        "--steps", type=count, default=20_000, metavar="N", help="default: 20000, the published 40 × 500"
    )
    group.add_argument(
        "--per-domain",
        type=_images,
        default=12,
        metavar="N",
        help="images of each source in a step, over all processes (default: 12); auto: as many as fit",
    )
    group.add_argument(
        "--accumulate", type=count, default=1, metavar="N", help="less memory: each process's batch in N parts"
    )
    group.add_argument(
        "--lr", type=_rate, default=None, metavar="X", help="default: 2e-4; 1e-5 where the whole encoder is trained"
    )
    _targets_option(group)
    group.add_argument("--gate-lr", type=_rate, default=2e-3, metavar="X", help="of the gates (default: 2e-3)")
    group.add_argument(
        "--fixed-head", action="store_true", help="keep a linear head as it was fitted (default: it is trained on)"
    )
    group.add_argument("--weight-decay", type=_number, default=0.1, metavar="X", help="of all but gates (default: 0.1)")
    group.add_argument("--mmd-weight", type=_number, default=0.1, metavar="X", help="lambda of the MMD (default: 0.1)")
    kernels, features = ("adaptive", "domainbed", "dan"), ("heads", "embedding")
    group.add_argument("--mmd-kernel", choices=kernels, default="adaptive", help="its bandwidths (default: adaptive)")
    group.add_argument("--mmd-features", choices=features, default="heads", help="of the MMD (default: heads)")
    group.add_argument(
        "--mmd-to",
        choices=("gates", "lora", "both"),
        default="gates",
        help="what the MMD's gradient reaches; other than gates (the default) with --mmd-features embedding",
    )
    group.add_argument(
        "--mmd-layers",
        nargs="+",
        type=_number,
        default=None,
        metavar="W",
        help="how much the MMD of each layer counts (default: all alike)",
    )
    group.add_argument(
        "--rank",
        nargs="+",
        type=count,
        default=None,
        metavar="R",
        help="of HA-LoRA: one, or one a layer; plain LoRA gets as many parameters (default: the published ranks)",
    )
    group.add_argument(
        "--gate", choices=("softmax", "sigmoid"), default=None, help="form of the gates (default: softmax)"
    )
    group.add_argument(
        "--shared", action="store_true", help="one down-projection for all heads: plain LoRA, in any method"
    )
    group.add_argument(
        "--sequential",
        action="store_true",
        help="one after the other: deltas in the first half of the steps, then gates",
    )
    group.add_argument(
        "--wise-ft",
        nargs="*",
        type=_number,
        default=False,
        metavar="ALPHA",
        help="score adapters half original, half tuned too, as encoders trained whole always are; numbers from 0 (the "
        "original) to 1: with that part of the tuned weights too, for a curve",
    )
    group.add_argument(
        "--target-curve",
        action="store_true",
        help="score the domain held out at every evaluation too, for a curve: nothing is chosen by it",
    )
    group.add_argument(
        "--context-weight",
        type=_number,
        default=None,
        metavar="X",
        help="of CAR-FT's KL, for every trained method (default: 1 for car-ft, else 0)",
    )
    group.add_argument("--evaluate-every", type=count, default=500, metavar="N", help="steps (default: 500)")
    group.add_argument(
        "--save-every", type=count, default=500, metavar="N", help="steps, to resume from (default: 500)"
    )
    group.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision (default: no)"
    )
    group.add_argument("--tf32", action="store_true", help="a GPU's float32 products in TF32")
    group.add_argument("--compile", action="store_true", help="by torch.compile")
    group.add_argument(
        "--fsdp", action="store_true", help="less memory: of several processes each holds a share of the image tower"
    )
    group.add_argument(
        "--ema",
        type=_decay,
        default=0.0,
        metavar="X",
        help="evaluate and keep a moving average of what is trained, of this decay (0.999, say; default: none)",
    )
    _cache_option(group)
    _again_options(group)
    group.add_argument(
        "--log",
        "--log-to",
        nargs="+",
        choices=("jsonl", "tensorboard"),
        default=[],
        metavar="KIND",
        help="write each step's numbers beside a run's results: jsonl, tensorboard, or both "
        "(torchrun has a --log-dir of its own: name it --log-to there)",
    )

    sweep = commands.add_parser(
        "sweep",
        help="a table of runs from a file: targets × seeds × methods × settings, as jobs",
        description="Runs what a TOML file says: the keys are train's options without the dashes, a table "
        "[methods.NAME] is a row with settings of its own, its [methods.NAME.search] values to choose from on the "
        "sources, [submit] says where jobs run. A killed sweep goes on when started again.",
        epilog="example: fastheads sweep studies/icons.toml",
    )
    sweep.add_argument("file", type=_path, metavar="FILE", help="the table, in TOML")
    sweep.add_argument(
        "--out", type=_path, default=None, metavar="DIR", help="default: runs/NAME, by the name of the file"
    )

    report = commands.add_parser(
        "report",
        help="runs of train and sweep side by side: tables, paired differences, curves over a setting",
        description="Writes one page on all runs in these folders. A run that several have counts once; methods that "
        "differ in a setting are told apart by it. Differences are paired image by image and seed by seed.",
        epilog="example: fastheads report runs/icons runs/lambda-10 --latex",
    )
    report.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="a folder that train or sweep wrote")
    report.add_argument("--csv", action="store_true", help="write the numbers as report.csv too")
    report.add_argument("--latex", action="store_true", help="write the table as report.tex too")
    report.add_argument("--out", type=_path, default=Path("runs/report"), metavar="DIR", help="default: runs/report")

    heads = commands.add_parser(
        "heads",
        help="which heads of the frozen model to close for a domain it has not seen, by several criteria",
        description="Closes each head of the frozen model by itself: accuracy on every domain, beside the MMD between "
        "the sources. Then criteria that see the sources alone choose heads to close, or gates, and an oracle by the "
        "target's held-out images; all are tested on its others. The same command goes on where it was killed.",
        epilog="example: fastheads heads --model ViT-B-16 --pretrained openai --data data/PACS --target sketch",
    )
    _model_options(heads, pretrained=OWN)
    _data_options(heads)
    group = heads.add_argument_group("the selection")
    _domain_options(group)
    group.add_argument("--seed", nargs="+", type=_whole(0), default=[0], metavar="N", help="of the splits (default: 0)")
    _split_option(group)
    group.add_argument(
        "--most", type=count, default=5, metavar="K", help="how many heads are closed at most (default: 5)"
    )
    group.add_argument(
        "--images",
        type=_whole(2),
        default=None,
        metavar="N",
        help="of each domain's held-out ones, to measure and choose by (default: all); a linear head is fitted on all",
    )
    group.add_argument(
        "--test-images",
        type=_whole(2),
        default=None,
        metavar="N",
        help="of the target, to test on (default: all that the oracle doesn't see)",
    )
    _cache_option(group)
    group.add_argument("--out", type=_path, default=Path("runs/heads"), metavar="DIR", help="default: runs/heads")
    heads.set_defaults(method=[], precision="no", fixed_head=False, per_domain=12)

    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy of a model, with or without an adapter, on each domain",
        description="Accuracy on each domain of a folder, zero-shot or by a linear head: of a base model, a merged "
        "one, or one with an adapter.",
        epilog=f"example: fastheads evaluate --data data/PACS --adapter {ADAPTER}",
    )
    _model_options(evaluate, pretrained=OWN, of_adapter=True)
    _data_options(evaluate)
    _adapter_options(evaluate, required=False)
    evaluate.add_argument("--domain", nargs="+", default=None, metavar="DOMAIN", help="default: all")

    inspect = commands.add_parser(
        "inspect",
        help="what an adapter holds, or how a model would be patched",
        description="With --adapter: its base, sizes and gates. Without: the path each layer of --model would take, "
        "and why.",
        epilog=f"example: fastheads inspect --adapter {ADAPTER}",
    )
    inspect.add_argument("--adapter", type=_path, default=None, metavar="DIR", help="written by train (…/adapter)")
    _model_options(inspect, pretrained="random weights")

    merge = commands.add_parser(
        "merge",
        help="fold an adapter into the weights: a stock checkpoint",
        description="Folds an adapter's deltas and gates into its base model and writes a checkpoint with stock keys, "
        "for open_clip.create_model(NAME, pretrained=FILE), timm.create_model(NAME, checkpoint_path=FILE), or, as a "
        "folder of that name without its ending, for Hugging Face's from_pretrained.",
        epilog=f"example: fastheads merge --adapter {ADAPTER} --out merged.safetensors",
    )
    _model_options(merge, pretrained=OWN, of_adapter=True)
    _adapter_options(merge, required=True)
    merge.add_argument("--out", type=_path, required=True, metavar="FILE", help="the checkpoint, .safetensors")
    examples = [command.epilog.removeprefix("example: ") for command in commands.choices.values() if command.epilog]
    main.epilog = "\n  ".join(["examples, in the order of a day:", *examples])
    for command in commands.choices.values():
        command.add_argument(
            "--json", action="store_true", help="print one JSON object in place of text: numbers, or where they are"
        )
        for action in command._actions:
            if action.type is _path:
                action.complete = FILES  # type: ignore[attr-defined]
    return main
