"""Lists in pages: ordered by a key that never changes, continued after the last key that was seen."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import orjson
from fastapi import Depends, Query
from pydantic import BeforeValidator, Field
from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.errors import InvalidRequest

T = TypeVar("T")
MAX_PAGE = 1000
_PAGE = 50


class Page(NamedTuple):
    """What a client asks for."""

    size: int
    #: the last key of the page before
    after: Any


def _size(given: Any) -> Any:
    """Without a value it is as if it were left out: so httpx, for one, writes what is null in a client."""
    return _PAGE if given == "" else given


def asked(
    page_size: Annotated[
        int, Field(ge=1), BeforeValidator(_size), Query(description="At most 1000; more is taken as 1000.")
    ] = _PAGE,
    page_token: Annotated[
        str | None, Query(description="`next_page_token` of the page before; empty or left out for the first.")
    ] = None,
) -> Page:
    """The page that the query parameters ask for."""
    return Page(min(page_size, MAX_PAGE), _after(page_token) if page_token else None)


PageDep = Annotated[Page, Depends(asked)]


def fetch(
    session: Session, statement: Select[T], key: InstrumentedAttribute[Any], page: Page, *, newest: bool = False
) -> tuple[Sequence[T], str | None]:
    """Rows of a page in the order of a unique key, and the token of the next page.

    Args:
        session: to read with.
        statement: selects rows that have the key.
        key: a unique column.
        page: which page.
        newest: largest keys first.

    Raises:
        InvalidRequest: the token is of another list.
    """
    if page.after is not None:
        if not isinstance(page.after, key.type.python_type):
            raise _bad_token()
        statement = statement.where(key < page.after if newest else key > page.after)
    rows = session.scalars(statement.order_by(key.desc() if newest else key).limit(page.size + 1)).all()
    return rows[: page.size], token(getattr(rows[page.size - 1], key.key)) if len(rows) > page.size else None


def position(page: Page) -> int:
    """Where a page begins in a list that no column orders: its tokens are positions.

    Raises:
        InvalidRequest: the token is of another list.
    """
    if page.after is None:
        return 0
    if not isinstance(page.after, int) or page.after < 0:
        raise _bad_token()
    return page.after


def token(key: Any) -> str:
    """An opaque token that stands for a key."""
    return base64.urlsafe_b64encode(orjson.dumps(key)).decode().rstrip("=")


def _after(given: str) -> Any:
    try:
        key = orjson.loads(base64.urlsafe_b64decode(given + "=" * (-len(given) % 4)))
    except (ValueError, binascii.Error):
        raise _bad_token() from None
    # `true` is an int for Python, and no key
    if not (isinstance(key, str) and "\0" not in key) and not (type(key) is int and abs(key) < 1 << 63):
        raise _bad_token()
    return key


def _bad_token() -> InvalidRequest:
    return InvalidRequest("page_token is not one that this list gave", pointer="/page_token")
