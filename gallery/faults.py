"""Named points at which a process can be made to fail, so that what is promised of crashes is tried on the code that runs.

A process whose environment names no fault when it starts has none, ever: its composition root arms what is named there,
nothing else does, and no request reaches it. A point then costs one comparison.

    FORWARDFILL_FAULT=publish:kill:3     kill -9 when the third segment is about to be published
    FORWARDFILL_FAULT=rename:stop:1      SIGSTOP, as when a machine is suspended; whoever wants it to go on sends SIGCONT
    FORWARDFILL_FAULT=sync:full:2        no space is left on the disk, from the second time on
    FORWARDFILL_FAULT=clock:-3600        the clock of this host is an hour behind
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from datetime import timedelta
from enum import StrEnum

VARIABLE = "FORWARDFILL_FAULT"
#: transactions that have a name: each is a point right before its commit, and as `<name>.committed` one right after
TRANSACTIONS = (
    "start",
    "validate",
    "lease",
    "publish",
    "index",
    "repair",
    "compact",
    "cutover",
    "cancel",
    "rollback",
    "finalize",
    "upsert",
    "delete",
    "fit_start",
    "fit_lease",
    "fit_complete",
)
#: every point; a fault at another would never come, and a test of it would prove nothing
POINTS = frozenset(
    [
        *("read", "transform", "write_column", "sync", "rename", "written", "build_index", "refresh"),
        *TRANSACTIONS,
        *(f"{name}.committed" for name in TRANSACTIONS),
    ]
)


class Action(StrEnum):
    """What happens at a point."""

    KILL = "kill"
    STOP = "stop"
    FULL = "full"


class _Fault:
    """One fault, counted over all threads of the process."""

    def __init__(self, point: str, action: Action, nth: int) -> None:
        self._point = point
        self._action = action
        self._left = nth
        self._lock = threading.Lock()

    def reached(self, point: str) -> None:
        """Fail, if this is the point and the time."""
        if point != self._point:
            return
        with self._lock:
            self._left -= 1
            left = self._left
        if self._action is Action.FULL and left <= 0:  # a disk that is full stays so
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (a fault at {point!r})")
        if self._action is not Action.FULL and left == 0:
            os.kill(os.getpid(), signal.SIGKILL if self._action is Action.KILL else signal.SIGSTOP)


_armed: _Fault | None = None
_behind = timedelta(0)


def reached(point: str) -> None:
    """Pass a point.

    Raises:
        OSError: the fault is a full disk.
    """
    if _armed is not None:
        _armed.reached(point)


def behind() -> timedelta:
    """What to add to the clock."""
    return _behind


def arm(fault: str | None) -> None:
    """Take the fault that the environment names; for composition roots, once, before anything else runs.

    Args:
        fault: `point:action:n` (the n-th time), `clock:seconds`, or nothing.

    Raises:
        ValueError: there is no such point or action.
    """
    global _armed, _behind  # noqa: PLW0603 - one per process, as its memory is
    _armed, _behind = None, timedelta(0)
    if not fault:
        return
    point, *rest = fault.split(":")
    if point == "clock" and len(rest) == 1:
        _behind = timedelta(seconds=float(rest[0]))
    elif point in POINTS and len(rest) == 2:
        _armed = _Fault(point, Action(rest[0]), int(rest[1]))
    else:
        raise ValueError(f"{VARIABLE}={fault!r} is no `point:action:n`; points are {', '.join(sorted(POINTS))}")
