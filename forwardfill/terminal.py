"""What commands say: results on the output, refusals on the error stream, all text as it is.

Names, paths and patterns hold brackets, which Rich would take for its markup, or drop.
"""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)


def say(text: str, *, style: str | None = None) -> None:
    """Print a sentence; it is not broken, so that what a path or an id in it is can be copied."""
    console.print(text, style=style, soft_wrap=True)


def refuse(text: str, *, code: int = 2) -> NoReturn:
    """Say what is wrong and how to mend it, and end the command.

    Args:
        text: a sentence.
        code: 2 where the command was told something wrong, 1 where something else failed.
    """
    errors.print(text, style="red", soft_wrap=True)
    raise typer.Exit(code)
