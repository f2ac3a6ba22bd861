"""Lists reach both databases as they are, in few statements, and are looked up by the index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery.catalog import listed as module
from gallery.catalog import schema
from gallery.catalog.items import _live, add_items, mark_deleted, payloads, places
from gallery.catalog.listed import listed, parts, values
from gallery.catalog.tables import GalleryRow, ItemRow, ModelRow, SegmentRow
from gallery.catalog.transaction import Catalog

# What neither database keeps in text is refused long before: NUL, and halves of characters.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ELEMENTS = st.lists(st.tuples(TEXT, st.none() | TEXT), min_size=1, max_size=40)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def catalog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('listed') / 'catalog.sqlite3'}"
    else:
        url = request.getfixturevalue("postgres_copy")("template0")
    opened = Catalog(url)
    schema.migrate(opened)
    yield opened
    opened.close()


def read(session: Session, elements: Sequence[tuple[str | None, ...]]) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for part in parts(elements):
        each = listed(session, part)
        asked = select(each.position, *each.fields).select_from(each.table).order_by(each.position)
        found += [tuple(row) for row in session.execute(asked, values(part))]
    return found


@given(elements=ELEMENTS, at_once=st.integers(1, 50), most_bytes=st.integers(1, 400))
def test_what_goes_in_comes_out_in_its_place_however_it_is_parted(
    catalog: Catalog, elements: list[tuple[str, str | None]], at_once: int, most_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, catalog.reading() as session:
        patch.setattr(module, "_MOST_ROWS", at_once)
        patch.setattr(module, "_MOST_BYTES", most_bytes)
        assert read(session, elements) == [(at, *element) for at, element in enumerate(elements)]


def test_an_empty_list_has_no_parts() -> None:
    assert not list(parts([]))


def segment(session: Session, name: str) -> SegmentRow:
    model = ModelRow(name=name, dimension=1, metric="cosine", normalized=False)
    gallery = GalleryRow(name=name, model=model, version=1, storage_dtype="float32", index={})
    session.add(gallery)
    session.flush()
    made = SegmentRow(gallery_id=gallery.id, version=1, rows=1, ids_file="ids", ids_sha256="0" * 64, ids_bytes=1)
    session.add(made)
    session.flush()
    return made


@given(payload=st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT)))
def test_payloads_come_back_as_they_were(catalog: Catalog, payload: dict[str, object]) -> None:
    with Session(catalog.engine) as session:
        made = segment(session, "kept")
        add_items(
            session, gallery_id=made.gallery_id, segment_id=made.id, ids=["a", "b", "ü"], payloads=[payload, None, {}]
        )
        found = payloads(session, [(made.id, row) for row in range(3)])
        assert [found[made.id, row] for row in range(3)] == [payload, None, {}]
        assert places(session, made.gallery_id, ["ü", "c"]) == {"ü": (made.id, 2)}


def test_ids_that_look_like_numbers_are_texts(catalog: Catalog) -> None:
    with Session(catalog.engine) as session:
        made = segment(session, "numbers")
        ids = ["1", "01", "1.0", "null", "true", '"1"']
        add_items(session, gallery_id=made.gallery_id, segment_id=made.id, ids=ids, payloads=[None] * len(ids))
        assert mark_deleted(session, made.gallery_id, ["1", "null"], 2) == {"1", "null"}
        assert set(places(session, made.gallery_id, ids)) == {"01", "1.0", "true", '"1"'}


def test_one_id_is_looked_up_by_the_index_even_where_nothing_was_analysed(catalog: Catalog) -> None:
    with Session(catalog.engine) as session:
        made = segment(session, "large")
        count = 20_000
        add_items(
            session,
            gallery_id=made.gallery_id,
            segment_id=made.id,
            ids=[f"item-{at}" for at in range(count)],
            payloads=[None] * count,
        )
        (part,) = parts([("item-7",)])
        asked = select(ItemRow.row).where(*_live(session, made.gallery_id, part)).params(values(part))
        told = asked.compile(session.get_bind(), compile_kwargs={"literal_binds": True})
        explain = "EXPLAIN QUERY PLAN" if session.get_bind().dialect.name == "sqlite" else "EXPLAIN"
        plan = "\n".join(str(row) for row in session.connection().exec_driver_sql(f"{explain} {told}"))
        assert "items_live" in plan
        assert "item_id=?" in plan or "(item_id)::text = ANY" in plan, plan
