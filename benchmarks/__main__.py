"""`python -m benchmarks`: every figure is a ratio of two things timed in turn, because machines are noisy."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gallery import Gallery
from gallery.search.request import SearchRequest
from models.transformations import Fct

DIMENSION, HIDDEN = 128, 2048


class Ratio(NamedTuple):
    """One line of the table."""

    what: str
    ours: str
    against: str
    ratio: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=20_000, help="items of the gallery")
    parser.add_argument("--rounds", type=int, default=30, help="timed searches of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        network = Fct(source_dimension=DIMENSION, target_dimension=DIMENSION, side_dimension=DIMENSION, hidden=HIDDEN)
        gallery = Gallery(Path(folder), network, items=options.items, segments=10)
        ratios = [*_fraction_zero(gallery, options.rounds), _upgrade(gallery), _fully(gallery, options.rounds)]
    table = Table(
        "measure", "ours", "against", "ratio", title=f"{options.items} items x {DIMENSION}, 2-layer mixer of {HIDDEN}"
    )
    for line in ratios:
        table.add_row(line.what, line.ours, line.against, f"{line.ratio:.2f}")
    Console().print(table)


def _fraction_zero(gallery: Gallery, rounds: int) -> list[Ratio]:
    """Before any segment is transformed: the forward route against its parts."""
    old, new = gallery.old[0], gallery.new_query
    candidates, sides = gallery.old[:200], gallery.side[:200]
    ours, bare = _in_turn(
        lambda: gallery.search(SearchRequest("new", new, 10, {"old": old[None]})),
        lambda: gallery.transform(candidates, sides),
        rounds,
    )
    return [Ratio("search at 0 %, p50, against a bare pass of its 200 candidates", _ms(ours), _ms(bare), ours / bare)]


def _upgrade(gallery: Gallery) -> Ratio:
    """The whole upgrade (read, transform, write, sync, publish) against the bare forward pass."""
    started = perf_counter()
    gallery.transform(gallery.old, gallery.side)
    bare = perf_counter() - started
    started = perf_counter()
    gallery.upgrade()
    ours = perf_counter() - started
    rate = len(gallery.old) / ours
    return Ratio(
        "upgrade, items per second, against a bare pass",
        f"{rate:.0f}/s",
        f"{len(gallery.old) / bare:.0f}/s",
        bare / ours,
    )


def _fully(gallery: Gallery, rounds: int) -> Ratio:
    """After the upgrade: the direct route against FAISS alone over one array of the same vectors."""
    vectors = gallery.transform(gallery.old, gallery.side)
    ours, bare = _in_turn(
        lambda: gallery.search(SearchRequest("new", gallery.new_query, 10)),
        lambda: faiss.knn(gallery.new_query, vectors, 10),
        rounds,
    )
    return Ratio("search at 100 %, 10 segments, p50, against one faiss.knn", _ms(ours), _ms(bare), ours / bare)


def _in_turn(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of each, one after the other, after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 3):
        for of, action in zip(times, (first, second), strict=True):
            started = perf_counter()
            action()
            if turn >= 3:
                of.append(perf_counter() - started)
    return median(times[0]), median(times[1])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
