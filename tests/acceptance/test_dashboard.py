"""The dashboard in a real browser: what a person sees and does, and what the page must never do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from playwright.sync_api import BrowserContext, Locator, Page, Request, Route, expect, sync_playwright

from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from gallery.catalog import upgrades as upgrade_rows
from models import artifacts
from models.transformations import Linear, build
from service.app import create_app
from service.keys import create_key, revoke_key
from tests.acceptance.forks import Nursery
from tests.acceptance.gallery_world import base64_of
from tests.acceptance.system import System, ok, running
from tests.service.world import GALLERY as PHOTOS
from tests.service.world import UNITS, World, opened, served

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; the system's package manager has it"),
]

PATIENCE_MS = 30_000
SIGNAL, NOISE, ITEMS, IN_A_SEGMENT, CLASSES = 8, 8, 240, 20, 12


# --- what there is to see ---------------------------------------------------------------------------------------------


class Gallery:
    """A gallery whose old embeddings are half noise, which the transformation leaves out: an upgrade makes it better."""

    name, old, new, transformation = "shop", "shop.old", "shop.new", "shop.old-to-new"

    def __init__(self, http: httpx.Client, folder: Path) -> None:
        """With items and probes."""
        self.http = http
        random = np.random.default_rng(0)
        centres = random.standard_normal((CLASSES, SIGNAL))

        def seen(classes: np.ndarray) -> np.ndarray:
            signal = centres[classes] + 0.45 * random.standard_normal((len(classes), SIGNAL))
            return np.hstack([signal, 1.5 * random.standard_normal((len(classes), NOISE))]).astype(np.float32)

        module = build(Linear(source_dimension=SIGNAL + NOISE, target_dimension=SIGNAL))
        module.load_state_dict({"weight": torch.eye(SIGNAL + NOISE)[:SIGNAL]})
        sha256 = artifacts.save(folder / "artifact.safetensors", module)
        for name, dimension in ((self.old, SIGNAL + NOISE), (self.new, SIGNAL)):
            ok(http.post("/models", json={"name": name, "dimension": dimension, "metric": "euclidean"}))
        ok(http.put(f"/artifacts/{sha256}", content=(folder / "artifact.safetensors").read_bytes()))
        known = {"name": self.transformation, "source": self.old, "target": self.new, "direction": "forward"}
        ok(http.post("/transformations", json={**known, "method": "affine", "artifact": sha256}))
        ok(http.post("/galleries", json={"name": self.name, "model": self.old}))
        classes = np.arange(ITEMS) % CLASSES
        items = [{"id": f"item-{n}", "embedding": base64_of(vector)} for n, vector in enumerate(seen(classes))]
        for start in range(0, ITEMS, IN_A_SEGMENT):
            body = {"model": self.old, "items": items[start : start + IN_A_SEGMENT]}
            ok(http.post(f"/galleries/{self.name}/items", json=body))
        asked = np.arange(2 * CLASSES) % CLASSES
        probes = [
            {
                "vectors": {self.old: base64_of(vector), self.new: base64_of(vector[:SIGNAL])},
                "relevant": [f"item-{n}" for n in np.flatnonzero(classes == group)],
            }
            for vector, group in zip(seen(asked), asked, strict=True)
        ]
        ok(http.put(f"/galleries/{self.name}/probes", json={"probes": probes}))

    def upgrade(self, **options: Any) -> str:
        """Start one; its id."""
        body = {"gallery": self.name, "target_model": self.new, **options}
        started: str = ok(self.http.post("/admin/upgrades", json=body))["id"]
        return started


@pytest.fixture
def gallery(tmp_path: Path, nursery: Nursery) -> Iterator[Gallery]:
    """In a service with its worker. So few candidates that segments which are not upgraded yet are searched worse."""
    settings = {"compact_segments": "0", "quality_share": "0.9", "oversample": "1", "min_candidates": "10"}
    with running(System(tmp_path, spawn=nursery.spawn, **settings)) as system:
        api = system.add_api("--no-worker")
        system.add_worker()
        yield Gallery(api.http, tmp_path)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A service in this process, without a worker: everything stays as it is until somebody acts."""
    with opened(tmp_path) as found:
        yield found


# --- who sees it ------------------------------------------------------------------------------------------------------


class Person:
    """Somebody at a browser, who also watches what the browser asks for and complains about."""

    def __init__(self, page: Page, host: str) -> None:
        """Open the dashboard."""
        self.page, self.host = page, host
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: self.requests.append(request))  # noqa: PLW0108 - it marks what it is given
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.goto(f"http://{host}/dashboard")

    def elsewhere(self) -> list[str]:
        """What was asked of others."""
        urls = (urlsplit(request.url) for request in self.requests)
        return [url.geturl() for url in urls if url.scheme != "data" and url.netloc != self.host]

    def events(self) -> list[Request]:
        """The streams that the page opened."""
        return [request for request in self.requests if request.url.endswith("/events")]

    def says(self, text: str) -> None:
        """Wait until the page says something."""
        expect(self.page.get_by_text(text).first).to_be_visible()

    @property
    def chosen(self) -> Locator:
        """The upgrade that is shown in full."""
        return self.page.locator("#chosen")

    @property
    def state(self) -> Locator:
        """Where it says how it stands, to screen readers too."""
        return self.chosen.locator("[aria-live]")


Visit = Callable[[httpx.URL | str], Person]


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    """One for all tests: what a page may keep, it keeps for its own service and its own tab."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium.new_context(reduced_motion="reduce")
        chromium.close()


@pytest.fixture
def visit(browser: BrowserContext) -> Iterator[Visit]:
    """Opens the dashboard of a service, given its URL. Whatever happened, nothing was loaded from elsewhere or blocked."""
    people: list[Person] = []

    def open_page(url: httpx.URL | str) -> Person:
        people.append(Person(browser.new_page(), urlsplit(str(url)).netloc))
        return people[-1]

    yield open_page
    for person in people:
        person.page.close()
        assert person.elsewhere() == []
        # A status that a test brings about is written to the console by the browser itself.
        assert [text for text in person.complaints if "Failed to load resource" not in text] == []


# --- an upgrade, from the first look to the last button ---------------------------------------------------------------


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


# --- an empty service, a refusal, a key, a restart, a name that looks like markup -------------------------------------


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


def test_a_service_that_takes_no_notice_is_told_of_although_the_connection_stands(world: World, visit: Visit) -> None:
    world.prepared().filled().start()
    person = visit(world.client.base_url)
    expect(person.page.locator("#status")).to_have_text("live")
    person.page.route("**/galleries?*", lambda route: None)  # from now on nothing comes, neither an answer nor an end
    expect(person.page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(person.page.locator("#status")).to_have_text("not connected")
    person.page.unroute("**/galleries?*")
    expect(person.page.locator("#status")).to_have_text("live")


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
