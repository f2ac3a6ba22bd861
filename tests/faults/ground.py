"""What everything stands on fails: the database, the disk, the files, the clock; and two that want the same."""

from __future__ import annotations

import signal
import threading
from typing import Any

import httpx

from tests.acceptance.system import wait_for
from tests.faults.record import ITEMS, Client
from tests.faults.shared import SEVERAL, damage, is_completed, repair
from tests.faults.stage import SECONDS, Judgement, Stage, Try


def database_restarts(stage: Stage, run: Try, *, crash: bool) -> Judgement:
    """The database goes away under searches, writes and an upgrade, and comes back."""
    assert stage.postgres is not None
    run.interrupted = True
    run.start(throttle={"items_per_second": 30})
    with run.traffic():
        stage.postgres.restart(crash=crash)
        stage.catalog.close()
        wait_for(lambda: is_completed(run), SECONDS, lambda: str(run.document()))
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
        for _ in range(SEVERAL):
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
    name = damage(stage, run.derived()[0].file)
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
    name = damage(stage, run.derived()[0].file)
    assert [said for said in run.damaged() if name in said], "the damage is not found"
    repair(stage, run)
    assert name in run.repaired()
    with run.traffic():
        repair(stage, run)
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
        repair(stage, run)
        assert name in run.repaired()
    return run.judge()


def source_column_is_damaged(stage: Stage, run: Try) -> Judgement:
    """A native column is damaged: nothing is derived from it, and it is named until someone brings its bytes back."""
    stage.worker.kill()
    column = run.native()[0]
    whole = stage.files.path(column.file).read_bytes()
    name = damage(stage, column.file)
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
