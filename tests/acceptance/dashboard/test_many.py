"""Many galleries and upgrades: what is asked for, what is shown, and how one of them is found and chosen."""

from __future__ import annotations

from urllib.parse import urlsplit

from playwright.sync_api import Route, expect

from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from tests.acceptance.dashboard.person import MARKS, Visit
from tests.service.world import GALLERY as PHOTOS
from tests.service.world import UNITS, World

pytestmark = MARKS


def test_of_many_galleries_the_first_dozen_is_shown_what_is_upgraded_before_all_others(
    world: World, visit: Visit
) -> None:
    world.prepared().filled()
    for number in range(20):
        world.post("/galleries", {"name": f"empty-{number:02}", "model": "old"})
    world.start()
    person = visit(world.client.base_url)
    person.page.set_viewport_size({"width": 390, "height": 844})
    names = person.page.locator("#galleries h3")
    expect(names).to_have_text([PHOTOS, *(f"empty-{number:02}" for number in range(11))])
    below = person.page.get_by_role("heading", name="Upgrades", exact=True)

    more = person.page.get_by_role("button", name="Show all 21")
    expect(more).to_have_attribute("aria-expanded", "false")
    far = below.evaluate("title => title.offsetTop")
    more.focus()
    person.page.keyboard.press("Enter")
    expect(names).to_have_text([PHOTOS, *(f"empty-{number:02}" for number in range(20))])
    fewer = person.page.get_by_role("button", name="Show the first 12 only")
    expect(fewer).to_be_focused()
    expect(fewer).to_have_attribute("aria-expanded", "true")
    with person.page.expect_response("**/galleries?*"):
        pass  # what is read again changes neither
    expect(names).to_have_count(21)
    person.page.keyboard.press("Enter")
    expect(names).to_have_count(12)
    expect(more).to_be_focused()
    expect(more).to_be_in_viewport()
    assert below.evaluate("title => title.offsetTop") == far


def galleries_with_upgrades(world: World, galleries: int, upgrades: int) -> None:
    """Galleries beside the first one, and in some of them an upgrade that waits for a worker."""
    world.prepared().filled()
    with world.store.catalog.transaction() as tx:
        old = model_rows.model_row(tx.session, "old")
        for number in range(galleries):
            name = f"gallery-{number:04}"
            gallery_rows.add_gallery(tx.session, name=name, model=old, index={"kind": "auto"}, storage_dtype="float32")
    for number in range(upgrades):
        name = f"gallery-{number:04}"
        world.post(
            f"/galleries/{name}/items", {"model": "old", "items": [{"id": "one", "embedding": UNITS[0].tolist()}]}
        )
        world.post("/admin/upgrades", {"gallery": name, "transformation": "old-to-new"})


def test_however_many_galleries_and_upgrades_there_are_a_reading_asks_for_few_of_them(
    world: World, visit: Visit
) -> None:
    galleries_with_upgrades(world, galleries=420, upgrades=40)
    person = visit(world.client.base_url)
    rows = person.page.locator("#upgrades li.row-card")
    expect(rows).to_have_count(20)
    seen = len(person.requests)
    expect(rows).to_have_count(40)  # those that are active are read in turns
    galleries = person.page.locator("#galleries")
    expect(galleries).to_contain_text("Show all 421")
    assert world.client.delete("/galleries/gallery-0419").status_code == 204
    expect(galleries).to_contain_text("Show all 420")
    asked = [urlsplit(request.url).path for request in person.requests[seen:]]
    readings = asked.count("/admin/upgrades")
    assert asked.count("/galleries") <= readings + 1
    of_one = [path for path in asked if path.startswith("/admin/upgrades/") and not path.endswith("/events")]
    assert 20 <= len(of_one) <= 12 * (readings + 1)


def test_progress_makes_only_that_anew_which_shows_it(world: World, visit: Visit) -> None:
    galleries_with_upgrades(world, galleries=150, upgrades=1)
    person = visit(world.client.base_url)
    person.page.get_by_role("button", name="Show all 151").click()
    expect(person.page.locator("#galleries h3")).to_have_count(151)
    expect(person.page.locator("#status")).to_have_text("live")
    with person.page.expect_request("**/galleries?*"):
        person.page.route(
            "**/galleries?*", lambda route: None
        )  # it does not end, so whatever is shown now came as an event
    person.page.evaluate(
        "() => { window.made = 0; const made = document.createElement; document.title = 'before';"
        " document.createElement = function (...given) { window.made += 1; return made.apply(this, given); } }"
    )
    person.page.wait_for_function("() => document.title !== 'before'")
    assert 0 < person.page.evaluate("window.made") < 400  # elements: of two events, if the browser is slow


def test_a_gallery_is_found_by_its_name_and_its_upgrade_paused_with_the_keyboard_only(
    world: World, visit: Visit
) -> None:
    galleries_with_upgrades(world, galleries=30, upgrades=25)
    person = visit(world.client.base_url)
    keyboard, names = person.page.keyboard, person.page.locator("#galleries h3")
    expect(names).to_have_count(12)
    keyboard.press("Tab")
    expect(person.page.get_by_role("searchbox", name="Find a gallery")).to_be_focused()
    keyboard.type("nothing of it")
    expect(person.page.locator("#galleries")).to_contain_text("No gallery has “nothing of it” in its name.")
    keyboard.press("Control+a")
    keyboard.type("Y-0002")
    expect(names).to_have_text(["gallery-0002"])
    expect(person.page.get_by_role("search").get_by_role("status")).to_have_text("1 of 31")
    upgrade = person.page.get_by_role("button", name="Upgrade to new: gallery-0002")
    expect(upgrade).to_be_visible()  # although it is older than those that are read each time
    keyboard.press("Tab")
    expect(upgrade).to_be_focused()
    keyboard.press("Enter")
    title = person.chosen.get_by_role("heading", level=3)
    expect(title).to_be_focused()
    expect(title).to_have_css("outline-style", "solid")  # who sees the page sees where the focus went
    expect(title).to_have_text("gallery-0002: old → new")
    keyboard.press("Tab")
    keyboard.press("Enter")
    expect(person.state).to_have_text("paused")
    expect(person.chosen.get_by_role("group", name="What can be done")).to_be_focused()
    keyboard.press("Escape")
    expect(person.page.locator("#upgrades").get_by_role("button", name="gallery-0002: old → new")).to_be_focused()


def test_a_dozen_galleries_are_all_there_are(world: World, visit: Visit) -> None:
    world.prepared()
    for number in range(11):
        world.post("/galleries", {"name": f"empty-{number:02}", "model": "old"})
    person = visit(world.client.base_url)
    expect(person.page.locator("#galleries h3")).to_have_count(12)
    expect(person.page.locator("#galleries").get_by_role("button")).to_have_count(0)


def test_older_upgrades_stay_although_a_reading_was_under_way_when_they_were_asked_for(
    world: World, visit: Visit
) -> None:
    world.prepared().filled()
    for _ in range(22):
        world.verb(world.start(), "cancel")
    person = visit(world.client.base_url)
    rows, older = person.page.locator("#upgrades li.row-card"), person.page.get_by_text("Show older ones")
    expect(rows).to_have_count(20)
    held: list[Route] = []
    person.page.route("**/galleries?*", lambda route: held.append(route))  # noqa: PLW0108 - it marks what it is given
    with person.page.expect_response("**/admin/upgrades?*"):
        pass  # the next reading has its upgrades, and waits for its galleries
    older.click()
    expect(rows).to_have_count(22)
    person.page.route("**/galleries?*", lambda route: route.continue_())  # from now on
    with person.page.expect_request("**/admin/upgrades?*"):  # of the reading after those that waited
        for route in held:
            route.continue_()
    expect(rows).to_have_count(22)
    expect(older).to_have_count(0)


def test_whom_an_upgrade_is_chosen_by_sees_its_title_and_its_verbs_however_far_down_it_stood(
    world: World, visit: Visit
) -> None:
    world.prepared().filled()
    first = world.upgraded()
    world.verb(first, "rollback")
    for _ in range(12):
        world.verb(world.start(), "cancel")
    person = visit(world.client.base_url)
    title, last = person.chosen.get_by_role("heading", level=3), person.page.locator("#upgrades li button").last
    for width in (390, 1400):
        person.page.set_viewport_size({"width": width, "height": 500})
        person.page.locator("#upgrades li button").first.press("Enter")
        last.press("Enter")
        expect(last).to_have_attribute("aria-pressed", "true")
        expect(title).to_be_in_viewport()
        expect(person.page.locator(":focus")).to_be_in_viewport()  # and so the next Tab leads to what is seen
        expect(title).to_be_focused()
        person.page.keyboard.press("Escape")
        expect(last).to_be_focused()


def test_whoever_chooses_an_upgrade_in_its_gallery_on_a_small_screen_sees_its_verbs(world: World, visit: Visit) -> None:
    world.prepared().filled().start()
    person = visit(world.client.base_url)
    person.page.set_viewport_size({"width": 360, "height": 500})
    person.page.get_by_role("button", name=f"Upgrade to new: {PHOTOS}").click()
    expect(person.chosen.get_by_role("button", name="Cancel…")).to_be_in_viewport()
