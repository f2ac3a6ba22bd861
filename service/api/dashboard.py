"""The page for people: files that hold no data, so that anyone may read them. What it shows, it asks for like any client."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Header
from starlette.responses import RedirectResponse, Response

from service.errors import PageNotFound

router = APIRouter(prefix="/dashboard", include_in_schema=False)

_FOLDER = Path(__file__).resolve().parent.parent / "dashboard"
_PAGE = "index.html"
_SCRIPT = "text/javascript; charset=utf-8"
#: the files that there are; a path that a client sends names one of these, or nothing
FILES = {
    _PAGE: "text/html; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": _SCRIPT,
    "chart.js": _SCRIPT,
    "dom.js": _SCRIPT,
    "service.js": _SCRIPT,
    "view.js": _SCRIPT,
    "words.js": _SCRIPT,
}
#: names, ids and errors come from clients: should one of them ever become markup, it still runs and loads nothing
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _File(NamedTuple):
    body: bytes
    headers: dict[str, str]


@router.get("")
async def page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The page."""
    return _answer(_PAGE, if_none_match)


@router.get("/")
async def page_with_a_slash() -> Response:
    """The page names its files as seen from `/dashboard`, so that it also works behind a proxy that adds a prefix."""
    return RedirectResponse("../dashboard", 308)


@router.get("/{file}")
async def page_file(file: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """One of its files."""
    if file not in FILES:
        raise PageNotFound("the dashboard has no such file")
    return _answer(file, if_none_match)


def _answer(name: str, known: str | None) -> Response:
    found = _file(name)
    if known is not None and found.headers["ETag"] in known:
        return Response(status_code=304, headers=found.headers)
    return Response(found.body, 200, {**found.headers, "Content-Type": FILES[name]})


@lru_cache
def _file(name: str) -> _File:
    """Read once: they are small, and never change while the service runs."""
    body = (_FOLDER / name).read_bytes()
    headers = {
        # asked for again each time, at the price of a 304: files of two versions must not meet in one page
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    return _File(body, headers)
