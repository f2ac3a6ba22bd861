"""Which indexes a segment may get, and how hard they may be searched."""

from __future__ import annotations

import pytest

from gallery.index.choose import RECALL, TRIED, check, choose
from gallery.index.registry import backend


def test_auto_tries_its_backends_in_turn_and_wants_recall_of_each() -> None:
    choices = choose({"kind": "auto"}, rows=50_000, exact_below=20_000)
    assert [(choice.kind, choice.enough) for choice in choices] == [(kind, RECALL) for kind in TRIED]


def test_what_was_asked_for_by_name_is_taken_as_it_is() -> None:
    (choice,) = choose({"kind": "ivf", "nprobe": 3}, rows=50_000, exact_below=20_000)
    assert (choice.kind, choice.efforts, choice.enough) == ("ivf", [{"nlist": 0, "nprobe": 3}], 0.0)


@pytest.mark.parametrize("kind", ["auto", "ivf", "hnsw"])
def test_a_small_segment_is_searched_exactly_whatever_was_asked_for(kind: str) -> None:
    assert not choose({"kind": kind}, rows=19_999, exact_below=20_000)


def test_exact_search_has_nothing_to_build_at_any_size() -> None:
    assert not choose({"kind": "flat"}, rows=10**7, exact_below=0)


@pytest.mark.parametrize("settings", [{"kind": "auto", "nprobe": 3}, {"kind": "scann"}, {"kind": "ivf", "m": 3}])
def test_settings_that_cannot_be_followed_are_refused_before_there_is_a_segment(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"takes no parameters|is not one of|has no parameter"):
        check(settings)


@pytest.mark.parametrize(("kind", "steered"), [("ivf", "nprobe"), ("hnsw", "ef_search")])
@pytest.mark.parametrize("rows", [1, 100, 20_000, 1_000_000])
def test_efforts_grow_and_differ_in_nothing_else(kind: str, steered: str, rows: int) -> None:
    efforts = backend(kind).efforts(rows)
    values = [effort[steered] for effort in efforts]
    assert values == sorted(set(values))
    assert len({tuple((k, v) for k, v in sorted(effort.items()) if k != steered) for effort in efforts}) == 1
    assert all(backend(kind).check(effort) == effort for effort in efforts)


def test_ivf_never_reads_more_than_a_third_of_many_lists() -> None:
    assert backend("ivf").efforts(1_000_000)[-1]["nprobe"] == 333


@pytest.mark.parametrize(("rows", "share"), [(10_000, 1.0), (65_536, 1.0), (131_072, 0.5), (1_000_000, 0.333)])
def test_codes_of_as_many_rows_are_read_as_take_the_time_of_a_graph(rows: int, share: float) -> None:
    assert backend("ivf_pq").efforts(rows)[-1]["nprobe"] == pytest.approx(share * rows**0.5, abs=1)


def test_exact_search_cannot_be_steered() -> None:
    assert not backend("flat").efforts(1000)
