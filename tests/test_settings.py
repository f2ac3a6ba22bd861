"""What processes may be told: it means what it says, or it is refused before anything is done by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from forwardfill.settings import ClientSettings
from gallery.catalog import schema
from gallery.catalog.transaction import Catalog
from gallery.settings import GallerySettings
from service.settings import ServiceSettings
from workers.settings import WorkerSettings

NUMBERS = [
    (kind, name)
    for kind in (GallerySettings, ServiceSettings, WorkerSettings)
    for name, field in kind.model_fields.items()
    if field.annotation in (int, float)
]


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


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.parametrize("value", ["inf", "nan", "1e308", str(10**23)])
def test_a_number_that_nothing_can_compute_with_is_refused_by_its_setting(
    kind: type[BaseSettings], name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FORWARDFILL_{name.upper()}", value)
    with pytest.raises(ValidationError) as refused:
        kind()
    assert [each["loc"] for each in refused.value.errors()] == [(name,)]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("lease_seconds", 31_536_000),
        ("max_attempts", 2**31 - 1),
        ("segments_at_once", 64),
        ("threads", 1024),
        ("mapped_cache_bytes", 2**63 - 1),
    ],
)
def test_the_largest_number_is_taken_and_one_more_is_not(name: str, most: int) -> None:
    assert getattr(GallerySettings.model_validate({name: most}), name) == most
    with pytest.raises(ValidationError, match="Input should be less than or equal to"):
        GallerySettings.model_validate({name: most + 1})


@pytest.mark.parametrize("kind", [GallerySettings, ServiceSettings, WorkerSettings, ClientSettings])
def test_an_empty_variable_is_as_one_that_is_not_set(kind: type[BaseSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in kind.model_fields:
        monkeypatch.delenv(f"FORWARDFILL_{name.upper()}", raising=False)
    default = kind()
    for name in kind.model_fields:
        monkeypatch.setenv(f"FORWARDFILL_{name.upper()}", "")
    assert kind() == default
