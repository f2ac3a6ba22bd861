"""Following an upgrade: its events, and the wait for a state."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest

from forwardfill.client import ForwardfillError, UpgradeStoppedError
from forwardfill.wire import parse_events
from tests.forwardfill.answering import Handler, client_of, upgrade

#: as the service tells of a pause that its gate made
CLOSED = [
    {"type": "paused", "reason": "gate_closed", "detail": "its gate closed; resume it with POST .../resume"},
    {"type": "gate_closed", "reason": "min_cmc1", "detail": "CMC-1 is 0.5, below 0.9"},
]
ASKED_FOR = [{"type": "paused", "reason": "requested", "detail": "paused as somebody asked for"}]

STREAM = (
    ': a comment\n\nid: 41\nevent: state\ndata: {"state":"running",\ndata: "at":"\u2028now"}\n\n'
    'event: progress\ndata: {"fraction":0.5}\r\n\r\nevent: nothing\n\ndata: {"unfinished":1}\n'
)


class Drops(httpx.SyncByteStream):
    """A stream in awkward pieces, which breaks at its end if asked to."""

    def __init__(self, text: str, *, breaks: bool = False) -> None:
        self._bytes = text.encode()
        self._breaks = breaks

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._bytes), 3):
            yield self._bytes[start : start + 3]
        if self._breaks:
            raise httpx.ReadError("the connection was lost")


def test_events_have_a_name_data_and_the_last_id_and_an_unfinished_one_is_none() -> None:
    events = list(parse_events(STREAM.replace("\r", "").removesuffix("\n").split("\n")))
    assert [(event.name, event.data, event.id) for event in events] == [
        ("state", {"state": "running", "at": "\u2028now"}, "41"),
        ("progress", {"fraction": 0.5}, "41"),
    ]


def test_events_survive_any_cut_of_the_stream() -> None:
    with client_of(lambda _: httpx.Response(200, stream=Drops(STREAM))) as client:
        assert [event.name for event in client.events("01JD")] == ["state", "progress"]


class Upgrades:
    """An upgrade that is in the next state each time it is asked for; its streams tell so, or break."""

    def __init__(self, *states: str, breaks: bool = False) -> None:
        self._states = list(states)
        self._breaks = breaks
        self.seen: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
            return httpx.Response(200, json=upgrade(state))
        self.seen.append(request.headers.get("last-event-id"))
        number = len(self.seen)
        news = f'id: {number}\nevent: progress\ndata: {{"fraction":0.1}}\n\n'
        if not self._breaks:
            news += f'id: {number}\nevent: state\ndata: {{"state":"?"}}\n\n'
        return httpx.Response(200, stream=Drops(news, breaks=self._breaks))


def test_waiting_ends_in_the_state_that_was_asked_for() -> None:
    service = Upgrades("pending", "running", "verifying", "completed")
    with client_of(service) as client:
        assert client.wait("01JD")["state"] == "completed"
    assert service.seen == [None, "1", "2"]


def test_a_broken_stream_is_taken_up_where_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardfill.following.RECONNECT_SECONDS", 0.0)
    service = Upgrades("running", "running", "paused", breaks=True)
    with client_of(service) as client:
        assert client.wait("01JD", until={"paused", "completed"})["state"] == "paused"
    assert service.seen == [None, "1"]


class StartsAgain:
    """Before a service that answers everything but the first question as one that is away, so many times."""

    def __init__(self, service: Handler, times: int, status: int | None) -> None:
        self._service, self._times, self._status = service, times, status
        self._asked = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self._asked += 1
        if not 1 < self._asked <= 1 + self._times:
            return self._service(request)
        if self._status is None:
            raise httpx.ConnectError("connection refused")
        return httpx.Response(self._status, json={"status": self._status, "code": "unavailable", "detail": "d"})


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("following.RECONNECT_SECONDS", "client.LOOK_SECONDS", "patience.AGAIN_SECONDS"):
        monkeypatch.setattr(f"forwardfill.{name}", 0.0)


AWAY = pytest.mark.parametrize("status", [None, 429, 502, 503, 504])


@AWAY
@pytest.mark.usefixtures("hurry")
def test_a_service_that_starts_again_is_waited_for_with_its_upgrade(status: int | None) -> None:
    with client_of(StartsAgain(Upgrades("running", "completed"), 4, status)) as client:
        assert client.wait("01JD", timeout=30.0)["state"] == "completed"


@AWAY
@pytest.mark.usefixtures("hurry")
def test_a_service_that_starts_again_is_waited_for_with_its_fit(status: int | None) -> None:
    ends = iter([None, "now", None])
    service = StartsAgain(lambda _: httpx.Response(200, json={"finished_at": next(ends)}), 3, status)
    with client_of(service) as client:
        assert [found["finished_at"] for found in client.watch_fit("01JF")] == [None, "now"]


@pytest.mark.usefixtures("hurry")
def test_a_service_that_stays_away_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    service = StartsAgain(Upgrades("running"), 10**9, None)
    with client_of(service) as client, pytest.raises(TimeoutError, match="does not answer"):
        client.wait("01JD", timeout=0.05)
    monkeypatch.setattr("forwardfill.patience.AWAY_SECONDS", 0.05)
    with client_of(StartsAgain(Upgrades("running"), 10**9, None)) as client, pytest.raises(httpx.ConnectError):
        client.wait("01JD")


def test_a_service_that_never_answered_is_not_waited_for() -> None:
    def away(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    with client_of(away) as client, pytest.raises(httpx.ConnectError):
        client.wait("01JD")


@pytest.mark.usefixtures("hurry")
def test_an_upgrade_that_is_gone_is_not_waited_for() -> None:
    gone = {"status": 404, "code": "upgrade_not_found", "detail": "no upgrade has the id"}
    service = iter([httpx.Response(200, json=upgrade("running")), *(httpx.Response(404, json=gone) for _ in range(2))])
    with client_of(lambda _: next(service)) as client, pytest.raises(ForwardfillError, match="upgrade_not_found"):
        client.wait("01JD")


def test_waiting_for_what_cannot_come_any_more_is_an_error() -> None:
    with client_of(Upgrades("running", "failed")) as client, pytest.raises(UpgradeStoppedError, match="failed"):
        client.wait("01JD")


@pytest.mark.parametrize("state", ["running", "paused", "awaiting_cutover", "done"])
def test_a_state_that_does_not_come_after_completion_is_not_waited_for(state: str) -> None:
    with client_of(Upgrades("completed")) as client, pytest.raises(UpgradeStoppedError, match="is completed"):
        client.wait("01JD", until=state, timeout=30.0)


def in_turn(*upgrades: dict[str, Any]) -> Handler:
    """An upgrade that is the next one each time it is asked for, and the last one from then on; its streams end at once."""
    left = list(upgrades)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return httpx.Response(200, stream=Drops("event: state\ndata: {}\n\n"))
        return httpx.Response(200, json=left.pop(0) if len(left) > 1 else left[0])

    return answer


def test_a_pause_that_a_gate_made_is_not_waited_out_because_only_a_person_ends_it() -> None:
    paused = upgrade("paused", conditions=CLOSED)
    with client_of(in_turn(upgrade("running"), paused)) as client, pytest.raises(UpgradeStoppedError) as caught:
        client.wait("01JD", timeout=30.0)
    assert caught.value.upgrade == paused
    for condition in CLOSED:
        assert condition["detail"] in str(caught.value)


def test_a_pause_that_is_waited_for_is_found_whoever_made_it() -> None:
    for conditions in (CLOSED, ASKED_FOR):
        with client_of(in_turn(upgrade("paused", conditions=conditions))) as client:
            assert client.wait("01JD", until={"paused", "completed"})["conditions"] == conditions


def test_a_pause_that_somebody_asked_for_and_a_manual_cutover_are_waited_out() -> None:
    paused, waits = upgrade("paused", conditions=ASKED_FOR), upgrade("awaiting_cutover", conditions=CLOSED[1:])
    with client_of(in_turn(paused, upgrade("running"), waits, upgrade("completed"))) as client:
        assert client.wait("01JD", timeout=30.0)["state"] == "completed"


def test_waiting_has_a_limit() -> None:
    with client_of(Upgrades("running")) as client, pytest.raises(TimeoutError, match="running"):
        client.wait("01JD", timeout=0.0)


class Rests:
    """An upgrade that rests: its streams send comments, or nothing, and keep the read timeout that they were asked with."""

    def __init__(self, comments: Iterable[bytes] = ()) -> None:
        self._comments = comments
        self.timeouts: list[float] = []
        self.looks: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            self.looks.append(request.extensions["timeout"]["read"])
            return httpx.Response(200, json=upgrade("paused"))
        self.timeouts.append(request.extensions["timeout"]["read"])
        return httpx.Response(200, stream=Silence(self._comments))


class Silence(httpx.SyncByteStream):
    """Comments, and then nothing within the read timeout."""

    def __init__(self, comments: Iterable[bytes]) -> None:
        self._comments = comments

    def __iter__(self) -> Iterator[bytes]:
        yield from self._comments
        raise httpx.ReadTimeout("nothing came")


def comments() -> Iterator[bytes]:
    """Comments without an end, though no test should read them for seconds."""
    patience = time.monotonic() + 5.0
    while time.monotonic() < patience:
        yield b": still here\n\n"
    pytest.fail("was waited on for ever")


def test_comments_do_not_prolong_a_wait() -> None:
    with client_of(Rests(comments())) as client, pytest.raises(TimeoutError, match=r"is paused after 0\.05 s"):
        client.wait("01JD", timeout=0.05)


def test_no_stream_of_a_wait_is_silent_beyond_its_end() -> None:
    service = Rests()
    with client_of(service) as client, pytest.raises(TimeoutError, match="paused"):
        client.wait("01JD", timeout=0.05)
    assert max(service.timeouts) <= 0.05


def test_a_service_that_hangs_does_not_hold_up_who_waits_for_longer_than_he_asked_for() -> None:
    service = Rests()
    with client_of(service, timeout=60.0) as client, pytest.raises(TimeoutError, match="paused"):
        client.wait("01JD", timeout=0.05)
    assert max(service.looks) <= 5.0


def test_a_stream_whose_read_timeout_passes_the_end_of_the_wait_is_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardfill.following.SLACK_SECONDS", 0.01)
    service = Rests(comments())
    with client_of(service) as client, pytest.raises(TimeoutError, match="paused"):
        client.wait("01JD", timeout=0.05)
    assert service.timeouts[1] <= service.timeouts[0] - 0.01
