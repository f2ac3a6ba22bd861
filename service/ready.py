"""Whether the service may start: its catalog has the schema of this version, and its address is not open to anyone."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from gallery.catalog import keys as key_rows
from gallery.catalog import schema
from gallery.catalog.transaction import Catalog
from service.settings import ServiceSettings


class OldSchemaError(Exception):
    """The catalog's database is of an older version, or empty; run `forwardfill migrate`."""


class UnsafeBinding(ValueError):
    """The service would be open to anyone who reaches the address."""


def make_ready(catalog: Catalog, settings: ServiceSettings) -> None:
    """Bring SQLite to the schema of this version, and make sure that the service may start.

    Raises:
        OldSchemaError: a PostgreSQL catalog is of an older version.
        NewerSchemaError: the catalog is of a newer version.
        UnsafeBinding: it would listen beyond loopback without a key.
    """
    # SQLite belongs to the service; a database that several share is migrated when an operator says so.
    if catalog.engine.dialect.name == "sqlite":
        schema.migrate(catalog)
    elif not schema.is_current(catalog):
        raise OldSchemaError(OldSchemaError.__doc__)
    require_safe_binding(settings.host, has_keys=has_keys(catalog), insecure=settings.insecure)


def require_safe_binding(host: str, *, has_keys: bool, insecure: bool) -> None:
    """Refuse to serve beyond loopback without a key.

    Raises:
        UnsafeBinding: there is no key, the host is not a loopback address, and it was not insisted.
    """
    if not has_keys and not insecure and not is_loopback(host):
        raise UnsafeBinding(
            f"FORWARDFILL_HOST: {host!r} is not a loopback address and no key was made: make one with "
            "`forwardfill keys create --name admin --scope admin`, or pass --insecure"
        )


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether an address or host name means this machine only."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def has_keys(catalog: Catalog) -> bool:
    """Whether a key was ever made."""
    with catalog.reading() as session:
        return key_rows.keys_made(session) > 0
