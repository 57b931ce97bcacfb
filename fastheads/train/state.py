"""The saved state of a run: written whole, the last two kept."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastheads.files import write_json
from fastheads.hosts.vision import head_names
from fastheads.model import is_patched
from fastheads.model.base import gathered
from fastheads.train.earlier import CHECKSUMS, check_state, checksums, corrupt, intact_state
from fastheads.train.ranks import everywhere, failures, of_all
from fastheads.train.recipe import Recipe
from fastheads.train.sharding import like


class Progress:
    """What a run has done so far: step, histories, best weights, the moving average."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0
        self.history: dict[str, list[Any]] = {"step": [], "validation": []}
        self.gates: dict[str, list[Any]] = {"step": [], "values": []}
        self.best: dict[str, Any] = {"step": 0, "accuracy": -1.0, "loss": math.inf, "weights": {}}
        self.average: dict[str, Tensor] = {}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Name → parameter of everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Name → tensor of everything a run makes: what is trained, a linear head, a free encoder's running statistics."""
    tower = "visual." if hasattr(model, "visual") else ""
    buffers = {} if is_patched(model) else {name: b for name, b in model.named_buffers() if name.startswith(tower)}
    return trainable(model) | {name: model.get_parameter(name) for name in head_names(model)} | buffers


class State:
    """accelerate's saved state of one run, trained weights only: `state`, and the one before it in `state.old`.

    Tensors that FSDP2 has cut are saved whole, so that any number of processes goes on, with it or without.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        progress: Progress,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        out: str | os.PathLike[str] | None,
        key: dict[str, Any],
    ) -> None:
        self.accelerator, self.model, self.progress, self.key = accelerator, model, progress, key
        self.folder = None if out is None else Path(out).expanduser() / "state"
        self.optimizer, self._whole = schedule.optimizer, dict[int, Tensor]()
        self.optimizer.register_state_dict_post_hook(self._optimizer_whole)
        self.optimizer.register_load_state_dict_pre_hook(self._optimizer_cut)
        accelerator.register_for_checkpointing(self, schedule)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def _save_weights(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()  # the frozen base is not saved again
        if self.accelerator.is_main_process:
            tensors = {n: t.detach().cpu().contiguous() for n, t in self._of_whole(learned(self.model)).items()}
            save_file(tensors, Path(folder) / "trained.safetensors")
            (Path(folder) / "run.json").write_text(json.dumps(self.key))

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        saved = load_file(Path(folder) / "trained.safetensors")
        for name, tensor in learned(self.model).items():
            tensor.data.copy_(like(saved[name], tensor))

    def state_dict(self) -> dict[str, Any]:
        """Of the progress, for accelerate."""
        best, average = self.progress.best, self._of_whole(self.progress.average)
        best = {**best, "weights": self._of_whole(best["weights"])}
        return {**self.progress.__dict__, "best": best, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the progress, from accelerate."""
        self.progress.__dict__.update(state)
        own = learned(self.model)
        for tensors in (self.progress.best["weights"], self.progress.average):
            tensors |= {name: like(tensor, own[name]) for name, tensor in tensors.items()}

    def _gather(self) -> None:
        """Makes whole what is cut; every process asks for all of it, before any of them can fail."""
        kept = (learned(self.model), self.progress.best["weights"], self.progress.average)
        cut = [t for own in (*kept, *self.optimizer.state.values()) for t in own.values() if isinstance(t, DTensor)]
        self._whole = {id(t): gathered(t.detach()).cpu() for t in cut}

    def _of_whole(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._whole.get(id(t), t) for name, t in tensors.items()}

    def _optimizer_whole(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {i: self._of_whole(own) for i, own in state["state"].items()}}

    def _optimizer_cut(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        cut = {
            i: {name: like(t, parameters[i]) if t.shape == parameters[i].shape else t for name, t in own.items()}
            for i, own in state["state"].items()
        }
        return {**state, "state": cut}

    def save(self) -> None:
        """Writes beside the old states, then moves each one place on: a kill leaves one of them.

        Raises OSError, on every process, where it can't be written; the old states stay.
        """
        if self.folder is None:
            return
        fresh = self.folder.with_name("state.new")
        if self.accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._gather()
        error: Exception | None = None
        try:
            self.accelerator.save_state(str(fresh))
        except Exception as e:  # of torch, safetensors, the system: whatever a full disk makes them say
            error = e
        self._whole = {}
        told = failures(error)
        if not told and self.accelerator.is_main_process:
            try:
                self._keep(fresh)
            except OSError as e:
                error = e
        told = told or failures(error)
        if told:
            if self.accelerator.is_main_process:
                shutil.rmtree(fresh, ignore_errors=True)
            free = of_all([shutil.disk_usage(self.folder.parent).free / 1e6])[0]  # all say the same
            kept = ", the one before is kept" if self.folder.exists() else ""
            raise everywhere(
                OSError(
                    f"out: the state of step {self.progress.step} can't be written to {self.folder.parent} "
                    f"({told}; {free:,.0f} MB are free there){kept}; make room, and the same command goes on"
                )
            )

    def _keep(self, fresh: Path) -> None:
        assert self.folder is not None
        old = self.folder.with_name("state.old")
        write_json(fresh / CHECKSUMS, checksums(fresh))
        for path in fresh.iterdir():
            with path.open("r+b") as f:  # Windows syncs only what may be written, and no folder
                os.fsync(f.fileno())
        if os.name == "posix":
            descriptor = os.open(fresh, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.folder, old)
        os.replace(fresh, self.folder)

    def resume(self, recipe: Recipe) -> None:
        """Goes on from the newest state that is whole, if there is one; says so where that is not the newest.

        Raises ValueError where it is another run's, or there is none that is whole.
        """
        if self.folder is None:
            return
        folder, damage = intact_state(self.folder.parent)
        self.accelerator.wait_for_everyone()  # nobody removes what another is still looking at
        if folder is None:
            return
        check_state(folder, self.key, recipe)
        try:
            self.accelerator.load_state(str(folder))
        except Exception as e:  # of torch, pickle, zipfile, safetensors: whatever a damaged file makes them say
            raise corrupt(folder, " ".join(str(e).split()) or type(e).__name__) from e
        if damage and self.accelerator.is_main_process:
            warnings.warn(f"{damage}: goes on from the state before it, of step {self.progress.step}", stacklevel=2)
            shutil.rmtree(self.folder)
