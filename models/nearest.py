"""Rows in a GPU's memory, which PyTorch compares with every query; any GPU that PyTorch supports will do.

Searches call it through `gallery/index/device.py`, with rows and queries, for scores and rows. That file proves for each answer
that rounding hid no row. Its proof counts on products in float32; with rougher ones it would be wrong.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.arithmetic import in_full_float32

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

# The most products of a query and a row at once: 256 MB of float32. More would be no faster.
_PRODUCTS = 1 << 26
# Of a trial: its rows differ by so little that a rougher number type, such as TensorFloat-32 with 10 bits, cannot pass it.
_TRIAL_ROWS, _TRIAL_STEP, _TRIAL_COUNT = 4096, 2.0**-20, 8


class TorchGpu:
    """A GPU, used by PyTorch; many threads may use it at once, and each waits only for its own answer."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        in_full_float32()

    def hold(self, rows: int, dimension: int, *, by_distance: bool) -> TorchHeld:
        """Make room for rows that are compared by distance, or else by inner product; raises RuntimeError if it is lacking."""
        return TorchHeld(rows, dimension, self._device, by_distance=by_distance)

    def try_out(self) -> None:
        """Raise RuntimeError if it does not compute, or not in float32."""
        order = np.random.default_rng(0).permutation(_TRIAL_ROWS)
        rows = np.zeros((_TRIAL_ROWS, 32), np.float32)
        rows[:, 0] = 1 + order * _TRIAL_STEP
        held = self.hold(*rows.shape, by_distance=False)
        held.add(rows)
        _, found = held.search(np.eye(1, 32, dtype=np.float32).repeat(64, axis=0), _TRIAL_COUNT)
        if not (found == np.argsort(-order)[:_TRIAL_COUNT]).all():
            raise RuntimeError("it finds wrong rows")


class TorchHeld:
    """Rows in the memory of a device, until this object is garbage; many threads may search them at once."""

    def __init__(self, rows: int, dimension: int, device: torch.device, *, by_distance: bool) -> None:
        self._rows = torch.empty((rows, dimension), device=device)
        # Rows that left no room to compare them would do no good. PyTorch keeps what it once had for the next that needs it.
        torch.empty((2, _PRODUCTS), device=device)
        self._by_distance = by_distance
        # Added to the (negative) products, so that the least is the best: |x|^2 for distances, else 0.
        self._added = torch.zeros(rows, device=device)
        self._filled = 0

    def add(self, vectors: Floats) -> None:
        """Copy float32 rows (n, dimension) to the device, behind those that are there."""
        place = slice(self._filled, self._filled + len(vectors))
        with torch.inference_mode():
            # `tensor` copies: PyTorch would warn of memory that is mapped read-only.
            part = self._rows[place].copy_(torch.tensor(vectors))
            if self._by_distance:
                self._added[place] = part.square().sum(dim=1)
        self._filled = place.stop

    def search(self, queries: Floats, count: int) -> tuple[Floats, Rows]:
        """The best `count` rows for float32 queries (n, dimension), or as many as there are.

        Returns:
            Squared distances (the least first) or inner products (the largest first), and rows, both (n, count); the row is
            -1 where the score is not a number.

        Raises:
            RuntimeError: there is no room to compute, or the GPU fails.
        """
        with torch.inference_mode():
            asked = torch.tensor(queries, device=self._rows.device)
            least, rows = self._least(asked, count)
            scores = least + asked.square().sum(dim=1, keepdim=True) if self._by_distance else -least
            rows = rows.where(scores.isfinite(), -1)
            return scores.cpu().numpy(), rows.cpu().numpy()

    def _least(self, asked: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` least keys of all rows for each query (queries, count), and their rows; keys that are no numbers last."""
        best, rows = asked.new_empty((len(asked), 0)), asked.new_empty((len(asked), 0), dtype=torch.int64)
        step = max(count, _PRODUCTS // max(1, len(asked)))
        for start in range(0, self._filled, step):
            part = slice(start, min(start + step, self._filled))
            near = torch.addmm(self._added[part], asked, self._rows[part].T, alpha=-2.0 if self._by_distance else -1.0)
            least, at = near.topk(min(count, near.shape[1]), largest=False)
            best, rows = torch.cat((best, least), dim=1), torch.cat((rows, at + start), dim=1)
            best, at = best.topk(min(count, best.shape[1]), largest=False)
            rows = rows.gather(1, at)
        return best, rows


def open_torch(number: int) -> TorchGpu | None:
    """A GPU by its number, after it was tried.

    Returns:
        None where the installed PyTorch knows no GPUs, or sees none.

    Raises:
        RuntimeError: it cannot be used; the message says why.
    """
    if not torch.cuda.device_count():
        return None
    try:
        gpu = TorchGpu(f"cuda:{number}")
        gpu.try_out()
    except Exception as error:  # with a bad GPU or driver, PyTorch raises AssertionError and classes of its own
        raise RuntimeError(f"PyTorch: {error}") from error
    return gpu
