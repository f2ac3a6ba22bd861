"""What a run was asked for, and what its groups share."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.vectors import EMBEDDINGS, Data, clustered, real
from gallery.settings import GallerySettings


class Skip(Exception):
    """A group cannot be measured here, and need not be."""


@dataclass(frozen=True)
class Setting:
    """Sizes and places."""

    #: folder for everything that is written meanwhile
    scratch: Path
    #: folder of real data; None where there is none
    root: Path | None
    #: of the measures that need no more
    items: int
    #: of the measures about a million
    million: int
    #: how often each side of a comparison is measured
    rounds: int
    #: hardly measure: see in a minute that all of it runs
    quick: bool

    def requests(self, usual: int) -> int:
        """How many requests make one measure."""
        return min(usual, 40) if self.quick else usual

    def seconds(self, usual: float) -> float:
        """How long a measure lasts that is a matter of time."""
        return min(usual, 1.0) if self.quick else usual

    @cached_property
    def data(self) -> Data:
        """What searches are compared on: real embeddings where they are given, else clustered vectors."""
        if self.root is not None and (self.root / EMBEDDINGS).is_file():
            return real(self.root).first(self.items)
        return clustered(self.items)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder that is gone afterwards, so that the next group has the disk and the page cache for itself."""
        made = Path(tempfile.mkdtemp(dir=self.scratch))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def threads() -> int:
    """How many threads the service uses for one search or transformation; bare passes get the same."""
    return GallerySettings().threads_used


def machine() -> dict[str, object]:
    """What the figures were measured on, as far as that explains them."""
    return {"cores": os.cpu_count(), "threads_of_one_call": threads(), "python": sys.version}
