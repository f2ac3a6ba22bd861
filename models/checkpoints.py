"""A training that was killed goes on where it was: its state after an epoch, in one safetensors file.

The file holds the weights, the optimizer's moments, both random states and the history; nothing is pickled. It is replaced
as a whole or not at all: after a kill it holds the state of the last epoch, or of the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from models.method import Batch
from models.plan import Plan


class OfAnotherTraining(ValueError):
    """The file that should hold this training's state holds something else. It stays as it is, and a person decides."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where a training keeps its state, and which training that is: the state of another training is refused."""

    path: Path
    #: everything the training depends on, as text
    identity: str

    def save(
        self,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        history: list[dict[str, float]],
    ) -> None:
        """Keep the state after an epoch."""
        tensors = {f"task.{name}": tensor for name, tensor in task.state_dict().items()}
        for place, state in optimizer.state_dict()["state"].items():
            kept = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{place}.{name}": value for name, value in kept.items()}
        tensors["random.generator"] = generator.get_state()
        tensors["random.torch"] = torch.get_rng_state()
        metadata = {"identity": self.identity, "history": json.dumps(history)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".unfinished")
        # A copy of each tensor: safetensors refuses tensors that share memory.
        data = to_bytes({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, metadata)
        with beside.open("wb") as file:  # the library's own error for a full disk is no OSError
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name with nothing in it
        beside.replace(self.path)

    def resume(
        self, task: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> list[dict[str, float]]:
        """Take up the state after the last epoch that was kept; returns its history, empty where nothing was kept.

        Raises:
            OfAnotherTraining: the file is of another training, or its tensors are not the task's.
        """
        if not self.path.exists():
            return []
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise OfAnotherTraining(
                f"{self.path} is not the state of a training ({error}): remove it, or name another place"
            ) from error
        if metadata.get("identity") != self.identity:
            what = "is the state of another training" if "identity" in metadata else "is not the state of a training"
            raise OfAnotherTraining(f"{self.path} {what}: remove it, or name another place")
        try:
            return _taken_up(task, optimizer, generator, tensors, metadata)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise OfAnotherTraining(
                f"{self.path} is not the state of this training ({error}): remove it, or name another place"
            ) from error

    def forget(self) -> None:
        """Remove the state."""
        self.path.unlink(missing_ok=True)


def identity_of(task: nn.Module, rows: Batch, plan: Plan, seed: int) -> str:
    """Name all that decides a training: what is trained, with its hyperparameters, the rows, the plan and the seed.

    Fresh weights are left out: a training that goes on replaces them. Buffers are left out too: `prepare` sums them, and
    their last digit may depend on the number of threads. The rows that they are measured on are part of the name.
    """
    modules = [(name, type(module).__qualname__, _attributes(module)) for name, module in task.named_modules()]
    shapes = {name: tuple(tensor.shape) for name, tensor in task.state_dict().items()}
    told = repr((modules, shapes, _told(rows), plan, seed))
    return f"{type(task).__name__} {hashlib.sha256(told.encode()).hexdigest()}"


def _taken_up(
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
) -> list[dict[str, float]]:
    task.load_state_dict(_part(tensors, "task."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _part(tensors, "optimizer.").items():
        place, _, key = name.partition(".")
        state.setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        # A fused optimizer pairs numbers by their place in memory, and a parameter may be stored column by column.
        for name, moment in moments.items():
            if moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(moment)
    generator.set_state(tensors["random.generator"])
    torch.set_rng_state(tensors["random.torch"])
    history: list[dict[str, float]] = json.loads(metadata["history"])
    return history


def _attributes(module: nn.Module) -> dict[str, object]:
    return {
        name: _told(value) for name, value in vars(module).items() if not name.startswith("_") and name != "training"
    }


def _told(value: object) -> object:
    """Return plain data that differs where values differ. Of what is neither data nor a tensor, only the class is told."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(content.data).hexdigest()
    if isinstance(value, tuple):
        return tuple(map(_told, value))
    if isinstance(value, dict):
        return {name: _told(each) for name, each in value.items()}
    told = type(value).__qualname__
    if is_dataclass(value):
        return told, {field.name: _told(getattr(value, field.name)) for field in fields(value)}
    return told


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
