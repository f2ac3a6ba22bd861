"""An upgrade as Server-Sent Events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from service.api import stream
from service.keys import create_key, revoke_key
from tests.acceptance.system import wait_for
from tests.service.world import World, events, opened


def follow(world: World, upgrade: str, last: int | None = None) -> httpx.Response:
    """The whole stream of an upgrade that ends."""
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    return world.client.get(f"/admin/upgrades/{upgrade}/events", headers=headers)


def states(text: str) -> list[str]:
    return [data["state"] for _, name, data in events(text) if name == "state"]


def follow_and_act(
    world: World,
    upgrade: str,
    later: Callable[[Callable[[], object]], None],
    acts: Mapping[str, Callable[[], object]],
) -> str:
    """The whole stream of an upgrade; at the first event that tells one of these states, something is done."""
    lines, left = list[str](), dict(acts)
    with world.client.stream("GET", f"/admin/upgrades/{upgrade}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            lines.append(line)
            told = states("\n".join(lines)) if line == "" else []
            if told and (act := left.pop(told[-1], None)):
                later(act)
    assert not left
    return "\n".join(lines)


@pytest.fixture
def later() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Do something in another thread, while the test reads a stream."""
    threads: list[threading.Thread] = []

    def start(act: Callable[[], object]) -> None:
        threads.append(threading.Thread(target=act))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def test_a_newcomer_is_told_how_it_stands_and_then_every_change(
    world: World, later: Callable[[Callable[[], object]], None]
) -> None:
    upgrade = world.start()
    acts = {"pending": world.work, "completed": lambda: world.verb(upgrade, "finalize")}
    text = follow_and_act(world, upgrade, later, acts)
    assert states(text) == ["pending", "validating", "running", "verifying", "completed", "finalized"]
    found = events(text)
    assert found[0][1] == "state"
    assert [event_id for event_id, _, _ in found] == sorted(event_id for event_id, _, _ in found)
    progress = [data for _, name, data in found if name == "progress"]
    assert progress[0]["fraction"] == 0.0
    assert progress[-1]["fraction"] == 1.0
    assert all(data["id"] == upgrade for _, name, data in found if name == "state")


def test_a_change_that_comes_while_a_newcomer_is_told_how_it_stands_is_told_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade, look = world.start(), stream._look
    cancel = iter([lambda: world.verb(upgrade, "cancel")])

    def then_cancelled(*given: Any) -> Any:
        found = look(*given)
        next(cancel, lambda: None)()
        return found

    monkeypatch.setattr(stream, "_look", then_cancelled)
    told = states(follow(world, upgrade).text)
    assert (told[0], told[-1]) == ("pending", "cancelled")


def test_what_was_missed_is_sent_after_the_last_event_id(world: World) -> None:
    upgrade = world.upgraded()
    world.verb(upgrade, "rollback")
    whole = follow(world, upgrade, 0)
    assert states(whole.text) == [
        "pending",
        "validating",
        "running",
        "verifying",
        "completed",
        "rolling_back",
        "rolled_back",
    ]
    ids = [event_id for event_id, name, _ in events(whole.text) if name == "state"]
    assert states(follow(world, upgrade, ids[4]).text) == ["rolling_back", "rolled_back"]
    assert states(follow(world, upgrade).text) == ["rolled_back"]


def test_a_client_that_has_seen_all_of_it_need_not_come_again(world: World) -> None:
    upgrade = world.start()
    world.verb(upgrade, "cancel")
    last = events(follow(world, upgrade).text)[-1][0]
    assert follow(world, upgrade, last).status_code == 204


def test_a_stream_ends_where_the_gallery_is_deleted(world: World) -> None:
    upgrade = world.upgraded()
    world.client.delete("/galleries/photos")
    answer = follow(world, upgrade)
    assert states(answer.text) == ["completed"]
    assert follow(world, upgrade, events(answer.text)[-1][0]).status_code == 204


def test_progress_comes_at_least_each_second_while_it_moves(world: World) -> None:
    upgrade = world.start(throttle={"items_per_second": 0.001})
    world.work()
    at = []
    with world.client.stream("GET", f"/admin/upgrades/{upgrade}/events") as answer:
        for line in answer.iter_lines():
            if line == "event: progress":
                at.append(time.monotonic())
            if len(at) == 4:
                break
    # Of three, since one may fall where the machine is busy with something else.
    assert median(later - earlier for earlier, later in pairwise(at)) < 1


def test_a_stream_ends_when_the_process_is_asked_to_stop(
    world: World, later: Callable[[Callable[[], object]], None]
) -> None:
    upgrade = world.start()
    closed = list[float]()

    def close() -> None:
        closed.append(time.monotonic())
        world.app.state.process.closing = True

    assert states(follow_and_act(world, upgrade, later, {"pending": close})) == ["pending"]
    assert time.monotonic() - closed[0] < 10  # it would go on for as long as the upgrade waits


def test_a_stream_ends_when_its_key_is_revoked(world: World, later: Callable[[Callable[[], object]], None]) -> None:
    upgrade = world.start()
    create_key(world.store.catalog, "other", "admin")
    world.client.headers["authorization"] = f"Bearer {create_key(world.store.catalog, 'operator', 'admin')}"
    wait_for(lambda: world.client.get("/models").status_code == 200, 5, lambda: "the key is not known")
    revoked = list[float]()

    def revoke() -> None:
        revoked.append(time.monotonic())
        revoke_key(world.store.catalog, "operator")

    assert states(follow_and_act(world, upgrade, later, {"pending": revoke})) == ["pending"]
    assert time.monotonic() - revoked[0] < 10  # it would go on for as long as the upgrade waits
    world.refused(follow(world, upgrade), 401, "unauthenticated")


def test_a_stream_does_not_hold_up_other_requests(world: World) -> None:
    upgrade = world.start()
    with world.client.stream("GET", f"/admin/upgrades/{upgrade}/events") as answer:
        lines = answer.iter_lines()
        next(lines)
        other = httpx.get(world.client.base_url.join("/health/live"))
        assert other.json() == {"status": "ok"}


def test_followers_of_an_upgrade_look_at_it_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty that each read the catalog by themselves would look twenty times as often as one."""
    upgrade = world.start(throttle={"items_per_second": 0.001})
    world.work()
    looked, count = list[float](), stream.progress_document

    def counted(*given: Any) -> Any:
        looked.append(time.monotonic())
        return count(*given)

    with ExitStack() as stack:
        followers = [
            stack.enter_context(world.client.stream("GET", f"/admin/upgrades/{upgrade}/events")).iter_lines()
            for _ in range(20)
        ]
        monkeypatch.setattr(stream, "progress_document", counted)
        told = [sum(line == "event: progress" for line in islice(each, 20)) for each in followers]
    assert min(told) >= 4  # each is told of it as if it were alone
    assert len(looked) <= 2 * max(told)


def test_streams_beyond_their_number_are_refused_and_hold_up_nobody(tmp_path: Path) -> None:
    with opened(tmp_path, max_streams=1) as world:
        path = f"/admin/upgrades/{world.prepared().filled().start()}/events"
        with world.client.stream("GET", path) as first:
            lines = first.iter_lines()  # let go of, it would close the stream
            next(lines)
            world.refused(world.client.get(path), 429, "overloaded")
            assert world.get("/health/ready")

        def again() -> bool:
            with world.client.stream("GET", path) as answer:
                return answer.status_code == 200

        wait_for(again, 20, lambda: "the place was not given back")
