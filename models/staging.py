"""Blocks of rows on their way to a device, through it, and back.

On a GPU each block has a stream of its own, in which it is copied there, computed with, and copied back, and a few blocks are
under way at once: while one is computed, the next is copied in and the one before is copied out. Host memory is pinned,
since a copy from other memory does not run beside anything else. On a CPU the same code computes block after block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
#: embeddings (n, source) and side-information (n, side) of the same rows, or none
Block = tuple[npt.NDArray[Any], npt.NDArray[Any] | None]
Compute = Callable[[Tensor, Tensor | None], Tensor]

# One is copied in, one is computed, one is copied out.
_GPU_STAGES = 3


def staged(blocks: Iterable[Block], compute: Compute, device: torch.device) -> Iterator[Floats]:
    """Compute with each block; results come in the order of the blocks, as float32.

    Args:
        blocks: each is read as soon as there is room for it.
        compute: maps tensors on `device` to one, with as many rows.
        device: where to compute.
    """
    free = [_Stage(device, number) for number in range(_GPU_STAGES if device.type == "cuda" else 1)]
    under_way: deque[_Stage] = deque()
    for block in blocks:
        stage = free.pop()
        stage.start(block, compute)
        under_way.append(stage)
        if not free:
            yield under_way[0].result()
            free.append(under_way.popleft())
    for stage in under_way:
        yield stage.result()


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:  # noqa: ARG001 - it tells streams apart
    """Return the stream of this number. A process reuses a few, as PyTorch and cuBLAS keep memory for each one ever used."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


class _Stage:
    """Room for one block under way; it is used for one block after the other."""

    def __init__(self, device: torch.device, number: int) -> None:
        self._device = device
        self._stream = _stream(device, number) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}
        self._output = torch.empty(0)

    def start(self, block: Block, compute: Compute) -> None:
        """Send a block on its way; a GPU is not waited for."""
        with torch.inference_mode(), self._on_stream():
            embeddings, side = (
                None if given is None else self._sent(name, given)
                for name, given in zip(("embeddings", "side"), block, strict=True)
            )
            assert embeddings is not None  # noqa: S101 - for the type checker: a block has embeddings
            output = compute(embeddings, side).float()
            self._output = output if self._stream is None else self._fetched(output)

    def result(self) -> Floats:
        """Wait for what was started last; the array is the caller's."""
        if self._stream is None:
            return self._output.numpy()
        self._stream.synchronize()
        return self._output.numpy().copy()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _sent(self, name: str, vectors: npt.NDArray[Any]) -> Tensor:
        # Always a copy: a mapped column is read-only, and a GPU reads while the caller may use the memory for something else.
        buffer = self._buffer(name, vectors.shape)
        np.copyto(buffer.numpy(), vectors, casting="same_kind")
        return buffer.to(self._device, non_blocking=True)

    def _fetched(self, output: Tensor) -> Tensor:
        return self._buffer("output", output.shape).copy_(output, non_blocking=True)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return host memory of a shape.

        For a GPU it is pinned. Pinning takes long, so the memory is used again. On a CPU it is new each time, because the
        result may be a view of it.
        """
        if self._stream is None:
            return torch.empty(shape)
        kept = self._buffers.get(name)
        if kept is None or kept.shape[1:] != shape[1:] or len(kept) < shape[0]:
            kept = self._buffers[name] = torch.empty(shape, pin_memory=True)
        return kept[: shape[0]]
