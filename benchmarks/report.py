"""What a run prints, group by group."""

from __future__ import annotations

import shutil
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.table import HEAD, Group, cells

_console = Console(width=160)


def show(group: Group) -> None:
    """Print the lines of a group, and where bars are missed, the command that shows where the time goes."""
    _console.print(f"\n[bold]{group.name}[/bold]")
    if why := group.failed or group.skipped:
        _console.print(f"{'failed' if group.failed else 'not measured'}: {why}", markup=False)
    if group.lines:
        table = Table(*HEAD)
        for line in group.lines:
            table.add_row(*cells(line), style="red" if line.missed else None)
        _console.print(table)
    if any(line.missed for line in group.lines) and shutil.which("py-spy"):
        _console.print(
            f"where the time goes: py-spy record --subprocesses --output build/bench/{group.name}.svg -- "
            f"{sys.executable} -m benchmarks --only {group.name}",
            markup=False,
        )
