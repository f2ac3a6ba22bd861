"""What processes may be told: it means what it says, or it is refused before anything is done by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from gallery.catalog import schema
from gallery.catalog.transaction import Catalog
from gallery.settings import GallerySettings


@pytest.mark.parametrize("name", ["a?1", "my%20data", "50%off", "a#b", "a b", "ünï", "a:b@c", "a?mode=memory&uri=true"])
def test_the_catalog_is_in_the_data_folder_whatever_its_name(name: str, tmp_path: Path) -> None:
    data = tmp_path / name
    data.mkdir()
    catalog = Catalog(GallerySettings(data=data, database_url="").database)
    schema.migrate(catalog)
    assert schema.is_current(catalog)
    catalog.close()
    assert (data / "catalog.sqlite3").exists()
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite+pysqlite:///:memory:",
        "sqlite:///catalog?mode=memory",
        "sqlite:///file:catalog?mode=memory&cache=shared&uri=true",
        "sqlite:///file:catalog?mode=memory&mode=rwc&uri=true",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:/catalog?vfs=memdb&uri=true",
        "sqlite://catalog.sqlite3",
    ],
)
def test_a_catalog_that_no_file_keeps_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=r"names no file.*: it is of the form sqlite:////"):
        GallerySettings(database_url=url)


@pytest.mark.parametrize(
    "url", ["sqlite:///relative", "sqlite:////folder/catalog", "sqlite:///file:/folder/catalog?immutable=1&uri=true"]
)
def test_a_catalog_in_a_file_is_taken(url: str) -> None:
    assert GallerySettings(database_url=url).database_url == url
