"""A filter means the same on SQLite, on PostgreSQL, and in the few lines of Python below."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gallery import errors
from gallery.catalog.filters import MOST_CONDITIONS, MOST_VALUES, compile_filter
from gallery.catalog.items import matching
from gallery.catalog.tables import GalleryRow, ItemRow, SegmentRow
from gallery.catalog.transaction import Catalog
from tests.gallery.conftest import TEMPLATE
from tests.gallery.world import World

_ABSENT = object()
ORDER = {"lt": lambda a, b: a < b, "lte": lambda a, b: a <= b, "gt": lambda a, b: a > b, "gte": lambda a, b: a >= b}

# Few names and values, so that filters meet payloads; some of each are nasty.
names = st.sampled_from(["a", "b", "or.and", 'q"uote', "back\\slash", "ünï", "$", "[0]", "a b", "", "'"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4
).filter(lambda name: name not in ("and", "or", "not"))
large = [2**53, 2**53 + 1, 1234567890123456788, 1234567890123456789, 2**63 - 1, -(2**63)]
numbers = st.integers(-3, 3) | st.sampled_from([0.5, -0.5, 1.0, 1e10, float(2**53), 1e300, -0.0, 0.1, *large])
texts = st.sampled_from(
    ["", "a", "A", "b", "1", "true", "null", "é", "z", "𝄞", "\uffff", "a'b", 'a"b', "a\\b", "%", "\n"]
)
scalars = st.none() | st.booleans() | numbers | texts
payloads = st.none() | st.dictionaries(
    names,
    scalars
    | st.sampled_from([2**63, 2**64 - 1, -(2**70)])
    | st.lists(scalars, max_size=2)
    | st.dictionaries(names, scalars, max_size=2),
    max_size=4,
)
operators = {"eq": scalars, "ne": scalars, "exists": st.booleans(), "in": st.lists(scalars, max_size=6)}
conditions = (
    scalars
    | st.fixed_dictionaries({}, optional=operators).filter(bool)
    | st.dictionaries(st.sampled_from(sorted(ORDER)), numbers | texts, min_size=1, max_size=2)
)
filters = st.recursive(
    st.dictionaries(names, conditions, max_size=2),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "and": st.lists(inner, min_size=1, max_size=2),
            "or": st.lists(inner, min_size=1, max_size=2),
            "not": inner,
        },
    ),
    max_leaves=4,
)


def fits(payload: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """The reference."""
    return all(_part(payload or {}, name, value) for name, value in wanted.items())


def _part(payload: Mapping[str, Any], name: str, value: Any) -> bool:
    if name == "and":
        return all(fits(payload, inner) for inner in value)
    if name == "or":
        return any(fits(payload, inner) for inner in value)
    if name == "not":
        return not fits(payload, value)
    field = payload.get(name, _ABSENT)
    operators = value if isinstance(value, dict) else {"eq": value}
    return all(_operator(field, operator, operand) for operator, operand in operators.items())


def _operator(field: Any, operator: str, operand: Any) -> bool:
    if operator == "exists":
        return (field is not _ABSENT) == operand
    if operator == "ne":
        return not _equal(field, operand)
    if operator == "in":
        return any(_equal(field, one) for one in operand)
    if operator == "eq":
        return _equal(field, operand)
    return _kind(field) == _kind(operand) in ("number", "string") and ORDER[operator](*_keys(field, operand))


def _equal(field: Any, operand: Any) -> bool:
    field_key, operand_key = _keys(field, operand)
    return _kind(field) == _kind(operand) and bool(field_key == operand_key)


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null"}
    return kinds.get(type(value), repr(type(value)))


def _keys(field: Any, operand: Any) -> tuple[Any, Any]:
    if isinstance(field, str) and isinstance(operand, str):
        return field.encode(), operand.encode()  # by bytes, as both databases do
    if _kind(field) == "number" and isinstance(operand, float):
        return float(field), operand
    return field, operand  # Python compares integers with floats by their values


class Items:
    """Payloads in a catalog, one segment at a time."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def matching(self, rows: list[Any], wanted: Mapping[str, Any]) -> list[int]:
        """Which of the payloads fit. Nothing is kept."""
        condition = compile_filter(wanted, self.catalog.engine.dialect.name)
        with self.catalog._write() as session:  # never committed
            gallery = GalleryRow(name="filtered", model_id=1, index={}, storage_dtype="float32")
            session.add(gallery)
            session.flush()
            segment = SegmentRow(
                gallery_id=gallery.id, rows=len(rows), version=0, ids_file="", ids_sha256="", ids_bytes=0
            )
            session.add(segment)
            session.flush()
            session.add_all(
                ItemRow(gallery_id=gallery.id, segment_id=segment.id, row=at, item_id=str(at), payload=payload)
                for at, payload in enumerate(rows)
            )
            session.flush()
            found = matching(session, gallery.id, [segment.id], condition)[segment.id]
            session.rollback()
        return sorted(found.tolist())


@pytest.fixture(scope="module")
def both(prepared: Path, prepared_postgres: None, postgres_copy: Callable[[str], str]) -> Iterator[list[Items]]:
    """The same table in both databases."""
    catalogs = [Catalog(f"sqlite:///{prepared / 'catalog.sqlite3'}"), Catalog(postgres_copy(TEMPLATE))]
    yield [Items(catalog) for catalog in catalogs]
    for catalog in catalogs:
        catalog.close()


_LARGE = [{"a": 1234567890123456788}, {"a": 1234567890123456789}, {"a": 2**64 - 1}, {"a": 2.0**53}, {"a": 2**53 + 1}]


@given(rows=st.lists(payloads, min_size=1, max_size=8), wanted=filters)
@example(rows=_LARGE, wanted={"a": 1234567890123456789})
@example(rows=_LARGE, wanted={"a": {"lt": 1234567890123456789, "gt": 2**53}})
@example(rows=_LARGE, wanted={"a": {"in": [2**53, 2**63 - 1]}})
@example(rows=_LARGE, wanted={"a": {"in": [2**53, 1234567890123456789, 2**53 + 1, float(2**64)]}})
@example(rows=[{"a": 1}, {"a": True}, {"a": "1"}, {"a": 1.0}, {"a": None}, {}], wanted={"a": {"in": [1, "true", None]}})
@settings(max_examples=250)
def test_both_databases_agree_with_python(both: list[Items], rows: list[Any], wanted: Any) -> None:
    expected = [at for at, payload in enumerate(rows) if fits(payload, wanted)]
    sqlite, postgresql = (items.matching(rows, wanted) for items in both)
    assert sqlite == expected
    assert postgresql == expected


@pytest.mark.parametrize(
    ("wanted", "says", "pointer"),
    [
        ([], "an object", "/filter"),
        ({"a": {"like": "x"}}, "'like' is not one of eq, ne, in, exists, lt", "/filter/a/like"),
        ({"a": {}}, "has no condition", "/filter/a"),
        ({"a": {"in": 1}}, "'in' does not take int", "/filter/a/in"),
        ({"a": {"lt": None}}, "'lt' does not take NoneType", "/filter/a/lt"),
        ({"a": {"lt": True}}, "'lt' does not take bool", "/filter/a/lt"),
        ({"a": {"exists": 1}}, "'exists' does not take int", "/filter/a/exists"),
        ({"a": [1]}, "cannot be compared with list", "/filter/a"),
        ({"or": []}, "takes a list of filters", "/filter/or"),
        ({"and": [{"a": {"no": 1}}]}, "'no' is not one of", "/filter/and/0/a/no"),
        ({"not": [1]}, "an object", "/filter/not"),
        ({"a": 10**400}, "number", "/filter/a"),
        ({"a": {"gt": 2**63}}, "64 bits", "/filter/a/gt"),
        ({"a": {"in": [1, -(2**63) - 1]}}, "64 bits", "/filter/a/in"),
        ({"a": {"lt": float("inf")}}, "number", "/filter/a/lt"),
        ({"a": float("nan")}, "number", "/filter/a"),
        ({"a": "nul\0"}, "NUL", "/filter/a"),
        ({"a": {"in": ["\ud800"]}}, "surrogate", "/filter/a/in"),
        ({"nul\0": 1}, "NUL", "/filter/nul\0"),
        ({"\ud800": {"exists": True}}, "surrogate", "/filter/\ud800"),
        ({"a/b": {"~/": 1}}, "is not one of", "/filter/a~1b/~0~1"),
    ],
)
def test_a_filter_that_cannot_be_followed_is_refused_with_its_place(wanted: Any, says: str, pointer: str) -> None:
    for dialect in ("sqlite", "postgresql"):
        with pytest.raises(errors.InvalidFilter, match=says) as refused:
            compile_filter(wanted, dialect)
        assert refused.value.pointer == pointer


def test_a_list_of_as_many_values_as_there_may_be_is_looked_up(both: list[Items]) -> None:
    every = [*range(0, MOST_VALUES - 4000, 2), *(f"t{n}" for n in range(4000)), *(n + 0.5 for n in range(3000))]
    rows = [{"a": value} for value in (4, 5, 0.5, "t7", "4", True, None)]
    for items in both:
        assert items.matching(rows, {"a": {"in": every}}) == [0, 2, 3]
        assert items.matching(rows, {"a": {"exists": True}, "not": {"a": {"in": every}}}) == [1, 4, 5, 6]


def test_both_databases_take_as_many_conditions_as_there_may_be(both: list[Items]) -> None:
    rows = [{"a": at} for at in (0, MOST_CONDITIONS - 1, MOST_CONDITIONS)]
    for items in both:
        assert items.matching(rows, {"or": [{"a": at} for at in range(MOST_CONDITIONS)]}) == [0, 1]


@pytest.mark.parametrize(
    ("wanted", "says", "pointer"),
    [
        ({f"f{at}": at for at in range(MOST_CONDITIONS + 1)}, "128 conditions", f"/filter/f{MOST_CONDITIONS}"),
        ({"or": [{}] * (MOST_CONDITIONS + 1)}, "128 conditions.* one `in`", f"/filter/or/{MOST_CONDITIONS}"),
        (
            {"and": [{"a": {"gt": at, "lt": at}} for at in range(MOST_CONDITIONS)]},
            "128 conditions",
            f"/filter/and/{MOST_CONDITIONS // 2}/a/gt",
        ),
        ({"a": {"in": [1] * MOST_VALUES}, "b": {"in": [1]}}, "10000 values.* several filters", "/filter/b/in"),
    ],
)
def test_a_filter_beyond_its_limits_is_refused_with_the_limit_and_the_place(
    wanted: Any, says: str, pointer: str
) -> None:
    for dialect in ("sqlite", "postgresql"):
        with pytest.raises(errors.InvalidFilter, match=says) as refused:
            compile_filter(wanted, dialect)
        assert refused.value.pointer == pointer


def test_a_filter_may_be_nested_eight_deep() -> None:
    wanted: dict[str, Any] = {"a": 1}
    for _ in range(7):
        wanted = {"not": wanted}
    compile_filter(wanted, "sqlite")
    with pytest.raises(errors.InvalidFilter, match="nested 8 deep"):
        compile_filter({"not": wanted}, "sqlite")


@pytest.mark.parametrize("payload", [{"n": 10**400}, {"n": [10**309]}, {"n": float("inf")}, {"n": "\0"}, {"\ud800": 1}])
def test_a_payload_that_a_database_cannot_hold_or_compare_is_refused(each_world: World, payload: Any) -> None:
    with pytest.raises(errors.InvalidItem) as refused:
        each_world.upsert("old", ["a"], np.ones((1, 4)), payloads=[payload])
    assert refused.value.pointer == "/items/0/payload"


def test_a_filtered_search_finds_what_fits_and_nothing_deleted(each_world: World) -> None:
    ids = [f"i{n}" for n in range(10)]
    each_world.upsert(
        "old", ids, np.arange(40).reshape(10, 4), payloads=[{"n": n, "even": n % 2 == 0} for n in range(10)]
    )
    each_world.delete("i4")
    search = partial(each_world.search, "old", np.zeros((1, 4)))
    assert [hit.id for hit in search(filter={"n": {"gte": 3}, "even": True}).hits(0)] == ["i6", "i8"]
    assert search(filter={"n": {"gt": 100}}).hits(0) == []
    assert len(search(filter={}).hits(0)) == 9
