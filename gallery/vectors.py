"""Which vectors are accepted: the one door for items and queries alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gallery import errors
from gallery.arrays import Vectors
from gallery.index.scores import unit
from gallery.spaces import EmbeddingModel

_UNIT_TOLERANCE = 1e-5
# The square of the distance of two vectors of which each has a square like this is a float32 still.
_LARGEST_SQUARE = float(np.finfo(np.float32).max) / 4


def accept(vectors: NDArray[Any], model: EmbeddingModel, *, pointer: str) -> Vectors:
    """Check vectors of a model and bring them into its convention.

    Args:
        vectors: (n, any) numbers.
        model: whose space they are in.
        pointer: JSON pointer of the vectors in the request; `{row}` in it is replaced by the offending row.

    Returns:
        (n, dimension) float32, C-contiguous; of unit length where the model is normalised.

    Raises:
        DimensionMismatch: another width than the model's.
        InvalidVector: NaN, infinity, a zero vector where a score would be undefined, or one so long that it would overflow.
    """
    if vectors.ndim != 2 or vectors.shape[1] != model.dimension:
        raise errors.DimensionMismatch(
            f"vectors of {model.name} have dimension {model.dimension}, these have {vectors.shape[-1]}",
            pointer=pointer.format(row=0),
        )
    accepted = _single(vectors)
    # A square is finite only if all numbers are, and 0 only if they are 0 or too small. So closer looks are seldom needed.
    with np.errstate(over="ignore"):
        squares = np.vecdot(accepted, accepted)
    if len(squares) == 1 and _beyond_question(squares.item(), model):
        return accepted
    directed = model.metric == "cosine" or model.normalized
    if not (squares <= _LARGEST_SQUARE).all():
        _finite(accepted, pointer)
        if not directed:
            _not_too_long(squares, model, pointer)
    if directed and not squares.all():
        _not_zero(accepted, model, pointer)
    return _normalize(accepted, squares) if model.normalized else accepted


def accept_side(side: NDArray[Any], dimension: int, *, pointer: str) -> Vectors:
    """Check side-information: (n, dimension), finite. Returns float32.

    Raises:
        DimensionMismatch: another width.
        InvalidVector: NaN or infinity.
    """
    if side.ndim != 2 or side.shape[1] != dimension:
        raise errors.DimensionMismatch(
            f"side-information has dimension {dimension}, this has {side.shape[-1]}", pointer=pointer.format(row=0)
        )
    accepted = _single(side)
    _finite(accepted, pointer)
    return accepted


def scoreable(mapped: Vectors) -> Vectors:
    """Vectors (n, dimension) that a transformation gave, changed where needed so that each has a finite score.

    An item without one would never be found. A vector that is too long is made as long as can be; one with NaN or infinity
    becomes zero. An upgrade refuses both.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.vecdot(mapped, mapped)
    if (squares <= _LARGEST_SQUARE).all():
        return mapped
    mapped = np.where(np.isfinite(mapped).all(axis=1, keepdims=True), mapped, np.float32(0))
    long = ~(squares <= _LARGEST_SQUARE)
    mapped[long] = unit(mapped[long]) * np.float32(0.99 * math.sqrt(_LARGEST_SQUARE))
    return mapped


def as_read(vectors: Vectors, dtype: np.dtype[Any]) -> Vectors:
    """Finite vectors (n, dimension) as they are read once they are stored as `dtype`.

    A number that is too large for it, which an upgrade refuses, is as large as can be.
    """
    if vectors.dtype == dtype:
        return vectors
    largest = np.finfo(dtype).max
    return np.clip(vectors, -largest, largest).astype(dtype).astype(np.float32)


def as_query(vectors: Vectors, model: EmbeddingModel) -> Vectors:
    """What an index of the model's space is asked with: of unit length under cosine."""
    if model.metric == "cosine" and not model.normalized:
        return unit(vectors)
    return vectors


def _single(vectors: NDArray[Any]) -> Vectors:
    """As float32, C-contiguous; a number beyond it becomes infinity, which is refused."""
    if vectors.dtype == np.float32:
        return np.ascontiguousarray(vectors)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(vectors, dtype=np.float32)


def _beyond_question(square: float, model: EmbeddingModel) -> bool:
    """Whether the square of one vector's length is enough to accept it as it is: for one number Python is faster than NumPy."""
    return 0 < square <= _LARGEST_SQUARE and (not model.normalized or abs(square - 1) <= _UNIT_TOLERANCE)


def _finite(vectors: Vectors, pointer: str) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise errors.InvalidVector(
            f"vector {bad[0]} holds NaN, infinity, or a number beyond float32", pointer=pointer.format(row=bad[0])
        )


def _not_too_long(squares: NDArray[np.float32], model: EmbeddingModel, pointer: str) -> None:
    """Refuse a vector whose scores would be infinite: such an item would never be found."""
    row = int(np.argmax(squares > _LARGEST_SQUARE))
    raise errors.InvalidVector(
        f"vector {row} is longer than {math.sqrt(_LARGEST_SQUARE):.0e}, so its scores in {model.name} would be infinite",
        pointer=pointer.format(row=row),
    )


def _not_zero(vectors: Vectors, model: EmbeddingModel, pointer: str) -> None:
    zero = np.flatnonzero(~vectors.any(axis=1))
    if zero.size:
        raise errors.InvalidVector(
            f"vector {zero[0]} is zero, which has no direction and so no score in {model.name}",
            pointer=pointer.format(row=zero[0]),
        )


def _normalize(vectors: Vectors, squares: NDArray[np.float32]) -> Vectors:
    """Unit length; vectors that have it already stay byte for byte what was sent."""
    off = ~(np.abs(squares - 1) <= _UNIT_TOLERANCE)
    if not off.any():
        return vectors
    normalized = vectors.copy()
    normalized[off] = unit(vectors[off])
    return normalized
