"""The stages of the benchmark: train, embed, transform, evaluate. Each is kept, and each asks for those it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from models import recipes
from models.backfilling import backfilling_curve, class_mean_order, distance_order, random_order, uncertainty_order
from models.benchmark.runs import Run
from models.captions import cifar100_concepts
from models.cross_modal import CIFAR100_CAPTIONS, Split, cross_modal_experiment
from models.data import Dataset
from models.encoders import Classifier, Encoder, embed, residual_network
from models.evaluation import Metric, Retrieval, judge_queries, mean_retrieval
from models.flips import flips
from models.method import Method, Setting
from models.methods import METHODS
from models.methods.fct import Fct
from models.plan import Plan
from models.recipes import Recipe, embedded_views
from models.runtime import Transform
from models.stages import Arrays, Places, Stages, code_of, drawn_from
from models.training import CompatibleTraining, OnStep, train_backbone, train_transformation

Floats = npt.NDArray[np.float32]
Row = dict[str, Any]
Role = Literal["old", "new", "simclr", "autoencoder"]
ROLES: tuple[Role, ...] = ("old", "new", "simclr", "autoencoder")
#: from a stage's title to what shows its progress
Show = Callable[[str], AbstractContextManager[OnStep | None]]

#: queries of a backfilling curve: each of its 22 galleries is ranked for each of these
CURVE_QUERIES = 2_000


def quiet(title: str) -> AbstractContextManager[OnStep | None]:
    """Show nothing."""
    del title
    return nullcontext()


class Trained(NamedTuple):
    """A method, the new model's vectors of the test images as it has them stored, and the seconds of its training."""

    method: Method
    new: Floats
    seconds: float


@dataclass(frozen=True)
class Experiment:
    """One old and one new model, and all that can be made of them."""

    recipe: Recipe
    data: Dataset
    folder: Path | None = None
    seed: int = 0
    device: str = "cpu"
    show: Show = field(default=quiet, compare=False)
    _embedded: dict[Role, Arrays] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def old(self) -> Classifier:
        with self.show("old model") as on_step:
            return recipes.train_old(self.recipe, self.data, on_step=on_step, **self._how)

    @cached_property
    def new(self) -> Classifier:
        with self.show("new model") as on_step:
            return recipes.train_new(self.recipe, self.data, on_step=on_step, **self._how)

    @cached_property
    def simclr(self) -> Encoder:
        with self.show("side-information by SimCLR") as on_step:
            return recipes.train_side(self.recipe, self.data, on_step=on_step, **self._how)

    @cached_property
    def autoencoder(self) -> Encoder:
        with self.show("side-information by an autoencoder") as on_step:
            return recipes.train_autoencoder_side(self.recipe, self.data, on_step=on_step, **self._how)

    def encoder(self, role: Role) -> Encoder:
        """Return a frozen encoder: of the old or the new model, or of a side-information model."""
        if role in ("old", "new"):
            classifier: Classifier = getattr(self, role)
            return classifier.encoder
        side: Encoder = getattr(self, role)
        return side

    def vectors(self, role: Role) -> Arrays:
        """Return what an encoder says of the test images, and of views of the training images: `test` and `train`.

        The first n rows of `train` are the n images as they are; all encoders see the same views.
        """

        def compute() -> Arrays:
            encoder = self.encoder(role)
            with self.show(f"embeddings: {role}"), drawn_from(self.seed, self.recipe.threads):
                (train,) = embedded_views(
                    [encoder],
                    self.data,
                    views=self.recipe.views,
                    view=self.recipe.view,
                    seed=self.seed,
                    device=self.device,
                )
                return {"train": train, "test": embed(encoder, self.data.test_images, device=self.device)}

        if role not in self._embedded:
            key = (self._models(role), self.recipe.views, self.recipe.view)
            self._embedded[role] = self._stages.arrays(f"vectors-{role}", key, compute)
        return self._embedded[role]

    def trained(self, run: Run) -> Trained:
        """Train a method, or take it as it was trained."""
        if METHODS[run.method].trains_backbone:
            return self._backbone(run)
        return self._on_pairs(run)

    def rows(self, run: Run) -> list[Row]:
        """Evaluate each transformation of a method against doing nothing, and its new model by itself."""

        def measure() -> dict[str, Any]:
            trained = self.trained(run)
            metric = METHODS[run.method].metric or self._setting(run).metric
            with self.show(f"{run.name}: evaluation"):
                return {"rows": self._judged(run, trained, metric)}

        kept: list[Row] = self._stages.figures(f"rows-{run.method}", self.depends_on(run), measure)["rows"]
        return [{**row, "name": run.name} for row in kept]

    def references(self, metric: Metric) -> dict[str, dict[str, float]]:
        """Evaluate old/old, the naive new/old, and new/new."""

        def measure() -> dict[str, Any]:
            old, new = self.vectors("old")["test"], self.vectors("new")["test"]
            width = old.shape[1]
            naive = np.zeros_like(old)
            naive[:, : min(width, new.shape[1])] = new[:, :width]
            pairs = {"old_old": (old, old), "naive": (naive, old), "new_new": (new, new)}
            with self.show(f"references by {metric}"):
                return {name: _figures(self._judge(*pair, metric)) for name, pair in pairs.items()}

        return self._stages.figures("references", (self._models("old", "new"), metric), measure)

    def curves(self, run: Run) -> dict[str, dict[str, float]]:
        """Evaluate partial re-embedding of a gallery that a run's transformation has upgraded, in several orders."""

        def measure() -> dict[str, Any]:
            trained = self.trained(run)
            forward = trained.method.transformations().forward
            if forward is None:
                raise ValueError(f"{run.name} has no forward transformation to start from")
            transform, native = Transform(forward), self.vectors("new")["test"]
            given = self.vectors("old")["test"], self._side(run, "test")
            derived, labels = transform(*given), self.data.test_labels
            orders = {"random": random_order(len(native), seed=self.seed)}
            orders["distance (an oracle)"] = distance_order(derived, native)
            orders["distance to class mean"] = class_mean_order(derived, labels)
            log_variance = transform.uncertainty(*given)
            if log_variance is not None:
                orders["uncertainty"] = uncertainty_order(log_variance)
            queries, found = min(CURVE_QUERIES, len(native)), {}
            for name, order in orders.items():
                with self.show(f"{run.name}: re-embedding, order {name}"):
                    curve = backfilling_curve(
                        native, derived, native, labels, order, metric=self._setting(run).metric, sample=queries
                    )
                found[name] = _named(curve.area)
            return found

        return self._stages.figures(f"curves-{run.method}", self.depends_on(run), measure)

    def cross_modal(self, root: Path) -> dict[str, Any]:
        """Upgrade an image-text model by XBT: both models are dual encoders on the features of the old and the new backbone.

        Args:
            root: the folder of CIFAR-100, whose file names the captions are made of.
        """
        images = len(self.data.train_images)
        code = [code_of(METHODS[name]) for name in ("xbt", "procrustes")]
        recipe = replace(CIFAR100_CAPTIONS, old_classes=self.recipe.old_classes, threads=self.recipe.threads)

        concepts = cifar100_concepts(root)

        def measure() -> dict[str, Any]:
            train, test = (
                Split(
                    old=self.vectors("old")[split][:size],
                    new=self.vectors("new")[split][:size],
                    labels=labels,
                    concepts=concepts[split],
                )
                for split, size, labels in (
                    ("train", images, self.data.train_labels),
                    ("test", len(self.data.test_images), self.data.test_labels),
                )
            )
            with self.show("XBT, two image-text models"):
                return asdict(cross_modal_experiment(train, test, recipe=recipe, seed=self.seed, cache=self.folder))

        return self._stages.figures("cross-modal", (self._models("old", "new"), concepts, recipe, *code), measure)

    def depends_on(self, run: Run) -> tuple[object, ...]:
        """Name all that decides a run, the method's code among it."""
        r, code = self.recipe, code_of(METHODS[run.method])
        centred = ["centred"] if run.centred else []
        if METHODS[run.method].trains_backbone:
            return (
                self._models("old", "new"),
                run.method,
                run.options,
                code,
                r.compatible,
                *centred,
            )
        sides = () if run.side is None else (run.side,)
        models = (self._models("old", "new", *sides), run.method, run.options, code, r.views, r.view, *centred)
        if _is_fct(run):
            return (*models, r.forward, r.hidden)
        return (*models, self._pair_plan(run))

    @property
    def _how(self) -> dict[str, Any]:
        return {"seed": self.seed, "cache": self.folder, "device": self.device}

    @property
    def _stages(self) -> Stages:
        return Stages(self.folder)

    def _models(self, *roles: Role) -> tuple[object, ...]:
        """Name all that decides some of the models, the data among it."""
        r = self.recipe
        decides: dict[Role, object] = {
            "old": r.old,
            "new": r.new,
            "simclr": (r.side, r.temperature),
            "autoencoder": r.autoencoder,
        }
        device = torch.device(self.device).type
        return (r.name, self.data.digest, r.old_classes, self.seed, device, *((role, decides[role]) for role in roles))

    def _setting(self, run: Run) -> Setting:
        return Setting(
            old_dimension=self.old.encoder.dimension,
            new_dimension=self.new.encoder.dimension,
            side_dimension=None if run.side is None else self.encoder(run.side).dimension,
            classes=len(self.data.class_names),
            metric="euclidean" if _is_fct(run) else "cosine",
            old_head=self.old.head.weight.detach(),
            new_head=self.new.head.weight.detach(),
        )

    def _old(self, run: Run, split: str) -> Floats:
        vectors = self.vectors("old")
        if not run.centred:
            return vectors[split]
        centred: Floats = vectors[split] - vectors["train"][: len(self.data.train_images)].mean(axis=0)
        return centred

    def _side(self, run: Run, split: str) -> Floats | None:
        return None if run.side is None else self.vectors(run.side)[split]

    def _fresh(self, run: Run) -> Method:
        sizes = {"hidden": self.recipe.hidden} if _is_fct(run) else {}
        return METHODS[run.method](self._setting(run), **{**sizes, **dict(run.options)})

    def _pair_plan(self, run: Run) -> Plan:
        return replace(METHODS[run.method].plan(len(self.data.train_labels)), epochs=self.recipe.pair_epochs)

    def _on_pairs(self, run: Run) -> Trained:
        # The paper's h sees augmented images; the other maps are fitted on the images as they are.
        views = self.recipe.views if _is_fct(run) else 1
        labels = np.tile(self.data.train_labels, views)
        rows = slice(len(labels))
        side = self._side(run, "train")

        def fit(method: Method, places: Places) -> None:
            with self.show(run.name) as on_step:
                train_transformation(
                    method,
                    old=self._old(run, "train")[rows],
                    new=self.vectors("new")["train"][rows],
                    side=None if side is None else side[rows],
                    labels=labels,
                    plan=self.recipe.forward if _is_fct(run) else self._pair_plan(run),
                    seed=self.seed,
                    device=self.device,
                    on_step=on_step,
                    **places,
                )

        with drawn_from(self.seed, self.recipe.threads):
            made, seconds = self._stages.trained(run.method, self.depends_on(run), lambda: self._fresh(run), fit)
        return Trained(made, self.vectors("new")["test"], seconds)

    def _backbone(self, run: Run) -> Trained:
        images = len(self.data.train_images)

        def make() -> CompatibleTraining:
            method = self._fresh(run)
            backbone = residual_network(
                self.recipe.new.design,
                channels=self.data.channels,
                dimension=method.feature_dimension,
                ends_in_relu=method.ends_in_relu,
            )
            started_from(backbone, self.new.encoder)
            return CompatibleTraining(backbone, method)

        def fit(task: CompatibleTraining, places: Places) -> None:
            with self.show(run.name) as on_step:
                train_backbone(
                    task,
                    self.data.train_images,
                    self.data.train_labels,
                    self.recipe.compatible,
                    old=self._old(run, "train")[:images],
                    new=self.vectors("new")["train"][:images],
                    augmentation=self.recipe.new.augmentation,
                    seed=self.seed,
                    device=self.device,
                    on_step=on_step,
                    **places,
                )

        depends_on = self.depends_on(run)
        with drawn_from(self.seed, self.recipe.threads):
            made, seconds = self._stages.trained(run.method, depends_on, make, fit)
            stored = self._stages.arrays(
                f"vectors-{run.method}",
                depends_on,
                lambda: {"new": embed(made, self.data.test_images, device=self.device)},
            )
        return Trained(made.method, stored["new"], seconds)

    def _judged(self, run: Run, trained: Trained, metric: Metric) -> list[Row]:
        old, maps = self._old(run, "test"), trained.method.transformations()
        sides: list[tuple[str, Floats, Floats]] = []
        if maps.forward is not None:
            sides.append(("forward", trained.new, Transform(maps.forward)(old, self._side(run, "test"))))
        if maps.backward is not None:
            sides.append(("backward", Transform(maps.backward)(trained.new), old))
        before = self._judge(old, old, metric)
        alone = _figures(self._judge(trained.new, trained.new, metric))
        rows = []
        for direction, queries, gallery in sides:
            after = self._judge(queries, gallery, metric)
            flipped = flips(before[:, 0], after[:, 0])
            rows.append(
                {
                    "method": run.method,
                    "direction": direction,
                    "metric": metric,
                    "old_old": _figures(before),
                    "new_old": _figures(after),
                    "new_new": alone,
                    "negative_flips": flipped.negative,
                    "positive_flips": flipped.positive,
                    "seconds": trained.seconds,
                }
            )
        return rows

    def _judge(self, queries: Floats, gallery: Floats, metric: Metric) -> npt.NDArray[np.float64]:
        labels = self.data.test_labels
        return judge_queries(queries, gallery, labels, labels, metric=metric, leave_one_out=True)


def started_from(backbone: Encoder, new: Encoder) -> None:
    """Give a backbone the weights of an independently trained one wherever the shapes agree.

    The papers train for 35 to 100 epochs from random weights. On a CPU that is out of reach; from here a few epochs are
    enough, and what differs (the last block of a wider backbone) starts fresh.
    """
    known, own = new.state_dict(), backbone.state_dict()
    shared = {name: known[name] for name, tensor in own.items() if name in known and known[name].shape == tensor.shape}
    backbone.load_state_dict(own | shared)
    backbone.requires_grad_(True)


def _is_fct(run: Run) -> bool:
    return issubclass(METHODS[run.method], Fct)


def _figures(judged: npt.NDArray[np.float64]) -> dict[str, float]:
    return _named(mean_retrieval(judged))


def _named(found: Retrieval) -> dict[str, float]:
    return {"cmc1": found.cmc1, "cmc5": found.cmc5, "map": found.map}
