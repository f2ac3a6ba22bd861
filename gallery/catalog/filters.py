"""Payload filters, compiled to one SQL condition that means the same on SQLite and PostgreSQL.

    {"category": "shoes", "price": {"lt": 50}}            all of them
    {"or": [{"category": "shoes"}, {"price": {"gte": 9}}]}
    {"not": {"category": {"in": ["shoes", "hats"]}}}

A field that is absent fits no comparison, only `{"exists": false}` and `ne`. Values of different JSON types are never
equal and never ordered: the type is compared first, so a string in one payload cannot break the filter on another's numbers.
An integer is compared exactly, any other number in double precision.

A condition costs a millisecond or two, most of it in SQLAlchemy under the interpreter's lock, and SQLite takes no expression
that is deeper than 1,000; so there is a limit. A value of `in` costs next to nothing: a list is one JSON text, of which the
database makes a table that it looks up in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Float,
    Numeric,
    Select,
    String,
    and_,
    case,
    cast,
    false,
    func,
    literal,
    not_,
    or_,
    select,
    true,
    type_coerce,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from gallery import errors
from gallery.catalog.tables import ItemRow

#: filters within each other
MOST_DEEP = 8
#: of a filter with all that is nested in it
MOST_CONDITIONS = 128
#: of all its lists together
MOST_VALUES = 10_000
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_ORDER: Mapping[str, Callable[[Any, Any], ColumnElement[bool]]] = {
    "lt": lambda field, value: field < value,
    "lte": lambda field, value: field <= value,
    "gt": lambda field, value: field > value,
    "gte": lambda field, value: field >= value,
}
#: what compares a field, beside a value alone
OPERATORS = ("eq", "ne", "in", "exists", *_ORDER)


class _Kind(FunctionElement[str]):
    """The JSON type of a payload's field: number, string, boolean, null, object, array; SQL null if absent."""

    type = String()
    inherit_cache = True


class _Text(FunctionElement[str]):
    """A payload's field as text."""

    type = String()
    inherit_cache = True


class _EachKind(_Kind):
    """As `_Kind`, on SQLite, for a field whose name JSON writes with escapes.

    SQLite's JSON paths compare names as they are written, so such a field is looked for among all fields.
    """

    inherit_cache = True


class _EachText(_Text):
    """As `_EachKind`, for the text of the field."""

    inherit_cache = True


_SQLITE_KIND = (
    "CASE {type} WHEN 'integer' THEN 'number' WHEN 'real' THEN 'number' WHEN 'text' THEN 'string' "
    "WHEN 'true' THEN 'boolean' WHEN 'false' THEN 'boolean' ELSE {type} END"
)
_SQLITE_TEXT = "CASE {type} WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' ELSE {value} END"


@compiles(_Kind, "sqlite")
def _kind_sqlite(element: _Kind, compiler: SQLCompiler, **kw: Any) -> str:
    return _SQLITE_KIND.format(type=f"json_type({compiler.process(element.clauses, **kw)})")


@compiles(_EachKind, "sqlite")
def _each_kind_sqlite(element: _EachKind, compiler: SQLCompiler, **kw: Any) -> str:
    return _each(element, _SQLITE_KIND.format(type="type"), compiler, **kw)


@compiles(_Kind, "postgresql")
def _kind_postgresql(element: _Kind, compiler: SQLCompiler, **kw: Any) -> str:
    payload, field = element.clauses
    return f"jsonb_typeof({compiler.process(payload, **kw)} -> {compiler.process(field, **kw)})"


@compiles(_Text, "sqlite")
def _text_sqlite(element: _Text, compiler: SQLCompiler, **kw: Any) -> str:
    inner = compiler.process(element.clauses, **kw)
    return _SQLITE_TEXT.format(type=f"json_type({inner})", value=f"json_extract({inner})")


@compiles(_EachText, "sqlite")
def _each_text_sqlite(element: _EachText, compiler: SQLCompiler, **kw: Any) -> str:
    return _each(element, _SQLITE_TEXT.format(type="type", value="value"), compiler, **kw)


def _each(element: FunctionElement[str], wanted: str, compiler: SQLCompiler, **kw: Any) -> str:
    payload, field = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"(SELECT {wanted} FROM json_each({payload}) WHERE key = {field})"  # noqa: S608 - bound parameters


@compiles(_Text, "postgresql")
def _text_postgresql(element: _Text, compiler: SQLCompiler, **kw: Any) -> str:
    payload, field = element.clauses
    # "C" orders text by its bytes, as SQLite does
    return f'({compiler.process(payload, **kw)} ->> {compiler.process(field, **kw)}) COLLATE "C"'


def compile_filter(given: Mapping[str, Any], dialect: str) -> ColumnElement[bool]:
    """One condition on `ItemRow` for a filter.

    Args:
        given: the filter as the client sent it.
        dialect: name of the database's dialect.

    Raises:
        InvalidFilter: an unknown operator, an operand of the wrong type, too deep a nesting, or too many conditions or values.
    """
    return _all(given, _Filter(dialect), "/filter", MOST_DEEP)


@dataclass(slots=True)
class _Filter:
    """What is being compiled, for which database, and how much of it there may still be."""

    dialect: str
    conditions: int = MOST_CONDITIONS
    values: int = MOST_VALUES

    def take_condition(self, pointer: str) -> None:
        self.conditions -= 1
        if self.conditions < 0:
            raise errors.InvalidFilter(
                f"a filter has at most {MOST_CONDITIONS} conditions: compare a field with many values by one `in`, or ask "
                "with several filters",
                pointer=pointer,
            )

    def take_values(self, count: int, pointer: str) -> None:
        self.values -= count
        if self.values < 0:
            raise errors.InvalidFilter(
                f"the lists of `in` have at most {MOST_VALUES} values, all those of a filter together: ask with several filters",
                pointer=pointer,
            )


def _all(given: Any, whole: _Filter, pointer: str, depth: int) -> ColumnElement[bool]:
    if not isinstance(given, Mapping):
        raise errors.InvalidFilter("a filter is an object of fields and conditions", pointer=pointer)
    if depth == 0:
        raise errors.InvalidFilter(f"a filter may be nested {MOST_DEEP} deep", pointer=pointer)
    if not given:
        whole.take_condition(pointer)
    parts = [_part(name, value, whole, pointer + errors.pointer(name), depth) for name, value in given.items()]
    return and_(true(), *parts)


def _part(name: str, value: Any, whole: _Filter, pointer: str, depth: int) -> ColumnElement[bool]:
    if name in ("and", "or"):
        if not isinstance(value, list) or not value:
            raise errors.InvalidFilter(f"{name!r} takes a list of filters", pointer=pointer)
        parts = [_all(inner, whole, f"{pointer}/{at}", depth - 1) for at, inner in enumerate(value)]
        return and_(*parts) if name == "and" else or_(*parts)
    if name == "not":
        return not_(func.coalesce(_all(value, whole, pointer, depth - 1), false()))
    _storable(name, pointer)
    field = _Field(name, whole.dialect)
    if not isinstance(value, Mapping):
        return _operator(field, "eq", value, whole, pointer)
    if not value:
        raise errors.InvalidFilter(f"field {name!r} has no condition", pointer=pointer)
    return and_(*(_operator(field, op, operand, whole, pointer + errors.pointer(op)) for op, operand in value.items()))


def _storable(text: str, pointer: str) -> None:
    """No payload holds such text, and a database would stumble over it."""
    if _UNSTORABLE.search(text):
        raise errors.InvalidFilter("text in a filter has no NUL and no lone surrogates", pointer=pointer)


def _finite(value: float, pointer: str) -> float:
    if not math.isfinite(value):
        raise errors.InvalidFilter("a number in a filter is finite in double precision", pointer=pointer)
    return value


def _within_64_bits(value: int, pointer: str) -> int:
    """SQLite takes a larger integer for the nearest double, which is that of many others."""
    if not -(1 << 63) <= value < 1 << 63:
        raise errors.InvalidFilter(
            "an integer in a filter has 64 bits, one of them for the sign; keep larger numbers as text", pointer=pointer
        )
    return value


def _operator(field: _Field, op: str, operand: Any, whole: _Filter, pointer: str) -> ColumnElement[bool]:
    whole.take_condition(pointer)
    if op == "exists" and isinstance(operand, bool):
        present = field.kind.is_not(None)
        return present if operand else not_(present)
    if op == "eq":
        return field.equals(operand, pointer)
    if op == "ne":
        return not_(func.coalesce(field.equals(operand, pointer), false()))
    if op == "in" and isinstance(operand, list):
        whole.take_values(len(operand), pointer)
        return field.among(operand, pointer)
    if op in _ORDER and isinstance(operand, int | float | str) and not isinstance(operand, bool):
        return field.ordered(_ORDER[op], operand, pointer)
    if op not in OPERATORS:
        raise errors.InvalidFilter(f"{op!r} is not one of {', '.join(OPERATORS)}", pointer=pointer)
    raise errors.InvalidFilter(f"{op!r} does not take {type(operand).__name__}", pointer=pointer)


def _table(values: Sequence[float | str], kind: Any, dialect: str) -> Select[Any]:
    """A list as a table of one column. `listed` has its positions too, and executes a statement for each of its parts."""
    text = literal(orjson.dumps(values).decode(), String)
    if dialect == "sqlite":
        return select(func.json_each(text).table_valued("value").c.value)
    # A table, and no array: PostgreSQL looks a value up in a table by its hash, and compares it with all of an array.
    return select(cast(func.json_array_elements_text(cast(text, JSON)).column_valued(), kind))


def _incomparable(value: Any, pointer: str) -> errors.InvalidFilter:
    return errors.InvalidFilter(f"a field cannot be compared with {type(value).__name__}", pointer=pointer)


class _Field:
    """One top-level field of the payload."""

    def __init__(self, name: str, dialect: str) -> None:
        self._dialect = dialect
        if dialect == "postgresql":
            kind, text, key = _Kind, _Text, name
        elif json.dumps(name) == f'"{name}"':
            kind, text, key = _Kind, _Text, f'$."{name}"'
        else:
            kind, text, key = _EachKind, _EachText, name
        self.kind = kind(ItemRow.payload, literal(key))
        self._text = text(ItemRow.payload, literal(key))
        self._float = self._text.cast(Float(53))
        # What SQLite extracts is a number already, and it compares integers with doubles by their values.
        self._exact = self._text.cast(Numeric) if dialect == "postgresql" else type_coerce(self._text, BigInteger)

    def equals(self, value: Any, pointer: str) -> ColumnElement[bool]:
        if value is None:
            return self.kind == "null"
        if isinstance(value, bool):
            return self._when("boolean", self._text == str(value).lower())
        if isinstance(value, int | float):
            return self.ordered(lambda field, number: field == number, value, pointer)
        if isinstance(value, str):
            return self.ordered(lambda field, text: field == text, value, pointer)
        raise _incomparable(value, pointer)

    def among(self, values: Sequence[Any], pointer: str) -> ColumnElement[bool]:
        """Whether it equals one of the values: one look at each type's list, however long that is."""
        integers, numbers, texts, few = list[int](), list[float](), list[str](), set[bool | None]()
        for value in values:
            if value is None or isinstance(value, bool):
                few.add(value)
            elif isinstance(value, int):
                integers.append(_within_64_bits(value, pointer))
            elif isinstance(value, float):
                numbers.append(_finite(value, pointer))
            elif isinstance(value, str):
                _storable(value, pointer)
                texts.append(value)
            else:
                raise _incomparable(value, pointer)
        parts = [self.equals(value, pointer) for value in sorted(few, key=str)]
        for kind, field, listed, type_ in (
            ("number", self._exact, integers, Numeric()),
            ("number", self._float, numbers, Float(53)),
            ("string", self._text, texts, String()),
        ):
            if listed:
                parts.append(self._when(kind, field.in_(_table(listed, type_, self._dialect))))
        return or_(false(), *parts)

    def ordered(
        self, compare: Callable[[Any, Any], ColumnElement[bool]], value: float | str, pointer: str
    ) -> ColumnElement[bool]:
        if isinstance(value, str):
            _storable(value, pointer)
            return self._when("string", compare(self._text, value))
        if isinstance(value, int):
            return self._when("number", compare(self._exact, literal(_within_64_bits(value, pointer), BigInteger)))
        return self._when("number", compare(self._float, _finite(value, pointer)))

    def _when(self, kind: str, condition: ColumnElement[bool]) -> ColumnElement[bool]:
        """The condition, evaluated only where the field has the JSON type: a cast of another type may fail."""
        return case((self.kind == kind, condition), else_=false())
