"""OpenCLIP's own training script on a table of images, captions and domains, with fastheads' adapters, sampler and MMD.

    python examples/openclip_training.py --train-data images.csv --dataset-type csv --csv-separator , \
        --csv-img-key path --csv-caption-key caption --model ViT-B-16 --pretrained openai --batch-size 48 --epochs 2

The table has a column `domain` beside OpenCLIP's two. All options are those of `open_clip_train.main`, which also runs
under torchrun; three of its functions are handed to it here, and the rest is as it is. Its checkpoints hold the adapted
model; the adapter itself is written to `--logs`/adapter.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import pandas
import torch.distributed as dist
from open_clip_train import main as training
from open_clip_train.data import CsvDataset, DataInfo
from open_clip_train.params import parse_args
from torch.utils.data import DataLoader, Dataset

import fastheads
from fastheads.train.data.sampling import BalancedBatches, Key

MMD_WEIGHT = 0.1


class Rows(Dataset):
    """The table's rows by the sampler's keys, each with its domain."""

    def __init__(self, table: CsvDataset, file: str, separator: str) -> None:
        domains = pandas.read_csv(file, sep=separator)["domain"]
        self.table, self.rows = table, [list(rows) for _, rows in sorted(domains.groupby(domains).groups.items())]

    def __getitem__(self, key: Key) -> tuple[Any, Any, int]:
        domain, row, _ = key
        return *self.table[self.rows[domain][row]], domain


class Batches:
    """What OpenCLIP takes for its loader: an epoch each time, balanced over domains; `domains` are the last batch's."""

    def __init__(self, rows: Rows, epoch: int, args: Any) -> None:
        self.rows, self.epoch, self.args = rows, epoch, args
        self.num_samples = sum(map(len, rows.rows))
        self.num_batches = self.num_samples // (args.batch_size * args.world_size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        args, begun = self.args, self.epoch * self.num_batches
        sampler = BalancedBatches(
            {domain: range(len(rows)) for domain, rows in enumerate(self.rows.rows)},
            args.batch_size * args.world_size // len(self.rows.rows),
            begun + self.num_batches,
            seed=args.seed,
            start=begun,
            process=args.rank,
            processes=args.world_size,
        )
        self.epoch += 1
        for images, texts, domains in DataLoader(self.rows, batch_sampler=sampler, num_workers=args.workers):
            self.domains = domains
            yield images, texts


class Parts:
    """OpenCLIP's model, data and loss, with what fastheads adds to each."""

    def create_model_and_transforms(self, *args: Any, **options: Any) -> Any:
        found = open_clip.create_model_and_transforms(*args, **options)
        self.model, self.capture = found[0], contextlib.ExitStack()
        fastheads.patch(self.model)
        self.model.register_forward_pre_hook(self._capture)
        return found

    def _capture(self, model: Any, _: Any) -> None:
        self.capture.close()  # that of the step before
        self.heads = self.capture.enter_context(fastheads.capture_heads(model))

    def get_data(self, args: Any, preprocess: Any, epoch: int, tokenizer: Any) -> dict[str, DataInfo]:
        options = {"img_key": args.csv_img_key, "caption_key": args.csv_caption_key, "sep": args.csv_separator}
        table = CsvDataset(args.train_data, preprocess[0], tokenizer=tokenizer, **options)
        self.batches = Batches(Rows(table, args.train_data, args.csv_separator), epoch, args)
        return {"train": DataInfo(self.batches)}

    def create_loss(self, args: Any) -> Any:
        own = open_clip.create_loss(args)

        def loss(**features: Any) -> dict[str, Any]:
            domains = self.batches.domains.to(args.device)
            group = dist.group.WORLD if args.distributed else None
            return own(**features) | {"mmd": MMD_WEIGHT * fastheads.head_mmd(self.heads, domains, group=group)}

        return loss


def main(argv: list[str]) -> Any:
    parts = Parts()
    handed = {name: getattr(parts, name) for name in ("create_model_and_transforms", "get_data", "create_loss")}
    with mock.patch.multiple(training, **handed):
        training.main(argv)
    parts.capture.close()
    fastheads.save_adapter(parts.model, Path(parse_args(argv).logs) / "adapter")
    return parts.model


if __name__ == "__main__":
    main(sys.argv[1:])
