"""The whole benchmark: every stage in turn, or several at once in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from models import recipes
from models.benchmark.experiment import ROLES, Experiment, Role, Show, quiet
from models.benchmark.report import markdown
from models.benchmark.runs import RUNS, Run
from models.evaluation import METRICS
from models.methods import METHODS
from models.recipes import Recipe

XBT = "XBT"

#: their h is the start of a backfilling curve
CURVES = ("FCT, SimCLR", "FastFill, SimCLR", "FastFill, no side-information")

Tell = Callable[[str], None]

LONGEST_FIRST: tuple[Role, ...] = ("new", "simclr", "old", "autoencoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What the benchmark works on: enough for another process to do a part of it."""

    recipe: Recipe
    root: Path | None
    folder: Path
    seed: int = 0
    device: str = "cpu"
    #: names of runs; empty for all
    only: tuple[str, ...] = ()

    def experiment(self, show: Show = quiet) -> Experiment:
        """Load the data, and name the models."""
        return Experiment(
            recipe=self.recipe,
            data=recipes.load_data(self.recipe.name, self.root),
            folder=self.folder / "stages",
            seed=self.seed,
            device=self.device,
            show=show,
        )

    @property
    def runs(self) -> list[Run]:
        """What is asked for, but for XBT, which has an experiment of its own."""
        return list(RUNS) if not self.only else [chosen(name) for name in self.only if name != XBT]

    @property
    def has_texts(self) -> bool:
        """Whether XBT is asked for, and the data has captions."""
        return self.recipe.name == "cifar100" and self.root is not None and (not self.only or XBT in self.only)


def chosen(name: str) -> Run:
    """Find a row of the table by its name, or the first of a method.

    Raises:
        ValueError: there is none.
    """
    for run in RUNS:
        if name in (run.name, run.method):
            return run
    raise ValueError(
        f"{name!r} is not one of {', '.join(run.name for run in RUNS)}; {XBT} is trained by `benchmark` alone"
    )


def benchmark(where: Where, *, jobs: int = 1, show: Show = quiet, tell: Tell = print) -> dict[str, Any]:
    """Train and evaluate everything that is not kept yet; write `results.json` and `results.md` into the folder.

    Args:
        where: the data, and the folder that keeps finished stages.
        jobs: stages done at once, each in a process of its own; 1 does them here, with progress bars.
        show: from a stage's title to a context with its progress bar; for one job.
        tell: told a line per finished stage; for several jobs.

    Returns:
        The results, as they are in `results.json`.
    """
    if XBT in where.only and not where.has_texts:
        raise ValueError(f"{XBT} needs the captions of cifar100: --data cifar100, and name their folder (--root)")
    start = time.perf_counter()
    if jobs > 1:
        _in_processes(where, jobs, tell)
    experiment = where.experiment(show)
    methods = [row for run in where.runs for row in experiment.rows(run)]
    metrics = [metric for metric in METRICS if any(row["metric"] == metric for row in methods)]
    results = {
        "data": where.recipe.name,
        "seed": where.seed,
        "threads": torch.get_num_threads() if jobs == 1 else 1,
        "jobs": jobs,
        "device": where.device,
        "seconds_of_this_run": 0.0,
        "references": {metric: experiment.references(metric) for metric in metrics},
        "methods": methods,
        "curves": {run.name: experiment.curves(run) for run in where.runs if run.name in CURVES},
        "cross_modal": experiment.cross_modal(where.root) if where.root is not None and where.has_texts else None,
    }
    results["seconds_of_this_run"] = time.perf_counter() - start
    where.folder.mkdir(parents=True, exist_ok=True)
    (where.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (where.folder / "results.md").write_text(markdown(results), encoding="utf-8")
    return results


def _in_processes(where: Where, jobs: int, tell: Tell) -> None:
    """Do all stages, those that others need first. The processes share what is done through the files that keep it."""
    # backbones first: the longest must not start last
    names = [run.name for run in sorted(where.runs, key=lambda run: not METHODS[run.method].trains_backbone)]
    names += [XBT] if where.has_texts else []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        try:
            for wave in (LONGEST_FIRST, [f"vectors of {role}" for role in LONGEST_FIRST], names):
                for done in as_completed([pool.submit(_stage, where, name) for name in wave]):
                    name, seconds = done.result()
                    tell(f"{name}: {seconds:.0f} s")
        except KeyboardInterrupt:  # leaving the pool waits for the whole wave, which may take hours
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _end_with_parent() -> None:
    """End this process once its parent was killed, which would take the result; the stage can go on from its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes: this one ends, silently
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _stage(where: Where, name: str) -> tuple[str, float]:
    """Do one stage by its name, in a process of its own: one thread, so that several do not wait for each other."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    experiment = where.experiment()
    if name in ROLES:
        experiment.encoder(name)
    elif (role := name.removeprefix("vectors of ")) in ROLES:
        experiment.vectors(role)
    elif name == XBT and where.root is not None:
        experiment.cross_modal(where.root)
    else:
        experiment.rows(chosen(name))
        if name in CURVES:
            experiment.curves(chosen(name))
    return name, time.perf_counter() - start
