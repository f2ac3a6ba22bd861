"""`make faults`: the whole matrix on real processes, on both stacks, as a table that must be all zeros.

python -m tests.faults [--stack sqlite|postgresql] [--only REGEX] [--list]
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.acceptance.forks import Nursery
from tests.faults.cases import Case, cases
from tests.faults.servers import servers
from tests.faults.stage import Judgement, Stage, staged

console = Console(width=130)
_enough = threading.Event()


@dataclass
class Row:
    """All tries of one fault at one point on one stack."""

    fault: str
    point: str
    stack: str
    tries: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    #: tries whose story went wrong
    failed: int = 0
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.failed)


def main() -> int:
    """Run what was asked for; 1 if anything is not zero."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--stack", choices=list(_STACKS), help="only this one")
    parser.add_argument("--only", default="", help="only faults whose name and point match this")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    asked = parser.parse_args()
    wanted = [case for case in cases() if re.search(asked.only, f"{case.fault}: {case.point}")]
    if asked.list:
        for case in wanted:
            console.print(f"{case.fault}: {case.point}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forwardfill-faults-") as folder, ThreadPoolExecutor() as beside:
        # Most of the time somebody waits for a lease to end, so the two stacks are played side by side.
        stacks = [
            beside.submit(play, Path(folder), wanted) for name, play in _STACKS.items() if asked.stack in (None, name)
        ]
        try:
            rows = [row for stack in stacks for row in stack.result()]
        finally:  # whoever is interrupted waits for the tries under way, whose servers and processes then end
            _enough.set()
    _tell(rows, time.monotonic() - began)
    return 0 if rows and all(row.clean for row in rows) else 1


def _embedded(folder: Path, wanted: Sequence[Case]) -> list[Row]:
    (folder / "sqlite").mkdir()
    with Nursery() as nursery, staged(folder / "sqlite", nursery.spawn) as stage:
        return _play_all(stage, "SQLite + files", [case for case in wanted if case.embedded])


def _production(folder: Path, wanted: Sequence[Case]) -> list[Row]:
    (folder / "postgresql").mkdir()
    with (
        Nursery() as nursery,
        servers() as (postgres, redis),
        staged(folder / "postgresql", nursery.spawn, postgres=postgres, redis=redis) as stage,
    ):
        return _play_all(stage, "PostgreSQL + Redis", wanted)


_STACKS = {"sqlite": _embedded, "postgresql": _production}


def _play_all(stage: Stage, stack: str, wanted: Sequence[Case]) -> list[Row]:
    rows: list[Row] = []
    for case in wanted:
        if _enough.is_set():
            break
        row = next((row for row in rows if (row.fault, row.point, row.stack) == (case.fault, case.point, stack)), None)
        if row is None:
            rows.append(row := Row(case.fault, case.point, stack))
        began = time.monotonic()
        row.tries += 1
        try:
            judged = _play(stage, case)
        except Exception:  # noqa: BLE001 - the others are played all the same
            row.failed += 1
            console.print(traceback.format_exc(limit=-4), markup=False)
            stage.mend()
        else:
            row.lost, row.doubled, row.wrong = (
                row.lost + judged.lost,
                row.doubled + judged.doubled,
                row.wrong + judged.wrong,
            )
            row.failed += bool(judged.why) and not (judged.lost or judged.doubled or judged.wrong)
            for why in judged.why[:10]:
                console.print(f"    {why}", markup=False)
        seconds = time.monotonic() - began
        row.seconds += seconds
        console.print(f"{stack}: {case.fault}, {case.point}: {seconds:.1f} s", markup=False, highlight=False)
    return rows


def _play(stage: Stage, case: Case) -> Judgement:
    run = stage.begin()
    judged = case.play(stage, run)
    run.end()
    return judged


def _tell(rows: Sequence[Row], seconds: float) -> None:
    table = Table("fault", "point", "stack", "tries", "lost", "doubled", "wrong answers", "failed", "s")
    for row in rows:
        numbers = (row.tries, row.lost, row.doubled, row.wrong, row.failed)
        style = None if row.clean else "red"
        table.add_row(row.fault, row.point, row.stack, *map(str, numbers), f"{row.seconds:.0f}", style=style)
    console.print(table)
    tries, wrong = sum(row.tries for row in rows), sum(not row.clean for row in rows)
    console.print(f"{tries} tries in {seconds / 60:.1f} minutes; {wrong} of {len(rows)} rows are not all zeros.")


if __name__ == "__main__":
    sys.exit(main())
