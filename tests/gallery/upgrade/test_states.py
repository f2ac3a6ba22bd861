"""The diagram of ARCHITECTURE.md, copied by hand, and every verb in every state."""

from __future__ import annotations

from itertools import product

import pytest

from gallery import errors
from gallery.upgrade.states import (
    ACTIVE,
    DRIVEN,
    NEXT,
    PUBLISHING,
    TERMINAL,
    TRANSFORMED,
    WORKING,
    State,
    Verb,
    allowed,
    step,
    wants,
)

DIAGRAM = {
    "pending": "validating",
    "validating": "running failed",
    "running": "paused verifying failed",
    "paused": "running",
    "verifying": "awaiting_cutover completed failed",
    "awaiting_cutover": "completed",
    "completed": "finalized rolling_back",
    "cancelling": "cancelled",
    "rolling_back": "rolled_back",
    "failed": "",
}
BEFORE_COMPLETED = ("pending", "validating", "running", "paused", "verifying", "awaiting_cutover", "failed")
#: what the diagram says in words, or what the verbs and an empty gallery or a dry run need beside it
BESIDE = {
    ("failed", "running"),  # resume
    ("failed", "pending"),  # resume of one that never ran
    ("paused", "pending"),  # likewise
    ("pending", "paused"),
    ("validating", "paused"),
    ("pending", "failed"),
    ("pending", "completed"),  # an empty gallery
    ("validating", "completed"),  # a dry run
}
TAKES = {
    "pending": "pause cancel",
    "validating": "pause cancel",
    "running": "pause cancel retry",
    "paused": "resume cancel retry",
    "verifying": "cancel",
    "awaiting_cutover": "cancel cutover",
    "completed": "rollback finalize",
    "failed": "resume cancel retry",
}
ALREADY = {
    ("pause", "paused"), ("cutover", "completed"), ("finalize", "finalized"),
    ("resume", "pending"), ("resume", "validating"), ("resume", "running"),
    ("cancel", "cancelled"), ("cancel", "cancelling"), ("rollback", "rolled_back"), ("rollback", "rolling_back"),
    ("retry", "pending"), ("retry", "validating"), ("retry", "verifying"), ("retry", "awaiting_cutover"), ("retry", "completed"),
}  # fmt: skip


@pytest.mark.parametrize(("now", "then"), list(product(State, State)))
def test_a_step_is_allowed_exactly_where_the_diagram_has_an_arrow(now: State, then: State) -> None:
    arrow = (
        then.value in DIAGRAM.get(now.value, "").split()
        or (now.value in BEFORE_COMPLETED and then is State.CANCELLING)
        or (now.value, then.value) in BESIDE
    )
    if arrow:
        assert step(now, then) is then
    else:
        with pytest.raises(errors.InvalidStateTransition, match=f"that is {now} cannot become {then}"):
            step(now, then)


@pytest.mark.parametrize(("verb", "now"), list(product(Verb, State)))
def test_a_verb_does_something_or_is_done_already_or_is_refused_with_what_is_allowed(verb: Verb, now: State) -> None:
    takes = TAKES.get(now.value, "").split()
    assert sorted(allowed(now)) == sorted(takes)
    if verb.value in takes:
        assert wants(verb, now)
    elif (verb.value, now.value) in ALREADY:
        assert not wants(verb, now)
    else:
        with pytest.raises(errors.InvalidStateTransition) as refused:
            wants(verb, now)
        assert sorted(refused.value.details["allowed"]) == sorted(takes)


@pytest.mark.parametrize("over", [State.COMPLETED, State.FAILED])
@pytest.mark.parametrize("verb", Verb)
def test_a_dry_run_that_is_over_takes_no_verb(verb: Verb, over: State) -> None:
    assert allowed(over, dry_run=True) == []
    with pytest.raises(errors.InvalidStateTransition, match="start another"):
        wants(verb, over, dry_run=True)


@pytest.mark.parametrize(("verb", "now"), list(product(Verb, State)))
def test_without_a_gallery_a_verb_is_done_already_or_refused_and_none_is_allowed(verb: Verb, now: State) -> None:
    assert allowed(now, deleted=True) == []
    if (verb.value, now.value) in ALREADY:
        assert not wants(verb, now, deleted=True)
    else:
        with pytest.raises(errors.InvalidStateTransition, match="gallery of this upgrade was deleted") as refused:
            wants(verb, now, deleted=True)
        assert refused.value.details["allowed"] == []


def test_every_state_can_be_reached_and_left_unless_it_is_the_end() -> None:
    assert {then for all_of in NEXT.values() for then in all_of} == set(State)
    assert {now for now in State if not NEXT[now]} == TERMINAL


def test_the_sets_of_states_fit_together() -> None:
    assert ACTIVE.isdisjoint(TERMINAL)
    assert WORKING.isdisjoint(TRANSFORMED)
    assert WORKING | (TRANSFORMED - {State.COMPLETED}) | {State.CANCELLING} == ACTIVE
    assert PUBLISHING <= WORKING
    assert DRIVEN <= ACTIVE
