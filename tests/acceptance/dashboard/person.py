"""Who looks at the dashboard."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Locator, Page, Request, expect

PATIENCE_MS = 30_000

CHROMIUM = shutil.which("chromium")
#: of every file of tests here
MARKS = [
    pytest.mark.acceptance,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; the system's package manager has it"),
]


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
