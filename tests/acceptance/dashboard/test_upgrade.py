"""An upgrade, from the first look to the last button."""

from __future__ import annotations

import re
from typing import Any

from playwright.sync_api import BrowserContext, Route, expect

from tests.acceptance.dashboard.person import MARKS, Visit
from tests.acceptance.dashboard.shop import ITEMS, Gallery
from tests.acceptance.system import ok
from tests.service.world import GALLERY as PHOTOS
from tests.service.world import UNITS, World

pytestmark = MARKS


def test_a_person_watches_an_upgrade_to_its_end_without_reloading_and_sees_that_it_got_better(
    gallery: Gallery, visit: Visit
) -> None:
    person = visit(gallery.http.base_url)
    card = person.page.locator("#galleries article", has_text=gallery.name)
    expect(card).to_contain_text(f"Model {gallery.old}")
    expect(card).to_contain_text(f"{ITEMS} items")

    gallery.upgrade(throttle={"items_per_second": 80})
    person.page.wait_for_function(
        "() => { const bar = document.querySelector('#chosen [role=progressbar]');"
        " return bar && bar.ariaValueNow > 0 && bar.ariaValueNow < 100 }"
    )
    expect(person.chosen.get_by_role("heading", level=3)).to_have_text(f"{gallery.name}: {gallery.old} → {gallery.new}")
    expect(person.page.locator("#status")).to_have_text("live")
    expect(person.chosen).to_contain_text("at most 80 items/s")
    expect(card).to_contain_text(f"Upgrade to {gallery.new}")

    expect(person.state).to_have_text("completed")
    expect(person.chosen.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "100")
    expect(card).to_contain_text(f"{ITEMS} derived")
    expect(card).to_contain_text("better than before")
    assert person.events(), "progress came by polling only"
    assert sum(request.is_navigation_request() for request in person.requests) == 1

    # Quality over progress, as a picture that says what it shows, and as a table.
    expect(person.chosen).to_contain_text("better than before")
    picture = person.chosen.get_by_role("img", name="CMC-1 over progress")
    expect(picture).to_be_visible()
    assert "before" in (picture.get_attribute("aria-label") or "")
    assert len((picture.locator("polyline").get_attribute("points") or "").split()) >= 3
    person.chosen.get_by_text("Quality over progress as a table").click()
    assert person.chosen.locator("details tbody tr").count() >= 3
    assert person.complaints == []


def test_what_an_upgrade_takes_now_is_offered_and_what_cannot_be_undone_is_asked_twice(
    world: World, visit: Visit
) -> None:
    world.prepared().filled().start()
    person = visit(world.client.base_url)
    buttons = person.chosen.get_by_role("group").get_by_role("button")
    expect(person.state).to_have_text("pending")
    expect(buttons).to_have_text(["Pause", "Cancel…"])
    buttons.get_by_text("Pause").click()
    expect(person.state).to_have_text("paused")
    expect(buttons).to_have_text(["Resume", "Cancel…"])
    expect(person.chosen).to_contain_text("paused as somebody asked for")
    buttons.get_by_text("Resume").press("Enter")
    expect(person.state).to_have_text("pending")
    world.work()
    expect(person.state).to_have_text("completed")

    expect(buttons).to_have_text(["Roll back…", "Finalize…"])
    buttons.get_by_text("Finalize…").click()
    question = person.page.get_by_role("dialog")
    frees = world.get("/admin/upgrades")["upgrades"][0]["finalize_frees"]
    expect(question).to_contain_text(f"The vectors of old are deleted, which frees {frees} bytes")
    person.page.keyboard.press("Escape")
    expect(question).to_be_hidden()
    assert world.get("/admin/upgrades")["upgrades"][0]["state"] == "completed"
    buttons.get_by_text("Finalize…").click()
    question.get_by_role("button", name="Finalize").click()
    expect(person.state).to_have_text("finalized")
    expect(buttons).to_have_count(0)


def test_who_works_by_keyboard_stays_among_the_verbs_when_the_one_that_was_pressed_is_gone(
    world: World, visit: Visit
) -> None:
    upgrade = world.prepared().filled().start()
    person = visit(world.client.base_url)
    verbs = person.chosen.get_by_role("group", name="What can be done")
    buttons = verbs.get_by_role("button")
    buttons.get_by_text("Pause").press("Enter")
    expect(person.state).to_have_text("paused")
    expect(verbs).to_be_focused()
    person.page.keyboard.press("Tab")
    expect(buttons.get_by_text("Resume")).to_be_focused()
    world.verb(upgrade, "resume")  # somebody else did
    expect(person.state).to_have_text("pending")
    expect(verbs).to_be_focused()


def test_a_retry_is_offered_where_something_failed(world: World, visit: Visit) -> None:
    world.prepared().filled().start(gate={"min_cmc1": 1.0})
    world.work()  # a gate without probes is always missed
    person = visit(world.client.base_url)
    buttons = person.chosen.get_by_role("group").get_by_role("button")
    expect(person.state).to_have_text("failed")
    expect(buttons.get_by_text("Retry", exact=True)).to_be_visible()


def test_a_dry_run_that_failed_is_over_and_stands_before_no_upgrade_that_goes_on(world: World, visit: Visit) -> None:
    world.prepared().filled()
    world.post("/galleries", {"name": "other", "model": "old"})
    world.post("/galleries/other/items", {"model": "old", "items": [{"id": "a", "embedding": UNITS[0].tolist()}]})
    world.verb(world.start(), "pause")
    dry = world.start(gallery="other", dry_run=True, gate={"min_cmc1": 1.0})
    world.work()  # a gate without probes is always missed
    assert world.upgrade(dry)["state"] == "failed"
    person = visit(world.client.base_url)
    expect(person.state).to_have_text("paused")
    expect(person.page).to_have_title(re.compile(f"^0 % {PHOTOS} "))
    expect(person.page.locator("#galleries article", has_text="other")).not_to_contain_text("Upgrade to")

    person.page.locator("#upgrades").get_by_role("button", name="other").click()
    expect(person.state).to_have_text("failed, dry run")
    expect(person.page.locator("#status")).to_have_text("up to date")  # nothing is followed
    assert not any(dry in request.url for request in person.events())
    expect(person.page).to_have_title("Forwardfill")


def test_who_waits_for_the_first_reading_is_told(world: World, visit: Visit) -> None:
    person = visit(world.client.base_url)
    held: list[Route] = []
    person.page.route("**/galleries?*", lambda route: held.append(route))  # noqa: PLW0108 - it marks what it is given
    person.page.reload()
    expect(person.page.locator("#status")).to_have_text("reading")
    person.page.route("**/galleries?*", lambda route: route.continue_())  # from now on
    for route in held:
        route.continue_()
    expect(person.page.locator("#status")).to_have_text("up to date")


def test_nothing_is_wider_than_the_screen(world: World, visit: Visit) -> None:
    world.prepared().filled()
    probes = [
        {"vectors": {"old": unit.tolist(), "new": [0, *unit.tolist()]}, "relevant": [f"item-{at}"]}
        for at, unit in enumerate(UNITS)
    ]
    ok(world.client.put(f"/galleries/{PHOTOS}/probes", json={"probes": probes}))
    world.upgraded()
    person = visit(world.client.base_url)
    expect(person.chosen.get_by_role("img").first).to_be_visible()
    for width in (360, 700, 1400):
        person.page.set_viewport_size({"width": width, "height": 800})
        assert person.page.evaluate("document.documentElement.scrollWidth") <= width
        table = person.chosen.locator(".scroll").first  # nor is a share cut off, each of which is 100.0 % here
        assert table.evaluate("(it) => it.scrollWidth <= it.clientWidth"), width


def test_numbers_are_said_as_people_say_them(world: World, visit: Visit) -> None:
    page = visit(world.client.base_url).page

    def said(what: str) -> Any:
        return page.evaluate(f"import('/dashboard/words.js').then((words) => {what})")

    assert said("[0, 0.0004, 0.352, 0.9999, 1].map(words.percent)") == ["0 %", "< 0.1 %", "35 %", "99.9 %", "100 %"]
    assert said("[null, 0.4, 59, 90, 7200, 400000].map(words.left)") == [
        "time left unknown",
        "almost done",
        "about 1 minute left",
        "about 2 minutes left",
        "about 2 hours left",
        "about 5 days left",
    ]
    assert said("[0, 1023, 1536, 5 << 20].map(words.bytes)") == ["0 bytes", "1,023 bytes", "1.5 KiB", "5 MiB"]
    assert (
        said("words.gate({min_cmc1: 0.9, max_map_drop: 0.01})")
        == "CMC-1 at least 90.0 %; mAP falls by at most 1.0 points"
    )
    assert said("words.throttle({})") == "none, full speed"


def test_who_was_asked_about_a_verb_that_is_gone_meanwhile_stays_among_the_verbs(world: World, visit: Visit) -> None:
    upgrade = world.prepared().filled().upgraded()
    person = visit(world.client.base_url)
    verbs = person.chosen.get_by_role("group", name="What can be done")
    verbs.get_by_role("button", name="Roll back…").press("Enter")
    expect(person.page.get_by_role("dialog")).to_be_visible()
    world.verb(upgrade, "finalize")  # somebody else did
    expect(person.state).to_have_text("finalized")
    person.page.keyboard.press("Escape")
    expect(verbs).to_be_focused()


def test_the_verb_that_loses_work_is_not_the_first(world: World, visit: Visit) -> None:
    world.prepared().filled().upgraded(cutover="manual")
    person = visit(world.client.base_url)
    expect(person.state).to_have_text("awaiting cutover")
    expect(person.chosen.get_by_role("group").get_by_role("button")).to_have_text(["Cut over", "Cancel…"])


def test_who_chooses_the_colours_of_all_pages_sees_how_far_an_upgrade_is(browser: BrowserContext, world: World) -> None:
    world.prepared().filled().upgraded()
    page = browser.new_page()
    page.emulate_media(forced_colors="active")
    page.goto(str(world.client.base_url.join("/dashboard")))
    done = page.locator("#chosen .bar i")
    colours = "node => [node, document.body].map((each) => getComputedStyle(each).backgroundColor)"
    bar, ground = done.evaluate(colours)
    assert bar != ground
    page.close()
