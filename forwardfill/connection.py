"""A client of the service that the environment names, and its failures told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from forwardfill.client import DEFAULT_TIMEOUT, Client, ForwardfillError
from forwardfill.errors import NOT_A_PROBLEM, ImpossibleName
from forwardfill.settings import ClientSettings
from forwardfill.terminal import refuse

_KEY_HINT = (
    "; set FORWARDFILL_API_KEY to a key that may; `forwardfill keys create` makes one, where the service runs, with its "
    "FORWARDFILL_DATA and FORWARDFILL_DATABASE_URL"
)

_URL_HINT = "; FORWARDFILL_URL should be the service's own address"


@contextmanager
def connected(timeout: httpx.Timeout | float = DEFAULT_TIMEOUT) -> Iterator[Client]:
    """Talk to FORWARDFILL_URL with FORWARDFILL_API_KEY; say what went wrong in one line, and exit with 1.

    A name that cannot be one is told in a line too, with exit status 2.
    """
    settings = ClientSettings()
    url, key = settings.url, settings.api_key
    try:
        made = Client(url, key.get_secret_value() if key else None, timeout=timeout)
    except (ImportError, ValueError, httpx.InvalidURL) as error:  # key and URL were looked at
        # An error about a malformed URL shows parts of it, and so perhaps of a password.
        why = "it is no URL" if isinstance(error, httpx.InvalidURL) else error
        refuse(f"the proxy that the environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) cannot be used: {why}")
    with made as client:
        try:
            yield client
        except ImpossibleName as error:
            refuse(str(error))
        except ForwardfillError as error:
            hint = _KEY_HINT if error.status in (401, 403) else _URL_HINT if error.code == NOT_A_PROBLEM else ""
            refuse(f"{error}{hint}", code=1)
        except httpx.TransportError as error:
            shown = httpx.URL(url).copy_with(userinfo=b"")  # there may be a password in it
            refuse(f"no service answers at {shown}: {error}; set FORWARDFILL_URL, or run `forwardfill serve`", code=1)
