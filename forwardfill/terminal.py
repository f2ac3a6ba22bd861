"""What commands say: results on the output, refusals on the error stream, all text as it is.

Names, paths and patterns hold brackets, which Rich would take for its markup, or drop.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

_ANY_WIDTH = 1 << 30

if os.environ.get("COLUMNS") == "0":  # a terminal that does not know how wide it is: Rich would print nothing at all
    del os.environ["COLUMNS"]

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)


def say(text: str, *, style: str | None = None) -> None:
    """Print a sentence on one line, so that a path or an id in it can be copied."""
    console.print(text, style=style, soft_wrap=True)


def show(table: Table) -> None:
    """Print a table: as wide as the terminal, or, where there is none, as wide as its contents, so that nothing is cut off.

    COLUMNS, if it is set, is the width everywhere.
    """
    wished = os.environ.get("COLUMNS", "")
    if console.is_terminal or wished:
        console.print(table, width=int(wished) if wished.isdecimal() else None)
        return
    table.width = console.measure(table, options=console.options.update(max_width=_ANY_WIDTH)).maximum
    console.print(table, crop=False)


def hand_over(secret: str) -> None:
    """Print what cannot be shown again, and nothing else, so that a script can take it.

    Raises:
        OSError: it could not be written.
    """
    if sys.stdout is None:  # it was closed before Python started
        raise OSError(errno.EBADF, "the output is closed")
    try:
        print(secret, flush=True)
    except OSError:
        sys.stdout = None  # else Python would try to write it again at its end, and exit with another status
        raise


def refuse(text: str, *, code: int = 2) -> NoReturn:
    """Say what is wrong and how to mend it, and end the command.

    Args:
        text: a sentence.
        code: 2 where the command was told something wrong, 1 where something else failed.
    """
    errors.print(text, style="red", soft_wrap=True)
    raise typer.Exit(code)
