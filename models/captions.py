"""Captions from what is known of an image: its concept, its class, its kind of class. And the words they are made of.

CIFAR-100 has no captions, but its file names keep the word each image was searched by (`mcintosh_s_000643.png`), finer
than its 100 classes. A style and an amount of detail, drawn at random, make a sentence of them. As in real captions the
detail varies: only some say that a mcintosh is an apple.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

#: the most words of a caption; even with three or four words for each name a caption has fewer
LENGTH = 28
PADDING, UNKNOWN = 0, 1

_STYLES = (
    "{name}",
    "a photo of {name}",
    "a small photo of {name}",
    "a picture of {name}",
    "a blurry picture of {name}",
    "an image that shows {name}",
    "a close view of {name}",
)
_DETAILS = (
    "",
    ", a kind of {fine}",
    ", one of the {coarse}",
    " among {coarse}",
    ", a kind of {fine}, among {coarse}",
)
# 123 of the 60,000 are of another form: `manual-beaver002.png`, `manual12-skunk01.png`.
_FILE_NAME = re.compile(r"(?:manual\d*-)?([a-z_]+?)(?:_s_)?\d+\.png")


@dataclass(frozen=True, slots=True, order=True)
class Concept:
    """What a caption may say of an image."""

    #: as one would search for it, such as "mcintosh"
    name: str
    #: its class, such as "apple"; often the name itself
    fine: str
    #: the kind of its class, such as "fruit and vegetables"
    coarse: str


def cifar100_concepts(root: str | Path) -> dict[str, tuple[Concept, ...]]:
    """Read the concept of each image of CIFAR-100, in the order of `models.data.cifar100`.

    Args:
        root: the folder with `labels.json` (`fine_names`, `coarse_names`, `coarse_of_fine`) and `filenames.json.gz`
            (per split, per class, the file names in the order of the sheet's tiles).

    Returns:
        Per split, `train` and `test`, a concept for each image: class by class, file name by file name.

    Raises:
        FileNotFoundError: a file is missing there.
        ValueError: a file name that holds no concept.
    """
    root = Path(root)
    for name in ("labels.json", "filenames.json.gz"):
        if not (root / name).is_file():
            raise FileNotFoundError(f"{root} has no {name}: give the folder that holds the CIFAR-100 sheets")
    labels = json.loads((root / "labels.json").read_text(encoding="utf-8"))
    with gzip.open(root / "filenames.json.gz", "rt", encoding="utf-8") as file:
        files = json.load(file)
    kinds = [labels["coarse_names"][coarse] for coarse in labels["coarse_of_fine"]]
    return {
        split: tuple(
            Concept(_words(_stem(name)), _words(fine), _words(coarse))
            for fine, coarse in zip(labels["fine_names"], kinds, strict=True)
            for name in files[split][fine]
        )
        for split in ("train", "test")
    }


def concept_ids(concepts: Sequence[Concept]) -> npt.NDArray[np.int64]:
    """Number the concepts: (n,). Two of the same name and class get the same number; numbers of two calls do not compare."""
    places = {concept: place for place, concept in enumerate(sorted(set(concepts)))}
    return np.array([places[concept] for concept in concepts], np.int64)


def caption_each(concepts: Sequence[Concept], *, seed: int = 0) -> list[str]:
    """Write one caption per image, its style and detail drawn at random; the same seed writes the same ones."""
    rng = np.random.default_rng(seed)
    return [_caption(concept, *_draw(rng, concept)) for concept in concepts]


def caption_corpus(concepts: Iterable[Concept]) -> list[str]:
    """Write every caption that these concepts can have, sorted and none twice: a corpus of texts without images."""
    return sorted(
        {
            _caption(concept, style, detail)
            for concept in set(concepts)
            for style, detail in itertools.product(_STYLES, _details(concept))
        }
    )


class Vocabulary:
    """The words of a corpus as numbers: 0 pads, 1 is any word that the corpus does not hold."""

    def __init__(self, captions: Iterable[str]) -> None:
        self.words = tuple(sorted({word for caption in captions for word in _split(caption)}))
        self._places = {word: place for place, word in enumerate(self.words, start=2)}

    def __len__(self) -> int:
        """Count the numbers in use, those of padding and of unknown words included."""
        return len(self.words) + 2

    def encode(self, captions: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return (n, LENGTH) int64: each caption's words in order, padded; words past the length are left out."""
        encoded = np.full((len(captions), LENGTH), PADDING, np.int64)
        for row, caption in zip(encoded, captions, strict=True):
            places = [self._places.get(word, UNKNOWN) for word in _split(caption)][:LENGTH]
            row[: len(places)] = places
        return encoded


def _stem(name: str) -> str:
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"the file name {name!r} is not <concept>_s_<number>.png, so it says no concept")
    return match[1]


def _words(name: str) -> str:
    """Return a name as one says it: `lawn_mower` is two words, and `vehicles_1` is about vehicles."""
    return re.sub(r"_\d+$", "", name).replace("_", " ")


def _split(caption: str) -> list[str]:
    return re.findall(r"[a-z-]+", caption.lower())


def _draw(rng: np.random.Generator, concept: Concept) -> tuple[str, str]:
    details = _details(concept)
    return _STYLES[rng.integers(len(_STYLES))], details[rng.integers(len(details))]


def _details(concept: Concept) -> list[str]:
    """Return what a caption may add to the name. What repeats the name is left out: an apple is not called a kind of apple."""
    return [detail for detail in _DETAILS if "{fine}" not in detail or concept.name != concept.fine]


def _caption(concept: Concept, style: str, detail: str) -> str:
    article = "an" if concept.name[0] in "aeiou" else "a"
    return (style + detail).format(name=f"{article} {concept.name}", fine=concept.fine, coarse=concept.coarse)
