"""What a GPU, its memory, the way to it, and the disk allow at the most: items per second of each, measured in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from models.artifacts import load

_ROUNDS = 5
#: a matrix product of this side, and a copy of this many bytes, are large enough for any GPU
_SIDE = 8192
_BYTES = 1 << 30
_FLOAT32 = 4


class Limits(NamedTuple):
    """Items per second that each would allow if nothing else took any time."""

    #: the multiplications and additions of the network, at the rate of one large matrix product in the same number type
    arithmetic: float
    #: what goes into each of its layers and comes out, read and written once in the memory of the device
    device_memory: float
    #: vectors in, vectors out, from and to pinned memory, in both directions at once
    host_copy: float
    #: the new vectors, written and synced
    disk: float

    @property
    def least(self) -> tuple[str, float]:
        """The one that decides, and its name."""
        return min(self._asdict().items(), key=lambda named: named[1])


class Rates(NamedTuple):
    """What a machine does in a second."""

    #: multiplications and additions of one large matrix product
    operations: float
    #: bytes read or written by a copy within the device
    copied: float
    #: bytes to the device, and from it
    sent: float
    fetched: float
    #: bytes written to the disk and synced
    written: float


def measured(artifact: Path, folder: Path, *, device: str, computed_in: str) -> Limits:
    """The limits of this machine for an artifact.

    Args:
        artifact: of the transformation.
        folder: on the disk that columns are written to.
        device: the GPU.
        computed_in: the number type that upgrades are computed in there.
    """
    return allowed(artifact, rates(folder, device=device, computed_in=computed_in), computed_in)


def allowed(artifact: Path, rates: Rates, computed_in: str) -> Limits:
    """The limits of a machine with these rates. Pure, except that it reads the artifact."""
    module = load(artifact)
    declared = module.architecture
    given = (declared.source_dimension + (getattr(declared, "side_dimension", None) or 0)) * _FLOAT32
    made = declared.target_dimension * _FLOAT32
    weights = [tensor for tensor in module.state_dict().values() if tensor.ndim == 2]
    operations = 2 * sum(weight.numel() for weight in weights)
    moved = sum(sum(weight.shape) for weight in weights) * getattr(torch, computed_in).itemsize
    return Limits(
        arithmetic=rates.operations / operations,
        device_memory=rates.copied / moved,
        host_copy=1 / max(given / rates.sent, made / rates.fetched),
        disk=rates.written / made,
    )


def rates(folder: Path, *, device: str, computed_in: str, side: int = _SIDE, size: int = _BYTES) -> Rates:
    """Measure this machine, with a matrix product of `side` and copies and a file of `size` bytes."""
    clock = _Clock(torch.device(device))
    return Rates(
        operations=clock.products(side, getattr(torch, computed_in)),
        copied=clock.copies(size),
        sent=clock.uploads(size),
        fetched=clock.downloads(size),
        written=_written(folder, size),
    )


class _Clock:
    """Times what a device does. The first run is not counted, because it allocates memory and chooses kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def products(self, side: int, dtype: torch.dtype) -> float:
        """Multiplications and additions per second of a matrix product."""
        one, other = (torch.rand(side, side, device=self._device).to(dtype) for _ in range(2))
        return 2 * side**3 / self._seconds(lambda: one @ other)

    def copies(self, size: int) -> float:
        """Bytes per second, read or written, of a copy within the device."""
        one, other = (torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2))
        return 2 * size / self._seconds(lambda: other.copy_(one))

    def uploads(self, size: int) -> float:
        """Bytes per second of a copy to the device."""
        host, there = self._pinned(size), torch.empty(size, dtype=torch.uint8, device=self._device)
        return size / self._seconds(lambda: there.copy_(host, non_blocking=True))

    def downloads(self, size: int) -> float:
        """Bytes per second of a copy from the device."""
        host, there = self._pinned(size), torch.empty(size, dtype=torch.uint8, device=self._device)
        return size / self._seconds(lambda: host.copy_(there, non_blocking=True))

    def _pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _seconds(self, act: Callable[[], object]) -> float:
        act()
        self._wait()
        begun = time.perf_counter()
        for _ in range(_ROUNDS):
            act()
        self._wait()
        return (time.perf_counter() - begun) / _ROUNDS

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _written(folder: Path, size: int) -> float:
    """Bytes per second of a file that is written and synced."""
    data, path = os.urandom(1 << 20), folder / "limit"
    begun = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, size >> 20)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    written = path.stat().st_size
    path.unlink()
    return written / seconds
