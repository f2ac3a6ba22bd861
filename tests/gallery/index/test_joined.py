"""Indexes of several segments made one: it answers as one over all their rows would."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.processes import private
from gallery.arrays import Rows, Space, Stored, Vectors
from gallery.index import _filtering, registry
from gallery.index.base import JOINED, Index, ListsBackend, Trained
from gallery.index.device import Device
from gallery.index.flat import JOINED_NUMBERS
from gallery.index.ivf_pq import PqIndex
from gallery.index.quantizer import training_rows
from gallery.index.selection import Selected
from tests.gallery.index.conftest import column_of, queries_of, unit_length
from tests.gallery.index.test_every_backend import assert_right, assert_same, every_dtype, every_space
from workers import memory

PARTS = (2500, 1, 2499, 1000)
gives_back = pytest.mark.skipif(memory._trim is None, reason="this C library cannot be asked to give memory back")
every_joining = pytest.mark.parametrize("name", ["flat", "ivf_pq"])


def parts(name: str, column: Stored, space: Space, folder: Path) -> list[Index]:
    """An index for each part of a column, with lists in common where there are lists."""
    backend, opened = registry.backend(name), []
    parameters = backend.check({"nprobe": 40} if isinstance(backend, ListsBackend) else {})
    trained = (
        backend.train(training_rows([column], space, 70), 70, space) if isinstance(backend, ListsBackend) else None
    )
    for at, part in enumerate(np.split(column, np.cumsum(PARTS)[:-1])):
        more = {} if trained is None else {"trained": trained}
        has_file = backend.build(part, space=space, path=folder / f"{at}", parameters=parameters, **more)
        path = folder / f"{at}" if has_file else None
        opened.append(backend.open(part, space=space, path=path, parameters=parameters))
    return opened


def joined(indexes: Sequence[Index]) -> Index:
    assert len({index.joins.key for index in indexes if index.joins}) == 1
    return indexes[0].join(indexes[1:])


@every_joining
@every_space
@every_dtype
class TestAnswers:
    """What is found, in every space and storage type."""

    @pytest.fixture
    def asked(self, name: str, space: Space, dtype: str, clustered: Vectors, tmp_path: Path) -> tuple[Index, Stored]:
        column = column_of(clustered, space, dtype)
        return joined(parts(name, column, space, tmp_path)), column

    def test_the_best_rows_of_all_are_found_with_their_exact_scores(
        self, name: str, space: Space, asked: tuple[Index, Stored], clustered: Vectors
    ) -> None:
        index, column = asked
        assert index.space == space  # by which whoever scores the column itself judges whether it is as it is compared
        queries = queries_of(clustered, space)
        assert_right(name, index.search(queries, 10), queries, column, space.metric, 10)

    @pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
    def test_rows_that_are_not_selected_are_never_found(
        self,
        name: str,
        space: Space,
        share: float,
        asked: tuple[Index, Stored],
        clustered: Vectors,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(_filtering, "FEW", 0)
        index, column = asked
        queries, selected = queries_of(clustered, space), np.random.default_rng(5).random(len(column)) < share
        found = index.search(queries, 10, Selected(selected))
        assert_right(name, found, queries, column, space.metric, 10, selected)

    def test_a_score_is_the_one_that_the_segment_alone_gives(
        self, name: str, space: Space, dtype: str, clustered: Vectors, tmp_path: Path
    ) -> None:
        column, queries = column_of(clustered, space, dtype), queries_of(clustered, space)
        indexes = parts(name, column, space, tmp_path)
        together, starts = joined(indexes).search(queries, 5), np.cumsum([0, *PARTS])
        for at, index in enumerate(indexes):
            alone = index.search(queries, 5)
            for query in range(len(queries)):
                scores = dict(zip((alone.rows[query] + starts[at]).tolist(), alone.scores[query].tolist(), strict=True))
                for row, score in zip(together.rows[query].tolist(), together.scores[query].tolist(), strict=True):
                    assert scores.get(row, score) == score


@every_joining
class TestConduct:
    """How it behaves towards its neighbours."""

    def test_joining_again_is_joining_all_at_once(self, name: str, clustered: Vectors, tmp_path: Path) -> None:
        space = Space("euclidean", normalized=False)
        indexes, queries = parts(name, clustered, space, tmp_path), queries_of(clustered, space)
        step_by_step = joined([joined(indexes[:2]), joined(indexes[2:])])
        assert_same(step_by_step.search(queries, 10), joined(indexes).search(queries, 10))

    def test_it_outlives_the_files_that_it_was_made_of_and_so_do_those(
        self, name: str, clustered: Vectors, tmp_path: Path
    ) -> None:
        space = Space("cosine", normalized=False)
        indexes, queries = parts(name, clustered, space, tmp_path), queries_of(clustered, space)
        before = joined(indexes).search(queries, 10)
        for path in tmp_path.iterdir():
            path.unlink()
        assert_same(joined(indexes).search(queries, 10), before)

    def test_equal_rows_of_several_segments_come_in_their_order(self, name: str, tmp_path: Path) -> None:
        vectors = np.tile(unit_length(np.random.default_rng(1).standard_normal((1000, 24))), (6, 1))
        index = joined(parts(name, vectors, Space("cosine", normalized=True), tmp_path))
        found = index.search(vectors[:9].copy(), 6)
        assert np.array_equal(found.rows, np.arange(9)[:, None] + 1000 * np.arange(6))
        assert (found.scores == found.scores[:, :1]).all()


def test_only_indexes_with_the_same_lists_and_codes_can_be_joined(clustered: Vectors, tmp_path: Path) -> None:
    backend, space = registry.backend("ivf_pq"), Space("euclidean", normalized=False)
    keys = []
    for at, part in enumerate(np.split(clustered, 2)):
        backend.build(part, space=space, path=tmp_path / f"{at}", parameters=backend.check({}))
        index = backend.open(part, space=space, path=tmp_path / f"{at}", parameters=backend.check({}))
        assert index.joins is not None
        keys.append(index.joins.key)
    assert keys[0] != keys[1]


def test_exact_indexes_are_joined_up_to_a_number_of_numbers(clustered: Vectors) -> None:
    index = registry.backend("flat").open(clustered, space=Space("cosine", normalized=False), path=None, parameters={})
    assert index.joins is not None
    assert index.joins.rows == JOINED_NUMBERS // clustered.shape[1]


@pytest.mark.parametrize("name", ["ivf", "ivf_sq8", "hnsw"])
def test_other_kinds_are_asked_alone(name: str, clustered: Vectors, tmp_path: Path) -> None:
    backend, space = registry.backend(name), Space("euclidean", normalized=False)
    backend.build(clustered, space=space, path=tmp_path / "it", parameters=backend.check({}))
    index = backend.open(clustered, space=space, path=tmp_path / "it", parameters=backend.check({}))
    assert index.joins is None
    with pytest.raises(NotImplementedError, match="is asked alone"):
        index.join([index])


def test_what_takes_long_is_made_before_the_first_search(clustered: Vectors, tmp_path: Path) -> None:
    index = joined(parts("ivf_pq", clustered, Space("euclidean", normalized=False), tmp_path))
    assert "lists" not in vars(index)
    assert Device("cpu", ()).place(index, [clustered]) is index
    assert "lists" in vars(index)


def test_a_small_part_of_what_is_searched_together_reads_the_lists_that_it_needs_there(
    clustered: Vectors, tmp_path: Path
) -> None:
    backend, space, many = registry.backend("ivf_pq"), Space("euclidean", normalized=False), 12
    assert isinstance(backend, ListsBackend)
    trained = backend.train(training_rows([clustered], space, 70), 70, space)
    few, more = backend.check({"nprobe": 1}), {**backend.check({"nprobe": 60}), JOINED: {"nprobe": 1}}
    split = list(enumerate(np.array_split(clustered, many)))
    for at, part in split:
        backend.build(part, space=space, path=tmp_path / f"{at}", parameters=few, trained=trained)

    def found(parameters: Mapping[str, Any], parts: int) -> Rows:
        opened = [
            backend.open(part, space=space, path=tmp_path / f"{at}", parameters=parameters)
            for at, part in split[:parts]
        ]
        return joined(opened).search(queries_of(clustered, space), 10).rows

    # Each of twelve is less than a tenth of them all, and each of four is not.
    assert np.array_equal(found(more, many), found(few, many))
    assert np.array_equal(found(more, 4), found(backend.check({"nprobe": 60}), 4))
    assert not np.array_equal(found(more, 4), found(few, 4))
    # What earlier versions wrote down was measured by the nearest neighbour only.
    former = {**backend.check({"nprobe": 60}), "joined": {"nprobe": 1}}
    assert np.array_equal(found(former, many), found(backend.check({"nprobe": 60}), many))


def test_many_small_segments_do_not_outvote_the_one_that_has_most_rows(clustered: Vectors, tmp_path: Path) -> None:
    backend, space = registry.backend("ivf_pq"), Space("euclidean", normalized=False)
    assert isinstance(backend, ListsBackend)
    trained = backend.train(training_rows([clustered], space, 70), 70, space)

    def reads(parts: Mapping[int, Sequence[int]]) -> int:
        """What segments of so many rows read together that need so many lists each."""
        opened = []
        for at, (rows, nprobe) in enumerate((rows, nprobe) for rows, needed in parts.items() for nprobe in needed):
            column, path, parameters = clustered[:rows], tmp_path / f"{rows}-{at}", backend.check({"nprobe": nprobe})
            backend.build(column, space=space, path=path, parameters=parameters, trained=trained)
            opened.append(backend.open(column, space=space, path=path, parameters=parameters))
        index = joined(opened)
        assert isinstance(index, PqIndex)
        return index.nprobe

    assert reads({3000: [40], 300: [8] * 11}) == 40
    assert reads({2000: [8], 100: [40] * 2}) == 8, "to find less in a tenth of the rows is no great loss"
    assert reads({1000: [8], 100: [40] * 2}) == 40


def with_lists(vectors: Vectors, lists: int, folder: Path) -> list[Index]:
    """Four parts of the vectors, each with an index of so many lists, whose centroids are the first of them."""
    backend, space = registry.backend("ivf_pq"), Space("euclidean", normalized=False)
    assert isinstance(backend, ListsBackend)
    parameters, codebook = backend.check({}), backend.train(vectors[:1000], 1, space, 1).codebook
    opened = []
    for at, part in enumerate(np.split(vectors, 4)):
        where: dict[str, Any] = {"space": space, "path": folder / f"{at}", "parameters": parameters}
        backend.build(part, **where, trained=Trained(vectors[:lists], codebook))
        opened.append(backend.open(part, **where))
    return opened


def held() -> int:
    memory.give_back()
    return private(os.getpid())


@gives_back
def test_joined_lists_hold_the_code_and_the_number_of_a_row_once(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).standard_normal((200_000, 64), dtype=np.float32)
    opened = with_lists(vectors, 100, tmp_path)
    before = held()
    index = joined(opened)
    index.prepare()
    assert held() - before < 2 * len(vectors) * (64 // 4 + 8)


@gives_back
def test_nothing_is_left_of_lists_that_were_joined_and_let_go(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).standard_normal((16_000, 64), dtype=np.float32)
    opened = with_lists(vectors, 4000, tmp_path)  # centroids of 1 MB
    joined(opened).prepare()
    before = held()
    for _ in range(20):
        joined(opened).prepare()
    assert held() - before < 10_000_000
