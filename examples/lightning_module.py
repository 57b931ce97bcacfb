"""A module for PyTorch Lightning (`pip install pytorch-lightning`) around fastheads' sampler, loss and schedule.

    python examples/lightning_module.py data/PACS ViT-B-16 --pretrained openai --target sketch --devices 2 --out adapter

The sampler deals a batch out by itself, so Lightning is to put none in its place; the MMD is over all processes.
"""

import argparse
from typing import Any

import open_clip
import pytorch_lightning
import torch
import torch.distributed as dist
from torch import Tensor

import fastheads
from fastheads.losses import class_text_weights
from fastheads.train.data.batches import Loader, training_loader
from fastheads.train.data.domains import DomainFolders, read_domains
from fastheads.train.evaluation import source_splits
from fastheads.train.methods import ImageEncoder, Objective
from fastheads.train.models import transforms
from fastheads.train.optimization import cosine_schedule, parameter_groups


class Adapted(pytorch_lightning.LightningModule):
    def __init__(self, model: Any, folders: DomainFolders, classifier: Tensor, args: argparse.Namespace) -> None:
        super().__init__()
        self.encoder, self.folders, self.args = ImageEncoder(model), folders, args
        self.register_buffer("classifier", classifier)

    def on_fit_start(self) -> None:
        self.objective = Objective(
            self.classifier,
            logit_scale=float(self.encoder.model.logit_scale.detach().exp()),
            num_domains=len(self.folders.domains),
            mmd_weight=self.args.mmd_weight,
            mmd_options={"group": dist.group.WORLD if self.trainer.world_size > 1 else None},
        )

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        losses = self.objective(self.encoder, self.encoder.model, *batch)
        self.log_dict(losses, prog_bar=True)
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.encoder.model, lr=2e-4, gate_lr=2e-3, weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [{"scheduler": cosine_schedule(optimizer, self.args.steps), "interval": "step"}]

    def train_dataloader(self) -> Loader:
        parts = source_splits(self.folders, self.args.target)
        return training_loader(
            self.folders,
            list(parts),
            {name: part[0] for name, part in parts.items()},
            transforms(self.encoder.model)[0],
            self.args.per_domain,
            self.args.steps,
            process=self.trainer.global_rank,
            processes=self.trainer.world_size,
            workers=self.args.workers,
            device=self.device,
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--pretrained", default=None)
    parser.add_argument("--target", required=True, help="the domain to leave out")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--per-domain", type=int, default=12, help="images of each domain in a step, of all processes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mmd-weight", type=float, default=0.1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)

    pytorch_lightning.seed_everything(0)  # adapters start alike
    model = open_clip.create_model(args.model, args.pretrained)
    folders, tokenizer = read_domains(args.data), open_clip.get_tokenizer(args.model)
    classifier = class_text_weights(model, tokenizer, folders.class_names, ["a photo of a {}."])
    fastheads.patch(model)
    trainer = pytorch_lightning.Trainer(
        max_steps=args.steps,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Adapted(model, folders, classifier, args))
    if trainer.is_global_zero:
        print({name: round(float(value), 4) for name, value in trainer.logged_metrics.items()})
        fastheads.save_adapter(model, args.out)


if __name__ == "__main__":
    main()
