"""Every fault: how it is brought about, and what must hold while it lasts and after it.

Each case is a function of a stage and a try. It ends with a judgement, or raises where the story itself went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from tests.acceptance.system import Process, wait_for
from tests.faults.history import Outcome
from tests.faults.record import ITEMS, Client
from tests.faults.stage import SECONDS, Judgement, Play, Stage, Try

_QUEUE = "forwardfill"
_SEVERAL = 3


@dataclass(frozen=True)
class Case:
    """One try."""

    fault: str
    point: str
    play: Play
    #: whether it can come where messages are files and the database is one
    embedded: bool = True


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def worker_dies(stage: Stage, run: Try, point: str) -> Judgement:
    """The worker dies while it upgrades, others write meanwhile, and a new worker goes on."""
    stage.worker.kill()
    run.probe()  # so that a worker searches, too
    run.start()
    stage.restart(stage.worker, point)
    with run.traffic():
        stage.died(stage.worker)
        stage.restart(stage.worker)
        run.wait("completed")
    return run.judge()


def compacting_worker_dies(stage: Stage, run: Try, point: str) -> Judgement:
    """The worker dies while it merges segments."""
    stage.worker.kill()
    stage.api.http.post(f"/admin/galleries/{run.world.gallery}/compact")
    stage.restart(stage.worker, point)
    with run.traffic():
        stage.died(stage.worker)
    stage.restart(stage.worker)
    stage.api.http.post(f"/admin/galleries/{run.world.gallery}/compact")
    wait_for(lambda: _segments(stage, run) == 1, SECONDS, lambda: f"{_segments(stage, run)} segments are left")
    run.start()
    run.wait("completed")
    return run.judge()


def indexing_worker_dies(stage: Stage, run: Try, point: str) -> Judgement:
    """The worker dies while it gives a column its index; then all is upgraded."""
    stage.restart(stage.worker)
    stage.worker.kill()
    run.client.upsert(ITEMS)
    stage.restart(stage.worker, point)
    stage.died(stage.worker)
    stage.restart(stage.worker)
    run.start()
    run.wait("completed")
    return run.judge()


def writing_api_dies(stage: Stage, run: Try, point: str, *, deletes: bool = False, upgraded: bool = False) -> Judgement:
    """An API process dies with a write in its hands; the client repeats it, and the gallery is upgraded."""
    if upgraded:
        run.start()
        run.wait("completed")
    stage.restart(stage.victim, point)
    client = Client(run.book, stage.victim)
    act = client.delete if deletes else client.upsert
    with run.traffic():
        assert act(ITEMS[:12]) == "unknown", f"{point} never came"
        stage.died(stage.victim)
        stage.restart(stage.victim)
        assert act(ITEMS[:12]) == "acknowledged"
    if not upgraded:
        run.start()
        run.wait("completed")
    return run.judge()


def searching_api_dies(stage: Stage, run: Try, point: str) -> Judgement:
    """An API process dies while it searches, or takes over what others wrote."""
    stage.restart(stage.victim, point)
    run.interrupted = True
    with run.traffic():
        client = Client(run.book, stage.victim)
        wait_for(
            lambda: client.look(run.world.new) is None and stage.victim.popen.poll() is not None,
            SECONDS,
            lambda: f"{point} never came",
        )
        stage.died(stage.victim)
        stage.restart(stage.victim)
    run.start()
    run.wait("completed")
    return run.judge()


def verb_dies(stage: Stage, run: Try, point: str, *, verb: str, before: str, after: str) -> Judgement:
    """An API process dies while it does what an operator asked for; who asks again gets it."""
    run.start(cutover="manual" if before == "awaiting_cutover" else "progressive")
    run.wait(before)
    stage.restart(stage.victim, point)
    with run.traffic():
        try:
            run.verb(verb, stage.victim)
        except httpx.TransportError:
            stage.died(stage.victim)
        stage.restart(stage.victim)
        state = run.document()["state"]
        assert state == (after if ".committed:" in point else before), state
        assert run.verb(verb, stage.victim) == (200 if state == after else 202)
        run.wait(after)
    return run.judge(*([run.world.new] if after == "finalized" else []))


def starting_api_dies(stage: Stage, run: Try, point: str) -> Judgement:
    """An API process dies as it starts an upgrade; who asks again with the same key gets the one that there is, or a first."""
    body = {"gallery": run.world.gallery, "transformation": run.world.transformation}
    key = {"Idempotency-Key": run.world.gallery}
    stage.restart(stage.victim, point)
    with run.traffic():
        with suppress(httpx.TransportError):
            raise AssertionError(
                f"{point} never came: {stage.victim.http.post('/admin/upgrades', json=body, headers=key)}"
            )
        stage.died(stage.victim)
        stage.restart(stage.victim)
        answers = [api.http.post("/admin/upgrades", json=body, headers=key) for api in (stage.victim, stage.api)]
        assert [answer.status_code for answer in answers] == [202, 202], answers
        started = {answer.json()["id"] for answer in answers}
        assert len(started) == 1, started
        run.upgrade = started.pop()
        run.wait("completed")
    return run.judge()


def fitting_api_dies(stage: Stage, run: Try, point: str) -> Judgement:
    """An API process dies as it takes the pairs of a fit; who sends them again with the same key has them fitted once."""
    stage.restart(stage.victim, point)
    with suppress(httpx.TransportError):
        raise AssertionError(f"{point} never came: {run.fit(stage.victim)}")
    stage.died(stage.victim)
    stage.restart(stage.victim)
    answers = [run.fit(api) for api in (stage.victim, stage.api)]
    assert len({answer["id"] for answer in answers}) == 1, answers
    with run.traffic():
        run.wait_fitted(answers[0]["id"])
    run.start()
    run.wait("completed")
    return run.judge()


def fitting_worker_dies(stage: Stage, run: Try, point: str) -> Judgement:
    """The worker dies while it fits a transformation, and a new one begins again: it is registered once."""
    stage.restart(stage.worker)
    wait_for(lambda: all(column.index_file for column in run.native()), SECONDS, lambda: "the worker is never idle")
    stage.worker.kill()
    fit = run.fit(stage.api)["id"]
    stage.restart(stage.worker, point)
    with run.traffic():
        stage.died(stage.worker)
        stage.restart(stage.worker)
        run.wait_fitted(fit)
    run.start()
    run.wait("completed")
    return run.judge()


# --- frozen, late, twice ----------------------------------------------------------------------------------------------


def worker_freezes(stage: Stage, run: Try, point: str) -> Judgement:
    """A worker is frozen past its lease, another does its segment, and then it goes on as if nothing had happened."""
    stage.worker.kill()
    run.start()
    stage.restart(stage.worker, point)
    with run.traffic():
        stage.stopped(stage.worker)
        with _another(stage):
            run.wait("completed")
            stage.worker.popen.send_signal(signal.SIGCONT)
            # What it was at is the last that it does; then it ends in good order.
            assert stage.worker.stop() == 0
        stage.restart(stage.worker)
    return run.judge()


def worker_freezes_and_its_files_are_collected(stage: Stage, run: Try, point: str) -> Judgement:
    """A worker is frozen with a file that no row names yet, and somebody collects all such files: it names none that is gone."""
    stage.worker.kill()
    run.start()
    stage.restart(stage.worker, point)
    with run.traffic():
        stage.stopped(stage.worker)
        _collect(stage)
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
    collected = _collect(stage)
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
    for _ in range(_SEVERAL):
        run.client.upsert(ITEMS[:8])
    copies = _repeat(stage, _messages(stage))
    stage.worker.popen.send_signal(signal.SIGCONT)
    with run.traffic():
        run.wait("completed")
    assert copies, "there was no message to repeat"
    _repeat(stage, copies)
    wait_for(lambda: not _messages(stage), SECONDS, lambda: "the late messages are never taken")
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


# --- what it stands on ------------------------------------------------------------------------------------------------


def database_restarts(stage: Stage, run: Try, *, crash: bool) -> Judgement:
    """The database goes away under searches, writes and an upgrade, and comes back."""
    assert stage.postgres is not None
    run.interrupted = True
    run.start(throttle={"items_per_second": 30})
    with run.traffic():
        stage.postgres.restart(crash=crash)
        stage.catalog.close()
        wait_for(lambda: _completed(run), SECONDS, lambda: str(run.document()))
    return run.judge()


def disk_is_full(stage: Stage, run: Try, point: str) -> Judgement:
    """No space is left for what the worker writes: its segments are set aside with the reason, and done when told so."""
    stage.worker.kill()
    run.start()
    stage.restart(stage.worker, point)
    with run.traffic():
        wait_for(lambda: run.document()["state"] == "failed", SECONDS, lambda: str(run.document()))
    failures = stage.api.http.get(f"/admin/upgrades/{run.upgrade}/failures").json()["failures"]
    said = [run.document()["error"] or "", *(failure["error"] for failure in failures)]
    assert any("No space left" in error for error in said), said
    stage.restart(stage.worker)
    assert run.verb("retry") == 202
    run.wait("completed")
    return run.judge()


def disk_is_full_for_a_write(stage: Stage, run: Try, point: str) -> Judgement:
    """An upsert finds no space: it is not acknowledged, nothing of it is left, and the process goes on."""
    stage.restart(stage.victim, point)
    client = Client(run.book, stage.victim)
    with run.traffic():
        for _ in range(_SEVERAL):
            assert client.upsert(ITEMS[:12]) == "unknown", f"{point} never came"
            assert client.look(run.world.old) is not None
    assert stage.victim.popen.poll() is None
    stage.restart(stage.victim)
    run.start()
    run.wait("completed")
    return run.judge()


def derived_column_is_damaged(stage: Stage, run: Try, point: str = "") -> Judgement:
    """A new column is damaged before all is done: it is found, named, and made anew from its source by the upgrade itself.

    With a point, the worker dies as it makes it anew, and the next one goes on.
    """
    stage.worker.kill()
    run.start(cutover="automatic")
    stage.restart(stage.worker, "publish.committed:stop:2")
    stage.stopped(stage.worker)
    name = _damage(stage, run.derived()[0].file)
    if point:
        stage.restart(stage.worker, point)
        stage.died(stage.worker)
        stage.restart(stage.worker)
    else:
        stage.worker.popen.send_signal(signal.SIGCONT)
    run.wait("completed")
    assert name in run.repaired(), "nobody said that it was damaged"
    stage.restart(stage.worker)
    return run.judge()


def served_column_is_damaged(stage: Stage, run: Try) -> Judgement:
    """A column that serves is damaged: `verify` names it, and with `--repair` makes it anew under searches and writes.

    Nobody searches before that: what is read from damaged bytes is wrong, and nothing can be done about it.
    """
    run.start()
    run.wait("completed")
    name = _damage(stage, run.derived()[0].file)
    assert [said for said in run.damaged() if name in said], "the damage is not found"
    _repair(stage, run)
    assert name in run.repaired()
    with run.traffic():
        _repair(stage, run)
    return run.judge()


def served_file_is_gone(stage: Stage, run: Try, which: str) -> Judgement:
    """A derived column or an index of one is gone: a process that starts then answers right, and `verify --repair` mends it."""
    run.start()
    run.wait("completed")
    column = run.derived()[0]
    name = column.file if which == "column" else column.index_file or ""
    stage.files.remove([name])
    stage.restart(stage.victim)
    client = Client(run.book, stage.victim)
    with run.traffic():
        assert client.look(run.world.new), run.book.failures
        _repair(stage, run)
        assert name in run.repaired()
    return run.judge()


def source_column_is_damaged(stage: Stage, run: Try) -> Judgement:
    """A native column is damaged: nothing is derived from it, and it is named until someone brings its bytes back."""
    stage.worker.kill()
    column = run.native()[0]
    whole = stage.files.path(column.file).read_bytes()
    name = _damage(stage, column.file)
    run.start()
    stage.restart(stage.worker)
    run.wait("failed")
    failures = stage.api.http.get(f"/admin/upgrades/{run.upgrade}/failures").json()["failures"]
    assert [failure["segment"] for failure in failures] == [column.segment_id], failures
    assert name in failures[0]["error"], failures
    assert [said for said in run.damaged() if name in said], "the damage is not found"
    stage.files.path(column.file).write_bytes(whole)
    assert run.verb("retry") == 202
    run.wait("completed")
    return run.judge()


def clock_is_set_back(stage: Stage, run: Try) -> Judgement:
    """A worker dies with a lease, and then it is an hour earlier: nobody waits an hour for its end, or for a throttle's."""
    stage.worker.kill()
    run.start(throttle={"items_per_second": 10})
    stage.restart(stage.worker, "lease.committed:kill:1")
    stage.died(stage.worker)
    stage.restart(stage.worker, "clock:-3600")
    stage.restart(stage.victim, "clock:-3600")
    with run.traffic():
        run.wait("completed")
    stage.restart(stage.worker)
    stage.restart(stage.victim)
    return run.judge()


def two_start_at_once(stage: Stage, run: Try) -> Judgement:
    """Two API processes are asked to start an upgrade at the same moment: one does, the other says that it is under way."""
    body = {"gallery": run.world.gallery, "transformation": run.world.transformation}
    together, statuses = threading.Barrier(2), list[tuple[int, dict[str, Any]]]()

    def start(http: httpx.Client) -> None:
        together.wait()
        answer = http.post("/admin/upgrades", json=body)
        statuses.append((answer.status_code, answer.json()))

    threads = [threading.Thread(target=start, args=(api.http,)) for api in (stage.api, stage.victim)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (one, started), (other, refused) = sorted(statuses, key=lambda status: status[0])
    assert (one, other, refused["code"]) == (202, 409, "upgrade_in_progress"), statuses
    run.upgrade = started["id"]
    run.wait("completed")
    return run.judge()


def _repair(stage: Stage, run: Try) -> None:
    assert _command(stage, "verify", "--repair", run.world.gallery) == 0, stage.worker.log.read_text()[-2000:]


def _collect(stage: Stage) -> bool:
    """Collect every file that no row names, however young; False if the catalog was busy all the time."""
    code = _command(stage, "gc", "--delete", "--older-than", "0.001")
    assert code in (0, 2), stage.worker.log.read_text()[-2000:]
    return code == 0


def _command(stage: Stage, *words: str) -> int:
    """As an operator gives it, beside all that goes on; its exit code."""
    return Process(list(words), stage.system.environment, stage.worker.log, stage.system.spawn).popen.wait(SECONDS)


# --- all of them ------------------------------------------------------------------------------------------------------

_WORKER = {
    **dict.fromkeys(["lease", "lease.committed", "read", "written", "publish", "publish.committed"], (1, 3)),
    **dict.fromkeys(["transform", "write_column", "sync", "rename", "build_index"], (1, 2, 4)),
    **dict.fromkeys(["validate", "validate.committed", "cutover", "cutover.committed", "refresh"], (1,)),
}
_UPSERT = {
    **dict.fromkeys(["write_column", "sync", "rename"], (1, 2, 3)),
    **dict.fromkeys(["written", "upsert", "upsert.committed"], (1,)),
}
_VERBS = {
    "cutover": ("awaiting_cutover", "completed"),
    "cancel": ("awaiting_cutover", "cancelled"),
    "rollback": ("completed", "rolled_back"),
    "finalize": ("completed", "finalized"),
}


def cases() -> Iterator[Case]:
    """The whole matrix."""
    yield from _worker_kills()
    yield from _api_kills()
    for point in ("read", "transform", "write_column", "rename", "build_index"):
        # Its other lane may be in a transaction, whose locks PostgreSQL takes away after a while. SQLite cannot.
        alone = point != "build_index"
        yield Case("a worker is frozen", point, partial(worker_freezes, point=f"{point}:stop:1"), embedded=alone)
        frozen = partial(worker_freezes, point=f"{point}:stop:2")
        yield Case("a worker is frozen", f"{point}, at its second segment", frozen, embedded=False)
    yield Case("frozen, and gc", "written", partial(worker_freezes_and_its_files_are_collected, point="written:stop:2"))
    for point, embedded in (("written", True), ("upsert", False)):  # SQLite lets nobody write beside a frozen writer
        frozen = partial(writer_freezes_and_its_files_are_collected, point=f"{point}:stop:1")
        yield Case("frozen, and gc", f"{point} (upsert)", frozen, embedded=embedded)
    yield Case("messages twice and late", "-", messages_come_twice_and_late)
    yield Case("Redis flushed and restarted", "-", messages_are_lost, embedded=False)
    for crash in (False, True):
        how = "crashes" if crash else "restarts"
        yield Case(f"the database {how}", "-", partial(database_restarts, crash=crash), embedded=False)
    for point in ("write_column", "sync", "build_index"):
        yield Case("disk full", point, partial(disk_is_full, point=f"{point}:full:3"))
    for point in ("write_column", "sync"):
        yield Case("disk full", f"{point} (upsert)", partial(disk_is_full_for_a_write, point=f"{point}:full:2"))
    yield Case("a derived column damaged", "verify", derived_column_is_damaged)
    for which in ("column", "index"):
        yield Case(f"a derived {which} gone", "verify", partial(served_file_is_gone, which=which))
    yield Case("a served column damaged", "verify", served_column_is_damaged)
    yield Case("a source column damaged", "read", source_column_is_damaged)
    yield Case("clock set back", "lease.committed", clock_is_set_back)
    for _ in range(_SEVERAL):
        yield Case("two start at once", "-", two_start_at_once)


def _worker_kills() -> Iterator[Case]:
    for point, times in _WORKER.items():
        for nth in times:
            yield _kill(worker_dies, point, "worker", nth)
    for point in ("index", "index.committed"):
        yield _kill(indexing_worker_dies, point, "worker")
    for point in ("repair", "repair.committed"):
        yield _kill(derived_column_is_damaged, point, "worker")
    for point in ("fit_lease", "fit_lease.committed", "sync", "rename", "fit_complete", "fit_complete.committed"):
        yield _kill(fitting_worker_dies, point, "fit")
    for point in ("compact", "compact.committed"):
        yield _kill(compacting_worker_dies, point, "worker")


def _api_kills() -> Iterator[Case]:
    for point, times in _UPSERT.items():
        for nth in times:
            yield _kill(writing_api_dies, point, "upsert", nth)
    for point in ("transform", "write_column", "upsert"):
        yield _kill(writing_api_dies, point, "upsert, upgraded", upgraded=True)
    for point in ("delete", "delete.committed"):
        yield _kill(writing_api_dies, point, "delete", deletes=True)
    for point in ("refresh", "transform"):
        yield _kill(searching_api_dies, point, "search", 2)
    for point in ("start", "start.committed"):
        yield _kill(starting_api_dies, point, "start")
    for point in ("write_column", "fit_start", "fit_start.committed"):
        yield _kill(fitting_api_dies, point, "fit")
    for verb, (before, after) in _VERBS.items():
        for point in (verb, f"{verb}.committed"):
            yield _kill(verb_dies, point, verb, verb=verb, before=before, after=after)


def _kill(play: Callable[..., Judgement], point: str, who: str, nth: int = 1, **more: Any) -> Case:
    return Case("kill -9", f"{point} ({who})", partial(play, point=f"{point}:kill:{nth}", **more))


# --- what they share --------------------------------------------------------------------------------------------------


@contextmanager
def _another(stage: Stage) -> Iterator[None]:
    """Another worker, for as long as a block runs."""
    other = Process(["worker"], stage.system.environment, stage.worker.log, stage.system.spawn)
    try:
        yield
    finally:
        other.kill()


def _completed(run: Try) -> bool:
    try:
        return bool(run.document()["state"] == "completed")
    except (AssertionError, httpx.TransportError):  # the database is not back yet
        return False


def _segments(stage: Stage, run: Try) -> int:
    return int(stage.api.http.get(f"/galleries/{run.world.gallery}").json()["segments"])


def _damage(stage: Stage, name: str) -> str:
    """Turn one bit of a file's last byte but one."""
    with stage.files.path(name).open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    return name


def _messages(stage: Stage) -> list[str]:
    """What waits in the queue."""
    if stage.redis is not None:
        return [message.decode() for message in stage.redis.client.lrange(_QUEUE, 0, -1)]
    found = []
    for path in (stage.system.data / "broker" / "messages").glob("*.msg"):
        with suppress(FileNotFoundError):  # taken meanwhile
            found.append(path.read_text())
    return found


def _repeat(stage: Stage, messages: list[str]) -> list[str]:
    """Put messages into the queue as if they had been sent once more."""
    for at, message in enumerate(messages):
        if stage.redis is not None:
            stage.redis.client.lpush(_QUEUE, message)
        else:
            folder = stage.system.data / "broker" / "messages"
            part = folder / f"{_QUEUE}.{at:020d}.again.part"
            part.write_text(json.dumps(json.loads(message)))
            part.rename(part.with_suffix(".msg"))
    return messages
