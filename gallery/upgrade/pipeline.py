"""A segment's new column: read, transformed and written at the same time, block by block.

    read, with its digest  ->  transform  ->  write, with its digest

Each step runs in a thread of its own and is at most one block ahead of the next. So a processor that transforms waits for no
file and no digest, and memory holds a few blocks of `FORWARDFILL_BLOCK_ROWS` rows, however large the segment is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

from gallery import errors
from gallery.ahead import ahead
from gallery.arrays import Dtype, Rows
from gallery.columns import read_blocks, verify, with_stand_ins, write_blocks
from gallery.files import Written
from gallery.spaces import EmbeddingModel, Transformation
from gallery.store import Store
from gallery.transforms import Block, computed_in


@dataclass(frozen=True, slots=True)
class Input:
    """A stored array that a new column is made from."""

    file: str
    sha256: str
    dimension: int


@dataclass(frozen=True, slots=True)
class Work:
    """What makes a new column, and how it is stored."""

    source: Input
    #: side-information; None where there is none, or the transformation takes none
    side: Input | None
    transformation: Transformation
    target: EmbeddingModel
    rows: int
    folder: str
    dtype: Dtype
    #: (n,) int64: rows that nobody will ever see, whose vectors need not be what the transformation gives
    unseen: Rows | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """A column that is durable."""

    column: Written
    #: the number type that its vectors were computed in
    computed_in: str


def derive(store: Store, work: Work, read_all: Callable[[], object] = lambda: None) -> Made:
    """Make the column; nothing names it yet.

    Args:
        store: where the files are.
        work: what is to be made.
        read_all: is called once all is read, before the last block is transformed.

    Raises:
        Damaged: what it would be made from is not what was stored. Nothing is left of it then.
        InvalidVector: the transformation gives numbers that cannot be stored; its detail `row` says for which row.
    """
    read, transforms = ahead(_read(store, work)), store.transforms
    try:
        with closing(read):
            first = next(read)
            loaded = transforms.in_bulk(work.transformation, *first)
            with (
                closing(_telling(chain([first], read), read_all)) as blocks,
                closing(ahead(transforms.apply_each(loaded, work.transformation, work.target, blocks))) as mapped,
            ):
                stored = mapped if work.unseen is None else with_stand_ins(mapped, work.unseen, work.dtype)
                column = write_blocks(
                    store.files, work.folder, stored, rows=work.rows, dimension=work.target.dimension, dtype=work.dtype
                )
    except errors.InvalidVector:
        # Damaged bytes may come out as such numbers before the end of their file tells that they are damaged.
        for each in _inputs(work):
            verify(store.files, each.file, each.sha256)
        raise
    return Made(column, computed_in(loaded))


def _read(store: Store, work: Work) -> Generator[Block]:
    """The blocks of the source, with side-information. Digests are compared before the last one is given, or raise.

    What is made of damaged bytes would get a digest that says that it is right.
    """
    source, *sides = (
        read_blocks(
            store.files,
            each.file,
            each.sha256,
            rows=work.rows,
            dimension=each.dimension,
            size=store.settings.block_rows,
        )
        for each in _inputs(work)
    )
    for embeddings in source:
        yield embeddings, next(sides[0]) if sides else None
    for side in sides:
        next(side, None)


def _telling(blocks: Iterable[Block], read_all: Callable[[], object]) -> Generator[Block]:
    """The blocks; `read_all` is called before the last one is given."""
    coming = iter(blocks)
    following = next(coming, None)
    while (block := following) is not None:
        following = next(coming, None)
        if following is None:
            read_all()
        yield block


def _inputs(work: Work) -> list[Input]:
    return [work.source, *([work.side] if work.side is not None else [])]
