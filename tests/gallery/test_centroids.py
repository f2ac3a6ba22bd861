"""Segments come to share the centroids of their lists, and get new ones where those do not serve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gallery import centroids, indexing
from gallery.arrays import Vectors
from gallery.catalog.galleries import gallery_row
from gallery.catalog.holdings import held
from gallery.catalog.tables import ColumnRow
from gallery.index import ivf_pq
from gallery.index._ivf import IvfIndex
from gallery.index.quantizer import FEWEST_ROWS_PER_LIST, ROUGH, THOROUGH, Care, Nearest, Quantizer
from gallery.indexing import QUANTIZER, index_column, wanting
from gallery.upgrade import lifecycle
from gallery.upgrade.states import State
from tests.gallery.world import GALLERY, OLD, World


@pytest.fixture
def small(world: World) -> World:
    """A world where 100 rows are enough for an index."""
    world.store.settings.exact_below = 100
    return world


def add(world: World, name: str, vectors: NDArray[Any], gallery: str = GALLERY) -> None:
    """Write one segment and index it."""
    world.upsert("old", [f"{name}{row}" for row in range(len(vectors))], vectors, gallery=gallery)
    for column in wanting(world.store):
        assert index_column(world.store, column)


def quantizers(world: World, gallery: str = GALLERY, model: str = "old") -> list[str]:
    """Which centroids each segment has."""
    with world.store.catalog.reading() as session:
        told = held(session, [row := gallery_row(session, gallery).id])[row][model].measured
    assert {segment["kind"] for segment in told} <= {"ivf", "ivf_pq"}
    return [segment[QUANTIZER] for segment in told]


def anywhere(rows: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(-50, 50, (rows, OLD))


def test_segments_of_one_gallery_and_model_share_centroids_and_find_what_they_hold(small: World) -> None:
    for at in range(3):
        add(small, f"s{at}-", anywhere(1600, at))
    assert len(set(quantizers(small))) == 1
    small.make("other")
    add(small, "other", anywhere(1600, 7), gallery="other")
    assert quantizers(small, "other") != quantizers(small)[:1]
    views = small.galleries.refresh().snapshot(GALLERY).segments
    opened = [view.columns["old"].index for view in views]
    assert len({index.quantizer for index in opened if isinstance(index, IvfIndex)}) == 1
    assert len(opened) == 3


def test_a_search_compares_its_query_with_shared_centroids_once(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf_pq, "JOINED_ROWS", 1600)  # each segment is asked by itself
    vectors = [anywhere(1600, at) for at in range(3)]
    for at, part in enumerate(vectors):
        add(small, f"s{at}-", part)
    assert len(set(quantizers(small))) == 1
    compared: list[int] = []
    nearest = Quantizer.nearest

    def counted(quantizer: Quantizer, queries: Vectors, count: int) -> Nearest:
        compared.append(len(queries))
        return nearest(quantizer, queries, count)

    monkeypatch.setattr(Quantizer, "nearest", counted)
    answer = small.search("old", [vectors[2][7]], k=5)
    assert len(answer.snapshot.shelves) == 3
    assert compared == [1]
    assert answer.hits(0)[0].id == "s2-7"


def test_a_gallery_that_has_outgrown_its_centroids_gets_new_ones_and_old_segments_keep_theirs(small: World) -> None:
    for name, rows in (("a", 400), ("b", 400), ("c", 4000), ("d", 400)):
        add(small, name, anywhere(rows, rows))
    first, second, third, fourth = quantizers(small)
    assert first == second != third == fourth


def test_where_the_centroids_find_too_little_in_a_segment_new_ones_are_trained(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ivf_pq, "READ_ROWS", 0)  # as in a gallery so large that not all lists can be read
    line, cloud = np.zeros((2000, OLD)), 100 * anywhere(4000, 1)
    line[:, 0] = np.linspace(-50, 50, 2000)
    cloud[:, 0] = anywhere(4000, 2)[:, 0]  # lists along the line say nothing of who is near whom in the cloud
    add(small, "line", line)
    add(small, "cloud", cloud[:2000])
    add(small, "more", cloud[2000:])
    first, second, third = quantizers(small)
    assert first != second == third


def test_where_much_must_be_read_more_lists_are_tried_and_the_better_index_stays(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lists_made(monkeypatch)
    monkeypatch.setattr(indexing, "FEW_ROWS", 0)
    monkeypatch.setattr(indexing, "MOST_READ", 0.06)
    add(small, "a", anywhere(6400))  # 8 of 80 lists are more than that, and 8 of 164 are not
    assert made == [(80, THOROUGH), (164, ROUGH), (164, THOROUGH)]
    add(small, "b", anywhere(6400, 1))
    first, second = (view.columns["old"].index for view in small.galleries.refresh().snapshot(GALLERY).segments)
    assert isinstance(first, ivf_pq.PqIndex)
    assert len(first.quantizer) == 6400 // FEWEST_ROWS_PER_LIST
    assert first.quantizer is second.quantizer
    assert len(index_files(small)) == 2


def test_more_lists_that_were_in_vain_are_not_tried_again_before_twice_as_many_can_be(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "FEW_ROWS", 0)
    monkeypatch.setattr(indexing, "MOST_READ", 0.06)
    made = lists_made(monkeypatch)
    for name, trained in (
        ("a", [40, 41]),
        ("b", [40, 41]),
        ("c", [40, 41, 123, 123]),  # and now they pay
    ):  # of each segment's 1,600 rows 39 a list
        add(small, name, anywhere(1600, ord(name)))
        assert [lists for lists, _ in made] == trained
    assert [care for _, care in made] == [THOROUGH, ROUGH, ROUGH, THOROUGH]
    assert len(index_files(small)) == 3


def lists_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Care]]:
    """How many lists are trained from now on, and how well."""
    made, train = list[tuple[int, Care]](), centroids.trained

    def counted(store: Any, column: Any, chosen: Any, lists: int, care: Care = THOROUGH) -> Any:
        made.append((lists, care))
        return train(store, column, chosen, lists, care)

    monkeypatch.setattr(centroids, "trained", counted)
    return made


def index_files(world: World) -> set[str]:
    return {path.name for path in world.store.files.path("indexes").rglob("*") if path.is_file()}


def test_an_upgraded_gallery_shares_centroids_of_its_new_vectors_and_a_rollback_leaves_nothing_of_them(
    small: World,
) -> None:
    for at in range(2):
        add(small, f"s{at}-", anywhere(1600, at))
    before = index_files(small)
    upgrade = small.start(on_missing_side_information="zeros")
    assert small.run(upgrade) is State.COMPLETED
    assert len(set(quantizers(small, model="new"))) == 1
    assert set(quantizers(small, model="new")).isdisjoint(quantizers(small))
    lifecycle.rollback(small.store, upgrade)
    assert index_files(small) == before


def test_a_merged_segment_has_the_centroids_of_those_that_it_was_made_of(small: World) -> None:
    for at in range(2):
        add(small, f"s{at}-", anywhere(1600, at))
    before = set(quantizers(small))
    small.compact(rows=10_000)
    assert len(small.galleries.refresh().snapshot(GALLERY).segments) == 1
    assert set(quantizers(small)) == before


def test_an_index_whose_file_went_away_is_no_source_of_centroids(small: World) -> None:
    add(small, "a", anywhere(300))
    with small.store.catalog.reading() as session:
        files = [row.index_file or "" for row in session.query(ColumnRow)]
    small.store.files.path(files[0]).write_bytes(b"torn")
    add(small, "b", anywhere(300, 1))
    assert len(set(quantizers(small))) == 2


def test_lists_that_were_asked_for_by_number_are_shared_by_that_number(small: World) -> None:
    small.make("named", index={"kind": "ivf", "nlist": 12, "nprobe": 12})
    for name in "ab":
        add(small, name, anywhere(300, ord(name)), gallery="named")
    add(small, "large", anywhere(3000), gallery="named")
    assert len(set(quantizers(small, "named"))) == 1


def test_a_column_whose_file_is_damaged_is_no_source_of_centroids_either(small: World) -> None:
    small.upsert("old", [f"a{row}" for row in range(1000)], anywhere(1000))
    with small.store.catalog.reading() as session:
        (file,) = [row.file for row in session.query(ColumnRow)]
    small.store.files.path(file).write_bytes(b"torn")
    small.upsert("old", [f"b{row}" for row in range(300)], anywhere(300, 1))
    assert index_column(small.store, wanting(small.store)[-1])
    assert len(quantizers(small)) == 1
