"""Removes files that no row names, as a crash leaves them behind, and never one that is about to be named.

Whoever publishes locks the row of its gallery, and checks under that lock that its files are there (`Files.unnamed`). A
gallery's orphans are removed under the same lock. So a file that was named meanwhile is known and spared, and whoever comes
later finds its file gone and names nothing. That is safe at any age of a file; only old ones are removed, so that no writer has
to start again. Files of no gallery have a lock of their own, `gallery.catalog.claims`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from gallery.catalog import claims
from gallery.catalog.galleries import free, known_file, known_files
from gallery.catalog.transaction import Catalog
from gallery.files import Files

#: where files are that rows name
FOLDERS = ("columns", "indexes", "artifacts", "fits")
# Files that are removed under one lock; writers of the gallery wait meanwhile.
_AT_ONCE = 32


def found(catalog: Catalog, files: Files, folder: str, *, older_than: float) -> list[str]:
    """The files below a folder that no row names now and that were not touched for so many seconds."""
    old = list(files.old(folder, older_than=older_than))
    if not old:
        return []
    # Read after the files' ages: what was young then may be named by now. All names are read at once, because no database index
    # has them, and each single question would read them all.
    with catalog.reading() as session:
        known = known_files(session, folder)
    return [name for name in old if not known(name)]


def remove(catalog: Catalog, files: Files, folder: str, *, older_than: float) -> list[str]:
    """Remove what `found` names; what somebody is publishing to at this moment is left for the next time.

    Returns:
        The names that were removed.
    """
    by_gallery: dict[int | None, list[str]] = defaultdict(list)
    for name in found(catalog, files, folder, older_than=older_than):
        by_gallery[_gallery(name)].append(name)
    removed: list[str] = []
    for gallery_id, names in by_gallery.items():
        for start in range(0, len(names), _AT_ONCE):
            removed += _remove(catalog, files, gallery_id, names[start : start + _AT_ONCE], older_than)
    return removed


def _remove(
    catalog: Catalog, files: Files, gallery_id: int | None, names: Sequence[str], older_than: float
) -> list[str]:
    with catalog.transaction() as tx:
        if not (claims.free(tx.session) if gallery_id is None else free(tx.session, gallery_id)):
            return []
        return files.remove_unknown(names, known=known_file(tx.session), older_than=older_than)


def _gallery(name: str) -> int | None:
    """The gallery below whose folder a file is; None where it is of none, as artifacts and the pairs of fits are."""
    _, _, rest = name.partition("/")
    number, _, file = rest.partition("/")
    return int(number) if file and number.isdecimal() else None
