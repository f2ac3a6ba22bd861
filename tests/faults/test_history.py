"""The checker of histories finds each kind of lie, and believes what is true."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.history import NO_WRITE, Answer, Outcome, Write, violations


def upsert(number: int, *ids: str, at: float, version: int | None = None, outcome: Outcome = "acknowledged") -> Write:
    return Write(number, "api", at, at + 0.5, frozenset(ids), outcome, version=version)


def delete(number: int, *ids: str, at: float, outcome: Outcome = "acknowledged") -> Write:
    return Write(number, "api", at, at + 0.5, frozenset(ids), outcome, deletes=True)


def answer(version: int, *hits: tuple[str, int], at: float, process: str = "api") -> Answer:
    return Answer(process, at, at + 0.5, version, hits)


def kinds(*told: Write | Answer) -> set[str]:
    writes = [each for each in told if isinstance(each, Write)]
    return {each.kind for each in violations(writes, [each for each in told if isinstance(each, Answer)])}


AB = upsert(1, "a", "b", at=1, version=1)
TRUE: dict[str, tuple[Any, ...]] = {
    "nothing": (),
    "what was written is found": (AB, answer(1, ("a", 1), ("b", 1), at=2)),
    "an older version at another process": (AB, answer(0, at=2, process="other")),
    "replaced and deleted": (
        *(AB, upsert(2, "a", at=2, version=2), delete(3, "b", at=3)),
        *(answer(2, ("a", 2), ("b", 1), at=2.6, process="other"), answer(3, ("a", 2), at=4)),
    ),
    "a version in between, before and after a delete": (
        *(AB, delete(2, "a", at=2), answer(1, ("a", 1), ("b", 1), at=2.1), answer(4, ("b", 1), at=3)),
        answer(2, ("b", 1), at=3, process="other"),
    ),
    "deleted, then written again": (
        *(AB, delete(2, "a", at=2), upsert(3, "a", at=3, version=3), answer(3, ("a", 3), ("b", 1), at=4)),
    ),
    "a write of unknown end that never was": (
        *(AB, upsert(2, "a", "c", at=2, outcome="unknown"), answer(5, ("a", 1), ("b", 1), at=9)),
    ),
    "a write of unknown end that was": (
        *(AB, upsert(2, "a", "c", at=2, outcome="unknown"), answer(5, ("a", 2), ("b", 1), ("c", 2), at=9)),
        answer(1, ("a", 1), ("b", 1), at=9, process="other"),
    ),
    "a delete of unknown end that was": (AB, delete(2, "a", at=2, outcome="unknown"), answer(5, ("b", 1), at=9)),
    "a write that was refused": (AB, upsert(2, "a", at=2, outcome="refused"), answer(1, ("a", 1), ("b", 1), at=3)),
}
LIES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "an acknowledged item is gone": ("lost", (AB, answer(1, ("a", 1), at=2))),
    "an acknowledged write is gone": (
        "lost",
        (AB, upsert(2, "a", at=2, version=2), answer(3, ("a", 1), ("b", 1), at=3)),
    ),
    "what an unknown delete cannot explain is gone": (
        "lost",
        (AB, delete(2, "a", at=2, outcome="unknown"), upsert(3, "a", at=3, version=3), answer(3, ("b", 1), at=4)),
    ),
    "found twice": ("doubled", (AB, answer(1, ("a", 1), ("b", 1), ("a", 1), at=2))),
    "deleted, and back": ("revived", (AB, delete(2, "a", at=2), answer(2, ("a", 1), ("b", 1), at=3))),
    "deleted, away, and back": (
        "revived",
        (AB, delete(2, "a", at=2), answer(2, ("b", 1), at=3), answer(4, ("a", 1), ("b", 1), at=5)),
    ),
    "deleted by who knows whom, away, and back": (
        "revived",
        (
            *(AB, delete(2, "a", at=2, outcome="unknown"), answer(2, ("b", 1), at=3)),
            answer(4, ("a", 1), ("b", 1), at=5),
        ),
    ),
    "half of an unknown write": (
        "half",
        (AB, upsert(2, "a", "c", at=2, outcome="unknown"), answer(5, ("a", 2), ("b", 1), at=9)),
    ),
    "an unknown write that was seen, and is gone": (
        "half",
        (
            *(AB, upsert(2, "c", at=2, outcome="unknown"), answer(5, ("a", 1), ("b", 1), ("c", 2), at=5)),
            answer(6, ("a", 1), ("b", 1), at=9),
        ),
    ),
    "a vector that nobody wrote": ("wrong", (AB, answer(1, ("a", 1), ("b", NO_WRITE), at=2))),
    "an item that nobody wrote": ("wrong", (AB, answer(1, ("a", 1), ("b", 1), ("c", 1), at=2))),
    "what was refused": (
        "wrong",
        (AB, upsert(2, "a", at=2, outcome="refused"), answer(2, ("a", 2), ("b", 1), at=3)),
    ),
    "a version that has what came after it": (
        "wrong",
        (AB, upsert(2, "a", at=2, version=2), answer(1, ("a", 2), ("b", 1), at=3, process="other")),
    ),
    "two states of one version": (
        "two states",
        (
            *(AB, upsert(2, "c", at=2, outcome="unknown"), answer(5, ("a", 1), ("b", 1), at=4)),
            answer(5, ("a", 1), ("b", 1), ("c", 2), at=4, process="other"),
        ),
    ),
    "a process that forgets what it answered": (
        "backwards",
        (AB, answer(4, ("a", 1), ("b", 1), at=2), answer(3, ("a", 1), ("b", 1), at=3)),
    ),
    "a process that forgets what it acknowledged": ("backwards", (AB, answer(0, at=2))),
}


@pytest.mark.parametrize("case", TRUE)
def test_what_can_be_true_is_believed(case: str) -> None:
    assert kinds(*TRUE[case]) == set()


@pytest.mark.parametrize("case", LIES)
def test_each_kind_of_lie_is_found(case: str) -> None:
    kind, told = LIES[case]
    assert kind in kinds(*told)


def test_only_the_lie_is_told() -> None:
    for name in ("an acknowledged item is gone", "found twice", "a process that forgets what it answered"):
        kind, told = LIES[name]
        assert kinds(*told) == {kind}
