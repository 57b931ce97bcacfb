"""A loop of one's own by accelerate: fastheads' sampler, loss and schedule, and nothing else of its trainer.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py data/PACS ViT-B-16 \
        --pretrained openai --target sketch --out adapter

The sampler deals a batch out by itself, so the loader is not prepared.
"""

import argparse

import open_clip
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

import fastheads
from fastheads.losses import class_text_weights
from fastheads.train.data.batches import training_loader
from fastheads.train.data.domains import read_domains
from fastheads.train.evaluation import source_splits
from fastheads.train.methods import ImageEncoder, Objective
from fastheads.train.models import transforms
from fastheads.train.optimization import cosine_schedule, parameter_groups


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
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)  # adapters start alike
    model = open_clip.create_model(args.model, args.pretrained).to(accelerator.device)
    folders, tokenizer = read_domains(args.data), open_clip.get_tokenizer(args.model)
    classifier = class_text_weights(model, tokenizer, folders.class_names, ["a photo of a {}."])
    fastheads.patch(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-4, gate_lr=2e-3, weight_decay=0.1))
    schedule = cosine_schedule(optimizer, args.steps)
    encoder, optimizer = accelerator.prepare(ImageEncoder(model), optimizer)
    objective = Objective(
        classifier,
        logit_scale=float(model.logit_scale.detach().exp()),
        num_domains=len(folders.domains),
        mmd_weight=args.mmd_weight,
        mmd_options={"group": dist.group.WORLD if accelerator.num_processes > 1 else None},
    )
    parts = source_splits(folders, args.target)
    loader = training_loader(
        folders,
        list(parts),
        {name: part[0] for name, part in parts.items()},
        transforms(model)[0],
        args.per_domain,
        args.steps,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=args.workers,
        device=accelerator.device,
    )
    model.train()
    for images, labels, domains in loader:
        with accelerator.autocast():
            losses = objective(encoder, model, images, labels, domains)
        accelerator.backward(losses["loss"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if accelerator.is_main_process:
        print({name: round(loss.item(), 4) for name, loss in losses.items()})
        fastheads.save_adapter(model, args.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
