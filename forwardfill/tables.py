"""What the service lists, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from forwardfill.terminal import show


def listed(rows: Iterable[Mapping[str, Any]], *columns: str) -> None:
    """Print rows; the first column names them and is never cut, so that it can be copied into the next command."""
    first, *others = columns
    table = Table()
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name)
    for row in rows:
        table.add_row(*("" if row[name] is None else str(row[name]) for name in columns))
    show(table)
