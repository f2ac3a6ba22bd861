import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.captions import (
    LENGTH,
    PADDING,
    UNKNOWN,
    Concept,
    Vocabulary,
    caption_corpus,
    caption_each,
    cifar100_concepts,
    concept_ids,
)
from tests.real_data import IMAGES, needs

MCINTOSH = Concept("mcintosh", "apple", "fruit and vegetables")
APPLE = Concept("apple", "apple", "fruit and vegetables")
BUS = Concept("bus", "bus", "vehicles")


def folder(root: Path, train: list[str], test: list[str]) -> Path:
    """Two classes, lawn_mower with the given file names and apple with one."""
    (root / "labels.json").write_text(
        json.dumps(
            {
                "fine_names": ["lawn_mower", "apple"],
                "coarse_names": ["fruit_and_vegetables", "vehicles_2"],
                "coarse_of_fine": [1, 0],
            }
        )
    )
    files = {
        "train": {"apple": ["apple_s_000027.png"], "lawn_mower": train},
        "test": {"apple": ["mcintosh_s_000643.png"], "lawn_mower": test},
    }
    with gzip.open(root / "filenames.json.gz", "wt") as file:
        json.dump(files, file)
    return root


def test_concepts_come_class_by_class_and_file_by_file_in_plain_words(tmp_path: Path) -> None:
    names = ["hand_mower_s_000104.png", "manual-shrew002.png", "manual12-skunk007.png"]
    concepts = cifar100_concepts(folder(tmp_path, names, ["lawn_mower_s_000001.png"]))
    mower = ("lawn mower", "vehicles")
    assert concepts["train"] == (
        Concept("hand mower", *mower),
        Concept("shrew", *mower),
        Concept("skunk", *mower),
        Concept("apple", "apple", "fruit and vegetables"),
    )
    assert concepts["test"] == (Concept("lawn mower", *mower), MCINTOSH)


def test_a_file_name_without_a_concept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'000104\.png' is not"):
        cifar100_concepts(folder(tmp_path, ["000104.png"], []))


@pytest.mark.parametrize("name", ["labels.json", "filenames.json.gz"])
def test_a_folder_without_names_says_what_is_missing(tmp_path: Path, name: str) -> None:
    (folder(tmp_path, [], []) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        cifar100_concepts(tmp_path)


def test_equal_concepts_have_one_number_and_one_name_in_two_classes_has_two() -> None:
    other = Concept("mcintosh", "computer", "household electrical devices")
    numbers = concept_ids([MCINTOSH, BUS, other, MCINTOSH])
    assert numbers[0] == numbers[3]
    assert len(set(numbers.tolist())) == 3


def test_the_same_seed_writes_the_same_captions_and_another_one_others() -> None:
    concepts = [MCINTOSH, APPLE, BUS] * 10
    assert caption_each(concepts, seed=3) == caption_each(concepts, seed=3)
    assert caption_each(concepts, seed=3) != caption_each(concepts, seed=4)


def test_a_caption_names_its_concept_and_only_what_is_true_of_it() -> None:
    for caption in caption_each([MCINTOSH] * 50):
        assert "a mcintosh" in caption
        assert "bus" not in caption
    assert all("an apple" in caption for caption in caption_each([APPLE] * 50))


def test_an_apple_is_not_called_a_kind_of_apple() -> None:
    assert any("a kind of apple" in caption for caption in caption_corpus([MCINTOSH]))
    assert not any("a kind of" in caption for caption in caption_corpus([APPLE]))


def test_the_corpus_holds_every_caption_once_and_whatever_is_drawn_is_in_it() -> None:
    corpus = caption_corpus([MCINTOSH, APPLE, MCINTOSH])
    assert corpus == sorted(set(corpus))
    drawn = set(caption_each([MCINTOSH] * 2_000))
    assert drawn == set(caption_corpus([MCINTOSH]))  # of 35, each has been drawn
    assert drawn < set(corpus)


def test_words_have_numbers_and_what_is_not_known_has_one_of_its_own() -> None:
    vocabulary = Vocabulary(["a photo of a mcintosh", "fruit and vegetables"])
    assert vocabulary.words == ("a", "and", "fruit", "mcintosh", "of", "photo", "vegetables")
    assert len(vocabulary) == 9
    row = vocabulary.encode(["A mcintosh, not a pear"])[0]
    assert row[:5].tolist() == [2, 5, UNKNOWN, 2, UNKNOWN]
    assert (row[5:] == PADDING).all()


@given(st.lists(st.text("abc -,.", max_size=120), max_size=4))
def test_any_captions_encode_to_numbers_below_the_vocabularys_size(captions: list[str]) -> None:
    vocabulary = Vocabulary(captions[:2])
    encoded = vocabulary.encode(captions)
    assert encoded.shape == (len(captions), LENGTH)
    assert encoded.dtype == np.int64
    assert ((encoded >= 0) & (encoded < len(vocabulary))).all()
    assert (encoded[:2] != UNKNOWN).all()


@needs(IMAGES)
def test_every_real_caption_fits_and_each_image_has_a_concept() -> None:
    concepts = cifar100_concepts(IMAGES)
    assert {split: len(each) for split, each in concepts.items()} == {"train": 50_000, "test": 10_000}
    assert len(set(concepts["train"])) > 700
    names = json.loads((IMAGES / "labels.json").read_text(encoding="utf-8"))["fine_names"]
    assert [concept.fine for concept in concepts["test"]] == [
        name.replace("_", " ") for name in names for _ in range(100)
    ]
    captions = caption_corpus(concepts["train"])
    assert max(len(caption.split()) for caption in captions) <= LENGTH
    assert (Vocabulary(captions).encode(captions) != UNKNOWN).all()
