"""Which score space, and by which route each segment, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from gallery import errors
from gallery.search.routes import Known, Plan, Route, SegmentFacts, plan
from gallery.spaces import Direction, EmbeddingModel, Registry, Transformation

AT = datetime(2026, 1, 1, tzinfo=UTC)


def segment(side: int | None, live: int, **columns: int) -> SegmentFacts:
    """A segment with a column of each model, which so many transformations made."""
    return SegmentFacts(frozenset(columns.items()), side, live)


OLD, NEW, BOTH = segment(2, 10, old=0), segment(None, 3, new=0), segment(2, 5, old=0, new=1)
BARE = segment(None, 7, old=0)


def transformation(
    name: str, source: str, target: str, direction: Direction, side: int | None = None, number: int = 1
) -> Transformation:
    """A transformation; ids do not matter here."""
    return Transformation(number, name, source, target, direction, "any", "0" * 64, side, None, AT)


FORWARD = transformation("fct", "old", "new", "forward", side=2)
BACKWARD = transformation("bct", "new", "old", "backward")


def planned(
    query: str,
    segments: Sequence[SegmentFacts],
    *transformations: Transformation,
    companions: Sequence[str] = (),
    pinned: Any = None,
    zeros_for: Sequence[str] = (),
    allow_partial: bool = False,
) -> Plan:
    """A plan with the models old, new and newest."""
    models = {
        n: EmbeddingModel(i, n, 4, "cosine", True, 2, None, None, AT) for i, n in enumerate(("old", "new", "newest"))
    }
    known = Known(query, companions, Registry(models, transformations), pinned or {}, zeros_for)
    return plan(known, segments, allow_partial=allow_partial)


def ways(found: Plan) -> list[tuple[str, str] | None]:
    """Route and searched column per segment."""
    return [None if way is None else (way.route.value, way.column) for way in found.ways]


def applied(found: Plan) -> list[str]:
    """Per segment, what maps its candidates, in this order."""
    return [" ".join(each.name for each in way.by) for way in found.ways if way]


DIRECT_OLD, DIRECT_NEW = ("direct", "old"), ("direct", "new")
ON, BACK = ("forward", "old"), ("backward", "new")

CASES = {
    "old query, nothing upgraded": ("old", [OLD], (FORWARD,), (), "old", [DIRECT_OLD]),
    "old query, half upgraded: old columns stay": ("old", [OLD, BOTH], (FORWARD,), (), "old", [DIRECT_OLD, DIRECT_OLD]),
    "new query, all upgraded": ("new", [BOTH, NEW], (FORWARD,), (), "new", [DIRECT_NEW, DIRECT_NEW]),
    "new query and a companion, half": (
        "new",
        [OLD, BOTH, NEW],
        (FORWARD,),
        ("old",),
        "new",
        [ON, DIRECT_NEW, DIRECT_NEW],
    ),
    "new query mapped back for candidates": ("new", [OLD, BOTH], (FORWARD, BACKWARD), (), "new", [ON, DIRECT_NEW]),
    "BCT: new query over old and new segments, scored in old": (
        "new",
        [OLD, NEW],
        (BACKWARD,),
        (),
        "old",
        [DIRECT_OLD, BACK],
    ),
    "BCT: new query over new segments only stays in new": ("new", [NEW], (BACKWARD,), (), "new", [DIRECT_NEW]),
    "BCT: old query over new segments": ("old", [OLD, NEW], (BACKWARD,), (), "old", [DIRECT_OLD, BACK]),
    "old query with a new companion over new segments": (
        "old",
        [OLD, NEW],
        (FORWARD,),
        ("new",),
        "new",
        [ON, DIRECT_NEW],
    ),
    "new query with a companion, no transformation": ("new", [OLD], (), ("old",), "old", [DIRECT_OLD]),
    "BCT: a companion's model is left behind, and no column of it is there": (
        "newest",
        [NEW],
        (BACKWARD,),
        ("old",),
        "old",
        [BACK],
    ),
    "no segments": ("new", [], (), (), "new", []),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_plan_is_that_of_the_design(case: Any) -> None:
    query, segments, transformations, companions, space, expected = case
    found = planned(query, segments, *transformations, companions=companions)
    assert (found.score_space, ways(found)) == (space, expected)
    counted = {
        route: sum(s.live for s, w in zip(segments, expected, strict=True) if w and w[0] == route) for route in Route
    }
    assert found.coverage._asdict() == {**counted, "unreachable": 0}


def test_a_backward_segment_is_searched_by_every_row_only_if_the_query_is_unknown_there() -> None:
    by_new = planned("new", [OLD, NEW], BACKWARD)
    by_old = planned("old", [OLD, NEW], BACKWARD)
    assert [way and way.exhaustive for way in by_new.ways] == [False, False]
    assert [way and way.exhaustive for way in by_old.ways] == [False, True]
    assert dict(by_new.query_by) == {"old": BACKWARD}
    assert dict(by_old.query_by) == {}


def test_a_companion_wins_over_a_mapped_query() -> None:
    assert dict(planned("new", [OLD], FORWARD, BACKWARD, companions=["old"]).query_by) == {}
    assert dict(planned("new", [OLD], FORWARD, BACKWARD).query_by) == {"old": BACKWARD}


@pytest.mark.parametrize(
    ("query", "segments", "transformations", "companions", "says"),
    [
        (
            "new",
            [OLD],
            (FORWARD,),
            (),
            "10 items have vectors of old only.*send the query's old vector in `companions`",
        ),
        ("new", [OLD], (), (), "register a forward transformation from old to new and send companions, or a backward"),
        ("new", [BARE], (FORWARD,), ("old",), None),
        (
            "old",
            [OLD, NEW],
            (FORWARD,),
            (),
            "3 items have vectors of new only, which a query of old does not reach.*backward transformation from old to new "
            "or from new to old",
        ),
        ("newest", [OLD, BOTH], (), (), "15 items have vectors of new or old only"),
    ],
)
def test_a_query_that_reaches_no_space_is_refused_with_what_would_help(
    query: str, segments: Any, transformations: Any, companions: Any, says: str | None
) -> None:
    if says is None:  # an old companion reaches the old space
        assert planned(query, segments, *transformations, companions=companions).score_space == "old"
        return
    with pytest.raises(errors.NoRoute, match=says):
        planned(query, segments, *transformations, companions=companions)


def test_a_refusal_is_about_the_query_models_own_space_although_a_companion_reaches_more_in_another() -> None:
    with pytest.raises(errors.NoRoute, match=r"8 items have vectors of new only.*backward transformation from old"):
        planned("old", [BARE, segment(None, 8, new=0)], FORWARD, companions=["new"])


def test_a_partial_answer_reaches_as_many_items_as_it_can_and_says_how_many_it_does_not() -> None:
    found = planned("new", [OLD, BOTH, NEW], FORWARD, allow_partial=True)
    assert (found.score_space, ways(found)) == ("new", [None, DIRECT_NEW, DIRECT_NEW])
    assert found.coverage == (8, 0, 0, 10)
    found = planned("new", [OLD, NEW], companions=["old"], allow_partial=True)
    assert (found.score_space, found.coverage) == ("old", (10, 0, 0, 3))


def test_items_without_side_information_go_forward_only_where_zeros_may_stand_for_it() -> None:
    refused = planned("new", [BARE, BOTH], FORWARD, companions=["old"])
    assert (refused.score_space, ways(refused)) == ("old", [DIRECT_OLD, DIRECT_OLD])
    assert ways(planned("new", [BARE, BOTH], FORWARD, companions=["old"], zeros_for=["fct"])) == [ON, DIRECT_NEW]


def test_side_information_of_another_width_does_not_feed_a_transformation() -> None:
    other = segment(3, 1, old=0)
    assert planned("new", [other], FORWARD, companions=["old"], zeros_for=["fct"]).score_space == "old"


def test_the_transformation_is_the_pinned_one_else_the_latest() -> None:
    later = transformation("later", "old", "new", "forward", number=2)

    def used(pinned: Any) -> Any:
        found = planned("new", [OLD], FORWARD, later, companions=["old"], pinned=pinned)
        return applied(found)

    assert used({}) == ["later"]
    assert used({("old", "new"): "fct"}) == ["fct"]


OLD_TO_NEW = transformation("a", "old", "new", "forward", number=1)
NEW_TO_NEWEST = transformation("b", "new", "newest", "forward", number=2)
OLD_TO_NEWEST = transformation("c", "old", "newest", "forward", number=3)
CHAIN = (OLD_TO_NEW, NEW_TO_NEWEST)


def test_transformations_are_composed_where_the_query_is_known_at_their_beginning() -> None:
    found = planned("newest", [OLD], *CHAIN, companions=["old"])
    assert (found.score_space, ways(found), applied(found)) == ("newest", [ON], ["a b"])
    with pytest.raises(
        errors.NoRoute, match="send the query's old vector in `companions`, so that a and b can be used"
    ):
        planned("newest", [OLD], *CHAIN, companions=["new"])


def test_what_was_composed_already_is_not_composed_again() -> None:
    found = planned("newest", [BOTH], *CHAIN, companions=["old", "new"])
    assert (ways(found), applied(found)) == ([("forward", "new")], ["b"])
    assert applied(planned("newest", [BOTH], *CHAIN, companions=["old"])) == ["a b"]


def test_a_direct_transformation_of_native_vectors_wins_over_one_of_derived_vectors() -> None:
    found = planned("newest", [BOTH], *CHAIN, OLD_TO_NEWEST, companions=["old", "new"])
    assert (ways(found), applied(found)) == ([ON], ["c"])
    assert applied(planned("newest", [BOTH], *CHAIN, OLD_TO_NEWEST, companions=["new"])) == ["b"]
    assert applied(planned("newest", [NEW], *CHAIN, OLD_TO_NEWEST, companions=["new"])) == ["b"]


def test_what_an_upgrade_is_pinned_to_wins_over_a_better_one_that_was_registered_since() -> None:
    found = planned(
        "newest",
        [BOTH],
        *CHAIN,
        OLD_TO_NEWEST,
        companions=["old", "new"],
        pinned={("old", "new"): "a", ("new", "newest"): "b"},
    )
    assert applied(found) == ["b"]


def test_every_transformation_of_a_path_must_be_fed() -> None:
    hungry = transformation("hungry", "new", "newest", "forward", side=3)
    assert planned("newest", [OLD], OLD_TO_NEW, hungry, companions=["old"]).score_space == "old"
    fed = planned("newest", [segment(3, 1, old=0)], OLD_TO_NEW, hungry, companions=["old"])
    assert applied(fed) == ["a hungry"]


def test_a_path_is_short_and_goes_in_no_circle() -> None:
    names = ["old", *"abc", "newest"]
    long = [transformation(f"t{at}", *names[at : at + 2], "forward", number=at) for at in range(4)]
    there_and_back = transformation("back", "a", "old", "forward", number=9)
    assert planned("newest", [OLD], *long, there_and_back, companions=["old"]).score_space == "old"
    assert applied(planned("newest", [segment(None, 1, a=0)], *long, there_and_back, companions=["a"])) == ["t1 t2 t3"]


@pytest.mark.parametrize(
    "verdict",
    [{"decision": "stay"}, {"decision": "stay", "upgrade_gains": False}, {"decision": "fuse", "upgrade_gains": False}],
)
def test_what_its_fit_advised_against_is_used_where_it_is_pinned_and_named_where_nothing_else_leads_there(
    verdict: dict[str, object],
) -> None:
    unadvised = replace(FORWARD, name="useless", evaluation={"verdict": verdict})
    with pytest.raises(errors.NoRoute, match="useless leads there, but its fit said that it gains nothing by itself"):
        planned("new", [OLD], unadvised)
    pinned = planned("new", [OLD], unadvised, companions=["old"], pinned={("old", "new"): "useless"})
    assert applied(pinned) == ["useless"]
    assert applied(planned("new", [OLD], FORWARD, unadvised, companions=["old"])) == ["fct"]
