"""From pairs of vectors to a map, what it is worth on items it never saw, and whether to upgrade at all.

No image and no model is needed: only the vectors of the same items by both models, with side-information and labels if there are
any. Nothing is printed here; every result can be written as JSON. Neither model should have been trained on these items: a model
is better on its training data than on a gallery, so the verdict would be better than the truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from inspect import signature
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch

from models.checkpoints import OfAnotherTraining
from models.evaluation import METRICS, Metric, evaluate_pairs
from models.inputs import Array, Pairs, Parts, Rows, check_apart, check_pairs, split, warnings_about
from models.method import Method, Setting
from models.methods import METHODS
from models.runtime import Transform
from models.training import Step, is_trained, train_transformation
from models.transformations import Transformation, side_dimension
from models.verdict import (
    DIRECTIONS,
    Direction,
    Measured,
    Metrics,
    Sample,
    Verdict,
    choose_weight,
    give_verdict,
    judge_of,
    overall,
    worth,
)

AUTO = "auto"
#: methods are compared on at most this many training pairs, and then the best is trained on all. With more pairs hardly another
#: method would win, and the training of those that lose, which is wasted, would take longer
CONTEST_PAIRS = 50_000
#: queries and items to judge by. A method or a weight is judged many times and the verdict is given once, so that has more
VALIDATION = (1_000, 10_000)
TEST = (2_000, 20_000)

#: the length of a unit vector that was rounded to float16 is wrong by less than this
UNIT_TOLERANCE = 1e-3

OnFit = Callable[[str, Step], None]
Hyperparameters = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked of a fit."""

    #: a key of METHODS, or `auto`: whichever applicable one is best on the validation part
    method: str = AUTO
    #: how vectors are compared in the space that the map leads to; losses follow it
    metric: Metric = "cosine"
    #: how vectors are compared in the space that it starts from; None: by `metric` too
    other_metric: Metric | None = None
    #: forward maps the gallery, old to new; backward maps queries, new to old
    direction: Direction = "forward"
    #: the share not trained on, half for validation and half for the test; None: see `models.inputs.split`
    held_out: float | None = None
    #: None: as each method's plan says
    epochs: int | None = None
    seed: int = 0
    device: str = "cpu"
    #: items of the gallery that the verdict is for; None: as many as the pairs
    gallery: int | None = None
    #: by method and name
    hyperparameters: Hyperparameters = field(default_factory=dict)

    def __post_init__(self) -> None:
        for metric in self.metrics:
            _check_choice("metric", metric, METRICS)
        _check_choice("direction", self.direction, DIRECTIONS)
        _check_choice("method", self.method, (*trainable(), AUTO))
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"training needs an epoch, not {self.epochs}")
        if self.gallery is not None and self.gallery < 1:
            raise ValueError(f"a gallery has an item at least, not {self.gallery}")
        for method, given in self.hyperparameters.items():
            _check_choice("method", method, tuple(trainable()))
            kinds = get_type_hints(METHODS[method].__init__)
            known = {name: kinds[name] for name in signature(METHODS[method]).parameters if name != "setting"}
            for name, value in given.items():
                _check_choice(f"hyperparameter of {method}", name, tuple(known))
                _check_type(f"hyperparameter {name} of {method}", value, known[name])

    @property
    def metrics(self) -> Metrics:
        """By model."""
        other = self.other_metric or self.metric
        return Metrics(other, self.metric) if self.direction == "forward" else Metrics(self.metric, other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A method that was tried, or the reason why it was not."""

    method: str
    #: what upgrading with this map measures on the validation part; empty where the method was not tried
    validation: Measured = field(default_factory=dict)
    seconds: float = 0.0
    skipped: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What a map is worth, on items that it was not trained on."""

    #: rows in each part
    parts: dict[str, int]
    #: how near mapped vectors are to what they should be, on test items: see `models.evaluation.evaluate_pairs`
    evaluation: dict[str, float | None]
    verdict: Verdict
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A map, and all that is known about it."""

    #: ready for `models.artifacts.save`
    transformation: Transformation
    method: str
    #: as `followed` returned them
    options: Options
    #: in the order of METHODS
    candidates: tuple[Candidate, ...]
    assessment: Assessment
    #: states of trainings, to be removed once the map is kept
    checkpoints: tuple[Path, ...]

    def report(self) -> dict[str, Any]:
        """Return everything but the weights as plain data."""
        return {
            "method": self.method,
            "options": asdict(self.options),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            **asdict(self.assessment),
        }


def followed(options: Options, pairs: Pairs) -> Options:
    """The options with cosine as metric, if all vectors have unit length: then every metric gives the same order.

    With cosine, mapped vectors are given unit length too, and no loss depends on the length of vectors.
    """
    if all(_of_unit_length(vectors) for vectors in (pairs.source, pairs.target)):
        return replace(options, metric="cosine", other_metric=None)
    return options


def _checked(options: Options, pairs: Pairs) -> Options:
    """Check that the pairs can be fitted and judged by; returns the options that follow from them."""
    check_pairs(pairs)
    options = followed(options, pairs)
    for name, vectors, metric in zip(("source", "target"), (pairs.source, pairs.target), options.metrics, strict=True):
        check_apart(name, vectors, directions=metric == "cosine")
    return options


def _of_unit_length(vectors: Array) -> bool:
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float32, casting="same_kind")
    return bool((abs(np.sqrt(squares) - 1) <= UNIT_TOLERANCE).all())


def trainable() -> dict[str, type[Method]]:
    """Return the methods that pairs of vectors are enough for."""
    return {name: method for name, method in METHODS.items() if not method.trains_backbone}


def fit(
    pairs: Pairs,
    options: Options,
    *,
    on_step: OnFit | None = None,
    checkpoint: Path | None = None,
    log: Path | None = None,
) -> Fitted:
    """Fit a map on a part of the pairs, choose by a second part, and judge by a third.

    Args:
        pairs: vectors of the same items by both models.
        options: what is asked.
        on_step: told after each step, with the method's name.
        checkpoint: as for `models.training.train`; with `auto` each training has a file of its own, named after it.
        log: likewise.

    Raises:
        ValueError: pairs that cannot be fitted, or no method that can be trained on them.
        OfAnotherTraining: the file for a checkpoint holds the state of another training.
        FloatingPointError: the one method that was asked for diverged.
    """
    options = _checked(options, pairs)
    parts = split(pairs, held_out=options.held_out, seed=options.seed)
    if len(parts.train) < 2:
        held, left = len(parts.validation) + len(parts.test), len(parts.train)
        raise ValueError(
            f"holding out {held} of {held + left} different pairs leaves {left} to train on: hold out less"
        )
    validation, test = _samples(pairs, parts)
    trainings = _Trainings(pairs, options, validation, on_step, checkpoint, log)
    if options.method == AUTO:
        method, module, candidates = _contest(trainings, parts.train)
    else:
        method = options.method
        module, candidate = trainings.run(method, parts.train)
        candidates = (candidate,)
    return Fitted(
        transformation=module,
        method=method,
        options=options,
        candidates=candidates,
        assessment=_assess(module, pairs, parts, validation, test, options),
        checkpoints=tuple(trainings.checkpoints),
    )


def assess(transformation: Transformation, pairs: Pairs, options: Options) -> Assessment:
    """Judge a map that exists already, on pairs that it was not trained on.

    Half of them choose the weight of fused scoring, the other half judges.

    Args:
        transformation: the map.
        pairs: vectors of the same items by both models.
        options: metric, direction, seed and device; the others do not matter.

    Raises:
        ValueError: pairs that cannot be judged by, or that this map does not fit.
    """
    options = _checked(options, pairs)
    _check_widths(transformation, pairs, options.direction)
    parts = replace(split(pairs, held_out=1, seed=options.seed), train=np.empty(0, np.int64))
    validation, test = _samples(pairs, parts)
    return _assess(transformation, pairs, parts, validation, test, options)


@dataclass
class _Trainings:
    """Trains methods on the same pairs, with the same options and the same judge."""

    pairs: Pairs
    options: Options
    validation: Sample
    on_step: OnFit | None
    checkpoint: Path | None
    log: Path | None
    checkpoints: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.judge = judge_of(self.validation, metric=self.options.metrics.new)

    def run(self, name: str, rows: Rows) -> tuple[Transformation, Candidate]:
        """Train a method on some rows, and judge its map by the validation part.

        Raises:
            ValueError: the method cannot be trained on these pairs, or does not offer the direction.
            OfAnotherTraining: the file for its checkpoint holds the state of another training.
            FloatingPointError: it diverged.
        """
        start, options = time.perf_counter(), self.options
        taken = self.pairs.take(rows)
        method = _made(name, taken, options)
        plan = method.plan(len(rows))
        checkpoint, log = (self._own(path, name, len(rows)) for path in (self.checkpoint, self.log))
        train_transformation(
            method,
            old=taken.source,
            new=taken.target,
            side=taken.side,
            labels=_coded(taken.labels),
            plan=plan if options.epochs is None else replace(plan, epochs=options.epochs),
            seed=options.seed,
            device=options.device,
            on_step=None if self.on_step is None else partial(self.on_step, name),
            checkpoint=checkpoint,
            log=log,
        )
        if checkpoint is not None and is_trained(method):
            self.checkpoints.append(checkpoint)
        module = _offered(method, options.direction)
        transform = Transform(module, device=options.device)
        found = worth(self.validation, transform, self.judge, direction=options.direction, metric=options.metric)
        return module, Candidate(method=name, validation=found, seconds=time.perf_counter() - start)

    def _own(self, path: Path | None, name: str, rows: int) -> Path | None:
        """Return the file of one training. With `auto` there are several, and the winner's second must not continue its first."""
        if path is None or self.options.method != AUTO:
            return path
        return path.with_name(f"{path.stem}.{name}-{rows}{path.suffix}")


def _contest(trainings: _Trainings, rows: Rows) -> tuple[str, Transformation, tuple[Candidate, ...]]:
    """Train every applicable method, and return the best: its name, its map, and how all of them did."""
    rng = np.random.default_rng(trainings.options.seed)
    few = np.sort(rng.permutation(rows)[:CONTEST_PAIRS])
    candidates: list[Candidate] = []
    best: tuple[float, str, Transformation] | None = None
    for name in trainable():
        try:
            module, candidate = trainings.run(name, few)
        except OfAnotherTraining:  # not the method's fault: if it were skipped for this, it could not win
            raise
        except (ValueError, FloatingPointError) as error:
            candidate = Candidate(method=name, skipped=str(error))
        else:
            score = overall(candidate.validation)
            if best is None or score > best[0]:
                best = score, name, module
        candidates.append(candidate)
    if best is None:
        raise ValueError(
            "no method can be trained on these pairs: " + "; ".join(f"{c.method}: {c.skipped}" for c in candidates)
        )
    _, name, module = best
    if len(few) < len(rows):
        module, _ = trainings.run(name, rows)
    return name, module, tuple(candidates)


def _made(name: str, pairs: Pairs, options: Options) -> Method:
    """Make a fresh method for the pairs that it will be trained on.

    Raises:
        ValueError: it needs labels and there are none, compares otherwise, a hyperparameter is not what it takes, or it does not
            offer the direction.
    """
    kind = METHODS[name]
    if kind.needs_labels and pairs.labels is None:
        raise ValueError(f"{name} needs labels")
    if kind.metric not in (None, options.metric):
        raise ValueError(f"{name} makes vectors that are compared by {kind.metric}, not by {options.metric}")
    setting = Setting(
        old_dimension=pairs.source.shape[1],
        new_dimension=pairs.target.shape[1],
        side_dimension=None if pairs.side is None else pairs.side.shape[1],
        classes=None if pairs.labels is None else len(np.unique(pairs.labels)),
        metric=options.metric,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        method = kind(setting, **options.hyperparameters.get(name, {}))
    _offered(method, options.direction)
    return method


def _offered(method: Method, direction: Direction) -> Transformation:
    module: Transformation | None = getattr(method.transformations(), direction)
    if module is None:
        raise ValueError(f"{method.name} offers no {direction} map")
    return module


def _coded(labels: Array | None) -> Array | None:
    """Number the labels that occur from 0, as methods want them."""
    return None if labels is None else np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _samples(pairs: Pairs, parts: Parts) -> tuple[Sample, Sample]:
    """Take the validation part and the test part.

    Without labels, more items make a finer measure: queries of the test part then search the validation part too, which the
    map has not seen either.
    """
    judged = pairs if parts.labelled else pairs.without_labels()
    searched = parts.test if parts.labelled else np.concatenate([parts.test, parts.validation])
    (queries, items), (test_queries, test_items) = VALIDATION, TEST
    return (
        Sample(pairs=judged.take(parts.validation[:items]), queries=min(queries, len(parts.validation))),
        Sample(pairs=judged.take(searched[:test_items]), queries=min(test_queries, len(parts.test))),
    )


def _assess(
    module: Transformation, pairs: Pairs, parts: Parts, validation: Sample, test: Sample, options: Options
) -> Assessment:
    transform, direction, metrics = Transform(module, device=options.device), options.direction, options.metrics
    weight = choose_weight(validation, transform, judge_of(validation, metric=metrics.new), direction=direction)
    verdict = give_verdict(
        test,
        transform,
        judge_of(test, metric=metrics.new, gallery=options.gallery or len(pairs)),
        direction=direction,
        metrics=metrics,
        weight=weight,
        seed=options.seed,
    )
    return Assessment(
        parts={name: len(getattr(parts, name)) for name in ("train", "validation", "test")},
        evaluation=_evaluation(test, transform, direction, options.metric),
        verdict=verdict,
        warnings=tuple(warnings_about(pairs, parts)),
    )


def _evaluation(sample: Sample, transform: Transform, direction: Direction, metric: Metric) -> dict[str, float | None]:
    some = sample.pairs.take(np.arange(sample.queries))
    if direction == "forward":
        return evaluate_pairs(transform(some.source, some.side), some.target, some.labels, metric=metric)
    # Its labelled part searches mapped vectors with native ones: a backward map is used the other way round.
    return evaluate_pairs(transform(some.target), some.source, metric=metric)


def _check_widths(transformation: Transformation, pairs: Pairs, direction: Direction) -> None:
    source, target = pairs.source.shape[1], pairs.target.shape[1]
    wanted = (source, target) if direction == "forward" else (target, source)
    architecture = transformation.architecture
    declared = (architecture.source_dimension, architecture.target_dimension)
    if declared != wanted:
        raise ValueError(
            f"the map goes from {declared[0]} to {declared[1]} dimensions, a {direction} map between these models goes "
            f"from {wanted[0]} to {wanted[1]}: look at the direction, and at which model is the source"
        )
    side, given = side_dimension(architecture), None if pairs.side is None else pairs.side.shape[1]
    if side is not None and side != given:
        raise ValueError(f"the map needs side-information of {side} dimensions, not {given}")


def _check_type(what: str, value: object, kind: Any) -> None:
    """Refuse what is of another type than an annotation says, or not finite; a whole number will do for any."""
    if get_origin(kind) is Literal:
        _check_choice(what, value, get_args(kind))
        return
    taken = get_args(kind) or (kind,)
    if type(value) not in taken and not (type(value) is int and float in taken):
        raise ValueError(f"the {what} is {' or '.join(each.__name__ for each in taken)}, not {value!r}")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"the {what} is a finite number, not {value!r}")


def _check_choice(what: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"the {what} {value!r} is not one of {', '.join(map(str, choices))}")
