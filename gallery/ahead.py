"""Do the next step of an iteration while the caller is busy with this one."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

_Item = TypeVar("_Item")
_NO_MORE = object()


def ahead(items: Generator[_Item]) -> Generator[_Item]:
    """The same items, made in a thread of their own, and no more than one of them before it is asked for.

    So two generators that take turns become two that work at once, and memory holds one item more than without. What `items`
    raises is raised here in its place. Whoever stops in the middle closes this (`contextlib.closing`): the item under way is
    waited for, and `items` is closed.
    """
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(next, items, _NO_MORE)
        while (item := coming.result()) is not _NO_MORE:
            coming = thread.submit(next, items, _NO_MORE)
            yield item  # type: ignore[misc]  # the other type that it may be is that of `_NO_MORE`
