"""A service that answers as told, and a client of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import orjson

from forwardfill.client import Client

Handler = Callable[[httpx.Request], httpx.Response]

LIMITS = {"limits": {"max_items_per_upsert": 4, "max_body_bytes": 1 << 20}}


def client_of(handler: Handler, **options: Any) -> Client:
    return Client("http://service", transport=httpx.MockTransport(handler), **options)


def upgrade(state: str, **more: Any) -> dict[str, Any]:
    return {"id": "01JD", "state": state, "error": None, "conditions": [], **more}


class Recorder:
    """Answers every request alike and keeps the bodies; `/info` gives small limits."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(200, json=LIMITS)
        self.requests.append(request)
        return httpx.Response(200, json=self.answer)

    @property
    def bodies(self) -> list[Any]:
        return [orjson.loads(request.content) for request in self.requests]
