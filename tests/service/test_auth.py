"""Keys, scopes, and who is served without one."""

from __future__ import annotations

import re
import socket

import pytest
from sqlalchemy import select

from gallery.catalog.tables import EventRow, KeyRow
from gallery.errors import KeyExists, KeyNotFound
from service.keys import create_key, list_keys, revoke_key
from service.ready import UnsafeBinding, has_keys, is_loopback, require_safe_binding
from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, World

ITEM = {"model": "old", "items": [{"id": "a", "embedding": [1, 0, 0, 0]}]}
QUERY = {"model": "old", "vector": [1, 0, 0, 0]}
IDS = {"ids": ["a"]}
# method, path, body, the least scope
CALLS = [
    ("GET", "/info", None, "search"),
    ("GET", "/metrics", None, "search"),
    ("GET", "/models", None, "search"),
    ("GET", "/models/old", None, "search"),
    ("GET", "/transformations", None, "search"),
    ("GET", "/transformations/old-to-new", None, "search"),
    ("GET", "/galleries", None, "search"),
    ("GET", f"/galleries/{GALLERY}", None, "search"),
    ("GET", f"/galleries/{GALLERY}/items/item-0", None, "search"),
    ("POST", f"/galleries/{GALLERY}/search", QUERY, "search"),
    ("POST", f"/galleries/{GALLERY}/search/batch", {"model": "old", "queries": [[1, 0, 0, 0]]}, "search"),
    ("GET", f"/galleries/{GALLERY}/search/explain?model=old&vector=AACAPwAAAAAAAAAAAAAAAA", None, "write"),
    ("POST", f"/galleries/{GALLERY}/search/explain", QUERY, "write"),
    ("POST", f"/galleries/{GALLERY}/items", ITEM, "write"),
    ("POST", f"/galleries/{GALLERY}/items/delete", IDS, "write"),
    ("PUT", f"/galleries/{GALLERY}/probes", {"probes": []}, "write"),
    ("POST", "/models", {}, "admin"),
    ("PUT", "/artifacts/" + "0" * 64, None, "admin"),
    ("POST", "/transformations", {}, "admin"),
    ("POST", "/transformations/old-to-new/evaluate", {}, "admin"),
    ("POST", "/transformations/fit", {}, "admin"),
    ("GET", "/transformations/fits", None, "admin"),
    ("GET", "/transformations/fits/none", None, "admin"),
    ("POST", "/transformations/fits/none/cancel", None, "admin"),
    ("POST", "/galleries", {}, "admin"),
    ("DELETE", "/galleries/nowhere", None, "admin"),
    ("POST", "/admin/galleries/nowhere/compact", None, "admin"),
    ("GET", "/admin/events", None, "admin"),
    ("POST", "/admin/upgrades", {}, "admin"),
    ("GET", "/admin/upgrades", None, "admin"),
    ("GET", "/admin/upgrades/none", None, "admin"),
    ("GET", "/admin/upgrades/none/events", None, "admin"),
    ("GET", "/admin/upgrades/none/failures", None, "admin"),
    ("GET", "/admin/upgrades/none/refinement", None, "admin"),
    ("PATCH", "/admin/upgrades/none", {}, "admin"),
    *(
        ("POST", f"/admin/upgrades/none/{verb}", None, "admin")
        for verb in ("pause", "resume", "cancel", "cutover", "rollback", "finalize", "retry")
    ),
]
SCOPES = ("search", "write", "admin")


def test_each_call_needs_its_scope_and_nothing_is_looked_up_before_it(world: World) -> None:
    keys = {scope: create_key(world.store.catalog, scope, scope) for scope in SCOPES}
    world.app.state.process.keyring.refresh()
    for method, path, body, least in CALLS:
        answer = world.client.request(method, path, json=body)
        world.refused(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"
        for scope in SCOPES:
            answer = world.client.request(method, path, json=body, headers={"authorization": f"Bearer {keys[scope]}"})
            if SCOPES.index(scope) < SCOPES.index(least):
                world.refused(answer, 403, "forbidden")
            else:
                assert answer.status_code not in (401, 403), (method, path, scope)


def test_every_documented_call_is_in_that_table(empty: World) -> None:
    known = {
        (method, re.sub("none|old-to-new|old|photos|nowhere|item-0|0{64}", "*", path.partition("?")[0]))
        for method, path, *_ in CALLS
    }
    documented = {
        (method.upper(), re.sub(r"\{\w+\}", "*", path))
        for path, methods in empty.get("/openapi.json")["paths"].items()
        for method in methods
        if not path.startswith("/health/")
    }
    assert documented == known


def test_health_and_the_openapi_document_need_no_key(world: World) -> None:
    create_key(world.store.catalog, "admin", "admin")
    world.app.state.process.keyring.refresh()
    for path in ("/health/live", "/health/ready", "/openapi.json"):
        assert world.client.get(path).status_code == 200


@pytest.mark.parametrize("header", ["Bearer", "Bearer wrong", "Basic YTpi", "nonsense"])
def test_what_is_no_valid_key_is_refused(world: World, header: str) -> None:
    create_key(world.store.catalog, "admin", "admin")
    world.app.state.process.keyring.refresh()
    answer = world.client.get("/models", headers={"authorization": header})
    world.refused(answer, 401, "unauthenticated")


def test_a_key_works_and_stops_working_within_a_second(world: World) -> None:
    secret = create_key(world.store.catalog, "reader", "search")
    headers = {"authorization": f"Bearer {secret}"}

    def status() -> int:
        return world.client.get("/models", headers=headers).status_code

    wait_for(lambda: world.client.get("/models").status_code == 401, 1, lambda: "the key is not known")
    assert status() == 200
    assert revoke_key(world.store.catalog, "reader")
    wait_for(lambda: status() == 401, 1, lambda: "the key still works")
    # The last key is gone, and the door stays shut.
    world.refused(world.client.get("/models", headers=headers), 401, "unauthenticated")


def test_keys_are_stored_as_digests_and_their_deeds_are_recorded(world: World) -> None:
    catalog = world.store.catalog
    assert not has_keys(catalog)
    secret = create_key(catalog, "operator", "admin")
    assert has_keys(catalog)
    assert len(secret) >= 43
    with catalog.reading() as session:
        (row,) = session.scalars(select(KeyRow))
        assert secret not in (row.sha256, row.name)
    assert [(key.name, key.scope, key.revoked_at) for key in list_keys(catalog)] == [("operator", "admin", None)]
    with pytest.raises(KeyExists):
        create_key(catalog, "operator", "search")
    world.app.state.process.keyring.refresh()
    body = {"gallery": GALLERY, "transformation": "old-to-new"}
    world.client.post("/admin/upgrades", json=body, headers={"authorization": f"Bearer {secret}"})
    with catalog.reading() as session:
        started = session.scalars(select(EventRow).where(EventRow.action == "upgrade.started")).one()
        assert started.actor == "operator"
    assert revoke_key(catalog, "operator")
    assert not revoke_key(catalog, "operator")
    with pytest.raises(KeyNotFound):
        revoke_key(catalog, "nobody")


@pytest.mark.parametrize(("name", "scope"), [("Bad Name", "admin"), ("good", "root"), ("", "admin")])
def test_a_key_has_a_sane_name_and_a_known_scope(empty: World, name: str, scope: str) -> None:
    with pytest.raises(ValueError, match=r"key's name|scope"):
        create_key(empty.store.catalog, name, scope)


def test_without_a_key_only_this_machine_is_served(world: World) -> None:
    get = world.client.get
    assert get("/models").status_code == 200
    world.refused(get("/models", headers={"x-forwarded-for": "192.0.2.7"}), 403, "forbidden")
    world.refused(get("/models", headers={"host": "rebound.example:80"}), 403, "forbidden")
    world.refused(get("/models", headers={"origin": "https://elsewhere.example"}), 403, "forbidden")
    own = str(world.client.base_url).rstrip("/")
    assert get("/models", headers={"origin": own}).status_code == 200
    world.app.state.process.settings.insecure = True
    assert get("/models", headers={"x-forwarded-for": "192.0.2.7"}).status_code == 200


def test_with_a_key_any_machine_is_served(world: World) -> None:
    secret = create_key(world.store.catalog, "reader", "search")
    world.app.state.process.keyring.refresh()
    headers = {"authorization": f"Bearer {secret}", "x-forwarded-for": "192.0.2.7", "host": "photos.example"}
    assert world.client.get("/models", headers=headers).status_code == 200


def test_a_large_body_is_not_read_before_the_key_is_seen(world: World) -> None:
    create_key(world.store.catalog, "admin", "admin")
    world.app.state.process.keyring.refresh()
    address = (world.client.base_url.host, world.client.base_url.port)
    with socket.create_connection(address, timeout=10) as connection:
        path = f"/galleries/{GALLERY}/items"
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000000\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_an_open_address_needs_a_key_or_insistence() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert is_loopback(host)
        require_safe_binding(host, has_keys=False, insecure=False)
    for host in ("0.0.0.0", "::", "192.0.2.7", "photos.example", ""):
        with pytest.raises(UnsafeBinding, match=f"^FORWARDFILL_HOST: '{host}' is not a loopback address"):
            require_safe_binding(host, has_keys=False, insecure=False)
        require_safe_binding(host, has_keys=True, insecure=False)
        require_safe_binding(host, has_keys=False, insecure=True)
