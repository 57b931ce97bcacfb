"""fit: one training run, from any point at which it was killed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastheads.hosts.vision import checkpoint_blocks, head_of, image_tower
from fastheads.losses import mmd
from fastheads.model import gate_parameters, gates, is_patched, lora_parameters
from fastheads.model.base import gathered
from fastheads.patching import patch
from fastheads.train.earlier import agree, hashes, run_key
from fastheads.train.evaluation import Problem, context_kept, context_logits, fit_head, image_features, score
from fastheads.train.logs import Log, peak_memory_mb
from fastheads.train.methods import ImageEncoder, Method, Objective, check_text
from fastheads.train.optimization import cosine_schedule, parameter_groups
from fastheads.train.ranks import Notice, Stopped, everywhere, group, join
from fastheads.train.recipe import Recipe, check_run
from fastheads.train.sharding import average_gradients, shard
from fastheads.train.state import Progress, State, learned, trainable
from fastheads.train.step import backward, micro_batches

Report = Callable[[dict[str, Any]], None]


def prepare(
    model: nn.Module,
    method: Method,
    *,
    teacher: bool = False,
    recompute: bool | int | str = 0,
    fixed_head: bool = False,
    **changes: Any,
) -> nn.Module:
    """Makes the parts of `model` trainable that the method trains, in place: patches it (`recompute` is `patch`'s,
    `changes` are `Method.config`'s), or frees its image tower; and its linear head, if it has one, unless that is to be
    fixed.

    Returns a frozen copy of the original image tower where a `teacher` is asked for and the model can't be its own (a
    patched model can, under `disabled`), else an empty module. Raises what `patch` raises for a method that needs it.
    """
    config, original = method.config_for(model, **changes), None
    if config is not None:
        patch(model, config, recompute=recompute)
    else:
        tower = image_tower(model)
        model.requires_grad_(False)
        original = copy.deepcopy(tower) if teacher else None
        tower.requires_grad_(True)
    head = head_of(model)
    if head is not None:
        head.requires_grad_(not fixed_head)
    return (nn.Identity() if original is None else original).eval()


def fit(
    model: nn.Module,
    method: Method,
    problem: Problem,
    recipe: Recipe,
    *,
    out: str | os.PathLike[str] | None = None,
    precision: str = "no",
    report: Report | None = None,
    log: Sequence[str] = (),
    hashed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains `model` in place on the problem's source domains and leaves the best weights in it.

    "Best" is the highest mean accuracy on the sources' held-out images, of equals the lower loss: training-domain
    validation, the target is never looked at. With `out` the run saves its state every `save_every` steps and goes on
    from there when called again with the same arguments; a resumed run ends with the same weights as one that was never
    stopped. Asked to end by SIGTERM it saves its state after the step it is in, and raises SystemExit(0).

    Started by `torchrun` or `accelerate launch`, each process takes its share of every batch, and all end with one
    process's weights but for rounding; a run may go on on another number of processes.

    Args:
        model: an OpenCLIP model, or a vision model with a linear head (which is fitted first, then trained on, unless
            `recipe.fixed_head`); not patched. The method says what of it is trained.
        precision: accelerate's mixed precision: "no", "fp16" or "bf16".
        report: called after every step with step, steps, loss, parts and images per second, for a progress bar.
        log: "jsonl", "tensorboard" or both, written to `out` by the first process: of every step the losses, learning
            rate, images per second, seconds waited for data and memory; where the run is evaluated also accuracies,
            gates and the MMD of each layer and pair of sources.
        hashed: `earlier.hashes(model, problem)`, where they are known already.

    Returns history, gates over time, selected step and its validation loss, seconds, images per second. The history has
    at up to 200 steps the loss and its parts, and `[step, value]` at each evaluation: the accuracies validation and,
    with `recipe.target_curve`, target; of a model with text context_accuracy and context_change (`context_kept` of the
    sources' held-out images), from the original model at step 0 on.
    """
    processes = join().num_processes
    check_run(method, recipe, precision, processes)
    check_text(model, method, recipe.context_weight)
    set_seed(recipe.seed)  # before the adapters draw their start
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # accelerate keeps one precision per process; runs may differ in it
    accelerator = Accelerator(mixed_precision=precision, cpu=join().device.type == "cpu")
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"accelerate's configuration: got {accelerator.distributed_type.value}; takes MULTI_GPU, and --fsdp "
            "(Recipe.fsdp) for shards"
        )
    key = run_key(hashed or hashes(model, problem), method, problem, recipe, precision)
    inner = model.to(accelerator.device)
    fit_head(inner, problem, recipe)
    contexts = _contexts(inner, problem, recipe)
    options: Any = {"recompute": recipe.recompute, "fixed_head": recipe.fixed_head, **recipe.adapter}
    teacher = prepare(inner, method, teacher=recipe.context_weight > 0, **options)
    sharded = recipe.fsdp and processes > 1
    if sharded:
        inner = copy.deepcopy(model.cpu()).to(accelerator.device)
        shard(inner, whole=trainable(inner).values() if method.trains == "adapter" else ())
    if recipe.checkpointing:
        checkpoint_blocks(image_tower(inner))
    encoder = ImageEncoder(inner)
    if recipe.compile:
        encoder.compile()
    rates = {"lr": recipe.lr, "gate_lr": recipe.gate_lr, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.AdamW(parameter_groups(inner, **rates))
    schedule = cosine_schedule(optimizer, recipe.steps)
    wrapped = accelerator.prepare_model(encoder, evaluation_mode=sharded)  # no DDP around shards
    optimizer = accelerator.prepare_optimizer(optimizer)
    problem = problem.to(accelerator.device)
    objective = Objective(
        classifier=problem.classifier,
        logit_scale=problem.logit_scale,
        num_domains=len(problem.folders.domains),
        contexts=problem.contexts,
        mmd_weight=recipe.mmd_weight if method.mmd else 0.0,
        context_weight=recipe.context_weight,
        teacher=None if isinstance(teacher, nn.Identity) else teacher.to(accelerator.device),
        mmd_features=recipe.mmd_features,
        mmd_to=recipe.mmd_to,
        mmd_options={"kernel": recipe.mmd_kernel},
        layer_weights=recipe.mmd_layers,
    )
    progress = Progress()
    state = State(accelerator, inner, progress, schedule, out, key=key)
    state.resume(recipe)
    agree(key, recipe, step=progress.step)

    if progress.step == 0:
        _record_gates(progress, inner)
        _record_contexts(progress, contexts, contexts, problem)
    _train_mode(inner)
    rank = accelerator.process_index
    loader = problem.training_loader(recipe, start=progress.step, process=rank, processes=processes)
    total = recipe.per_domain * len(problem.sources)
    record_every = max(1, recipe.steps // 200)
    logged = log and out is not None and accelerator.is_main_process
    writer = Log(Path(os.fspath(out)).expanduser(), log, progress.step) if out is not None and logged else None
    average = get_ema_multi_avg_fn(recipe.ema)
    began = time.perf_counter() - progress.seconds
    with Notice() as notice, _products(recipe), contextlib.closing(writer) if writer else contextlib.nullcontext():
        waits = time.perf_counter()
        for batch in loader:
            waited = time.perf_counter() - waits
            step, last = progress.step + 1, progress.step + 1 == recipe.steps
            evaluates = step % recipe.evaluate_every == 0 or last
            batches = micro_batches(batch, recipe.accumulate)
            sums, heads = backward(
                objective,
                wrapped,
                inner,
                batches,
                accelerator,
                total=total,
                seed=f"{recipe.seed}/{step}/{rank}",
                group=group(),
                keep=bool(log) and evaluates,
            )
            if sharded:
                average_gradients(trainable(inner).values())
            if recipe.sequential:
                _hold(inner, gates=progress.step < recipe.steps // 2)
            lr = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.step = step
            values, asked = _totals(accelerator, objective, sums, notice.given)
            progress.seconds = time.perf_counter() - began
            if not math.isfinite(values["loss"]):
                told = f"loss: is {values['loss']} at step {step}; lower the learning rate ({recipe.lr})"
                raise everywhere(FloatingPointError(told))
            if recipe.ema:
                now = {name: p.detach() for name, p in trainable(inner).items()}
                if progress.average:
                    average(list(progress.average.values()), list(now.values()), step)
                else:
                    progress.average = {name: p.clone() for name, p in now.items()}
            if step % record_every == 0 or last:
                _record(progress, inner, step, values, with_gates=step % (10 * record_every) == 0 or last)
            rate = step * total / progress.seconds
            if report is not None:
                each = {name: own * processes for name, own in loader.rates().items()}
                report({"step": step, "steps": recipe.steps, "images_per_second": rate, **each, **values})
            found: dict[str, Any] = {}
            if evaluates:
                with _averaged(inner, progress.average):
                    found["accuracy"] = _select(progress, inner, problem, recipe, contexts)
                    if recipe.target_curve:  # after the choice, which it has no part in
                        target = score(inner, problem, problem.target, "all", recipe).accuracy
                        progress.history.setdefault("target", []).append([step, target])
                if heads is not None:
                    domains = torch.cat([batch[2] for batch in batches])
                    found["mmd_of_pairs"] = _pairs(heads, domains, problem, recipe)
                if progress.gates["step"]:
                    found["gates"] = _gates_now(inner)
            if writer is not None:
                cost = {"images_per_second": rate, "waited_seconds": waited, "memory_mb": peak_memory_mb()}
                writer.write(step, {**values, "lr": lr, **cost, **found})
            if asked and not last:
                state.save()
                raise Stopped(f"step {step} of {recipe.steps}" + (f", saved in {out}" if out is not None else ""))
            if step % recipe.save_every == 0 and not last:
                state.save()
            waits = time.perf_counter()
            began = waits - progress.seconds  # evaluating and saving is not training time
    for name, tensor in learned(inner).items():
        tensor.data.copy_(progress.best["weights"][name])
    state.save()
    if sharded:
        for name, tensor in learned(model.to(accelerator.device)).items():
            tensor.data.copy_(gathered(progress.best["weights"][name]))
    accelerator.free_memory()
    return {
        "selected_step": progress.best["step"],
        "validation_loss": progress.best["loss"],
        "steps": recipe.steps,
        "seconds": progress.seconds,
        "images_per_second": recipe.steps * total / max(progress.seconds, 1e-9),
        "history": progress.history,
        "gates": progress.gates if progress.gates["step"] else None,
    }


def _totals(
    accelerator: Accelerator, objective: Objective, sums: dict[str, Tensor], asked: bool
) -> tuple[dict[str, float], bool]:
    """The loss and its parts over all processes, and whether any of them was asked to end."""
    flag = torch.tensor(float(asked), device=accelerator.device)
    *parts, flags = accelerator.reduce(torch.stack([*(s.float() for s in sums.values()), flag]), "sum").tolist()
    values = dict(zip(sums, parts, strict=True))
    return {"loss": objective.weighted(values), **values}, flags > 0


@contextlib.contextmanager
def _products(recipe: Recipe) -> Iterator[None]:
    """float32 products in TF32 inside, where the recipe says so."""
    before = torch.get_float32_matmul_precision()
    if recipe.tf32:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _averaged(model: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """Inside, what is trained has the values of `average`, if there is one."""
    tensors = trainable(model) if average else {}
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.data.copy_(average[name])
    try:
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data.copy_(own[name])


def _pairs(heads: Tensor, domains: Tensor, problem: Problem, recipe: Recipe) -> list[dict[str, float]]:
    """Of each layer the MMD of each pair of sources, over the whole batch."""
    place = torch.zeros(len(problem.folders.domains), dtype=torch.int64)
    place[[problem.folders.index(name) for name in problem.sources]] = torch.arange(len(problem.sources))
    options: Any = {"num_domains": len(problem.sources), "kernel": recipe.mmd_kernel, "group": group()}
    found = mmd(heads, place.to(domains.device)[domains], reduction="none", **options).tolist()
    pairs = list(itertools.combinations(enumerate(problem.sources), 2))
    return [{f"{one} {other}": layer[a][b] for (a, one), (b, other) in pairs} for layer in found]


def _record(progress: Progress, model: nn.Module, step: int, values: dict[str, float], with_gates: bool) -> None:
    progress.history["step"].append(step)
    for name, value in values.items():
        progress.history.setdefault(name, []).append(value)
    if with_gates:
        _record_gates(progress, model)


def _hold(model: nn.Module, *, gates: bool) -> None:
    """Takes the gradients of the gates, or of the deltas: without one AdamW leaves a parameter as it is."""
    for p in gate_parameters(model) if gates else lora_parameters(model):
        p.grad = None


def _train_mode(model: nn.Module) -> None:
    """For training; frozen batch norms keep their statistics (convolutional towers have some)."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def _gates_now(model: nn.Module) -> list[list[float]]:
    now = gates(model)
    assert isinstance(now, Tensor)
    return now.tolist()


def _record_gates(progress: Progress, model: nn.Module) -> None:
    if is_patched(model) and gate_parameters(model):
        progress.gates["step"].append(progress.step)
        progress.gates["values"].append(_gates_now(model))


def _contexts(model: nn.Module, problem: Problem, recipe: Recipe) -> dict[str, Tensor]:
    """How the sources' held-out images fit each domain's prompt, by source; nothing where there is no text."""
    for name in problem.sources if problem.domain_contexts is not None and not problem.original else ():
        loader = problem.evaluation_loader(name, "validation", recipe)
        logits = context_logits(image_features(model, loader, f"contexts of {name}")[0], problem)
        assert logits is not None
        problem.original[name] = logits
    return problem.original


def _record_contexts(
    progress: Progress, found: Mapping[str, Tensor], original: Mapping[str, Tensor], problem: Problem
) -> None:
    """`context_kept`, the mean of the sources'."""
    kept = [context_kept(found[name], original[name], problem.folders.index(name)) for name in found]
    for name, values in zip(("context_accuracy", "context_change"), zip(*kept, strict=True), strict=False):
        progress.history.setdefault(name, []).append([progress.step, sum(values) / len(values)])


def _select(
    progress: Progress, model: nn.Module, problem: Problem, recipe: Recipe, contexts: Mapping[str, Tensor]
) -> dict[str, float]:
    """Scores the sources' held-out images and keeps the weights if they are the best so far; returns the accuracies.

    contexts: the original model's, to record what is left of its sense of them.
    """
    scores = {name: score(model, problem, name, "validation", recipe) for name in problem.sources}
    accuracy = round(sum(s.accuracy for s in scores.values()) / len(scores), 6)  # equals stay equal
    loss = sum(s.loss for s in scores.values()) / len(scores)
    progress.history["validation"].append([progress.step, accuracy])
    if (accuracy, -loss) > (progress.best["accuracy"], -progress.best["loss"]):
        weights = {name: tensor.detach().clone() for name, tensor in learned(model).items()}
        progress.best = {"step": progress.step, "accuracy": accuracy, "loss": loss, "weights": weights}
    known = {name: found.context for name, found in scores.items() if found.context is not None}
    _record_contexts(progress, known, contexts, problem)
    return {name: found.accuracy for name, found in scores.items()}
