"""What a worker does before it works."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import structlog

from gallery.catalog import schema
from gallery.catalog.transaction import Catalog
from workers import main


def test_a_worker_that_starts_before_the_migration_says_so_once_and_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            schema.migrate(catalog)

    monkeypatch.setattr(time, "sleep", sleep)
    with structlog.testing.capture_logs() as events:
        main._until_migrated(catalog)
        main._until_migrated(catalog)
    assert schema.is_current(catalog)
    assert len(waits) == 3
    assert [(each["event"], "`forwardfill migrate`" in each["detail"]) for each in events] == [("schema_is_old", True)]
    catalog.close()


def test_a_worker_waits_for_the_migration_of_a_database_that_answers_only_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mounted later"
    catalog = Catalog(f"sqlite:///{folder / 'catalog.sqlite3'}")
    steps = iter([folder.mkdir, lambda: None, lambda: schema.migrate(catalog)])
    monkeypatch.setattr(time, "sleep", lambda _: next(steps)())
    with structlog.testing.capture_logs() as events:
        main._until_migrated(catalog)
    assert schema.is_current(catalog)
    assert [each["event"] for each in events] == ["look_failed", "schema_is_old"]
    catalog.close()
