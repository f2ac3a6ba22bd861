"""API keys and scopes. A process keeps all keys in memory, so that a search need not ask the database who may search.

A key is 256 random bits, stored as its SHA-256. Once a key was ever made, requests need one, even if it was revoked: to revoke
the last key must not let everybody in. Before that, only this machine is served.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from gallery.catalog import audit
from gallery.catalog import keys as key_rows
from gallery.catalog.tables import KeyRow
from gallery.catalog.transaction import Catalog
from service.names import NAME

_PREFIX = "ffk_"  # so that a leaked key is recognised by scanners


class Scope(IntEnum):
    """What a key may do; each includes those before it."""

    SEARCH = 1
    WRITE = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    #: the key's name; None where no key is needed
    name: str | None
    scope: Scope


@dataclass(frozen=True, slots=True)
class Keys:
    """All valid keys at one moment."""

    #: by SHA-256
    valid: Mapping[str, Caller]
    #: whether a key was ever made
    needed: bool

    def caller(self, secret: str) -> Caller | None:
        """Whose key it is, or None. Digests are compared, in constant time, so timing tells nothing about a key."""
        digest = hashlib.sha256(secret.encode()).hexdigest()
        found = None
        for known, caller in self.valid.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found


class Keyring:
    """The keys of this process; `refresh` swaps them."""

    def __init__(self, catalog: Catalog) -> None:
        """Start locked; call `refresh`."""
        self._catalog = catalog
        self.current = Keys({}, needed=True)

    def refresh(self) -> None:
        """Read the keys again."""
        with self._catalog.reading() as session:
            rows = key_rows.all_keys(session)
        valid = {row.sha256: Caller(row.name, Scope[row.scope.upper()]) for row in rows if row.revoked_at is None}
        self.current = Keys(valid, needed=bool(rows))


def create_key(catalog: Catalog, name: str, scope: str) -> str:
    """Make a key and return it; nobody can read it again.

    Raises:
        ValueError: the name or the scope is not one.
        KeyExists: another key has the name.
    """
    if not re.fullmatch(NAME, name):
        raise ValueError(f"a key's name fits {NAME}, and {name!r} does not")
    if scope.upper() not in Scope.__members__:
        raise ValueError(f"scope {scope!r} is not one of {', '.join(each.name.lower() for each in Scope)}")
    secret = _PREFIX + secrets.token_urlsafe(32)
    with catalog.transaction() as tx:
        digest = hashlib.sha256(secret.encode()).hexdigest()
        key_rows.add_key(tx.session, name=name, scope=scope.lower(), sha256=digest)
        audit.record(tx.session, "key.created", key=name, scope=scope.lower())
    return secret


def list_keys(catalog: Catalog) -> list[KeyRow]:
    """Every key that was ever made, oldest first; `revoked_at` is null while it is valid."""
    with catalog.reading() as session:
        return key_rows.all_keys(session)


def revoke_key(catalog: Catalog, name: str) -> bool:
    """Take a key back, in force within a second; False if it was revoked before.

    Raises:
        KeyNotFound: none has the name.
    """
    with catalog.transaction() as tx:
        revoked = key_rows.revoke_key(tx.session, name)
        if revoked:
            audit.record(tx.session, "key.revoked", key=name)
    return revoked
