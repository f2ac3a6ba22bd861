"""What the gallery must be told: where things are kept, and its limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

YEAR = 365 * 24 * 60 * 60
# Beyond these a number is a slip, and what computes with it ends in an error that does not name the setting: dates have an end,
# and so have the integers of databases and of native libraries.
Seconds = Annotated[float, Field(gt=0, le=YEAR)]
Count = Annotated[int, Field(le=2**31 - 1)]
Bytes = Annotated[int, Field(le=2**63 - 1)]

_DATABASES = {"sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg"}


class GallerySettings(BaseSettings):
    """Read from `FORWARDFILL_*` by the composition roots only; everyone below is handed values."""

    model_config = SettingsConfigDict(env_prefix="FORWARDFILL_", env_ignore_empty=True, extra="ignore")

    data: Path = Field(default=Path("forwardfill-data"), description="Folder of columns, indexes and artifacts.")
    database_url: str = Field(
        default="",
        description="SQLAlchemy URL; empty means SQLite in the data folder.",
        json_schema_extra={"secret": True},
    )
    # Where an index that finds 99 of 100 begins to pay (ADR 0032): sooner for one query, later for many at once.
    exact_below: Count = Field(default=5_000, ge=0, description="Segments with fewer rows have no index file.")
    max_dimension: Count = Field(default=8192, ge=1, description="Largest dimension of a model.")
    max_items_per_upsert: Count = Field(default=10_000, ge=1, description="Items in one JSON upsert.")
    max_items_per_arrow: Count = Field(default=1_000_000, ge=1, description="Items in one Arrow upsert.")
    # A map hardly gets better beyond that, and all of them are in a worker's memory at once.
    max_fit_pairs: Count = Field(default=100_000, ge=1, description="Pairs that a transformation is fitted to.")
    max_k: Count = Field(default=1000, ge=1, description="Hits of one search.")
    max_queries: Count = Field(default=1000, ge=1, description="Queries in one batch search.")
    oversample: Count = Field(default=10, ge=1, description="Candidates per hit on forward and backward routes.")
    # For the first place alone, recall needs about a hundred candidates however small k is.
    min_candidates: Count = Field(default=200, ge=1, description="Fewest candidates on forward and backward routes.")
    lease_seconds: Seconds = Field(default=30.0, description="A worker that is silent for longer loses its segment.")
    max_attempts: Count = Field(default=3, ge=1, description="Attempts at a segment before it is set aside as failed.")
    # A network computes 2,048 rows as fast as more, since what lies between two layers then stays in the cache; and a few blocks
    # are all that a worker holds of a segment.
    block_rows: Count = Field(
        default=2048, ge=1, description="Rows that a worker reads, transforms and writes together during an upgrade."
    )
    segments_at_once: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Segments that a worker transforms or indexes at once; one more may wait for its index on disk.",
    )
    quality_share: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Most of a worker's time that measuring quality with probes may take, during an upgrade and after it.",
    )
    mapped_cache_bytes: Bytes = Field(
        default=256 * 1024 * 1024,
        ge=0,
        description="Memory for vectors that were transformed at query time.",
    )
    index_device: str = Field(
        default="auto",
        description="Where the API's indexes live: auto (a GPU if there is one that works), cpu, cuda, cuda:1, ...",
    )
    filter_cache_bytes: Bytes = Field(
        default=64 * 1024 * 1024,
        ge=0,
        description="Memory for which rows fit a filter: a byte for each row and filter, 400 for each segment.",
    )

    # Searches and the worker share the cores. Threads that wait for each other on a busy core cost more than they gain: a
    # transformation took 4 times longer with two threads on two busy cores than with one.
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Threads of one search or transformation; 0 means half of the cores, at least one.",
    )

    @field_validator("database_url")
    @classmethod
    def _database_that_works(cls, url: str) -> str:
        if not url:
            return url
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):  # whose messages have parts of the URL, and so perhaps of the password
            parsed = None
        if parsed is None or parsed.drivername not in _DATABASES:
            raise ValueError(
                "is not of the form sqlite:////FOLDER/catalog.sqlite3 or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE; "
                "empty, it is SQLite in the data folder"
            )
        if parsed.get_backend_name() == "sqlite" and not _is_kept(parsed):
            raise ValueError(
                "names no file, without which SQLite forgets everything: it is of the form "
                "sqlite:////FOLDER/catalog.sqlite3; empty, it is SQLite in the data folder"
            )
        return url

    @property
    def threads_used(self) -> int:
        """The number that is in force."""
        return self.threads or max(1, (os.cpu_count() or 1) // 2)

    @property
    def database(self) -> URL:
        """The URL that is in force; as no string, in which some signs of a folder's name would mean something else."""
        if self.database_url:
            return make_url(self.database_url)
        return URL.create("sqlite", database=str(self.data.absolute() / "catalog.sqlite3"))


def _is_kept(sqlite: URL) -> bool:
    """Whether SQLite keeps it in a file, and not in a connection's memory."""
    name = (sqlite.database or "").removeprefix("file:").partition("?")[0]
    options = sqlite.normalized_query
    in_memory = "memory" in options.get("mode", ()) or "memdb" in options.get("vfs", ())
    return name not in ("", ":memory:") and not sqlite.host and not in_memory
