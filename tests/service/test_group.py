"""Processes behind one port: what they count is one, and nobody else gets their port."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gallery.search.routes import Coverage
from service.group import Group, PortTakenError, reserved, shared_sockets
from service.metrics import Metrics

COVERAGE = Coverage(3, 1, 0, 0)


def told(metrics: Metrics) -> dict[str, float]:
    """Every number that Prometheus is told."""
    lines = metrics.as_text().decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        if not name.startswith("process_")
    }


@pytest.fixture
def group(tmp_path: Path) -> list[Metrics]:
    return [Metrics(member) for member in Group.made(tmp_path, 3)]


def test_each_tells_what_all_have_counted(group: list[Metrics]) -> None:
    for number, metrics in enumerate(group, 1):
        metrics.counts.answered(COVERAGE, [0.002] * number)
        metrics.counts.requested("POST", "/x", 200)
        metrics.counts.upserted(10 * number)
        metrics.counts.ended("refused")
        metrics.share()
    for metrics in group:
        numbers = told(metrics)
        assert numbers['forwardfill_searches_total{outcome="answered"}'] == 6
        assert numbers['forwardfill_searches_total{outcome="refused"}'] == 3
        assert numbers['forwardfill_searched_items_total{route="direct"}'] == 18
        assert numbers['forwardfill_http_requests_total{method="POST",route="/x",status="200"}'] == 3
        assert numbers["forwardfill_upserted_items_total"] == 60
        assert numbers['forwardfill_search_seconds_bucket{le="0.0025"}'] == 6
        assert numbers["forwardfill_search_seconds_sum"] == pytest.approx(0.012)


@settings(max_examples=50)
@given(
    acts=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["search", "tell", "share", "restart"]), st.floats(0, 9))
    )
)
def test_no_number_ever_falls_whoever_is_asked_and_whoever_is_started_again(
    acts: list[tuple[int, str, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    members = Group.made(tmp_path_factory.mktemp("group"), 3)
    group = [Metrics(member) for member in members]
    last: dict[str, float] = {}
    for place, act, seconds in acts:
        if act == "search":
            group[place].counts.answered(COVERAGE, [seconds, seconds / 3])
        elif act == "share":
            group[place].share()
        elif act == "restart":
            group[place] = Metrics(members[place])  # killed: whatever it had not shared is gone
        else:
            now = told(group[place])
            assert all(now[name] >= value for name, value in last.items())
            last = now


def test_what_is_counted_while_it_is_asked_is_told_by_the_next(
    group: list[Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Metrics.share

    def and_then_one_more(self: Metrics) -> None:
        share(self)
        self.counts.answered(COVERAGE, [0.1])  # a search that ends in between

    monkeypatch.setattr(Metrics, "share", and_then_one_more)
    first = told(group[0])
    assert all(told(group[1])[name] >= value for name, value in first.items())


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


HOSTS = ["127.0.0.1", "localhost"]


@pytest.mark.parametrize("host", HOSTS)
def test_members_share_the_port_and_nothing_connects_before_one_listens(host: str, opened: ExitStack) -> None:
    port = opened.enter_context(reserved(host, 0))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port))
    for _ in range(2):
        for made in shared_sockets(host, port):
            opened.enter_context(made).listen()
    for _ in range(10):
        opened.enter_context(socket.create_connection((host, port)))


@pytest.mark.parametrize("listening", [False, True])
def test_a_second_group_is_refused_whether_or_not_the_first_listens_yet(listening: bool, opened: ExitStack) -> None:
    port = opened.enter_context(reserved("127.0.0.1", 0))
    if listening:
        (made,) = shared_sockets("127.0.0.1", port)
        opened.enter_context(made).listen()
    with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}"), reserved("127.0.0.1", port):
        pass


def test_the_port_of_a_single_process_is_refused(opened: ExitStack) -> None:
    alone = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
    with pytest.raises(PortTakenError), reserved("127.0.0.1", alone.getsockname()[1]):
        pass


def test_a_port_that_somebody_has_on_one_of_the_hosts_addresses_is_refused(
    opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = opened.enter_context(socket.create_server(("127.0.0.2", 0))).getsockname()[1]
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{at}", port)) for at in (1, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolved)  # as of a name with two addresses
    with pytest.raises(PortTakenError), reserved("both", port):
        pass


def test_connections_that_were_closed_just_now_do_not_keep_the_port(opened: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # the server closes first, so its side lingers
    with reserved("127.0.0.1", port) as again:
        assert again == port


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(PortTakenError, match=r"192\.0\.2\.1"), reserved("192.0.2.1", 0):
        pass


@pytest.mark.parametrize("lacking", ["family", "address"])
def test_an_address_that_this_host_lacks_is_left_out(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = 99 if lacking == "family" else socket.AF_INET  # as IPv6 is where the kernel was told to have none
    names = ((first, "192.0.2.1"), (socket.AF_INET, "127.0.0.1"))
    found = [(family, socket.SOCK_STREAM, 6, "", (name, 0)) for family, name in names]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with reserved("several.example", 0) as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_all_addresses_of_a_name_have_the_same_free_port(monkeypatch: pytest.MonkeyPatch, opened: ExitStack) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", 0)) for last in (1, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    made = [opened.enter_context(each) for each in shared_sockets("several.example", 0)]
    assert len({each.getsockname()[1] for each in made}) == 1
    assert len({each.getsockname()[0] for each in made}) == 2
