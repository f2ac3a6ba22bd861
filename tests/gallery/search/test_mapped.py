"""Rows that were mapped at query time are kept: right, within a bound, and mapped once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery.arrays import Space, Stored
from gallery.files import Files, digest
from gallery.index.registry import backend
from gallery.search.brief import NotBrief
from gallery.search.mapped import Asked, MappedColumns
from gallery.snapshot import Column
from gallery.spaces import EmbeddingModel, Transformation
from gallery.transforms import Transforms, artifact_file

WIDTH = 4
NOW = datetime(2026, 1, 1, tzinfo=UTC)
NEW = EmbeddingModel(2, "new", WIDTH, "euclidean", False, None, None, None, NOW)
MODELS = {"new": NEW}


class Doubling:
    """The transformation: twice the embedding, plus the side-information if there is any; it counts what it maps."""

    def __init__(self) -> None:
        self.mapped = 0
        self.times = 2

    def __call__(self, embeddings: Any, side: Any = None) -> Any:
        self.mapped += len(embeddings)
        return (self.times * np.float32(embeddings) + (0 if side is None else side)).astype(np.float32)


@pytest.fixture
def doubling() -> Doubling:
    return Doubling()


@pytest.fixture
def transforms(tmp_path: Path, doubling: Doubling) -> Transforms:
    return Transforms(Files(tmp_path), lambda _: doubling)


@pytest.fixture
def forward(tmp_path: Path) -> Transformation:
    part = tmp_path / "artifacts" / "part"
    part.parent.mkdir()
    part.write_bytes(b"doubling")
    sha256 = digest(part)
    part.rename(tmp_path / artifact_file(sha256))
    return Transformation(1, "f", "old", "new", "forward", "linear", sha256, None, None, NOW)


def column(number: int, rows: int) -> Column:
    return holding(np.arange(rows * WIDTH, dtype=np.float32).reshape(rows, WIDTH) + number * 1000, number)


def holding(vectors: Stored, number: int = 1) -> Column:
    index = backend("flat").open(vectors, space=Space("euclidean", normalized=False), path=None, parameters={})
    return Column(number, "old", "native", (), vectors, index, None)


def asked(from_: Column, rows: Sequence[int]) -> Asked:
    return Asked(from_, None, np.array(rows, dtype=np.int64))


def test_rows_come_in_the_order_in_which_they_are_asked_from_all_columns(
    transforms: Transforms, forward: Transformation
) -> None:
    first, second = column(1, 5), column(2, 3)
    taken = MappedColumns(transforms, 1 << 20).take([asked(second, [2, 0]), asked(first, [4, 4, 1])], [forward], MODELS)
    assert np.array_equal(taken, 2 * np.concatenate([second.vectors[[2, 0]], first.vectors[[4, 4, 1]]]))


def test_a_row_that_is_known_is_not_mapped_again(
    transforms: Transforms, forward: Transformation, doubling: Doubling
) -> None:
    mapped, one = MappedColumns(transforms, 1 << 20), column(1, 10)
    mapped.take([asked(one, [1, 2, 3])], [forward], MODELS)
    mapped.take([asked(one, [3, 2, 5])], [forward], MODELS)
    assert doubling.mapped == 4


def test_a_row_is_rounded_as_the_column_that_an_upgrade_makes_of_it(
    transforms: Transforms, forward: Transformation, doubling: Doubling
) -> None:
    doubling.times = 3
    half = holding(np.array([[0.1, 2, -30_000, 30_000]], np.float16))
    taken = MappedColumns(transforms, 1 << 20).take([asked(half, [0])], [forward], MODELS)
    assert taken.dtype == np.float32
    # What is too large for the column, an upgrade refuses.
    assert taken.tolist() == [[np.float16(3 * np.float32(half.vectors[0, 0])), 6, -65504, 65504]]


def test_what_is_kept_stays_within_the_bound_and_the_oldest_goes_first(
    transforms: Transforms, forward: Transformation, doubling: Doubling
) -> None:
    size = 10 * (WIDTH + 1) * 4  # with the place of each row
    mapped = MappedColumns(transforms, 2 * size)
    columns = [column(number, 10) for number in range(3)]
    for each in columns:
        mapped.take([asked(each, range(10))], [forward], MODELS)
    mapped.take([asked(columns[2], [0]), asked(columns[1], [0])], [forward], MODELS)
    assert doubling.mapped == 30
    mapped.take([asked(columns[0], [0])], [forward], MODELS)
    assert doubling.mapped == 31


def test_of_columns_that_are_larger_than_the_bound_the_rows_that_were_asked_for_are_kept(
    transforms: Transforms, forward: Transformation, doubling: Doubling
) -> None:
    mapped, columns = MappedColumns(transforms, 1 << 14), [column(number, 1000) for number in range(3)]
    for _ in range(2):
        taken = mapped.take([asked(each, [999, 5, 7]) for each in columns], [forward], MODELS)
        assert np.array_equal(taken, 2 * np.concatenate([each.vectors[[999, 5, 7]] for each in columns]))
    assert doubling.mapped == 9


def test_more_and_more_rows_of_a_column_are_right_and_stay_within_the_bound(
    transforms: Transforms, forward: Transformation, doubling: Doubling
) -> None:
    mapped, one, random = MappedColumns(transforms, 6000), column(1, 500), np.random.default_rng(0)
    for _ in range(200):
        rows = random.permutation(500)[:20]
        assert np.array_equal(mapped.take([asked(one, rows)], [forward], MODELS), 2 * one.vectors[rows])
    assert 500 < doubling.mapped < 4000, "some of it is kept, and never all"


def test_what_the_bound_has_no_room_for_is_mapped_each_time_and_rightly(
    transforms: Transforms, forward: Transformation, doubling: Doubling
) -> None:
    mapped, large = MappedColumns(transforms, 8), column(1, 10)
    for _ in range(2):
        assert np.array_equal(mapped.take([asked(large, [7])], [forward], MODELS), 2 * large.vectors[[7]])
    assert doubling.mapped == 2


def test_many_threads_get_the_right_rows(transforms: Transforms, forward: Transformation) -> None:
    mapped, one = MappedColumns(transforms, 1 << 20), column(1, 2000)

    def take(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, 2000, 300)
        return bool(np.array_equal(mapped.take([asked(one, rows)], [forward], MODELS), 2 * one.vectors[rows]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(take, range(64)))


class Quick(Doubling):
    """An artifact in another number type: one more than the exact one, so that it shows."""

    computed_in = "doubles"

    def __call__(self, embeddings: Any, side: Any = None) -> Any:
        return super().__call__(embeddings, side) + 1

    def quickest(self, embeddings: Any, side: Any = None) -> Any:
        raise AssertionError("the exact one is asked")

    def each(self, blocks: Any) -> Any:
        raise AssertionError("blocks are for upgrades")


class Exact(Quick):
    """One that is `Quick` once it saw ten rows."""

    computed_in = "float32"

    def __init__(self, quick: Quick) -> None:
        super().__init__()
        self.weights = 4
        self.samples: list[int] = []
        self.sampled: Any = None
        self.meanwhile: Callable[[], float] = float
        self.seen: list[float] = []
        self._quick = quick

    def __call__(self, embeddings: Any, side: Any = None) -> Any:
        return Doubling.__call__(self, embeddings, side)

    def quickest(self, embeddings: Any, side: Any = None) -> Quick | None:
        self.samples.append(len(embeddings))
        self.sampled = embeddings
        self.seen.append(self.meanwhile())
        return self._quick if len(embeddings) >= 10 else None


def test_candidates_are_mapped_in_what_an_upgrade_would_take_once_a_sample_of_their_column_tells(
    tmp_path: Path, forward: Transformation
) -> None:
    exact = Exact(Quick())
    mapped = MappedColumns(Transforms(Files(tmp_path), lambda _: exact), 0)
    few, many = column(1, 9), column(2, 50)
    for one, rows, more in ((few, [1, 2], 0), (many, [3], 1), (few, [1, 2], 1), (many, range(30), 1)):
        taken = mapped.take([asked(one, rows)], [forward], MODELS)
        assert np.array_equal(taken, 2 * one.vectors[list(rows)] + more)
    assert exact.samples == [9, 50], "it is found out once, by the whole column and not by what a query is near to"


def test_a_column_of_many_rows_is_sampled_from_its_beginning_to_its_end(
    tmp_path: Path, forward: Transformation
) -> None:
    exact, one = Exact(Quick()), column(1, 5000)
    MappedColumns(Transforms(Files(tmp_path), lambda _: exact), 0).take([asked(one, [7])], [forward], MODELS)
    assert exact.samples == [1024]
    assert np.array_equal(exact.sampled[[0, -1]], one.vectors[[0, -1]])


def test_until_it_is_found_out_what_is_quickest_nobody_knows_how_long_it_takes_to_map_what_is_stored(
    tmp_path: Path, forward: Transformation
) -> None:
    exact = Exact(Quick())
    transforms = Transforms(Files(tmp_path), lambda _: exact)
    transforms.get(forward.artifact)  # by a write, which maps what is not stored yet
    assert (transforms.weights([forward], stored=True), transforms.weights([forward], stored=False)) == (math.inf, 4)
    exact.meanwhile = lambda: transforms.weights([forward], stored=True)
    mapped = MappedColumns(transforms, 0)
    with pytest.raises(NotBrief):  # who would have to wait for the trial does something else
        mapped.take([asked(column(1, 50), [7])], [forward], MODELS, at_most=1e9)
    mapped.take([asked(column(1, 50), [7])], [forward], MODELS)
    assert exact.seen == [math.inf]
    assert transforms.weights([forward], stored=True) == 4
    mapped.take([asked(column(1, 50), [7])], [forward], MODELS, at_most=4)


def test_many_threads_find_out_once_in_what_to_map_candidates(tmp_path: Path, forward: Transformation) -> None:
    exact = Exact(Quick())
    mapped, one = MappedColumns(Transforms(Files(tmp_path), lambda _: exact), 0), column(1, 50)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: mapped.take([asked(one, range(20))], [forward], MODELS), range(64)))
    assert all(np.array_equal(each, 2 * one.vectors[:20] + 1) for each in taken)
    assert exact.samples == [50]


def test_nothing_asked_gives_no_rows(transforms: Transforms, forward: Transformation) -> None:
    assert MappedColumns(transforms, 8).take([], [forward], MODELS).shape == (0, WIDTH)
