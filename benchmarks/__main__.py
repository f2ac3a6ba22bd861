"""`python -m benchmarks`: ratios, each the median of rounds in which both sides are measured in turn, and their bars.

Machines are noisy, so nothing is compared with a figure of another run. Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import orjson
import torch

from benchmarks import chroma, during, floor, halfway, million, payloads, pgvector, upgrading, writes
from benchmarks.processes import end_in_good_order
from benchmarks.report import show
from benchmarks.setting import Setting, Skip, machine, threads
from benchmarks.table import Group, Line, document, exit_code, markdown

Measure = Callable[[Setting], Iterator[Line]]

#: in the order in which they run: those that take longest come last
GROUPS: dict[str, Measure] = {
    "http": floor.measure,
    "chroma": chroma.measure,
    "pgvector": pgvector.measure,
    "payloads": payloads.measure,
    "writes": writes.measure,
    "half": halfway.measure,
    "during": during.measure,
    "million": million.measure,
    "workers": upgrading.measure_workers,
    "reembed": upgrading.measure_reembedding,
    "upgrade": upgrading.measure,
}
OUT = Path("build/bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, print it, write it down; the exit code."""
    options = _parser().parse_args(arguments)
    end_in_good_order()
    torch.set_num_threads(threads())
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="forwardfill-bench-") as scratch:
        setting = _setting(options, Path(scratch))
        groups = []
        for name in options.only or GROUPS:
            groups.append(run(name, GROUPS[name], setting))
            show(groups[-1])
            _write(options, groups)  # an hour of measuring is not lost with the last of it
    return exit_code(groups)


def run(name: str, measure: Measure, setting: Setting) -> Group:
    """One group. What goes wrong in it is written down, and the others are measured all the same."""
    lines: list[Line] = []
    try:
        for line in measure(setting):
            lines.append(line)  # what was measured before something went wrong stays  # noqa: PERF402
    except Skip as why:
        return Group(name, tuple(lines), skipped=str(why))
    except Exception as error:  # noqa: BLE001 - a server that does not start, a peer that is not installed
        traceback.print_exc()
        return Group(name, tuple(lines), failed=f"{type(error).__name__}: {error}")
    return Group(name, tuple(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=GROUPS, metavar="NAME", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--root", type=Path, help="folder of real data: CIFAR-100's embeddings and images")
    parser.add_argument("--items", type=int, default=100_000, help="of the measures that need no more")
    parser.add_argument("--million", type=int, default=1_000_000, help="of the measures about a million")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is measured, in turn")
    parser.add_argument("--quick", action="store_true", help="tiny: see that all of it runs; the ratios mean nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="where results.json and results.md go")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure on; some 10 GB for a million")
    return parser


def _setting(options: argparse.Namespace, scratch: Path) -> Setting:
    return Setting(
        scratch=scratch,
        root=options.root,
        items=min(options.items, 2000) if options.quick else options.items,
        million=min(options.million, 8000) if options.quick else options.million,
        rounds=min(options.rounds, 2) if options.quick else options.rounds,
        quick=options.quick,
    )


def _write(options: argparse.Namespace, groups: Sequence[Group]) -> None:
    asked = {name: None if value is None else str(value) for name, value in vars(options).items()}
    results = {"machine": machine(), "options": asked, "good": exit_code(groups) == 0, "groups": document(groups)}
    (options.out / "results.json").write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2))
    (options.out / "results.md").write_text(markdown(groups), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
