"""Finished stages of an experiment, kept as files: what is done is not done again, and a killed run goes on where it was.

A stage is a module that was trained, arrays that were computed, or figures that were measured. Its file is named by
everything the stage depends on, so that a changed recipe never meets an old result; it is written whole or not at all.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as arrays_to_bytes
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

Arrays = dict[str, npt.NDArray[Any]]
Module = TypeVar("Module", bound=nn.Module)

_OWN = "models."


class Places(TypedDict, total=False):
    """Where a training keeps its state between epochs and its log; empty where nothing is kept."""

    checkpoint: Path
    log: Path


@dataclass(frozen=True, slots=True)
class Stages:
    """A folder of finished stages; without a folder each is done anew."""

    folder: Path | None = None

    def trained(
        self, role: str, depends_on: object, make: Callable[[], Module], fit: Callable[[Module, Places], object]
    ) -> tuple[Module, float]:
        """Take a trained module, or make, fit and keep it.

        Args:
            role: of the module, the start of its file's name.
            depends_on: whatever decides the result, with a `repr` that tells all of it: frozen dataclasses, numbers.
            make: a fresh module; the caller seeds what it draws.
            fit: trains it in place.

        Returns:
            The module, in eval mode and without gradients, and the seconds its training took, even if in an earlier run.
        """
        module = make()
        place = self._place(role, depends_on, ".safetensors")
        if place is not None and place.exists():
            module.load_state_dict(load_file(place))
            return module.eval().requires_grad_(False), _seconds(place)
        start = time.perf_counter()
        if place is None:
            fit(module, {})
            return module.eval().requires_grad_(False), time.perf_counter() - start
        checkpoint, log = place.with_suffix(".checkpoint"), place.with_suffix(".csv")
        if not checkpoint.exists():
            log.unlink(missing_ok=True)  # of a training that was finished, whose file somebody removed
        before = _logged(log)
        fit(module, {"checkpoint": checkpoint, "log": log})
        seconds = before + time.perf_counter() - start
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
        with _whole(place) as beside:
            beside.write_bytes(to_bytes(tensors, {"seconds": repr(seconds)}))
        checkpoint.unlink(missing_ok=True)
        return module.eval().requires_grad_(False), seconds

    def arrays(self, role: str, depends_on: object, compute: Callable[[], Mapping[str, npt.NDArray[Any]]]) -> Arrays:
        """Take arrays, or compute and keep them."""
        place = self._place(role, depends_on, ".arrays")
        if place is not None and place.exists():
            return load_arrays(place)
        arrays = {name: np.ascontiguousarray(values) for name, values in compute().items()}
        if place is not None:
            with _whole(place) as beside:
                beside.write_bytes(arrays_to_bytes(arrays))
        return arrays

    def figures(self, role: str, depends_on: object, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Take figures, or measure and keep them; whatever JSON can hold."""
        place = self._place(role, depends_on, ".json")
        if place is not None and place.exists():
            kept: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            return kept
        figures = measure()
        if place is not None:
            with _whole(place) as beside:
                beside.write_text(json.dumps(figures), encoding="utf-8")
        return figures

    def _place(self, role: str, depends_on: object, suffix: str) -> Path | None:
        if self.folder is None:
            return None
        key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
        return self.folder / f"{role}-{key}{suffix}"


def code_of(kind: type) -> str:
    """Return a digest of a class's module and of all modules of this package whose functions and classes it builds on.

    For `depends_on`: what was trained by other code is another result.
    """
    names, found = {base.__module__ for base in kind.__mro__ if base.__module__.startswith(_OWN)}, set[str]()
    while names:
        found |= names
        used = {
            getattr(value, "__module__", None) or "" for name in names for value in vars(sys.modules[name]).values()
        }
        names = {name for name in used if name.startswith(_OWN)} - found
    sources = [inspect.getsource(sys.modules[name]) for name in sorted({kind.__module__, *found})]
    return hashlib.sha256("".join([kind.__qualname__, *sources]).encode()).hexdigest()[:16]


@contextmanager
def _whole(place: Path) -> Iterator[Path]:
    """Yield a place to write beside, and then rename: a killed run must not find half of a file.

    The body writes bytes itself. If safetensors wrote the file, its error for a full disk would be no OSError.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(place.name + ".unfinished")
    yield beside
    beside.replace(place)


@contextmanager
def drawn_from(seed: int, threads: int | None = None) -> Iterator[None]:
    """Draw fresh weights from a seed, on so many threads, and leave the caller's random state and threads alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _seconds(place: Path) -> float:
    with safe_open(place, framework="pt") as file:
        return float(file.metadata()["seconds"])


def _logged(log: Path) -> float:
    """Sum the seconds of the epochs that a killed run finished."""
    if not log.exists():
        return 0.0
    with log.open(newline="", encoding="utf-8") as file:
        whole = (line for line in file if line.endswith("\n"))  # the last may be torn, as `train` mends it
        return sum(float(line["seconds"]) for line in csv.DictReader(whole))
