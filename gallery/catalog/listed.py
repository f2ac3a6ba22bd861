"""A list as a table: thousands of values reach the database by one statement, as one JSON text that it takes apart.

A parameter or a row of its own for each value costs SQLAlchemy and the driver ten microseconds under the interpreter's lock,
during which no search runs. Of 50,000 items, that was half of the time that it took to write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson
from sqlalchemy import JSON, ColumnElement, FromClause, Integer, String, bindparam, cast, func, literal_column, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

# Of one text. SQLite takes up to a billion, and PostgreSQL as many; several copies of it are in memory for a moment.
_MOST_BYTES = 1 << 26
_MOST_ROWS = 5_000
_NAME = "listed"


class Part(NamedTuple):
    """Some elements of a list, as few as one statement should be given."""

    #: position of the first
    start: int
    text: str
    #: fields of each
    width: int


class Listed(NamedTuple):
    """A part of a list in a statement, to be executed with `values`."""

    table: FromClause
    #: in the whole list, from 0
    position: ColumnElement[int]
    #: the fields of each element, as texts; null where they are
    fields: tuple[ColumnElement[str], ...]


def parts(elements: Sequence[Sequence[str | None]]) -> Iterator[Part]:
    """A list whose elements have equally many fields, in parts."""
    for start in range(0, len(elements), _MOST_ROWS):
        yield from _short_enough(start, elements[start : start + _MOST_ROWS])


def _short_enough(start: int, elements: Sequence[Sequence[str | None]]) -> Iterator[Part]:
    text, half = orjson.dumps(elements), len(elements) // 2
    if len(text) > _MOST_BYTES and half:
        yield from _short_enough(start, elements[:half])
        yield from _short_enough(start + half, elements[half:])
    else:
        yield Part(start, text.decode(), len(elements[0]))


def values(part: Part) -> dict[str, str]:
    """What a statement with this part is executed with. Within it, SQLAlchemy would keep the text beside what it compiled."""
    return {_NAME: part.text}


def listed(session: Session, part: Part) -> Listed:
    """A part of a list, for a statement of this session."""
    if _is_sqlite(session):
        each = func.json_each(bindparam(_NAME, type_=String)).table_valued("key", "value", name=_NAME)
        fields = [func.json_extract(each.c.value, f"$[{at}]", type_=String) for at in range(part.width)]
        return Listed(each, cast(each.c.key, Integer) + part.start, tuple(fields))
    array = func.json_array_elements(cast(bindparam(_NAME, type_=String), JSON))
    found = array.table_valued("value", with_ordinality="number", name=_NAME).render_derived()
    texts = (
        found.c.value.op("->>", return_type=String())(literal_column(str(at), Integer)) for at in range(part.width)
    )
    return Listed(found, cast(found.c.number, Integer) - 1 + part.start, tuple(texts))


def among(session: Session, column: ColumnElement[str], part: Part) -> ColumnElement[bool]:
    """Whether a column is the first field of one of the elements."""
    each = listed(session, part)
    found = select(each.fields[0]).select_from(each.table)
    if _is_sqlite(session):
        return column.in_(found)
    # As an array: joined with as many rows as PostgreSQL believes that a list has, it read the whole table for one element
    # wherever that was not analysed of late.
    return column == func.any(func.array(found.scalar_subquery()))


def as_json(session: Session, text: ColumnElement[str]) -> ColumnElement[Any]:
    """A field that is JSON, as the database keeps it."""
    return text if _is_sqlite(session) else cast(text, JSONB)


def _is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"
