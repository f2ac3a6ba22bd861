"""What arrives while others like it are under way is done together with what else does, by one call.

A task that finds a free lane is done at once, in its own thread. Only where all lanes are taken do tasks gather, and the lane
that is free next takes those that did. There is no timer and no thread of its own, so a lone task takes what it always took.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from threading import Event, Lock
from typing import Any, Generic, TypeVar

import structlog

log = structlog.get_logger()
T = TypeVar("T")
A = TypeVar("A")


class _Entry(Generic[T, A]):
    """A task, on its way."""

    __slots__ = ("answers", "failed", "leads", "task", "woken")

    def __init__(self, task: T) -> None:
        self.task = task
        self.woken = Event()
        #: the tasks that its thread has to do, this one first; None while it waits, and for good if another thread does it
        self.leads: Sequence[_Entry[T, A]] | None = None
        #: its own answer; if there is still none once the task is woken, its thread does it alone
        self.answers: Sequence[A] = ()
        #: what the call failed with, where that is said to be no task's own fault
        self.failed: Exception | None = None


class _Line:
    """The tasks of one kind."""

    __slots__ = ("running", "waiting")

    def __init__(self) -> None:
        self.running = 0
        self.waiting: list[_Entry[Any, Any]] = []


class Together:
    """Gathers tasks; safe from many threads."""

    def __init__(self, lanes: int) -> None:
        """Let `lanes` calls of one kind run at once before others gather."""
        self._lanes = lanes
        self._lock = Lock()
        # A kind has a line while a task of it is under way.
        self._lines: dict[Hashable, _Line] = {}

    def do(
        self,
        kind: Hashable,
        task: T,
        act: Callable[[Sequence[T]], Sequence[A]],
        *,
        most: Callable[[Sequence[T]], int],
        for_all: tuple[type[Exception], ...] = (),
    ) -> A:
        """Do a task, together with others where that costs nobody anything.

        Args:
            kind: what tasks must have in common to be done together.
            task: what to do.
            act: does tasks of this kind, and gives their answers in order.
            most: of those that wait, the first of them first, how many may be done by one call; at least one.
            for_all: what `act` raises through no task's fault. Then all that wait by now are told, and none of them is tried:
                each would fail likewise, after as long a wait.

        Raises:
            Exception: whatever `act` raises for this task alone, and what is `for_all`; never for the sake of another's.
        """
        own = _Entry[T, A](task)
        if not self._enter(kind, own):
            own.woken.wait()
        if own.leads is not None:
            try:
                self._act(kind, own.leads, act, for_all)
            finally:
                own.leads = None  # it refers to itself by this: what it holds would stay until garbage is collected
                self._leave(kind, most)
        if own.failed is not None:
            raise own.failed
        (answer,) = own.answers or act([task])
        return answer

    def _enter(self, kind: Hashable, own: _Entry[Any, Any]) -> bool:
        """Take a lane; or wait in the line, and return False."""
        with self._lock:
            line = self._lines.setdefault(kind, _Line())
            if line.running == self._lanes:
                line.waiting.append(own)
                return False
            line.running += 1
        own.leads = [own]
        return True

    def _leave(self, kind: Hashable, most: Callable[[Sequence[Any]], int]) -> None:
        """Give the lane to those who wait; to nobody, where nobody does."""
        with self._lock:
            line = self._lines[kind]
            if not line.waiting:
                line.running -= 1
                if not line.running:
                    del self._lines[kind]
                return
            count = most([each.task for each in line.waiting])
            group, line.waiting = line.waiting[:count], line.waiting[count:]
        group[0].leads = group
        group[0].woken.set()

    def _act(
        self,
        kind: Hashable,
        group: Sequence[_Entry[T, A]],
        act: Callable[[Sequence[T]], Sequence[A]],
        for_all: tuple[type[Exception], ...],
    ) -> None:
        """Do the tasks of a group; its first is the caller, who is awake."""
        try:
            for each, answer in zip(group, act([each.task for each in group]), strict=True):
                each.answers = (answer,)
        except for_all as error:
            group = [*group, *self._all_waiting(kind)]
            for each in group:
                each.failed = error
        except Exception as error:
            if len(group) == 1:
                raise
            log.info("each_alone", tasks=len(group), error=type(error).__name__)  # its words may be anybody's data
            for each in group:  # whose fault it is cannot be told, so each is then done alone and finds out
                each.answers = ()
        finally:
            for each in group[1:]:
                each.woken.set()

    def _all_waiting(self, kind: Hashable) -> Sequence[_Entry[Any, Any]]:
        """Take those who wait out of their line."""
        with self._lock:
            line = self._lines[kind]
            waiting, line.waiting = line.waiting, []
            return waiting
