"""How the gallery sees transformations: functions from arrays to arrays, handed in by the composition roots."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gallery import errors, faults, lineage
from gallery.arrays import Vectors
from gallery.columns import verify
from gallery.files import Files
from gallery.index.scores import unit
from gallery.spaces import EmbeddingModel, Transformation

Load = Callable[[Path], "Transform"]
ARTIFACTS = "artifacts"
#: rows on which is tried how to map all of a column, and how fast that is; more rows would not tell more
SAMPLE_ROWS = 1024


class Transform(Protocol):
    """A loaded artifact."""

    def __call__(self, embeddings: NDArray[Any], side: NDArray[Any] | None = None) -> Vectors:
        """Map (n, source) embeddings with (n, side) side-information to (n, target) float32."""


#: embeddings (n, source) and side-information (n, side) of the same rows, or none
Block = tuple[NDArray[Any], NDArray[Any] | None]


@runtime_checkable
class Bulk(Transform, Protocol):
    """A loaded artifact that knows how to map the many vectors of an upgrade."""

    @property
    def computed_in(self) -> str:
        """The number type that it computes in."""

    def quickest(self, embeddings: NDArray[Any], side: NDArray[Any] | None = None) -> Bulk | None:
        """The quickest way to compute it that is exact enough, tried on a sample; None if that is too small to tell."""

    def each(self, blocks: Iterable[Block]) -> Iterator[Vectors]:
        """Map each block as a call does, in the same order; while a device computes one, it is handed the next."""


@runtime_checkable
class Predicting(Transform, Protocol):
    """A loaded artifact whose architecture may have an uncertainty head (FastFill, ICLR 2023)."""

    def uncertainty(self, embeddings: NDArray[Any], side: NDArray[Any] | None = None) -> Vectors | None:
        """Predict the log-variance of each row's result, (n,) float32; None where there is no such head."""


def artifact_file(sha256: str) -> str:
    """The stored name of an artifact."""
    return f"{ARTIFACTS}/{sha256}.safetensors"


class Transforms:
    """The transformations of this process, loaded once each; safe from many threads."""

    def __init__(self, files: Files, load: Load) -> None:
        """Load artifacts of `files` with `load`."""
        self._files = files
        self._load = load
        self._loaded: dict[str, Transform] = {}
        self._in_bulk: dict[str, Transform] = {}
        self._lock = threading.Lock()
        self._trying = threading.Lock()

    def apply(
        self,
        transformation: Transformation,
        target: EmbeddingModel,
        embeddings: NDArray[Any],
        side: NDArray[Any] | None,
    ) -> Vectors:
        """Map embeddings and bring them into the target model's convention.

        Args:
            transformation: which.
            target: its target model; where that is normalised, so is the result.
            embeddings: (n, source dimension).
            side: (n, side dimension); None stands for zeros where the transformation needs side-information.

        Returns:
            (n, target dimension) float32.
        """
        return _applied(self.get(transformation.artifact), transformation, target, embeddings, side)

    def in_bulk(self, transformation: Transformation, embeddings: NDArray[Any], side: NDArray[Any] | None) -> Transform:
        """The function that maps stored vectors, chosen once: by the first sample that is large enough to tell which is quickest.

        Args:
            transformation: which.
            embeddings: (n, source dimension), some of what is to be mapped.
            side: (n, side dimension), or None as for `apply`.
        """
        found = self._in_bulk.get(transformation.artifact)
        if found is not None:
            return found
        loaded = self.get(transformation.artifact)
        with self._trying:  # what is timed beside another trial tells nothing
            found = self._in_bulk.get(transformation.artifact)
            if found is None:
                found = loaded
                if isinstance(loaded, Bulk):
                    found = loaded.quickest(embeddings, _side(transformation, embeddings, side))
            if found is None:
                return loaded
            self._in_bulk[transformation.artifact] = found
        return found

    def apply_each(
        self, loaded: Transform, transformation: Transformation, target: EmbeddingModel, blocks: Iterable[Block]
    ) -> Generator[Vectors]:
        """Map blocks by the function that `in_bulk` gave, in the same order, each as `apply` does.

        The next block may be taken before the result of one is given back.
        """
        given = _given(transformation, blocks)
        for mapped in loaded.each(given) if isinstance(loaded, Bulk) else (loaded(*block) for block in given):
            yield unit(mapped) if target.normalized else mapped

    def apply_all(
        self,
        by: Sequence[Transformation],
        models: Mapping[str, EmbeddingModel],
        embeddings: NDArray[Any],
        side: NDArray[Any] | None,
        sample: Callable[[], Block],
    ) -> Vectors:
        """Map stored vectors by one transformation after the other, each as an upgrade would, with the same side-information.

        Args:
            by: one or more, each of which starts where the one before it leads to.
            models: their targets, by name.
            embeddings: (n, dimension of the first one's source).
            side: (n, side dimension) or None.
            sample: gives a sample of all vectors that may be mapped so, for `in_bulk`. The vectors that are mapped now may be no
                sample: the nearest ones to a query are alike.

        Returns:
            (n, dimension of the last one's target) float32.
        """
        if any(each.artifact not in self._in_bulk for each in by):
            self._decide(by, models, *sample())
        for transformation in by:
            loaded = self._in_bulk.get(transformation.artifact) or self.get(transformation.artifact)
            embeddings = _applied(loaded, transformation, models[transformation.target], embeddings, side)
        return embeddings

    def _decide(
        self,
        by: Sequence[Transformation],
        models: Mapping[str, EmbeddingModel],
        embeddings: NDArray[Any],
        side: NDArray[Any] | None,
    ) -> None:
        for transformation in by:
            loaded = self.in_bulk(transformation, embeddings, side)
            if transformation is not by[-1]:
                embeddings = _applied(loaded, transformation, models[transformation.target], embeddings, side)

    def uncertainty(
        self, transformation: Transformation, embeddings: NDArray[Any], side: NDArray[Any] | None
    ) -> NDArray[np.float32]:
        """Predict how uncertain the result of `apply` is, row by row.

        Returns:
            (n,) float32: the predicted log-variance of each row; larger is less certain.

        Raises:
            WrongTransformation: it has no uncertainty head.
        """
        loaded, predicted = self.get(transformation.artifact), None
        if isinstance(loaded, Predicting):
            predicted = loaded.uncertainty(embeddings, _side(transformation, embeddings, side))
        if predicted is None:
            raise no_uncertainty(transformation.name)
        return predicted

    def weights(self, by: Sequence[Transformation], *, stored: bool) -> float:
        """How many weights are applied to each row by all of the transformations; infinite where that is not known yet.

        Args:
            by: which.
            stored: whether stored vectors are to be mapped. What is quickest for these has to be found out first, and takes long.
        """
        return sum(
            math.inf
            if stored and each.artifact not in self._in_bulk
            else getattr(self._loaded.get(each.artifact), "weights", math.inf)
            for each in by
        )

    def get(self, sha256: str) -> Transform:
        """The function of an artifact.

        Raises:
            Damaged: the stored file is not the one that was registered.
        """
        found = self._loaded.get(sha256)
        if found is None:
            with self._lock:
                found = self._loaded.get(sha256) or self._open(sha256)
                self._loaded[sha256] = found
        return found

    def _open(self, sha256: str) -> Transform:
        name = artifact_file(sha256)
        verify(self._files, name, sha256)
        try:
            return self._load(self._files.path(name))
        except ValueError as error:
            raise errors.UnsafeArtifact(str(error)) from error


def computed_in(loaded: Transform) -> str:
    """The number type that an artifact is computed in."""
    return loaded.computed_in if isinstance(loaded, Bulk) else lineage.EXACT


def no_uncertainty(name: str) -> errors.WrongTransformation:
    """The refusal to order an upgrade by what its transformation does not predict."""
    return errors.WrongTransformation(
        f"{name} predicts no uncertainty, by which segments could be ordered: fit one with an uncertainty head (FastFill), "
        "or take the order `stored` or `most_searched`",
        pointer="/order",
    )


def _applied(
    loaded: Transform,
    transformation: Transformation,
    target: EmbeddingModel,
    embeddings: NDArray[Any],
    side: NDArray[Any] | None,
) -> Vectors:
    faults.reached("transform")
    mapped = loaded(embeddings, _side(transformation, embeddings, side))
    return unit(mapped) if target.normalized else mapped


def _given(transformation: Transformation, blocks: Iterable[Block]) -> Iterator[Block]:
    for embeddings, side in blocks:
        faults.reached("transform")
        yield embeddings, _side(transformation, embeddings, side)


def _side(transformation: Transformation, embeddings: NDArray[Any], side: NDArray[Any] | None) -> NDArray[Any] | None:
    """The side-information that a transformation is given: none where it takes none, zeros where there is none."""
    if transformation.side_dimension is None:
        return None
    return side if side is not None else np.zeros((len(embeddings), transformation.side_dimension), dtype=np.float32)
