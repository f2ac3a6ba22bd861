"""Workers that are frozen and thawed, and messages that come late, twice, or never."""

from __future__ import annotations

import signal
import threading

from sqlalchemy.exc import OperationalError

from tests.acceptance.system import wait_for
from tests.faults.history import Outcome
from tests.faults.record import ITEMS, Client
from tests.faults.shared import SEVERAL, another_worker, collect, sent_again, waiting_messages
from tests.faults.stage import SECONDS, Judgement, Stage, Try


def worker_freezes(stage: Stage, run: Try, point: str) -> Judgement:
    """A worker is frozen past its lease, another does its segment, and then it goes on as if nothing had happened.

    Who is frozen in a transaction keeps its locks. PostgreSQL takes them away in time; SQLite, which has one for all writers,
    cannot, so there nothing else may be under way, and the worker is frozen without it.
    """
    stage.worker.kill()
    run.start()
    stage.restart(stage.worker, point, segments_at_once=2 if stage.postgres else 1)
    with run.traffic():
        stage.stopped(stage.worker)
        if not stage.postgres:
            _without_the_lock(stage)
        with another_worker(stage):
            run.wait("completed")
            stage.worker.popen.send_signal(signal.SIGCONT)
            # What it was at is the last that it does; then it ends in good order.
            assert stage.worker.stop() == 0
        stage.restart(stage.worker)
    return run.judge()


def _without_the_lock(stage: Stage) -> None:
    """Freeze the worker anew if it was frozen with SQLite's lock: its heartbeat may have been at a commit just then."""
    try:
        with stage.catalog.transaction() as tx:
            tx.session.connection()
    except OperationalError:
        stage.worker.popen.send_signal(signal.SIGCONT)
        with stage.catalog.transaction() as tx:
            tx.session.connection()  # its commit is done, and it cannot begin another
            stage.worker.popen.send_signal(signal.SIGSTOP)
            stage.stopped(stage.worker)


def worker_freezes_and_its_files_are_collected(stage: Stage, run: Try, point: str) -> Judgement:
    """A worker is frozen with a file that no row names yet, and somebody collects all such files: it names none that is gone."""
    stage.worker.kill()
    run.start()
    stage.restart(stage.worker, point)
    with run.traffic():
        stage.stopped(stage.worker)
        collect(stage)
        stage.worker.popen.send_signal(signal.SIGCONT)
        run.wait("completed")
    stage.restart(stage.worker)
    return run.judge()


def writer_freezes_and_its_files_are_collected(stage: Stage, run: Try, point: str) -> Judgement:
    """Likewise an API process with an upsert in its hands: what it cannot name it does not acknowledge.

    Where it is about to commit, it has its files, and they are left alone.
    """
    named = point.startswith("upsert")
    stage.worker.kill()  # which may hold the gallery too, and then its files are left for the next time
    stage.restart(stage.victim, point)
    client, outcomes = Client(run.book, stage.victim), list[Outcome]()
    writing = threading.Thread(target=lambda: outcomes.append(client.upsert(ITEMS[:12])))
    writing.start()
    stage.stopped(stage.victim)
    # Another thread of the frozen process may be writing: on SQLite nobody can then, and nothing is collected.
    collected = collect(stage)
    stage.victim.popen.send_signal(signal.SIGCONT)
    writing.join()
    assert outcomes == ["acknowledged" if named or not collected else "unknown"], outcomes
    stage.restart(stage.worker)
    with run.traffic():
        assert client.upsert(ITEMS[:12]) == "acknowledged"
        stage.restart(stage.victim)
    run.start()
    run.wait("completed")
    return run.judge()


def messages_come_twice_and_late(stage: Stage, run: Try) -> Judgement:
    """Every message waits while the worker is suspended, comes twice, and all of them once more when all is done."""
    # Idle first: who is frozen in the middle of a transaction holds its locks, and SQLite has one for all writers.
    wait_for(lambda: all(column.index_file for column in run.native()), SECONDS, lambda: "the worker is never idle")
    stage.worker.popen.send_signal(signal.SIGSTOP)
    run.start()
    for _ in range(SEVERAL):
        run.client.upsert(ITEMS[:8])
    # Redis gives the first message to the suspended worker, which had asked for it; the next is sent a tenth of a second later.
    wait_for(lambda: waiting_messages(stage), SECONDS, lambda: "there is no message to repeat")
    copies = sent_again(stage, waiting_messages(stage))
    stage.worker.popen.send_signal(signal.SIGCONT)
    with run.traffic():
        run.wait("completed")
    sent_again(stage, copies)
    wait_for(lambda: not waiting_messages(stage), SECONDS, lambda: "the late messages are never taken")
    return run.judge()


def messages_are_lost(stage: Stage, run: Try) -> Judgement:
    """The broker forgets all messages, dies, and comes back."""
    assert stage.redis is not None
    run.start(throttle={"items_per_second": 30})
    with run.traffic():
        stage.redis.client.flushall()
        stage.redis.kill()
        run.client.upsert(ITEMS[:8])
        stage.redis.start()
        stage.redis.client.flushall()
        run.wait("completed")
    return run.judge()
