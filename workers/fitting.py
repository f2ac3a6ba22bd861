"""How a worker trains for a fit: `models.fitting` as a function from arrays to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from gallery import errors
from gallery.fits import Asked, Outcome, Tell
from gallery.pairs import Pairs

if TYPE_CHECKING:
    from models.training import Step


#: what of a verdict is kept with the transformation
_ADVICE = ("decision", "reason", "assumption", "upgrade_gains")


def fit_pairs(pairs: Pairs, asked: Asked, path: Path, tell: Tell, *, device: str = "cpu") -> Outcome:
    """Train, judge on pairs that were held out, and write the artifact; see `gallery.fits.Fit`.

    Args:
        pairs: to fit.
        asked: what and how.
        path: where the artifact goes.
        tell: told after each step of a training.
        device: where to train.

    Raises:
        UnusablePairs: no method, or not the one that was asked for, can be trained on these pairs.
    """
    # The methods bring SciPy along, which takes seconds and a hundred MB: only a worker that fits needs it.
    from models import artifacts, fitting, inputs  # noqa: PLC0415

    given = inputs.Pairs(source=pairs.source, target=pairs.target, side=pairs.side, labels=pairs.labels)
    try:
        options = fitting.Options(
            method=asked.method,
            metric=asked.metric,
            other_metric=asked.other_metric,
            direction=asked.direction,
            seed=asked.seed,
            device=device,
            gallery=pairs.gallery,
        )
        tried = list(fitting.trainable()) if asked.method == fitting.AUTO else [asked.method]
        fitted = fitting.fit(given, options, on_step=_progress(tried, tell))
        sha256 = artifacts.save(path, fitted.transformation)
    except (ValueError, FloatingPointError) as error:
        # What was left out may be why.
        raise errors.UnusablePairs("; ".join((str(error), *pairs.warnings))) from error
    info, report = artifacts.check(path), _plain(fitted.report())
    verdict = report["verdict"]
    return Outcome(
        sha256=sha256,
        bytes=info.size,
        architecture=info.declared(),
        method=fitted.method,
        evaluation={
            **report["evaluation"],
            "pairs": report["parts"]["test"],
            "verdict": {name: verdict[name] for name in _ADVICE},
        },
        report=report,
    )


def _progress(tried: list[str], tell: Tell) -> Callable[[str, Step], None]:
    """Tell how much of the trainings is done; where methods compete, the best one may be trained again at the end."""
    parts, reached = len(tried) + (len(tried) > 1), 0.0

    def on_step(method: str, step: Step) -> None:
        nonlocal reached
        reached = max(reached, (tried.index(method) + step.done / step.total) / parts)
        tell(reached, method)

    return on_step


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: no tuples, and null for what is not a number."""
    plain: dict[str, Any] = orjson.loads(orjson.dumps(report, option=orjson.OPT_SERIALIZE_NUMPY))
    return plain
