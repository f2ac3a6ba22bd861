"""Which segments are merged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gallery.compact.plan import AT_ONCE, DUST_ROWS, Piece, Rule, merges


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    found = []
    for at in range(draw(st.integers(0, 40))):
        live = draw(st.sampled_from([0, 1, 2, 7, 500, 1023, 1024, 3000, 9000, 40_000, 90_000]))
        dead = draw(st.sampled_from([0, 0, 1, 1024, 50_000]))
        held = draw(st.sampled_from([False, False, False, True]))
        found.append(Piece(at, max(1, live + dead), live, draw(st.sampled_from("ab")), held))
    return found


rules = st.builds(Rule, st.integers(2, 16), st.sampled_from([4, 5000, 100_000]), st.booleans())


def applied(given_: list[Piece], found: list[tuple[int, ...]]) -> Iterator[Piece]:
    """The segments after the merges."""
    by_id = {piece.segment_id: piece for piece in given_}
    new = max(by_id, default=0) + 1
    for at, merge in enumerate(found):
        live = sum(by_id[segment].live for segment in merge)
        if live:
            yield Piece(new + at, live, live, by_id[merge[0]].kind)
    merged = {segment for merge in found for segment in merge}
    yield from (piece for piece in given_ if piece.segment_id not in merged)


@given(pieces(), rules)
def test_a_merge_takes_segments_of_one_kind_that_nobody_holds_and_none_grows_too_large(
    found: list[Piece], rule: Rule
) -> None:
    by_id = {piece.segment_id: piece for piece in found}
    merged = merges(found, rule)
    assert len({segment for merge in merged for segment in merge}) == sum(map(len, merged)), "in two merges"
    for merge in merged:
        group = [by_id[segment] for segment in merge]
        assert list(merge) == sorted(merge)
        assert not any(piece.held for piece in group)
        live = sum(piece.live for piece in group)
        if live:
            assert len({piece.kind for piece in group}) == 1
            assert all(piece.live for piece in group)
        if len(merge) > 1:
            assert live <= rule.rows


@given(pieces(), rules)
def test_merging_comes_to_an_end_with_few_segments_and_every_live_row(found: list[Piece], rule: Rule) -> None:
    now = found
    for _ in range(200):
        merged = merges(now, rule)
        if not merged:
            break
        now = list(applied(now, merged))
    assert not merged
    assert sum(piece.live for piece in now) == sum(piece.live for piece in found)
    for kind in "ab":
        small = [p for p in now if p.kind == kind and not p.held and 0 < p.live <= rule.rows // 2]
        dust = [p for p in small if p.live < DUST_ROWS]
        if rule.everything:
            assert len(small) <= 1
            assert all(p.rows == p.live for p in now if not p.held)
        elif rule.rows > 2 * DUST_ROWS * rule.segments:
            assert len(dust) < rule.segments
    assert all(piece.live or piece.held for piece in now)


@pytest.mark.parametrize("rows", [1, 10])
def test_a_row_is_written_again_once_per_size_and_not_once_per_request(rows: int) -> None:
    rule, written, now, new = Rule(16, 100_000), 0, list[Piece](), 0
    for _ in range(5000):
        new += 1
        now.append(Piece(new, rows, rows, "a"))
        for merge in merges(now, rule):
            live = sum(piece.live for piece in now if piece.segment_id in merge)
            written, new = written + live, new + 1
            now = [piece for piece in now if piece.segment_id not in merge] + [Piece(new, live, live, "a")]
    assert sum(piece.live for piece in now) == 5000 * rows
    assert len(now) < 4 * rule.segments
    assert written < 6 * 5000 * rows


def test_where_there_is_time_for_one_merge_only_no_kind_of_segments_waits_for_ever() -> None:
    rule, now, new, most = Rule(4, 100_000), list[Piece](), 0, 0
    for _ in range(200):
        for live, kind in ((0, "a"), (1, "a"), (1, "b")) * 4:
            new += 1
            now.append(Piece(new, 1, live, kind))
        found = merges(now, rule)[:1]
        now = list(applied(now, found))
        new, most = new + 1, max(most, len(now))
    assert most < 100


class Counted(int):
    """A number that counts how often it is added to another."""

    times = 0

    def __radd__(self, other: int) -> int:
        """Count, and add."""
        Counted.times += 1
        return other + int(self)


def test_planning_adds_each_segment_up_a_few_times_however_many_there_are() -> None:
    Counted.times = 0
    assert len(merges([Piece(at, 1, Counted(1), "a") for at in range(500)], Rule(16, 100_000))) == 1
    assert Counted.times < 10 * 500


def test_a_segment_that_is_mostly_deleted_is_written_again_alone() -> None:
    large = Piece(1, 100_000, 40_000, "a")
    assert merges([large], Rule(8, 60_000)) == [(1,)]
    assert merges([large._replace(live=60_000)], Rule(8, 60_000)) == []
    assert merges([large._replace(live=99_999)], Rule(8, 60_000, everything=True)) == [(1,)]


def test_segments_without_a_live_row_go_whatever_they_hold() -> None:
    assert merges([Piece(1, 3, 0, "a"), Piece(2, 9, 0, "b"), Piece(3, 9, 0, "b", held=True)], Rule(8, 100)) == [(1, 2)]


def test_no_merge_takes_more_segments_than_a_statement_of_the_catalog_can_name() -> None:
    for live in (0, 1):
        pieces = [Piece(at, 1, live, "a") for at in range(2 * AT_ONCE + 1)]
        assert [len(merge) for merge in merges(pieces, Rule(2, 100_000))][:2] == [AT_ONCE, AT_ONCE]
        assert len(merges(pieces, Rule(2, 100_000))[-1]) <= AT_ONCE
