"""fit: one training run, from any point at which it was killed."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastheads.hosts.vision import checkpoint_blocks, head_names, head_of, image_tower
from fastheads.model import gate_parameters, gates, is_patched, lora_parameters
from fastheads.patching import patch
from fastheads.train.earlier import check_state, corrupt, hashes, run_key, saved_state
from fastheads.train.evaluation import Problem, fit_head, score
from fastheads.train.methods import ImageEncoder, Method, Objective, check_text
from fastheads.train.optimization import cosine_schedule, parameter_groups
from fastheads.train.recipe import Recipe, check_run

Report = Callable[[dict[str, Any]], None]


class _Progress:
    """What a run has done so far, saved with accelerate's state: step, histories, best weights."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0
        self.history: dict[str, list[Any]] = {"step": [], "validation": []}
        self.gates: dict[str, list[Any]] = {"step": [], "values": []}
        self.best: dict[str, Any] = {"step": 0, "accuracy": -1.0, "loss": math.inf, "weights": {}}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


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


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Name → parameter of everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Name → tensor of everything a run makes: what is trained, a linear head, a free encoder's running statistics."""
    tower = "visual." if hasattr(model, "visual") else ""
    buffers = {} if is_patched(model) else {name: b for name, b in model.named_buffers() if name.startswith(tower)}
    return trainable(model) | {name: model.get_parameter(name) for name in head_names(model)} | buffers


def fit(
    model: nn.Module,
    method: Method,
    problem: Problem,
    recipe: Recipe,
    *,
    out: str | os.PathLike[str] | None = None,
    precision: str = "no",
    report: Report | None = None,
) -> dict[str, Any]:
    """Trains `model` in place on the problem's source domains and leaves the best weights in it.

    "Best" is the highest mean accuracy on the sources' held-out images, of equals the lower loss: training-domain
    validation, the target is never looked at. With `out` the run saves its state every `save_every` steps and goes on
    from there when called again with the same arguments; a resumed run ends with the same weights as one that was never
    stopped.

    Args:
        model: an OpenCLIP model, or a vision model with a linear head (which is fitted first, then trained on, unless
            `recipe.fixed_head`); not patched. The method says what of it is trained.
        precision: accelerate's mixed precision: "no", "fp16" or "bf16".
        report: called after every step with step, steps, loss, parts and images per second, for a progress bar.

    Returns history, gates over time, selected step and its validation loss, seconds, images per second.
    """
    check_run(method, recipe, precision)
    check_text(model, method, recipe.context_weight)
    set_seed(recipe.seed)  # before the adapters draw their start
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # accelerate keeps one precision per process; runs may differ in it
    accelerator = Accelerator(mixed_precision=precision)
    key = run_key(hashes(model, problem), method, problem, recipe, precision)
    key |= {"processes": accelerator.num_processes}
    inner = model.to(accelerator.device)
    fit_head(inner, problem, recipe)
    options: Any = {"recompute": recipe.recompute, "fixed_head": recipe.fixed_head, **recipe.adapter}
    teacher = prepare(inner, method, teacher=recipe.context_weight > 0, **options)
    if recipe.checkpointing:
        checkpoint_blocks(image_tower(inner))
    encoder = ImageEncoder(inner)
    rates = {"lr": recipe.lr, "gate_lr": recipe.gate_lr, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.AdamW(parameter_groups(inner, **rates))
    schedule = cosine_schedule(optimizer, recipe.steps)
    wrapped, optimizer = accelerator.prepare(encoder, optimizer)
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
        mmd_options={"kernel": recipe.mmd_kernel, "layer_weights": recipe.mmd_layers},
    )
    progress = _Progress()
    state = _State(accelerator, inner, progress, schedule, out, key=key)
    state.resume(recipe)

    if progress.step == 0:
        _record_gates(progress, inner)
    _train_mode(inner)
    share = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    loader = problem.training_loader(recipe, start=progress.step, **share)
    record_every = max(1, recipe.steps // 200)
    began = time.perf_counter() - progress.seconds
    for images, labels, domains in loader:
        images, labels, domains = (t.to(accelerator.device, non_blocking=True) for t in (images, labels, domains))
        with accelerator.autocast():
            parts = objective(wrapped, inner, images, labels, domains)
        accelerator.backward(parts["loss"])
        if recipe.sequential:
            _hold(inner, gates=progress.step < recipe.steps // 2)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.step += 1
        step, last = progress.step, progress.step == recipe.steps
        progress.seconds = time.perf_counter() - began
        values = {name: part.item() for name, part in parts.items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"loss: is {values['loss']} at step {step}; lower the learning rate ({recipe.lr})")
        if step % record_every == 0 or last:
            _record(progress, inner, step, values, with_gates=step % (10 * record_every) == 0 or last)
        if report is not None:
            rate = step * recipe.per_domain * len(problem.sources) / progress.seconds
            each = {name: own * accelerator.num_processes for name, own in loader.rates().items()}
            report({"step": step, "steps": recipe.steps, "images_per_second": rate, **each, **values})
        if step % recipe.evaluate_every == 0 or last:
            _select(progress, inner, problem, recipe)
        if step % recipe.save_every == 0 and not last:
            state.save()
        began = time.perf_counter() - progress.seconds  # evaluating and saving is not training time
    for name, tensor in learned(inner).items():
        tensor.data.copy_(progress.best["weights"][name])
    state.save()
    accelerator.free_memory()
    images_seen = recipe.steps * recipe.per_domain * len(problem.sources)
    return {
        "selected_step": progress.best["step"],
        "validation_loss": progress.best["loss"],
        "steps": recipe.steps,
        "seconds": progress.seconds,
        "images_per_second": images_seen / max(progress.seconds, 1e-9),
        "history": progress.history,
        "gates": progress.gates if progress.gates["step"] else None,
    }


def _record(progress: _Progress, model: nn.Module, step: int, values: dict[str, float], with_gates: bool) -> None:
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


def _record_gates(progress: _Progress, model: nn.Module) -> None:
    if is_patched(model) and gate_parameters(model):
        now = gates(model)
        assert isinstance(now, Tensor)
        progress.gates["step"].append(progress.step)
        progress.gates["values"].append(now.tolist())


def _select(progress: _Progress, model: nn.Module, problem: Problem, recipe: Recipe) -> None:
    """Scores the sources' held-out images and keeps the weights if they are the best so far."""
    scores = [score(model, problem, name, "validation", recipe) for name in problem.sources]
    accuracy = round(sum(s.accuracy for s in scores) / len(scores), 6)  # equals stay equal
    loss = sum(s.loss for s in scores) / len(scores)
    progress.history["validation"].append([progress.step, accuracy])
    if (accuracy, -loss) > (progress.best["accuracy"], -progress.best["loss"]):
        weights = {name: tensor.detach().clone() for name, tensor in learned(model).items()}
        progress.best = {"step": progress.step, "accuracy": accuracy, "loss": loss, "weights": weights}


class _State:
    """accelerate's saved state of one run, trained weights only, replaced as a whole."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        progress: _Progress,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        out: str | os.PathLike[str] | None,
        key: dict[str, Any],
    ) -> None:
        self.accelerator, self.model, self.progress, self.key = accelerator, model, progress, key
        self.folder = None if out is None else Path(out).expanduser() / "state"
        accelerator.register_for_checkpointing(progress, schedule)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def _save_weights(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()  # the frozen base is not saved again
        if self.accelerator.is_main_process:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learned(self.model).items()}
            save_file(tensors, Path(folder) / "trained.safetensors")
            (Path(folder) / "run.json").write_text(json.dumps(self.key))

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        saved = load_file(Path(folder) / "trained.safetensors")
        for name, tensor in learned(self.model).items():
            tensor.data.copy_(saved[name])

    def save(self) -> None:
        """Writes beside the old state, then takes its place: a kill leaves one of the two."""
        if self.folder is None:
            return
        fresh, old = self.folder.with_name("state.new"), self.folder.with_name("state.old")
        if self.accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(old, ignore_errors=True)
            if self.folder.exists():
                os.replace(self.folder, old)
            os.replace(fresh, self.folder)
            shutil.rmtree(old, ignore_errors=True)

    def resume(self, recipe: Recipe) -> None:
        """Goes on from the saved state, if there is one. Raises ValueError where it is another run's, or corrupt."""
        folder = None if self.folder is None else saved_state(self.folder.parent)
        if folder is None:
            return
        check_state(folder, self.key, recipe)
        try:
            self.accelerator.load_state(str(folder))
        except Exception as e:  # of torch, pickle, zipfile, safetensors: whatever a damaged file makes them say
            raise corrupt(folder, " ".join(str(e).split()) or type(e).__name__) from e
