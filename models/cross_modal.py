"""XBT's whole experiment (ICCV 2025): an image-text model is replaced, the gallery is not.

Old and new model are dual encoders on the features of an old and a new image backbone. The old one saw the first classes
only, the new one all. Queries by the new model, images and captions, search a gallery of the old one's vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from models.captions import Concept, Vocabulary, caption_corpus, caption_each, concept_ids
from models.data import as_tensor
from models.dual_encoders import DualEncoder, embed_images, embed_texts, train_dual_encoder
from models.evaluation import cmc_from_ranking
from models.method import Batch, Method, Setting
from models.methods.procrustes import Procrustes
from models.methods.xbt import Xbt, XbtTuning
from models.plan import Plan
from models.runtime import Transform
from models.stages import Places, Stages, code_of, drawn_from
from models.training import train, train_transformation
from models.transformations import Identity, Transformation, build

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
_Module = TypeVar("_Module", bound=nn.Module)

BLOCK = 1_000  # queries scored at once
#: the ways to search: what the queries are, and what the gallery is
DIRECTIONS = {
    "image to text": ("images", "texts"),
    "text to image": ("texts", "images"),
    "image to image": ("images", "images"),
}
SHARES = tuple(tenth / 10 for tenth in range(11))  # those of the SLERP authors


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of one split: row i is the same image in all."""

    #: (n, d) float32: features by the old and by the new image backbone
    old: Floats
    new: Floats
    #: (n,) int64
    labels: Labels
    concepts: tuple[Concept, ...]

    def __post_init__(self) -> None:
        lengths = [len(self.old), len(self.new), len(self.labels), len(self.concepts)]
        if len(set(lengths)) != 1:
            raise ValueError(f"features, labels and concepts must be of the same images, not {lengths} of them")

    @cached_property
    def digest(self) -> str:
        """Return a digest of the contents."""
        whole = hashlib.sha256(repr(self.concepts).encode())
        for values in (self.old, self.new, self.labels):
            whole.update(np.ascontiguousarray(values).tobytes())
        return whole.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossModalRecipe:
    """How the experiment is run."""

    #: the old model sees the images and captions of this many classes only
    old_classes: int
    old_dimension: int
    new_dimension: int
    #: of both models
    dual: Plan
    #: of the first stage
    noise: float
    projector: Plan
    #: the second stage sees this share of the training pairs
    share: float
    rank: int
    tuning: Plan
    #: of InfoNCE, in both stages
    temperature: float
    #: of torch, while something is trained; None leaves it as it is
    threads: int | None = None


CIFAR100_CAPTIONS = CrossModalRecipe(
    old_classes=50,
    old_dimension=64,
    new_dimension=128,
    dual=Plan(epochs=5, batch=512, learning_rate=2e-3, optimizer="adam"),
    noise=0.1,
    projector=Plan(epochs=40, batch=512, learning_rate=3e-3, optimizer="adam"),
    share=0.1,
    rank=4,
    tuning=Plan(epochs=10, batch=256, learning_rate=5e-4, optimizer="adam"),
    temperature=0.1,
)


@dataclass(frozen=True, slots=True)
class Found:
    """The share of queries whose first hit is relevant."""

    #: relevant is what has the query's class
    by_class: float
    #: relevant is what has the query's concept; queries without such an item in the gallery are not counted
    by_concept: float


@dataclass(frozen=True, slots=True)
class CrossModalResult:
    """What queries by each system find, direction by direction."""

    #: system, then direction; all but `new/new` and `xbt, new items` search the old model's vectors
    found: dict[str, dict[str, Found]]
    #: SLERP's share of the aligned new query, direction by direction
    shares: dict[str, float]
    #: the seconds that each training took, even if that was in an earlier run
    seconds: dict[str, float]

    def compatible(self, system: str, direction: str) -> bool:
        """Say whether a system beats staying with the old model, by class: M(new, old) > M(old, old)."""
        return self.found[system][direction].by_class > self.found["old/old"][direction].by_class


@dataclass(frozen=True, slots=True)
class Vectors:
    """Unit vectors of images and of their captions, row by row."""

    images: Floats
    texts: Floats

    def through(self, transformation: Transformation) -> Vectors:
        """Return both through one map: two towers share one space."""
        transform = Transform(transformation)
        return Vectors(transform(self.images), transform(self.texts))


@dataclass(frozen=True, slots=True)
class Relevance:
    """What belongs together: (n,) the class, and the concept."""

    classes: Labels
    concepts: Labels


def cross_modal_experiment(
    train: Split,
    test: Split,
    *,
    recipe: CrossModalRecipe = CIFAR100_CAPTIONS,
    seed: int = 0,
    cache: Path | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> CrossModalResult:
    """Train both models, upgrade from one to the other in every way, and search in every direction.

    Args:
        train: all that is trained on. The models see its pairs, the projector its texts, the second stage few of its pairs.
        test: the queries and the gallery, with captions of their own.
        recipe: how.
        seed: of captions, weights and the order of rows.
        cache: a folder that keeps what was trained.
        on_stage: told the name of each training before it begins.
    """
    made = _Trainings(recipe, train, seed, Stages(cache), on_stage)
    old, new = made.old_model(), made.new_model()
    projector = made.projector(old, new)
    tuned = made.tuned(new, projector)
    procrustes = made.procrustes(old, new)
    captions = caption_each(test.concepts, seed=seed + 1)
    stayed, best = embed_pairs(old, test.old, captions), embed_pairs(new, test.new, captions)
    aligned, at_home = best.through(procrustes), embed_pairs(tuned, test.new, captions).through(projector)
    resized = build(Identity(source_dimension=new.dimension, target_dimension=old.dimension, normalize_output=True))
    systems = {
        "old/old": (stayed, stayed),
        "naive": (best.through(resized), stayed),
        "procrustes": (aligned, stayed),
        "xbt, texts only": (best.through(projector), stayed),
        "xbt": (at_home, stayed),
        "xbt, new items": (at_home, at_home),
        "new/new": (best, best),
    }
    relevance = Relevance(test.labels, concept_ids(test.concepts))
    found = {name: search(queries, gallery, relevance) for name, (queries, gallery) in systems.items()}
    shares = made.shares(old, new, procrustes)
    found["procrustes, slerp"] = {
        direction: search(mix(stayed, aligned, share), stayed, relevance)[direction]
        for direction, share in shares.items()
    }
    return CrossModalResult(found, shares, made.seconds)


def embed_pairs(dual: DualEncoder, features: Floats, captions: Sequence[str]) -> Vectors:
    """Embed images, given as features (n, d), and their captions."""
    return Vectors(embed_images(dual, features), embed_texts(dual, captions))


def search(queries: Vectors, gallery: Vectors, relevance: Relevance) -> dict[str, Found]:
    """Search a gallery in every direction; row i is the same image and its caption in all.

    An image's own caption is a right answer, as in the benchmarks of image-text retrieval. Where images search images,
    each is left out of its own ranking.
    """
    found = {}
    for direction, (asked, answered) in DIRECTIONS.items():
        alike = asked == answered
        hits = first_hits(getattr(queries, asked), getattr(gallery, answered), leave_one_out=alike)
        labels = (relevance.classes, relevance.concepts)
        found[direction] = Found(*(_recall(hits, each, leave_one_out=alike) for each in labels))
    return found


def first_hits(queries: Floats, gallery: Floats, *, leave_one_out: bool = False) -> Labels:
    """Return the gallery row that each unit query finds first, by cosine, ties in gallery order: (n,) int64.

    All that Recall@1 needs, under both kinds of relevance at once; to rank 10,000 items for that would be waste.
    """
    parts = []
    for start in range(0, len(queries), BLOCK):
        scores = queries[start : start + BLOCK] @ gallery.T
        if leave_one_out:
            rows = np.arange(len(scores))
            scores[rows, start + rows] = -np.inf
        parts.append(scores.argmax(axis=1))
    return np.concatenate(parts)


def mix(old: Vectors, aligned: Vectors, share: float) -> Vectors:
    """Mix the old model's queries with the new model's aligned ones by SLERP. The old model must still run for that."""
    return Vectors(slerp(old.images, aligned.images, share), slerp(old.texts, aligned.texts, share))


def slerp(start: Floats, end: Floats, share: float) -> Floats:
    """Go a share of the way along the great circle between unit vectors (n, d): 0 is the start, 1 the end.

    sin((1 - a) t) / sin(t) u + sin(a t) / sin(t) v, with t the angle. Equal vectors leave no way
    to go, and opposite ones no shortest way; the start is returned for both.
    """
    angle = np.arccos(np.clip((start.astype(np.float64) * end).sum(axis=1, keepdims=True), -1, 1))
    sine = np.sin(angle)
    ahead = sine > 1e-3  # nearer to 0 and pi, float32 does not tell angles apart
    safe = np.where(ahead, sine, 1)
    mixed = np.sin((1 - share) * angle) / safe * start + np.sin(share * angle) / safe * end
    return np.where(ahead, mixed, start).astype(np.float32)


class _Trainings:
    """Everything that is trained, in the order of the story."""

    def __init__(
        self,
        recipe: CrossModalRecipe,
        split: Split,
        seed: int,
        stages: Stages,
        on_stage: Callable[[str], None] | None,
    ) -> None:
        self.recipe = recipe
        self.split = split
        self.seed = seed
        self.stages = stages
        self.on_stage = on_stage or (lambda _: None)
        self.seconds: dict[str, float] = {}
        self.captions = caption_each(split.concepts, seed=seed)
        #: what the projector and Procrustes read; the old model does not know every word of it
        self.corpus = caption_corpus(split.concepts)
        few = np.random.default_rng(seed).permutation(len(self.captions))[: int(recipe.share * len(self.captions))]
        #: the pairs of the second stage
        self.few = np.sort(few)

    def old_model(self) -> DualEncoder:
        """Train the old model on the first classes. It does not know words that only captions of other classes have."""
        rows = np.flatnonzero(self.split.labels < self.recipe.old_classes)
        return self._model("old model", self.split.old, rows, self.recipe.old_dimension)

    def new_model(self) -> DualEncoder:
        """Train the new model on all pairs."""
        return self._model("new model", self.split.new, np.arange(len(self.split.labels)), self.recipe.new_dimension)

    def projector(self, old: DualEncoder, new: DualEncoder) -> Transformation:
        """Train XBT's projector on texts; no image takes part."""
        recipe = self.recipe

        def make() -> Xbt:
            return Xbt(self._setting(), noise=recipe.noise, temperature=recipe.temperature)

        def fit(method: Xbt, places: Places) -> None:
            train_transformation(
                method,
                old=embed_texts(old, self.corpus),
                new=embed_texts(new, self.corpus),
                plan=recipe.projector,
                seed=self.seed,
                **places,
            )

        decides = (recipe.old_classes, recipe.dual, recipe.noise, recipe.temperature, recipe.projector, code_of(Xbt))
        return _backward(self._trained("projector", decides, make, fit))

    def tuned(self, new: DualEncoder, projector: Transformation) -> DualEncoder:
        """Train XBT's second stage on few pairs; no old model takes part."""
        recipe = self.recipe

        def make() -> XbtTuning:
            return XbtTuning(new, projector, rank=recipe.rank, temperature=recipe.temperature)

        def fit(task: XbtTuning, places: Places) -> None:
            texts = new.vocabulary.encode([self.captions[row] for row in self.few])
            pairs = Batch(features=as_tensor(self.split.new[self.few]).float(), texts=as_tensor(texts))
            train(task, pairs, recipe.tuning, seed=self.seed, **places)

        return self._trained("tuning", (recipe, code_of(Xbt)), make, fit).tuned()

    def procrustes(self, old: DualEncoder, new: DualEncoder) -> Transformation:
        """Solve for the rotation on the projector's texts; that takes no time worth keeping."""
        method = Procrustes(self._setting())
        train_transformation(method, old=embed_texts(old, self.corpus), new=embed_texts(new, self.corpus))
        return _backward(method)

    def shares(self, old: DualEncoder, new: DualEncoder, procrustes: Transformation) -> dict[str, float]:
        """Choose SLERP's share in each direction: the one that finds most among the pairs of the second stage."""
        captions, labels = [self.captions[row] for row in self.few], self.split.labels[self.few]
        stayed = embed_pairs(old, self.split.old[self.few], captions)
        aligned = embed_pairs(new, self.split.new[self.few], captions).through(procrustes)
        found = [search(mix(stayed, aligned, share), stayed, Relevance(labels, labels)) for share in SHARES]
        return {
            direction: SHARES[int(np.argmax([each[direction].by_class for each in found]))] for direction in DIRECTIONS
        }

    def _setting(self) -> Setting:
        recipe = self.recipe
        return Setting(old_dimension=recipe.old_dimension, new_dimension=recipe.new_dimension, metric="cosine")

    def _model(self, role: str, features: Floats, rows: Labels, dimension: int) -> DualEncoder:
        captions = [self.captions[row] for row in rows]

        def make() -> DualEncoder:
            return DualEncoder(Vocabulary(captions), features.shape[1], dimension)

        def fit(dual: DualEncoder, places: Places) -> None:
            train_dual_encoder(
                dual,
                features[rows],
                captions,
                self.recipe.dual,
                seed=self.seed,
                **places,
            )

        return self._trained(role, (self.recipe.dual, len(rows)), make, fit)

    def _trained(
        self,
        role: str,
        decides: object,
        make: Callable[[], _Module],
        fit: Callable[[_Module, Places], None],
    ) -> _Module:
        """Take what was trained earlier, or train it. Data, seed and widths decide the result, and so does `decides`."""
        self.on_stage(role)
        widths = (self.recipe.old_dimension, self.recipe.new_dimension)
        depends_on = (decides, widths, self.split.digest, self.seed)
        with drawn_from(self.seed, self.recipe.threads):
            module, self.seconds[role] = self.stages.trained(f"xbt-{role.replace(' ', '-')}", depends_on, make, fit)
        return module


def _backward(method: Method) -> Transformation:
    offered = method.transformations().backward
    if offered is None:
        raise ValueError(f"{method.name} offers no map from the new space to the old one")
    return offered


def _recall(hits: Labels, labels: Labels, *, leave_one_out: bool) -> float:
    """Return Recall@1: row i of the queries and of the gallery has labels[i]."""
    alike = np.bincount(labels)[labels] - leave_one_out
    return cmc_from_ranking((labels[hits] == labels)[:, None], alike)
