"""Which GPU a worker takes: where several workers share some, each takes one of its own while there are enough."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from gallery.index.device import NoSuchDevice

__all__ = ["NoSuchDevice", "chosen", "claimed"]


def claimed(names: Sequence[str], folder: Path) -> str:
    """Claim the first name that nobody has claimed in the folder, until this process ends; if there is none, take any.

    A claim is a lock on a file that stays open, so the system gives it up with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        handle = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it is taken, or this file system knows no locks
            os.close(handle)
        else:
            return name
    return names[os.getpid() % len(names)]


def chosen(wanted: str, data: Path) -> str:
    """The device that a worker computes on: what the settings name, else a GPU, else the CPU.

    GPUs are told apart by what they are, not by their numbers: containers, and hosts that share the data folder, number their
    own from 0.

    Raises:
        NoSuchDevice: PyTorch cannot compute on it. It is tried here, since a transformation that fails there seems to be wrong.
    """
    if wanted == "cpu":
        return wanted
    import torch  # noqa: PLC0415 - CUDA is asked about in the worker's own process, never when a module is imported

    try:
        # `device_count` also works where CUDA does not, such as with a driver that is too old for it.
        if wanted == "auto":
            if not torch.cuda.device_count():
                return "cpu"
            # Until then NVML counts, and CUDA may give less: where a GPU is divided (MIG), one part of it and nothing else.
            torch.cuda.init()  # type: ignore[no-untyped-call]
            there = {str(torch.cuda.get_device_properties(at).uuid): at for at in range(torch.cuda.device_count())}
            wanted = f"cuda:{there[claimed(list(there), data / 'devices')]}"
        torch.zeros(1, device=wanted).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was made without CUDA
        reason = str(error).partition("\n")[0]
        raise NoSuchDevice(
            f"PyTorch sees {torch.cuda.device_count()} GPUs and cannot compute on {wanted!r} ({reason}): "
            "mend that, or set FORWARDFILL_DEVICE=cpu"
        ) from None
    return wanted
