"""What clients were told, and whether all of it can be true. Pure.

A gallery's version orders what happened to it: each write takes effect at one version, which writes of other items may
share, and each answer is the gallery at one. An acknowledged upsert says its version. Of any other write it is known only
between which versions it took effect: after every version that anyone knew when it began, and before every one that its own
process knew after it was acknowledged. A write whose connection broke may have taken effect or not; once an answer shows it,
it has, and all of it.

An answer is complete: whatever is not in it was not there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Literal, NamedTuple

#: stands for the write of a vector that no write gave its item
NO_WRITE = -1

Outcome = Literal["acknowledged", "unknown", "refused"]
Kind = Literal["lost", "half", "doubled", "revived", "wrong", "two states", "backwards"]


@dataclass(frozen=True, slots=True)
class Write:
    """An upsert or a delete of some items, as its client saw it."""

    number: int
    #: the process that it was sent to; another one after each restart
    process: str
    began: float
    ended: float
    ids: frozenset[str]
    outcome: Outcome
    deletes: bool = False
    #: of an acknowledged upsert
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer: by item the number of the write whose vector it has, in the order of the hits."""

    process: str
    began: float
    ended: float
    version: int
    hits: tuple[tuple[str, int], ...]


class Violation(NamedTuple):
    """Something that cannot be true."""

    kind: Kind
    what: str


class _Span(NamedTuple):
    """Between which versions, both included, a write took effect; whether it is certain that it did."""

    low: float
    high: float
    certain: bool


def violations(writes: Sequence[Write], answers: Sequence[Answer]) -> list[Violation]:
    """All that cannot be true of what was told."""
    spans = _spans(writes, answers)
    by_number = {write.number: write for write in writes}
    by_item = defaultdict[str, list[Write]](list)
    for write in writes:
        for item in write.ids:
            by_item[item].append(write)
    found = [violation for answer in answers for violation in _answer(answer, by_number, by_item, spans)]
    return [*found, *_returned(answers, by_item, spans), *_two_states(answers), *_backwards(writes, answers)]


def _spans(writes: Sequence[Write], answers: Sequence[Answer]) -> dict[int, _Span]:
    known = sorted((told.ended, told.version) for told in (*writes, *answers) if told.version is not None)
    ends = [ended for ended, _ in known]
    highest = list(accumulate((version for _, version in known), max))
    shown = defaultdict[int, float](lambda: inf)
    for answer in answers:
        for _, number in answer.hits:
            shown[number] = min(shown[number], answer.version)
    return {
        write.number: _span(write, highest[at - 1] if (at := bisect_left(ends, write.began)) else 0, shown, answers)
        for write in writes
    }


def _span(write: Write, before: int, shown: Mapping[int, float], answers: Iterable[Answer]) -> _Span:
    if write.version is not None:
        return _Span(write.version, write.version, certain=True)
    high = shown[write.number]
    if write.outcome == "acknowledged":
        after = (told.version for told in answers if told.process == write.process and told.began > write.ended)
        high = min(high, min(after, default=inf))
    return _Span(before + 1, high, certain=write.outcome == "acknowledged" or high < inf)


def _answer(
    answer: Answer, writes: Mapping[int, Write], by_item: Mapping[str, Sequence[Write]], spans: Mapping[int, _Span]
) -> Iterator[Violation]:
    times = Counter(item for item, _ in answer.hits)
    for item, count in times.items():
        if count > 1:
            yield Violation("doubled", f"{item} {count} times in version {answer.version}")
    seen = dict(answer.hits)
    for item, number in seen.items():
        write = writes.get(number)
        if write is None or item not in write.ids or write.deletes or write.outcome == "refused":
            yield Violation("wrong", f"{item} in version {answer.version} has a vector that was never written")
        elif spans[number].low > answer.version:
            yield Violation("wrong", f"{item} in version {answer.version} is of write {number}, which is later")
        else:
            yield from _replaced(answer, item, write, by_item[item], spans)
    for item, history in by_item.items():
        if item not in seen:
            yield from _absent(answer, item, history, spans)


def _replaced(
    answer: Answer, item: str, write: Write, history: Iterable[Write], spans: Mapping[int, _Span]
) -> Iterator[Violation]:
    """A later write has taken effect, but the answer shows this one."""
    for later in history:
        if _effective(spans[later.number], answer.version) and spans[later.number].low > spans[write.number].high:
            what = (
                f"{item} in version {answer.version} is of write {write.number}, although {_told(later)} came after it"
            )
            yield Violation("revived" if later.deletes else _gone(later), what)


def _absent(answer: Answer, item: str, history: Sequence[Write], spans: Mapping[int, _Span]) -> Iterator[Violation]:
    """An upsert has taken effect, and no delete can have come after it."""
    for write in history:
        if write.deletes or not _effective(spans[write.number], answer.version):
            continue
        low = spans[write.number].low
        deletes = [spans[other.number] for other in history if other.deletes and other.outcome != "refused"]
        # After the upsert, so not at its very version: no two writes of an item share one.
        if not any(max(span.low, low + 1) <= min(span.high, answer.version) for span in deletes):
            yield Violation(_gone(write), f"{item} of {_told(write)} is not in version {answer.version}")


def _effective(span: _Span, version: int) -> bool:
    """Whether a write has certainly taken effect by a version."""
    return span.certain and span.high <= version


def _gone(write: Write) -> Kind:
    """What is missing of a write: if nobody acknowledged it, some answer showed another part of it."""
    return "lost" if write.outcome == "acknowledged" else "half"


def _told(write: Write) -> str:
    return f"{'delete' if write.deletes else 'upsert'} {write.number} ({write.outcome})"


def _returned(
    answers: Iterable[Answer], by_item: Mapping[str, Sequence[Write]], spans: Mapping[int, _Span]
) -> Iterator[Violation]:
    """A write sets an item once: where another state followed it, or none, it does not come back."""
    past = defaultdict[str, set[int]](set)
    for answer in sorted(answers, key=lambda answer: answer.version):
        seen = dict(answer.hits)
        for item, history in by_item.items():
            if seen.get(item) in past[item]:
                yield Violation("revived", f"{item} of write {seen[item]} is back in version {answer.version}")
            effective = {write.number for write in history if _effective(spans[write.number], answer.version)}
            past[item] |= effective - {seen.get(item, NO_WRITE)}


def _two_states(answers: Iterable[Answer]) -> Iterator[Violation]:
    """All answers of one version are equal, whoever gave them."""
    first: dict[int, dict[str, int]] = {}
    for answer in answers:
        then, now = first.setdefault(answer.version, dict(answer.hits)), dict(answer.hits)
        if now != then:
            differ = sorted(item for item in now.keys() | then.keys() if now.get(item) != then.get(item))
            yield Violation("two states", f"version {answer.version} was answered with two states of {differ[:3]}")


def _backwards(writes: Iterable[Write], answers: Iterable[Answer]) -> Iterator[Violation]:
    """What a process has told, it knows from then on."""
    told = defaultdict[str, list[tuple[float, int]]](list)
    for each in (*writes, *answers):
        if each.version is not None:
            told[each.process].append((each.ended, each.version))
    known = {process: sorted(versions) for process, versions in told.items()}
    highest = {process: list(accumulate((v for _, v in versions), max)) for process, versions in known.items()}
    for answer in answers:
        at = bisect_left(known[answer.process], (answer.began, 0))
        if at and highest[answer.process][at - 1] > answer.version:
            yield Violation(
                "backwards",
                f"{answer.process} told of version {highest[answer.process][at - 1]}, then answered with {answer.version}",
            )
