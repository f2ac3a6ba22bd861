"""A client of the service that the environment names, and its failures told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer
from rich.console import Console

from forwardfill.client import DEFAULT_TIMEOUT, Client, ForwardfillError
from forwardfill.settings import ClientSettings

console = Console()


@contextmanager
def connected(timeout: httpx.Timeout | float = DEFAULT_TIMEOUT) -> Iterator[Client]:
    """Talk to FORWARDFILL_URL with FORWARDFILL_API_KEY; say what went wrong in one line, and exit with 1."""
    settings = ClientSettings()
    url, key = settings.url, settings.api_key
    with Client(url, key.get_secret_value() if key else None, timeout=timeout) as client:
        try:
            yield client
        except ForwardfillError as error:
            console.print(f"[red]{error}[/red]")
            raise typer.Exit(1) from error
        except httpx.TransportError as error:
            console.print(
                f"[red]no service answers at {url}: {error}; set FORWARDFILL_URL, or run `forwardfill serve`[/red]"
            )
            raise typer.Exit(1) from error
