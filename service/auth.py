"""Who may ask: each request is let through by its key, or refused."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.errors import Forbidden, Unauthenticated
from service.keys import Caller, Scope
from service.process import Process, ProcessDep
from service.ready import is_loopback

_BEARER = HTTPBearer(auto_error=False, description="An API key, made with `forwardfill keys create`.")


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


_EVERYTHING = Caller(None, Scope.ADMIN)


def _local(request: MutableMapping[str, Any], *, insecure: bool) -> Caller:
    """Let anyone on this machine do everything, but no web page in a browser on it: the last two checks are for these."""
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
