"""API keys and scopes. Keys are kept in memory, so that a search asks no database who may search.

A key is 256 random bits, stored as its SHA-256. Once a key was made, requests need one, even if it is revoked later: taking
the last key back must not open the door. Before that, only this machine is served.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from gallery.catalog import audit
from gallery.catalog import keys as key_rows
from gallery.catalog.tables import KeyRow
from gallery.catalog.transaction import Catalog
from service.bodies import NAME
from service.errors import Forbidden, Unauthenticated
from service.process import Process, ProcessDep
from service.ready import is_loopback

_PREFIX = "ffk_"  # so that a leaked key is recognised by scanners
_BEARER = HTTPBearer(auto_error=False, description="An API key, made with `forwardfill keys create`.")


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
        """Whose key it is. What is compared are digests, so timing tells nothing about a key."""
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


def admitted(process: Process, request: MutableMapping[str, Any], needed: Scope) -> Caller:
    """Find out who sent a request, given as its ASGI scope.

    Raises:
        Unauthenticated: a key is needed, and none or an invalid one came.
        Forbidden: the key's scope is too small, or the request does not come from this machine.
    """
    keys = process.keyring.current
    if not keys.needed:
        return _local(request, insecure=process.settings.insecure)
    kind, _, secret = _header(request, b"authorization").partition(" ")
    caller = keys.caller(secret.strip()) if kind.lower() == "bearer" else None
    if caller is None:
        raise Unauthenticated("send a valid key as `Authorization: Bearer <key>`")
    if caller.scope < needed:
        raise Forbidden(
            f"this needs the scope {needed.name.lower()}, and the key {caller.name} has {caller.scope.name.lower()}"
        )
    return caller


class Needs:
    """A dependency that lets a request through if its sender has a scope. It comes first, before anything is looked up."""

    def __init__(self, scope: Scope) -> None:
        """Ask for `scope` or more."""
        self._scope = scope

    async def __call__(
        self,
        request: Request,
        process: ProcessDep,
        _: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],  # for the OpenAPI document
    ) -> Caller:
        """Find out who asks.

        Raises:
            Unauthenticated: a key is needed, and none or an invalid one came.
            Forbidden: the key's scope is too small, or the request does not come from this machine.
        """
        return admitted(process, request.scope, self._scope)


MaySearch = Annotated[Caller, Security(Needs(Scope.SEARCH))]
MayWrite = Annotated[Caller, Security(Needs(Scope.WRITE))]
MayAdmin = Annotated[Caller, Security(Needs(Scope.ADMIN))]


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


_EVERYTHING = Caller(None, Scope.ADMIN)


def _local(request: MutableMapping[str, Any], *, insecure: bool) -> Caller:
    """Without keys, whoever is on this machine may do everything; a page in its browser is not, so it is told apart."""
    if not insecure:
        client = request.get("client")
        if client is not None and not is_loopback(client[0]):
            raise Forbidden("without a key only this machine is served; make one with `forwardfill keys create`")
        host = _header(request, b"host")
        if not is_loopback(_host_name(host)):
            raise Forbidden("without a key the host must be a loopback address: a page might have rebound its own name")
        origin = _header(request, b"origin")
        if origin and origin.partition("//")[2] != host:
            raise Forbidden("without a key, pages of other origins are refused")
    return _EVERYTHING


@lru_cache(maxsize=1024)
def _host_name(host: str) -> str:
    """Of a `Host` header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets that do not match
        return ""


def _header(request: MutableMapping[str, Any], wanted: bytes) -> str:
    """A header of a request, empty if it has none; ASGI gives their names in lower case."""
    for name, value in request["headers"]:
        if name == wanted:
            text: str = value.decode("latin-1")
            return text
    return ""
