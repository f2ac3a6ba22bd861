"""An upgrade over REST, from start to end, under searches."""

from __future__ import annotations

from tests.service.world import GALLERY, World


def test_a_search_is_right_at_every_step_of_an_upgrade(world: World) -> None:
    upgrade = world.start()
    seen = set()
    while True:
        answer = world.new_search(1)
        assert [hit["id"] for hit in answer["hits"]] == ["item-1", "item-0", "item-2", "item-3"]
        assert answer["served"]["score_space"] == "new"
        routes = answer["served"]["routes"]
        assert routes["direct"] + routes["forward"] == 4
        assert routes["backward"] == routes["unreachable"] == 0
        assert {hit["origin"] for hit in answer["hits"]} == {"derived"}
        seen.add(routes["direct"])
        old = world.old_search(1)
        assert [hit["id"] for hit in old["hits"]] == ["item-1", "item-0", "item-2", "item-3"]
        assert old["served"]["routes"] == {"direct": 4, "forward": 0, "backward": 0, "unreachable": 0}
        if not world.work(steps=1):
            break
    assert seen == {0, 1, 2, 3, 4}
    document = world.upgrade(upgrade)
    assert document["state"] == "completed"
    assert document["progress"]["fraction"] == 1.0
    assert world.get(f"/galleries/{GALLERY}")["model"] == "new"
