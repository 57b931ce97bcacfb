"""A loop of one's own, in plain DDP: fastheads' sampler, loss and schedule, and nothing else of its trainer.

    torchrun --nproc-per-node 2 examples/ddp.py data/PACS ViT-B-16 --pretrained openai --target sketch --out adapter

Where it divides `--per-domain`, the number of processes changes no result: a step's images are those of (seed, step),
each process takes its share, and the MMD is over the batch of all (`group`).
"""

import argparse
import os

import open_clip
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

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

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, device = dist.get_rank(), torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

    torch.manual_seed(0)  # adapters start alike
    model = open_clip.create_model(args.model, args.pretrained).to(device)
    folders = read_domains(args.data)
    classifier = class_text_weights(
        model, open_clip.get_tokenizer(args.model), folders.class_names, ["a photo of a {}."]
    )
    fastheads.patch(model)
    encoder = DistributedDataParallel(ImageEncoder(model))
    objective = Objective(
        classifier,
        logit_scale=float(model.logit_scale.detach().exp()),
        num_domains=len(folders.domains),
        mmd_weight=args.mmd_weight,
        mmd_options={"group": dist.group.WORLD},
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-4, gate_lr=2e-3, weight_decay=0.1))
    schedule = cosine_schedule(optimizer, args.steps)

    parts = source_splits(folders, args.target)
    loader = training_loader(
        folders,
        list(parts),
        {name: part[0] for name, part in parts.items()},
        transforms(model)[0],
        args.per_domain,
        args.steps,
        process=rank,
        processes=dist.get_world_size(),
        workers=args.workers,
        device=device,
    )
    model.train()
    for images, labels, domains in loader:
        losses = objective(encoder, model, images, labels, domains)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if rank == 0:
        print({name: round(loss.item(), 4) for name, loss in losses.items()})
        fastheads.save_adapter(model, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
