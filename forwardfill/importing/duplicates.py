"""Ids that occur twice: the later row would replace the earlier one, and nobody would be told."""

from __future__ import annotations

import numpy as np

from forwardfill.importing.column import BadInput
from forwardfill.importing.rows import Rows

_BLOCK = 65_536


def refuse(rows: Rows) -> None:
    """Look through all ids, before the first row is sent.

    Eight bytes per row are held, a hash; ids whose hashes are equal are compared themselves in a second reading.

    Raises:
        BadInput: an id occurs twice.
    """
    if rows.ids is None:
        return
    hashes, at = np.empty(len(rows), np.int64), 0
    for block in rows.id_blocks(_BLOCK):
        hashes[at : at + len(block)] = [hash(each) for each in block]
        at += len(block)
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if suspects:
        _refuse_equal(rows, suspects)


def _refuse_equal(rows: Rows, suspects: set[int]) -> None:
    seen, at = dict[str, int](), 0
    for block in rows.id_blocks(_BLOCK):
        for row, each in enumerate(block, at):
            if hash(each) not in suspects:
                continue
            if each in seen:
                where = rows.ids.where if rows.ids else ""
                raise BadInput(
                    f"{where}, row {row}: has the id {each!r}, and so has row {seen[each]}; an id names one item, so leave one "
                    "of the rows out or give it another id"
                )
            seen[each] = row
        at += len(block)
