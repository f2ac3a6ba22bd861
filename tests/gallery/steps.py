"""How much work a database has with something, by a count that no busy machine changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import event

from gallery.catalog.transaction import Catalog

T = TypeVar("T")


def steps_of(catalog: Catalog, action: Callable[[], T]) -> tuple[T, int]:
    """What an action gives, and how many steps SQLite's machine takes for it."""
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += 1

    def begin(_: Any, cursor: Any, *__: Any) -> None:
        cursor.connection.set_progress_handler(count, 1)

    event.listen(catalog.engine, "before_cursor_execute", begin)
    try:
        given = action()
        return given, counted
    finally:
        event.remove(catalog.engine, "before_cursor_execute", begin)
