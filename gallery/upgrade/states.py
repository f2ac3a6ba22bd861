"""The states of an upgrade and the steps between them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum

from gallery import errors


class State(StrEnum):
    """Where an upgrade is; transitional ones end in -ing."""

    PENDING = "pending"
    VALIDATING = "validating"
    RUNNING = "running"
    PAUSED = "paused"
    VERIFYING = "verifying"
    AWAITING_CUTOVER = "awaiting_cutover"
    COMPLETED = "completed"
    FINALIZED = "finalized"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"


class Verb(StrEnum):
    """What an operator may ask for."""

    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    CUTOVER = "cutover"
    ROLLBACK = "rollback"
    FINALIZE = "finalize"
    RETRY = "retry"


S = State
NEXT: Mapping[State, frozenset[State]] = {
    S.PENDING: frozenset({S.VALIDATING, S.PAUSED, S.COMPLETED, S.CANCELLING, S.FAILED}),
    S.VALIDATING: frozenset({S.RUNNING, S.PAUSED, S.COMPLETED, S.CANCELLING, S.FAILED}),
    S.RUNNING: frozenset({S.PAUSED, S.VERIFYING, S.CANCELLING, S.FAILED}),
    S.PAUSED: frozenset({S.PENDING, S.RUNNING, S.CANCELLING}),
    S.VERIFYING: frozenset({S.AWAITING_CUTOVER, S.COMPLETED, S.CANCELLING, S.FAILED}),
    S.AWAITING_CUTOVER: frozenset({S.COMPLETED, S.CANCELLING}),
    S.COMPLETED: frozenset({S.FINALIZED, S.ROLLING_BACK}),
    S.FAILED: frozenset({S.PENDING, S.RUNNING, S.CANCELLING}),
    S.CANCELLING: frozenset({S.CANCELLED}),
    S.ROLLING_BACK: frozenset({S.ROLLED_BACK}),
    S.CANCELLED: frozenset(),
    S.ROLLED_BACK: frozenset(),
    S.FINALIZED: frozenset(),
}

#: an upgrade in one of these holds its gallery: no second one may start. `rolling_back`, which is passed through within one
#: transaction, is none of them, because a dry run of the gallery may be active at that moment.
ACTIVE = frozenset(State) - {S.COMPLETED, S.FINALIZED, S.CANCELLED, S.ROLLING_BACK, S.ROLLED_BACK}
#: segments are transformed, or will be
WORKING = frozenset({S.PENDING, S.VALIDATING, S.RUNNING, S.PAUSED, S.FAILED})
#: every segment was transformed; what is written in the source model now is transformed with its request
TRANSFORMED = frozenset({S.VERIFYING, S.AWAITING_CUTOVER, S.COMPLETED})
#: one worker checks whether it may begin, or verifies whether it may complete
JUDGED = frozenset({S.PENDING, S.VALIDATING, S.VERIFYING})
#: a worker has something to do
DRIVEN = frozenset({S.PENDING, S.VALIDATING, S.RUNNING, S.VERIFYING})
#: the holder of a lease may still publish; a paused upgrade lets the segment under way finish
PUBLISHING = frozenset({S.RUNNING, S.PAUSED})
TERMINAL = frozenset({S.FINALIZED, S.CANCELLED, S.ROLLED_BACK})
_DRY_RUN_IS_OVER = frozenset({S.COMPLETED, S.FAILED})

_FROM: Mapping[Verb, frozenset[State]] = {
    Verb.PAUSE: frozenset({S.PENDING, S.VALIDATING, S.RUNNING}),
    Verb.RESUME: frozenset({S.PAUSED, S.FAILED}),
    Verb.CANCEL: ACTIVE - {S.CANCELLING},
    Verb.CUTOVER: frozenset({S.AWAITING_CUTOVER}),
    Verb.ROLLBACK: frozenset({S.COMPLETED}),
    Verb.FINALIZE: frozenset({S.COMPLETED}),
    Verb.RETRY: frozenset({S.FAILED, S.RUNNING, S.PAUSED}),
}
_ALREADY: Mapping[Verb, frozenset[State]] = {
    Verb.PAUSE: frozenset({S.PAUSED}),
    Verb.RESUME: frozenset({S.PENDING, S.VALIDATING, S.RUNNING}),
    Verb.CANCEL: frozenset({S.CANCELLED, S.CANCELLING}),
    Verb.CUTOVER: frozenset({S.COMPLETED}),
    Verb.ROLLBACK: frozenset({S.ROLLED_BACK, S.ROLLING_BACK}),
    Verb.FINALIZE: frozenset({S.FINALIZED}),
    Verb.RETRY: frozenset({S.PENDING, S.VALIDATING, S.VERIFYING, S.AWAITING_CUTOVER, S.COMPLETED}),
}


def step(now: State, then: State) -> State:
    """The next state, if the step is allowed.

    Raises:
        InvalidStateTransition: it is not.
    """
    if then not in NEXT[now]:
        raise errors.InvalidStateTransition(f"an upgrade that is {now} cannot become {then}", allowed=allowed(now))
    return then


def allowed(now: State, *, dry_run: bool = False, above: Collection[State] = (), deleted: bool = False) -> list[str]:
    """The verbs that a state takes.

    Args:
        now: the state.
        dry_run: it is a dry run.
        above: the states of the open upgrades that started on top of this one.
        deleted: its gallery is.
    """
    if deleted or (dry_run and now in _DRY_RUN_IS_OVER):
        return []
    return [verb.value for verb in Verb if now in _FROM[verb] and verb not in _covered(above)]


def wants(
    verb: Verb, now: State, *, dry_run: bool = False, above: Collection[State] = (), deleted: bool = False
) -> bool:
    """Whether the verb has something to do; False if it is so already. The arguments are those of `allowed`.

    Raises:
        InvalidStateTransition: the state does not allow it, or what started on top of it, or there is no gallery any more;
            `allowed` names what they do allow.
    """
    if dry_run and now in _DRY_RUN_IS_OVER:
        raise errors.InvalidStateTransition(
            "a dry run changed nothing, so there is nothing to do; start another", allowed=[]
        )
    if deleted and now not in _ALREADY[verb]:
        raise errors.InvalidStateTransition(
            f"the gallery of this upgrade was deleted, so it takes no {verb} any more", allowed=[]
        )
    if now in _FROM[verb] and verb in _covered(above):
        can = allowed(now, above=above)
        raise errors.InvalidStateTransition(
            f"another upgrade started on top of this one and is {', '.join(above)}: finalize it or take it back before a "
            f"{verb} of this one",
            allowed=can,
        )
    if now in _FROM[verb]:
        return True
    if now in _ALREADY[verb]:
        return False
    can = allowed(now, above=above)
    raise errors.InvalidStateTransition(
        f"an upgrade that is {now} takes no {verb}; it takes {', '.join(can) or 'nothing more'}", allowed=can
    )


def _covered(above: Collection[State]) -> frozenset[Verb]:
    """The verbs that a completed upgrade does not take because of those on top of it.

    Its own columns are what the next one started from and goes back to; while that one is active, it may read the older
    columns too.
    """
    if not above:
        return frozenset()
    return frozenset({Verb.ROLLBACK}) if ACTIVE.isdisjoint(above) else frozenset({Verb.ROLLBACK, Verb.FINALIZE})
