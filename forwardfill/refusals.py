"""Failures that an operator can mend, in a line each: a wrong setting, a database or a disk that does not answer.

Any other error is a fault of ours, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings
from sqlalchemy.exc import DBAPIError, OperationalError

from forwardfill.settings import ClientSettings
from gallery.catalog.schema import CatalogHeldError, NewerSchemaError
from gallery.errors import GalleryError
from gallery.folder import ForeignFolderError
from gallery.settings import GallerySettings
from service.ready import OldSchemaError, UnsafeBinding
from service.settings import ServiceSettings
from workers.settings import WorkerSettings

_SETTINGS: Mapping[str, type[BaseSettings]] = {
    kind.__name__: kind for kind in (ClientSettings, GallerySettings, ServiceSettings, WorkerSettings)
}
#: modules that need not be installed, and the extras that bring them
_EXTRAS = {"psycopg": "postgres", "PIL": "train", "matplotlib": "train", "sklearn": "train"}


def in_words(error: Exception) -> str | None:
    """What is wrong and what would mend it, without any secret; None if nobody expects this error."""
    match error:
        case ValidationError() if error.title in _SETTINGS:
            kind = _SETTINGS[error.title]
            return "\n".join(_setting(kind, each) for each in error.errors(include_url=False))
        # Without a statement, the connection failed. SQLAlchemy's own text would show the values of a statement.
        case DBAPIError() if error.statement is None or isinstance(error, OperationalError):
            return _of_the_catalog(error)
        case ModuleNotFoundError() if (package := (error.name or "").partition(".")[0]) in _EXTRAS:
            return f"{package} is not installed: pip install 'forwardfill[{_EXTRAS[package]}]'"
        case (
            GalleryError()
            | CatalogHeldError()
            | ForeignFolderError()
            | NewerSchemaError()
            | OldSchemaError()
            | UnsafeBinding()
        ):
            return str(error)
        case OSError() if not isinstance(error, BrokenPipeError):  # whoever read the output wants no more
            named = error.filename is not None and error.strerror is not None
            return f"{error.filename}: {error.strerror}" if named else _line(str(error))
    return None


def is_read_only(error: DBAPIError) -> bool:
    """Whether SQLite may not write its file, or not make files beside it."""
    return str(getattr(error.orig, "sqlite_errorname", "")).startswith("SQLITE_READONLY")


def _has_no_room_beside(error: DBAPIError) -> bool:
    """Whether SQLite may make no files beside one that is there, of which it says only that it cannot open it."""
    catalog = Path(GallerySettings().database.database or "")
    return getattr(error.orig, "sqlite_errorname", "") == "SQLITE_CANTOPEN" and catalog.is_file()


def _of_the_catalog(error: DBAPIError) -> str:
    if is_read_only(error) or _has_no_room_beside(error):
        return (
            "the catalog cannot be written, which SQLite needs even to read it (FORWARDFILL_DATABASE_URL, FORWARDFILL_DATA): "
            "allow that; or, to verify a copy that nobody changes, set "
            "FORWARDFILL_DATABASE_URL='sqlite:///file:/FOLDER/catalog.sqlite3?immutable=1&uri=true'"
        )
    return f"the catalog does not answer (FORWARDFILL_DATABASE_URL, FORWARDFILL_DATA): {_line(str(error.orig))}"


def _setting(kind: type[BaseSettings], wrong: Any) -> str:
    name = str(wrong["loc"][0])
    extra = kind.model_fields[name].json_schema_extra
    secret = isinstance(extra, dict) and bool(extra.get("secret"))
    given = "" if secret else f" (got {wrong['input']!r})"
    return f"{kind.model_config['env_prefix']}{name.upper()}: {wrong['msg'].removeprefix('Value error, ')}{given}"


def _line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
