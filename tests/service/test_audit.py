"""Who did what, when, to what, and with which artifact: kept for ever, and read by those who may do everything."""

from __future__ import annotations

from typing import Any

import pytest

from service.keys import create_key
from tests.service.world import GALLERY, World, events


@pytest.fixture
def known(world: World) -> World:
    """A client with the key of the night shift."""
    key = create_key(world.store.catalog, "night-shift", "admin")
    world.app.state.process.keyring.refresh()
    world.client.headers["authorization"] = f"Bearer {key}"
    return world


def listed(world: World, **query: Any) -> list[Any]:
    """The oldest first."""
    return list(reversed(world.get("/admin/events", params=query)["events"]))


def test_each_step_of_an_upgrade_names_who_asked_for_it_and_the_artifact(known: World) -> None:
    upgrade = known.start()
    known.work()
    known.verb(upgrade, "rollback")
    found = listed(known, upgrade=upgrade)
    told = [(each["action"], each["actor"], each["detail"].get("state")) for each in found]
    assert told == [
        ("upgrade.started", "night-shift", None),
        ("upgrade.state", None, "validating"),
        ("upgrade.state", None, "running"),
        ("upgrade.state", None, "verifying"),
        ("upgrade.state", None, "completed"),
        ("upgrade.state", "night-shift", "rolling_back"),
        ("upgrade.state", "night-shift", "rolled_back"),
    ]
    assert {each["detail"]["artifact"] for each in found} == {known.upgrade(upgrade)["artifact_sha256"]}
    assert {(each["gallery"], each["upgrade"]) for each in found} == {(GALLERY, upgrade)}
    stream = events(known.client.get(f"/admin/upgrades/{upgrade}/events", headers={"Last-Event-ID": "0"}).text)
    assert [data["actor"] for _, name, data in stream if name == "state"] == [actor for _, actor, _ in told]


def test_a_throttle_probes_and_a_deletion_are_on_the_record_too(known: World) -> None:
    upgrade = known.start()
    known.client.patch(f"/admin/upgrades/{upgrade}", json={"throttle": {"duty_cycle": 0.5}})
    probes = [{"vectors": {"old": [1, 0, 0, 0]}}]
    assert known.client.put(f"/galleries/{GALLERY}/probes", json={"probes": probes}).status_code == 200
    assert known.client.delete(f"/galleries/{GALLERY}").status_code == 204
    found = {each["action"]: each for each in listed(known, gallery=GALLERY)}
    assert found["upgrade.throttled"]["detail"]["throttle"] == {"duty_cycle": 0.5}
    assert found["gallery.probes_replaced"]["actor"] == "night-shift"
    assert found["gallery.probes_replaced"]["detail"] == {"probes": 1}
    assert (found["gallery.deleted"]["actor"], found["upgrade.throttled"]["actor"]) == ("night-shift", "night-shift")


def test_the_trail_is_read_in_pages_the_newest_first(world: World) -> None:
    whole = world.get("/admin/events")["events"]
    assert [each["id"] for each in whole] == sorted((each["id"] for each in whole), reverse=True)
    page = world.get("/admin/events", params={"page_size": 2})
    rest = world.get("/admin/events", params={"page_token": page["next_page_token"]})
    assert page["events"] + rest["events"] == whole
    assert rest["next_page_token"] is None
    assert listed(world, gallery="nowhere") == listed(world, upgrade="none") == []
    world.refused(world.client.get("/admin/events", params={"gallery": ""}), 422, "invalid_request")
