"""Processes that are killed at a point, and what must hold after that."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx

from tests.acceptance.system import wait_for
from tests.faults.record import ITEMS, Client
from tests.faults.shared import segments_of
from tests.faults.stage import SECONDS, Judgement, Stage, Try

_CROWD = 8  # clients that write at once


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
    wait_for(lambda: segments_of(stage, run) == 1, SECONDS, lambda: f"{segments_of(stage, run)} segments are left")
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


def crowded_api_dies(stage: Stage, run: Try, point: str) -> Judgement:
    """An API process dies with the writes of many clients in its hands; all repeat theirs, and the gallery is upgraded."""
    stage.restart(stage.victim, point)
    shares = [ITEMS[at::_CROWD] for at in range(_CROWD)]

    def until_it_dies(ids: Sequence[str]) -> None:
        client = Client(run.book, stage.victim)
        while client.upsert(ids) == "acknowledged":
            pass

    with run.traffic(), ThreadPoolExecutor(_CROWD) as clients:
        list(clients.map(until_it_dies, shares))
        stage.died(stage.victim)
        stage.restart(stage.victim)
        assert set(clients.map(Client(run.book, stage.victim).upsert, shares)) == {"acknowledged"}
    versions = [write.version for write in run.book.writes if write.version is not None]
    assert len(set(versions)) < len(versions), "no two of them shared a commit"
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
