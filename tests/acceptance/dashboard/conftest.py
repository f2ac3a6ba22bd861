"""Services to look at, and a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import BrowserContext, expect, sync_playwright

from tests.acceptance.dashboard.person import CHROMIUM, PATIENCE_MS, Person, Visit
from tests.acceptance.dashboard.shop import Gallery
from tests.acceptance.forks import Nursery
from tests.acceptance.system import System, running
from tests.service.world import World, opened


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
