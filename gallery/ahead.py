"""Do the next step of an iteration while the caller is busy with this one."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

_Item = TypeVar("_Item")
_NO_MORE = object()


def ahead(items: Generator[_Item]) -> Generator[_Item]:
    """The same items, each made in another thread while the caller is busy with the one before it.

    So two generators that would take turns work at once, and memory holds one item more. What `items` raises is raised here, in
    its place. Whoever stops in the middle closes this generator (`contextlib.closing`): it waits for the item under way, and
    closes `items`.
    """
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(next, items, _NO_MORE)
        while (item := coming.result()) is not _NO_MORE:
            coming = thread.submit(next, items, _NO_MORE)
            yield item  # type: ignore[misc]  # the other type that it may be is that of `_NO_MORE`
