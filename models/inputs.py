"""What a map is fitted from: vectors of the same items by both models, from files or from memory; checked, then split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

COLUMNS = ("source", "side", "target", "labels")
# Of two vectors with squared lengths up to this, the squared distance is still a finite float32, and so are all scores.
LARGEST_SQUARE = float(np.finfo(np.float32).max) / 4
CHECKED_ROWS = 65_536  # how many rows are checked at a time
COMPARED_ROWS = 1_024  # how many rows are compared with the first at a time; mostly a second part is not looked at
PROJECTIONS = 4  # of each model's vectors, by which copies are found
SAME = 1e-6  # vectors of length 1 that differ by less in each element have the same direction, up to rounding
CELL = 1 / 256  # of their median deviation: copies differ by a thousandth of that, and different items by far more
MIN_PAIRS = 10  # with fewer, parts of two rows each would be most of the data
MIN_PART = 100  # how many rows a part to judge by should have: one query is then one percent
MAX_PART = 20_000  # with more rows a judgement gets no better, but a map does, so the rest is trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The same items, row by row, by the old model (`source`) and by the new one (`target`)."""

    #: (n, d_old) and (n, d_new), any real type, perhaps mapped files
    source: Array
    target: Array
    #: (n, d_side): what was stored beside the old vectors
    side: Array | None = None
    #: (n,) integers or strings: rows of one label are relevant to each other
    labels: Array | None = None

    def __len__(self) -> int:
        return len(self.source)

    def columns(self) -> dict[str, Array]:
        """Return the columns that are there, by name."""
        present = ((name, getattr(self, name)) for name in COLUMNS)
        return {name: column for name, column in present if column is not None}

    def take(self, rows: Rows) -> Pairs:
        """Return some rows, copied into memory: vectors as float32."""
        taken = {name: column[rows] for name, column in self.columns().items()}
        return Pairs(**{name: each if name == "labels" else each.astype(np.float32) for name, each in taken.items()})

    def without_labels(self) -> Pairs:
        """Return the same rows without labels."""
        return Pairs(source=self.source, target=self.target, side=self.side)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A split: the rows of each part. No row is in two parts, and of equal pairs, up to rounding, only the first is in any."""

    #: what maps are trained on, in the order of the pairs; empty to judge a map that exists already
    train: Rows
    #: what the method and the weight of fused scoring are chosen by, shuffled
    validation: Rows
    #: what the verdict rests on, shuffled
    test: Rows
    #: whether the parts were made by label, so that a row can find another of its label in its own part
    labelled: bool
    #: rows that are in no part, because an earlier row is the same pair
    copies: int


def read_pairs(source: Path, target: Path, *, side: Path | None = None, labels: Path | None = None) -> Pairs:
    """Map .npy files, and check them as `check_pairs` does.

    Raises:
        ValueError: a file is not what it should be; names the file, what is wrong, and the fix.
        OSError: a file cannot be read.
    """
    paths = {"source": source, "target": target, "side": side, "labels": labels}
    given = {name: path for name, path in paths.items() if path is not None}
    pairs = Pairs(**{name: _map(path) for name, path in given.items()})
    check_pairs(pairs, {name: str(path) for name, path in given.items()})
    return pairs


def check_pairs(pairs: Pairs, names: Mapping[str, str] | None = None) -> None:
    """Check that pairs can be fitted: shapes, lengths, types, and that every value, and so every score, is finite.

    Args:
        pairs: what to check.
        names: what errors call a column, such as the path of its file.

    Raises:
        TypeError: a column is no NumPy array.
        ValueError: names the column, what is wrong, and the fix.
    """
    names = names or {}
    columns = pairs.columns()
    for column, values in columns.items():
        name = names.get(column, column)
        _check_kind(name, values, is_label=column == "labels")
        if len(values) != len(pairs.source):
            raise ValueError(
                f"{name} has {len(values)} rows, {names.get('source', 'source')} has {len(pairs.source)}: "
                "row i must be the same item in all"
            )
    if len(pairs) < MIN_PAIRS:
        raise ValueError(
            f"{names.get('source', 'source')} has {len(pairs)} rows: a map needs {MIN_PAIRS} pairs at the very least, "
            "and some hundreds to be worth anything"
        )
    for column, values in columns.items():
        if column != "labels":
            _check_values(names.get(column, column), values, scored=column != "side")


def check_apart(name: str, vectors: Array, *, directions: bool) -> None:
    """Check that a model tells items apart. To one that does not, every item is a nearest neighbour, and any map perfect.

    Args:
        name: what the error calls the vectors.
        vectors: (n, d), n > 0.
        directions: whether it is only directions that count, as under cosine.

    Raises:
        ValueError: all rows are the same, or all have the same direction.
    """

    def seen(rows: Array) -> npt.NDArray[np.float64]:
        rows = rows.astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(lengths > 0, lengths, 1) if directions else rows

    first, most = seen(vectors[:1]), SAME if directions else 0.0
    parts = (seen(vectors[start : start + COMPARED_ROWS]) for start in range(0, len(vectors), COMPARED_ROWS))
    if all((np.abs(part - first) <= most).all() for part in parts):
        what = "have the same direction" if directions else "are the same"
        raise ValueError(f"all rows of {name} {what}: give pairs of different items, or look at that model")


def split(pairs: Pairs, *, held_out: float | None = None, seed: int = 0) -> Parts:
    """Split pairs into three parts, by seed.

    What is held out goes half to validation and half to test. Where there are labels, rows are dealt out in twos of one label.
    So each label is spread over the parts, and a row that is held out has another of its label in its part. If too many labels
    occur only once, labels are not used.

    Of equal pairs only the first is used, also where they differ in the last digits. A copy in another part would mean judging a
    map on what it was trained on. A copy in the same part would be an easy find for the first. A method that validates on folds
    of its rows would be misled likewise.

    Args:
        pairs: what to split.
        held_out: the share of rows that are not trained on. By default a fifth, and where that is less than
            `MIN_PART` rows for each part, that many, up to half of the pairs.
        seed: of the split.

    Raises:
        ValueError: the share is not between 0 and 1; 1 trains on nothing, to judge a map that is there already.
    """
    if held_out is not None and not 0 < held_out <= 1:
        raise ValueError(f"the share held out must be above 0 and at most 1, not {held_out}")
    rng = np.random.default_rng(seed)
    rows = _distinct(pairs)
    count = len(rows)
    wanted = held_out * count if held_out is not None else min(max(0.2 * count, 2 * MIN_PART), 0.5 * count)
    wanted = min(wanted, 2 * MAX_PART)
    units = rng.permutation(count)[:, None] if pairs.labels is None else _twos(pairs.labels[rows], rng)
    # Rows whose label stands alone cannot be dealt in twos: with half of the rows like that, labels tell too little.
    if 2 * units.size < count:
        return split(pairs.without_labels(), held_out=held_out, seed=seed)
    held = units[_every(len(units), min(1.0, wanted / units.size), rng.random())]
    if pairs.labels is not None and any(_all_the_same(pairs.labels[rows[part]]) for part in (held[::2], held[1::2])):
        return split(pairs.without_labels(), held_out=held_out, seed=seed)  # all have one label, so any search is right
    validation, test = held[::2].ravel(), held[1::2].ravel()
    if min(len(validation), len(test)) < 2:
        raise ValueError(
            f"holding out {wanted:.3g} of {count} different pairs leaves nothing to judge by: hold out more, at least 4 pairs"
        )
    train = np.setdiff1d(np.arange(count), held.ravel())
    return Parts(
        train=rows[train],
        validation=rows[rng.permutation(validation)],
        test=rows[rng.permutation(test)],
        labelled=pairs.labels is not None,
        copies=len(pairs) - count,
    )


def warnings_about(pairs: Pairs, parts: Parts) -> list[str]:
    """Warn if there are too few pairs for something, and say how many would do."""
    warnings = []
    count = len(pairs) - parts.copies
    share = len(parts.train) / count
    if parts.copies:
        warnings.append(
            f"{parts.copies:,} of {len(pairs):,} pairs are copies of others: each pair is trained on or judged by once"
        )
    needed = 2 * pairs.source.shape[1]
    if 0 < len(parts.train) < needed:
        warnings.append(
            f"{len(parts.train)} pairs train a map from {pairs.source.shape[1]} dimensions: it will follow their noise. "
            f"{ceil(needed / share):,} pairs in all would do"
        )
    smallest = min(len(parts.validation), len(parts.test))
    if smallest < MIN_PART:
        warnings.append(
            f"{len(parts.test)} pairs judge the map: only a large difference is told from noise. "
            f"{ceil(count * MIN_PART / max(1, smallest)):,} pairs in all would do"
        )
    if pairs.labels is not None and not parts.labelled:
        warnings.append(
            "most labels stand alone, or those of what is held out are all the same, so that no search finds more than another: "
            "the labels are not used to judge"
        )
    return warnings


def _map(path: Path) -> Array:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged head fails in as many ways as a bad program does
        raise ValueError(f"{path} is not an array that `np.save` wrote, or is cut short ({error})") from error
    if not isinstance(values, np.ndarray):
        values.close()
        raise ValueError(f"{path} is an archive of arrays: write the one that is meant with `np.save`")  # noqa: TRY004 - of a file
    return values


def _check_kind(name: str, values: Array, *, is_label: bool) -> None:
    if not isinstance(values, np.ndarray):  # in memory it may be anything that has rows
        raise TypeError(f"{name} is of type {type(values).__name__}: give a NumPy array, as np.asarray makes one")
    if is_label:
        if values.ndim != 1 or values.dtype.kind not in "iuUS":
            raise ValueError(
                f"{name} holds {values.dtype} of shape {values.shape}: labels are one integer or string a row, shape (n,)"
            )
    elif values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"{name} has shape {values.shape}: vectors are rows of one matrix, shape (n, d)")
    elif values.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {values.dtype}: vectors are real numbers, float32 for instance")


def _check_values(name: str, values: Array, *, scored: bool) -> None:
    """Check values after conversion to float32, as they are used: a large float64 becomes infinite."""
    bad, long = list[int](), list[int]()
    for start in range(0, len(values), CHECKED_ROWS):
        with np.errstate(over="ignore", invalid="ignore"):
            block = values[start : start + CHECKED_ROWS].astype(np.float32)
            too_long = np.vecdot(block, block) > LARGEST_SQUARE
        finite = np.isfinite(block).all(axis=1)
        bad += (start + np.flatnonzero(~finite)).tolist()
        long += (start + np.flatnonzero(finite & too_long)).tolist()
    if bad:
        raise ValueError(
            f"{name} has {len(bad)} rows with a NaN or an infinity, the first is row {bad[0]}: drop these rows from all files"
        )
    if long and scored:
        raise ValueError(
            f"{name} has {len(long)} rows longer than {sqrt(LARGEST_SQUARE):.0e}, the first is row {long[0]}: their scores would "
            "be infinite; divide all vectors of this model by one number"
        )


def _distinct(pairs: Pairs) -> Rows:
    """Return the rows, in order, that are not copies of an earlier one.

    A model that embeds the same thing again, beside other things, differs in the last digits. So pairs count as equal where both
    vectors have all their projections on a few random directions in the same narrow cells. One that lies at the edge of a cell
    may be missed.
    """
    places = np.concatenate([_projected(pairs.source), _projected(pairs.target)], axis=1)
    # Equal ones go first: of many copies the median deviation would be 0.
    places, firsts = np.unique(places, axis=0, return_index=True)
    deviations = np.median(np.abs(places - np.median(places, axis=0)), axis=0)
    cells = np.floor(places / np.where(deviations > 0, deviations * CELL, 1))
    _, codes = np.unique(cells, axis=0, return_inverse=True)
    earliest = np.full(codes.max() + 1, len(pairs))
    np.minimum.at(earliest, codes.ravel(), firsts)
    return np.sort(earliest).astype(np.int64)


def _projected(vectors: Array) -> npt.NDArray[np.float64]:
    """Return the projections (n, PROJECTIONS) of vectors (n, d), as float32, on random directions."""
    directions = np.random.default_rng(0).normal(size=(vectors.shape[1], PROJECTIONS))
    starts = range(0, len(vectors), CHECKED_ROWS)
    return np.concatenate(
        [vectors[start : start + CHECKED_ROWS].astype(np.float32).astype(np.float64) @ directions for start in starts]
    )


def _twos(labels: Array, rng: np.random.Generator) -> Rows:
    """Pair rows of one label at random, label by label in random order; of an odd number one is left over.

    Returns:
        (m, 2) rows.
    """
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((rng.random(len(labels)), rng.permutation(len(counts))[codes]))
    sizes = counts[codes[order]]
    starts = np.flatnonzero(np.r_[True, np.diff(codes[order]) != 0])
    place = np.arange(len(order)) - np.repeat(starts, sizes[starts])  # within its label
    return order[place < sizes - sizes % 2].reshape(-1, 2).astype(np.int64)


def _all_the_same(labels: Array) -> bool:
    return bool((labels == labels.flat[0]).all()) if labels.size else False


def _every(count: int, share: float, offset: float) -> npt.NDArray[np.bool_]:
    """Mark a share of places evenly: any run of places has that share of marks, give or take one."""
    marks = np.floor(np.arange(count + 1) * share + offset)
    return np.asarray(np.diff(marks) > 0)
