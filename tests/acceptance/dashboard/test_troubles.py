"""An empty service, a refusal, a key, a restart, a name that looks like markup."""

from __future__ import annotations

from urllib.parse import urlsplit

from playwright.sync_api import Route, expect

from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from gallery.catalog import upgrades as upgrade_rows
from service.app import create_app
from service.keys import create_key, revoke_key
from tests.acceptance.dashboard.person import MARKS, Visit
from tests.service.world import GALLERY as PHOTOS
from tests.service.world import World, served

pytestmark = MARKS


def test_an_empty_service_says_what_to_do_next(world: World, visit: Visit) -> None:
    person = visit(world.client.base_url)
    person.says("No gallery yet.")
    person.says("POST /galleries ")
    person.says("No upgrade yet.")
    world.prepared()
    person.says("Empty. Send items:")
    person.says(f"POST /galleries/{PHOTOS}/items")
    assert person.complaints == []


def test_a_refused_verb_shows_the_services_reason_and_can_be_insisted_on(world: World, visit: Visit) -> None:
    world.prepared().filled().start()
    world.upsert({"id": "native", "embedding": [0, 0, 0, 0, 1]}, model="new")
    person = visit(world.client.base_url)
    cancel = person.chosen.get_by_role("button", name="Cancel…")
    question = person.page.get_by_role("dialog")
    reason = world.client.post(f"/admin/upgrades/{world.get('/admin/upgrades')['upgrades'][0]['id']}/cancel").json()
    assert reason["code"] == "native_items_would_be_unreachable"

    cancel.click()
    question.get_by_role("button", name="Cancel the upgrade").click()
    expect(question).to_contain_text(reason["detail"])
    question.get_by_role("button", name="No").click()
    expect(person.chosen.get_by_role("alert")).to_have_text(f"cancel was refused: {reason['detail']}")
    cancel.click()
    question.get_by_role("button", name="Cancel the upgrade").click()
    question.get_by_role("button", name="Do it all the same").click()
    expect(person.state).to_have_text("cancelled")


def test_where_a_key_is_needed_the_page_asks_for_it_says_which_is_wrong_and_keeps_it_in_the_tab_only(
    world: World, visit: Visit
) -> None:
    world.prepared().filled().start()
    keys = {scope: create_key(world.store.catalog, scope, scope) for scope in ("search", "admin")}
    world.app.state.process.keyring.refresh()
    person = visit(world.client.base_url)
    key, use = person.page.get_by_label("API key"), person.page.get_by_role("button", name="Use this key")
    expect(key).to_have_attribute("type", "password")
    expect(person.page.get_by_role("heading", name="Galleries")).to_be_hidden()

    key.fill("ffk_wrong")
    use.click()
    expect(person.page.get_by_role("alert")).to_contain_text("does not take this key")
    key.fill(keys["search"])
    key.press("Enter")
    person.says(PHOTOS)
    expect(person.page.locator("#galleries")).to_be_focused()
    person.says("this needs the scope admin, and the key search has search")
    person.page.get_by_role("button", name="Forget key").click()
    key.fill(keys["admin"])
    use.click()
    expect(person.state).to_have_text("pending")
    expect(person.page.locator("#status")).to_have_text("live")
    assert person.events()[-1].headers["authorization"] == f"Bearer {keys['admin']}"

    person.page.reload()
    expect(person.chosen).to_contain_text(PHOTOS)  # it is the same tab
    kept = "JSON.stringify([document.cookie, localStorage, location.href, document.body.innerHTML])"
    assert keys["admin"] not in person.page.evaluate(kept)
    expect(visit(world.client.base_url).page.get_by_label("API key")).to_be_visible()  # it is another tab


def test_a_key_that_is_revoked_while_a_question_is_open_takes_the_question_away_and_says_so(
    world: World, visit: Visit
) -> None:
    upgrade = world.prepared().filled().start()
    key = create_key(world.store.catalog, "admin", "admin")
    world.app.state.process.keyring.refresh()
    person = visit(world.client.base_url)
    person.page.get_by_label("API key").fill(key)
    person.page.keyboard.press("Enter")
    person.chosen.get_by_role("button", name="Cancel…").click()
    expect(person.page.get_by_role("dialog")).to_be_visible()
    revoke_key(world.store.catalog, "admin")
    world.app.state.process.keyring.refresh()
    expect(person.page.get_by_label("API key")).to_be_focused()
    expect(person.page.get_by_role("dialog")).to_be_hidden()
    expect(person.page.get_by_role("alert")).to_contain_text("was revoked")

    with person.page.expect_response("**/galleries?*"):  # as if somebody had looked for another key and came back
        person.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(person.page.get_by_role("alert")).to_contain_text("was revoked")
    with world.store.catalog.reading() as session:
        assert upgrade_rows.upgrade_row(session, upgrade).state == "pending"


def test_the_page_recovers_when_the_service_comes_back(world: World, visit: Visit) -> None:
    upgrade = world.prepared().filled().start()
    with served(create_app(world.store)) as url:
        person = visit(url)
        expect(person.page.locator("#status")).to_have_text("live")
    expect(person.page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(person.page.locator("#galleries article")).to_be_visible()  # what it knew, it still shows
    streams = len(person.events())
    with served(create_app(world.store), port=urlsplit(url).port or 0):
        expect(person.page.locator("#banner")).to_be_hidden()
        expect(person.page.locator("#status")).to_have_text("live")
        world.verb(upgrade, "cancel")
        expect(person.state).to_have_text("cancelled")
    assert len(person.events()) > streams
    assert person.events()[-1].headers["last-event-id"]


def test_names_that_look_like_markup_are_shown_as_text(world: World, visit: Visit) -> None:
    name = "<img src=x onerror=alert(1)><b>bold</b>"
    world.prepared()
    with world.store.catalog.transaction() as tx:  # REST refuses such a name; the page must not count on that
        old = model_rows.model_row(tx.session, "old")
        gallery_rows.add_gallery(tx.session, name=name, model=old, index={"kind": "auto"}, storage_dtype="float32")
    person = visit(world.client.base_url)
    expect(person.page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    assert person.page.locator("main img, main b b").count() == 0
    assert person.complaints == []


def test_a_service_that_takes_no_notice_is_told_of_although_the_connection_stands(world: World, visit: Visit) -> None:
    world.prepared().filled().start()
    person = visit(world.client.base_url)
    expect(person.page.locator("#status")).to_have_text("live")
    person.page.route("**/galleries?*", lambda route: None)  # from now on nothing comes, neither an answer nor an end
    expect(person.page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(person.page.locator("#status")).to_have_text("not connected")
    person.page.unroute("**/galleries?*")
    expect(person.page.locator("#status")).to_have_text("live")


def test_of_a_second_wrong_key_it_is_said_again_that_it_is_wrong(world: World, visit: Visit) -> None:
    create_key(world.store.catalog, "admin", "admin")
    world.app.state.process.keyring.refresh()
    person = visit(world.client.base_url)
    key, problem = person.page.get_by_label("API key"), person.page.locator("#key-problem")
    key.fill("ffk_wrong")
    key.press("Enter")
    expect(problem).to_be_visible()
    held: list[Route] = []
    person.page.route("**/galleries?*", lambda route: held.append(route))  # noqa: PLW0108 - it marks what it is given
    key.fill("ffk_wrong_too")
    key.press("Enter")
    expect(problem).to_be_hidden()  # until the service has said it again, which is read aloud
    person.page.route("**/galleries?*", lambda route: route.continue_())  # from now on
    for route in held:
        route.continue_()
    expect(problem).to_be_visible()
