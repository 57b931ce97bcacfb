"""What a process of a distributed test runs: importable by name, so that a spawned process finds it."""

import contextlib
import json
import os

import torch
from training import stopped_at

from fastheads.train.data.batches import evaluation_loader
from fastheads.train.evaluation import image_features
from fastheads.train.loop import fit
from fastheads.train.methods import METHODS
from fastheads.train.state import trainable


def train_on_rank(rank, world, port, base, problem, recipe, out, method="hap", stop=None):
    be_rank(rank, world, port)
    with contextlib.suppress(InterruptedError):
        run = fit(base, METHODS[method], problem, recipe, out=out, log=["jsonl"], report=stopped_at(stop))
    if stop:
        return
    found = {n: p.detach() for n, p in trainable(base).items()}
    torch.save({"history": run["history"], "weights": found}, out / f"rank{rank}.pt")


def score_on_rank(rank, world, port, base, problem, recipe, out):
    """This process's share of the target's images, and what it then knows of all of them."""
    be_rank(rank, world, port)
    share = problem.evaluation_loader("red", "all", recipe)
    whole = evaluation_loader(problem.folders, "red", None, problem.transforms[1], recipe.batch_size)
    features, labels = image_features(base, share)
    alone = image_features(base, whole)
    same = torch.equal(features, alone[0]) and torch.equal(labels, alone[1])
    (out / f"rank{rank}.json").write_text(json.dumps({"images": len(share.dataset), "same": same}))


def be_rank(rank, world, port):
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in own.items()})


def fall_silent_on_rank(rank, world, port, base, problem, recipe, out):
    """The last process stops for good at step 2; another says how its run ended."""
    import signal

    from fastheads.train.ranks import lost

    os.environ["FASTHEADS_PATIENCE"] = "6"
    be_rank(rank, world, port)

    def report(values):
        if rank == world - 1 and values["step"] == 2:
            os.kill(os.getpid(), signal.SIGSTOP)

    try:
        fit(base, METHODS["hap"], problem, recipe, report=report)
    except RuntimeError as e:
        (out / f"lost{rank}").write_text(str(lost(e)))


def fail_on_rank(rank, world, port, base, problem, recipe, out):
    """Runs that fail on one process alone; each process writes what all of them said."""
    import copy
    import dataclasses
    import errno

    from fastheads.train import state

    be_rank(rank, world, port)
    last, told = rank == world - 1, {}
    fewer = (problem.folders.files[0][last:], *problem.folders.files[1:])
    changed = {
        "settings": (problem, dataclasses.replace(recipe, lr=recipe.lr * (1 + last))),
        "images": (dataclasses.replace(problem, folders=dataclasses.replace(problem.folders, files=fewer)), recipe),
        "loss": (problem, recipe),
        "disk": (problem, dataclasses.replace(recipe, fsdp=True)),
    }
    write = state.save_file

    def full(tensors, path):
        write(tensors, path)
        if (path.parents[1] / "state").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for name, (its_problem, its_recipe) in changed.items():
        model = copy.deepcopy(base)

        def spoil(values, name=name, model=model):
            if name == "loss" and last:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

        state.save_file = full if name == "disk" else write
        try:
            method = METHODS["fine-tune" if its_recipe.fsdp else "hap"]
            fit(model, method, its_problem, its_recipe, out=out / name, report=spoil)
        except (ValueError, FloatingPointError, OSError) as e:
            told[name] = str(e), e.everywhere
    (out / f"told{rank}.json").write_text(json.dumps(told))


def train_until_killed(root, out, kill, number=9):
    """Trains on the folders under `root`; gets that signal at step `kill`, or else saves what it learned."""
    import open_clip

    from fastheads.demo.base import CONFIG, MODEL, register
    from fastheads.train.data.batches import clip_transforms
    from fastheads.train.data.domains import read_domains
    from fastheads.train.evaluation import make_problem
    from fastheads.train.recipe import Recipe

    def report(values):
        if values["step"] == kill:
            os.kill(os.getpid(), number)

    torch.set_num_threads(1)
    register()
    torch.manual_seed(0)
    base = open_clip.CLIP(**json.loads(CONFIG.read_text())).eval()
    transforms = clip_transforms(48, (0.5,) * 3, (0.25,) * 3, flip=False)
    tokenizer = open_clip.get_tokenizer(MODEL)
    problem = make_problem(base, tokenizer, read_domains(root), "red", transforms, with_contexts=False)
    recipe = Recipe(steps=7, per_domain=2, lr=5e-3, mmd_weight=0.1, evaluate_every=3, save_every=2)
    fit(base, METHODS["hap"], problem, recipe, out=out, report=report)
    torch.save({n: p.detach() for n, p in trainable(base).items()}, f"{out}/final.pt")


def step_on_rank(rank, world, folder, name, targets, wrap):
    """One training step of a patched model on this process's share of a batch, in DDP or FSDP2; rank 0 saves it."""
    import torch.distributed as dist
    from standins import default_config, fill_adapters, images, patched
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from fastheads.hosts import find_tower

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = patched(
        name,
        default_config(name, targets=targets),
        recompute={"fsdp recompute": True, "fsdp norms": "norms"}.get(wrap, False),
    )
    fill_adapters(model)
    model.forward = model.encode_image
    if wrap == "ddp":
        run = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (world,))
        for block in find_tower(model, "visual").blocks:
            if wrap == "fsdp norms":  # whose weights are freed before the attention's backward pass asks for them
                fully_shard(block.ln_1, mesh=mesh)
            fully_shard(block, mesh=mesh)
        run = model
        fully_shard(model.visual, mesh=mesh)  # not the whole: torch shards no scalar, as OpenCLIP's logit_scale is
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    share = images(2 * world).chunk(world)[rank]
    run(share).square().mean().backward()
    optimizer.step()
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            for kind, t in (("gradient", p.grad), ("parameter", p.detach())):
                found[f"{kind} {name}"] = t.full_tensor() if isinstance(t, DTensor) else t
    if rank == 0:
        torch.save(found, f"{folder}/step.pt")
    dist.destroy_process_group()


def look_on_rank(rank, world, port, paths, out):
    """This process's share of a look at `paths`; what it then knows is written to `out`."""
    from fastheads.cli import data
    from fastheads.train.data.images import look

    be_rank(rank, world, port)
    looked = []
    found = data._unreadable(paths, lambda path: looked.append(path) or look(path), "looking")
    (out / f"rank{rank}.json").write_text(
        json.dumps({"found": [[str(path), reason] for path, reason in found], "looked": len(looked)})
    )


def example(name):
    """The module examples/`name`.py."""
    import importlib.util
    from pathlib import Path

    file = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_on_rank(rank, world, port, name, argv):
    """An example's `main` as torchrun starts it."""
    from fastheads.demo.base import register

    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in own.items()})
    register()
    example(name).main(argv)
