"""Trains every method on a device that computes as this host does, and refuses what a GPU refuses: tensors of two places.

Each tensor of the device is kept inside another one, which says that it is elsewhere. PyTorch calls its doors for such backends
experimental, and they change the process for good: so this is a program of its own. It prints, by method, how far what was
trained is from what the host trains, or what went wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from models.method import Method
from models.methods import METHODS
from models.training import train
from tests.models.test_every_method import PLAN, made, the_method, world

NAME = "elsewhere"
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_CHOOSES = torch.ops.aten.index.Tensor
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


class Elsewhere(Tensor):
    """A tensor of the device."""

    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor) -> Elsewhere:
        """A tensor like the host's one that keeps its numbers."""
        like = (kept.shape, kept.stride(), kept.storage_offset())
        outer: Elsewhere = Tensor._make_wrapper_subclass(cls, *like, dtype=kept.dtype, device=torch.device(NAME, 0))  # type: ignore[attr-defined]
        outer.kept = kept
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the host."""
        return _computed(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the host."""
        return _computed(func, args, kwargs or {})


class Backend(_DummyBackendModule):
    """What PyTorch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """As a GPU has it."""
        return [torch.bfloat16]


def _computed(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    there = {id(each.kept): each for each in tree_leaves((args, named)) if isinstance(each, Elsewhere)}
    # A number may come from the host, and so may the places of what is chosen.
    met = tree_leaves(args[:1] if func is _CHOOSES else (args, named))
    left = [each for each in met if isinstance(each, Tensor) and not isinstance(each, Elsewhere) and each.ndim]
    if there and left and func not in _COPIES:
        raise RuntimeError(f"{func} of tensors on two devices")
    wanted, stays = named.get("device"), isinstance(args[0], Elsewhere) if func in _COPIES else bool(there)
    if wanted is not None:
        stays, named = torch.device(wanted).type == NAME, {**named, "device": torch.device("cpu")}
    found = func(*tree_map(_kept, args), **tree_map(_kept, named))
    return tree_map(lambda each: _outer(each, there), found) if stays and func not in _READS else found


def _kept(given: Any) -> Any:
    return given.kept if isinstance(given, Elsewhere) else given


def _outer(found: Any, there: Mapping[int, Elsewhere]) -> Any:
    return there.get(id(found), Elsewhere(found)) if isinstance(found, Tensor) else found


def trained(method: type[Method], device: str) -> list[Tensor]:
    """What a training on a device leaves, and what it offers."""
    with Device() if device == NAME else nullcontext():
        task = made(method)
        train(task, world(), replace(PLAN, epochs=2), device=device)
        offered = the_method(task).transformations()
        modules = [module for module in (task, offered.forward, offered.backward) if module is not None]
        return [each.detach().cpu() for each in chain.from_iterable(module.state_dict().values() for module in modules)]


def _apart(method: type[Method]) -> float | str:
    try:
        pairs = zip(trained(method, "cpu"), trained(method, NAME), strict=True)
        return max(float((one - other).abs().max()) for one, other in pairs if one.is_floating_point())
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    sys.stdout.write(json.dumps({name: _apart(method) for name, method in METHODS.items()}))
