"""What a worker does for an upgrade: the next small step, by its state. Any worker may do any step, any number of times."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors, repair
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, UpgradeRow, now
from gallery.catalog.transaction import UNANSWERED, in_words
from gallery.columns import verify
from gallery.heartbeat import Stopped, heartbeat
from gallery.search.run import Searcher
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.upgrade import gate, lifecycle, live, segment, sources, validation
from gallery.upgrade.lanes import Lanes
from gallery.upgrade.moves import Changed, complete, drop, locked, move
from gallery.upgrade.states import DRIVEN, JUDGED, State

log = structlog.get_logger()


class _Unmeasured(Exception):
    """Nothing was measured for the cutover yet, since the upgrade still verified when that was looked at."""


def due(store: Store, states: Collection[State] = DRIVEN) -> list[str]:
    """Upgrades in some states for which a worker could do something now, and no other does it already."""
    with store.catalog.reading() as session:
        return list(_due_in(store, session, states))


def another_due(store: Store, upgrade_id: str) -> bool:
    """Whether any but this one is due. Among hundreds that are under way, the first that is found will do."""
    with store.catalog.reading() as session:
        return any(other != upgrade_id for other in _due_in(store, session))


def under_way(store: Store) -> bool:
    """Whether any upgrade is under way, in whatever state."""
    with store.catalog.reading() as session:
        return session.scalar(select(UpgradeRow.id).where(UpgradeRow.active).limit(1)) is not None


def advance(
    store: Store,
    galleries: Galleries,
    searcher: Searcher,
    upgrade_id: str,
    owner: str,
    more: Callable[[], bool] | None = None,
    between: Callable[[], None] = lambda: None,
) -> bool:
    """Do the next step of an upgrade; False if there is nothing to do now, or it was given up.

    Args:
        store: where the upgrade is.
        galleries: what searches of this process see, to measure quality.
        searcher: of this process.
        upgrade_id: which.
        owner: who leases segments, and the upgrade itself while it is judged.
        more: whether to go on with more segments, several at once, after one is done; None: one segment is a step.
        between: is called often while everything of a gallery is read; it raises `Stopped` to give the step up.
    """
    with store.catalog.reading() as session:
        state = State(upgrade_rows.upgrade_row(session, upgrade_id).state)
    if state in JUDGED:
        judge = finish if state is State.VERIFYING else validation.validate
        return _judge(store, upgrade_id, owner, between, partial(judge, store, galleries, searcher, upgrade_id))
    if state is State.RUNNING:

        def published() -> None:
            live.look(store, galleries, searcher, upgrade_id)

        lanes = Lanes(store, upgrade_id, owner, published=published, more=more)
        return lanes.run() or settle(store, upgrade_id)
    return False


def _judge(
    store: Store,
    upgrade_id: str,
    owner: str,
    between: Callable[[], None],
    judge: Callable[[Callable[[], None]], bool],
) -> bool:
    """Check or verify an upgrade under a lease on it. That may read the whole gallery, so no other worker need do it too.

    Args:
        store: where the upgrade is.
        upgrade_id: which.
        owner: who leases it.
        between: as for `advance`.
        judge: does it. It often calls the function that it is given, which calls `between`, and raises `Stopped` if the lease is
            lost.

    Returns:
        What `judge` does; False where another holds it, or it was given up.
    """
    seconds = store.settings.lease_seconds
    with store.catalog.transaction() as tx:
        if not upgrade_rows.lease_upgrade(tx.session, upgrade_id, JUDGED, owner=owner, seconds=seconds):
            return False

    def renew(session: Session) -> bool:
        return upgrade_rows.renew_upgrade(session, upgrade_id, JUDGED, owner=owner, seconds=seconds)

    try:
        with heartbeat(store, f"upgrade {upgrade_id}", renew) as lost:
            return judge(partial(_go_on, between, lost))
    except Stopped:
        return False
    finally:
        with suppress(*UNANSWERED), store.catalog.transaction() as tx:  # else it ends by itself
            upgrade_rows.release_upgrade(tx.session, upgrade_id, owner=owner)


def _go_on(between: Callable[[], None], lost: threading.Event) -> None:
    between()
    if lost.is_set():
        raise Stopped


def settle(store: Store, upgrade_id: str) -> bool:
    """When no segment is left to lease or held by a worker: go on to verify, or fail with what was set aside."""
    with store.catalog.reading() as session:
        left = upgrade_rows.counts(session, upgrade_id).segments
    if left.get("pending") or left.get("leased"):
        return False
    with store.catalog.transaction() as tx:
        # The gallery's row is locked: no write can add a segment between this count and the step.
        row, _ = locked(tx.session, upgrade_id)
        left = upgrade_rows.counts(tx.session, upgrade_id).segments
        if row.state != State.RUNNING or left.get("pending") or left.get("leased"):
            return False
        if left.get("failed"):
            row.error = f"{left['failed']} segments failed; see failures, then retry or cancel"
            move(tx.session, row, State.FAILED, error=row.error)
        else:
            move(tx.session, row, State.VERIFYING)
    return True


def finish(
    store: Store, galleries: Galleries, searcher: Searcher, upgrade_id: str, between: Callable[[], None]
) -> bool:
    """Read every new column again, look for segments without one, measure, then complete or wait for the cutover.

    An upgrade whose gate is missed by the upgraded columns fails; resumed, it completes in spite of that. The arguments are
    those of `validation.validate`.
    """
    damaged = _damaged(store, upgrade_id, between)
    if damaged:
        return _set_aside(store, upgrade_id, damaged)
    try:
        compared = live.before_cutover(store, galleries, searcher, upgrade_id)
    except UNANSWERED:
        raise  # nothing was found out, so the step is done again
    except Exception as error:  # noqa: BLE001 - whatever cannot be verified is a reason not to complete
        return fail(store, upgrade_id, State.VERIFYING, in_words(error))
    with store.catalog.transaction("cutover") as tx:
        row, gallery = locked(tx.session, upgrade_id)
        if row.state != State.VERIFYING:
            return False
        row.quality = live.verified(row, compared, now())
        missing = _without_target(tx.session, row)
        if missing:
            row.error = f"segments {missing[:5]} have no column of {row.target.name}"
            move(tx.session, row, State.FAILED, error=row.error)
        elif row.cutover == "manual":
            move(tx.session, row, State.AWAITING_CUTOVER)  # whoever asks for the cutover is told of the gate
        elif gate.stops(row.quality):
            row.error = (gate.closed(row.quality) or {}).get("detail")
            move(tx.session, row, State.FAILED, error=row.error)
        else:
            row.quality = live.served(row)
            complete(tx.session, row, gallery)
    return True


def cutover(
    store: Store,
    galleries: Galleries,
    searcher: Searcher,
    upgrade_id: str,
    *,
    accept_below_gate: bool = False,
    actor: str | None = None,
) -> Changed:
    """Let all transformed segments serve at once, if they pass the gate.

    Raises:
        GateClosed: they are not, and that was not accepted.
    """
    with store.catalog.reading() as session:
        waits = upgrade_rows.upgrade_row(session, upgrade_id).state == State.AWAITING_CUTOVER
    compared = live.before_cutover(store, galleries, searcher, upgrade_id) if waits else None

    def admit(row: UpgradeRow) -> None:
        if not waits:
            raise _Unmeasured
        row.quality = live.verified(row, compared, now())
        if (found := gate.closed(row.quality)) and not accept_below_gate:
            raise errors.GateClosed(
                f'{found["detail"]}; repeat with {{"accept_below_gate": true}} to let it serve in spite of that',
                limit=found["limit"],
            )
        row.quality = live.served(row)

    try:
        return lifecycle.cutover(store, upgrade_id, actor=actor, admit=admit)
    except _Unmeasured:  # verifying ended after the look
        return cutover(store, galleries, searcher, upgrade_id, accept_below_gate=accept_below_gate, actor=actor)


def fail(store: Store, upgrade_id: str, expected: State, error: str) -> bool:
    """Stop an upgrade that is still in the expected state; a person resumes or cancels it."""
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if row.state != expected:
            return False
        row.error = error[:2000]
        move(tx.session, row, State.FAILED, error=row.error)
    return True


def _due_in(store: Store, session: Session, states: Collection[State] = DRIVEN) -> Iterator[str]:
    rows = session.scalars(select(UpgradeRow).where(UpgradeRow.active, UpgradeRow.state.in_(states)))
    return (row.id for row in rows if _due(session, row, store.settings.lease_seconds))


def _due(session: Session, row: UpgradeRow, lease_seconds: float) -> bool:
    if row.state in JUDGED:
        return upgrade_rows.unattended(session, row.id, lease_seconds)
    left = upgrade_rows.counts(session, row.id).segments
    if not left.get("pending") and not left.get("leased"):
        return True
    return segment.hold(session, row) is None and upgrade_rows.next_free(session, row.id, lease_seconds) is not None


def _damaged(store: Store, upgrade_id: str, between: Callable[[], None]) -> dict[int, str]:
    """By column id, what is wrong with columns of an upgrade that are damaged and could not be made anew."""
    with store.catalog.reading() as session:
        columns = list(session.scalars(select(ColumnRow).where(ColumnRow.upgrade_id == upgrade_id)))
    found: dict[int, str] = {}
    # Nothing is transformed any more, so digests may use the processors.
    threads = ThreadPoolExecutor(store.settings.segments_at_once, thread_name_prefix="verify")
    read = [(column, threads.submit(verify, store.files, column.file, column.sha256)) for column in columns]
    try:
        for _, verified in read:
            between()
            verified.exception()
    finally:
        threads.shutdown(cancel_futures=True)
    for column, verified in read:
        try:
            verified.result()
        except errors.Damaged as error:
            log.warning("column_damaged", upgrade=upgrade_id, segment=column.segment_id, error=str(error))
            if not repair.attempt(store, error):
                found[column.id] = str(error)
    return found


def _set_aside(store: Store, upgrade_id: str, damaged: Mapping[int, str]) -> bool:
    """Drop damaged columns, and fail the upgrade. A retry makes them again, once what they are made from is whole."""
    with store.catalog.transaction() as tx:
        row, _ = locked(tx.session, upgrade_id)
        if row.state != State.VERIFYING:
            return False
        columns = [column for key in damaged if (column := tx.session.get(ColumnRow, key)) is not None]
        if not columns:  # another worker saw to them
            return True
        for column in columns:
            upgrade_rows.set_aside(tx.session, row.id, column.segment_id, damaged[column.id])
        drop(store, tx, columns)
        why = next(iter(damaged.values()))
        row.error = f"{len(damaged)} columns were damaged ({why}); see failures, then retry or cancel"
        move(tx.session, row, State.FAILED, error=row.error)
    return True


def _without_target(session: Session, row: UpgradeRow) -> list[int]:
    """Segments that should have a column of the target and have none; found by a join, never by counts."""
    skipped = {s.segment_id for s in upgrade_rows.in_state(session, row.id, "skipped")}
    lacking = segment_rows.without_model(session, row.gallery_id or 0, row.target_id)
    lacking = [segment for segment in lacking if segment.id not in skipped]
    left_out = row.missing_side == "skip"
    made_from = sources.of_segments(session, row, lacking)
    return [s.id for s, source in zip(lacking, made_from, strict=True) if source is not None or not left_out]
