import numpy as np
import pytest
import torch

from models.captions import Concept, Vocabulary, caption_each
from models.dual_encoders import (
    MAX_SCALE,
    Contrastive,
    DualEncoder,
    embed_images,
    embed_texts,
    train_dual_encoder,
)
from models.functional import symmetric_info_nce
from models.method import Batch
from models.plan import Plan

CONCEPTS = [Concept(name, name, "things") for name in ("apple", "bus", "cup", "dog", "elm", "fox")]
FEATURES, DIMENSION = 12, 8


def world(rows: int = 240) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Features that cluster by concept, a caption for each, and the concepts' numbers."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % len(CONCEPTS)
    centres = rng.normal(size=(len(CONCEPTS), FEATURES))
    features = np.maximum(centres[labels] + 0.2 * rng.normal(size=(rows, FEATURES)), 0).astype(np.float32)
    return features, caption_each([CONCEPTS[label] for label in labels], seed=1), labels


def dual(captions: list[str]) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(Vocabulary(captions), FEATURES, DIMENSION, hidden=32)


def info_nce(first: np.ndarray, second: np.ndarray, scale: float) -> float:
    """CLIP's loss: -log of the softmax at the pair, over rows and over columns, in NumPy."""
    first, second = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (first, second))
    scores = np.exp(scale * first @ second.T)
    own = np.diag(scores)
    return float(-(np.log(own / scores.sum(axis=1)) + np.log(own / scores.sum(axis=0))).mean() / 2)


def test_the_loss_is_clips_with_the_learned_temperature() -> None:
    features, captions, _ = world(20)
    fresh = dual(captions)
    with torch.no_grad():
        fresh.log_scale.fill_(np.log(9.0))
    batch = Batch(features=torch.from_numpy(features), texts=torch.from_numpy(fresh.vocabulary.encode(captions)))
    images, texts = embed_images(fresh, features).astype(float), embed_texts(fresh, captions).astype(float)
    loss = Contrastive(fresh).losses(batch)["contrast"]
    assert loss.item() == pytest.approx(info_nce(images, texts, 9.0), rel=1e-4)


def test_the_loss_is_the_same_from_either_side_and_for_vectors_of_any_length() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(9, 5, generator=generator), torch.randn(9, 5, generator=generator)
    loss = symmetric_info_nce(first, second, scale=7.0)
    torch.testing.assert_close(symmetric_info_nce(second, first, scale=7.0), loss)
    torch.testing.assert_close(symmetric_info_nce(3 * first, second / 2, scale=7.0), loss)


def test_without_a_scale_the_loss_is_that_of_guessing_and_with_a_large_one_right_pairs_cost_nothing() -> None:
    vectors = torch.eye(6)
    assert symmetric_info_nce(vectors, vectors, scale=0.0).item() == pytest.approx(np.log(6))
    assert symmetric_info_nce(vectors, vectors, scale=100.0).item() == pytest.approx(0, abs=1e-6)


def test_training_brings_an_image_to_a_caption_of_its_concept() -> None:
    features, captions, labels = world()
    trained = dual(captions)
    before = trained.scale.item()
    history = train_dual_encoder(
        trained, features, captions, Plan(epochs=8, batch=48, learning_rate=5e-3, optimizer="adam"), seed=1
    )
    assert history.epochs[-1]["contrast"] < history.epochs[0]["contrast"]
    assert trained.scale.item() != before
    said = caption_each([CONCEPTS[label] for label in labels], seed=2)  # other words than it was trained on
    found = (embed_images(trained, features) @ embed_texts(trained, said).T).argmax(axis=1)
    assert (labels[found] == labels).mean() > 0.95


def test_both_towers_end_in_unit_vectors_and_none_of_them_is_still_the_right_width() -> None:
    features, captions, _ = world(30)
    fresh = dual(captions)
    for vectors in (embed_images(fresh, features), embed_texts(fresh, captions)):
        assert vectors.shape == (30, DIMENSION)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert embed_images(fresh, features[:0]).shape == embed_texts(fresh, []).shape == (0, DIMENSION)


def test_padding_says_nothing_and_neither_does_the_order_of_words() -> None:
    fresh = dual(["a photo of a bus"]).eval()
    padded = torch.from_numpy(fresh.vocabulary.encode(["a photo of a bus"]))
    torch.testing.assert_close(fresh.texts(padded[:, :5]), fresh.texts(padded))
    np.testing.assert_allclose(
        embed_texts(fresh, ["bus a of photo a"]), embed_texts(fresh, ["a photo of a bus"]), rtol=1e-5, atol=1e-6
    )


def test_the_learned_scale_stays_below_clips_bound() -> None:
    fresh = dual(["a bus"])
    assert fresh.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        fresh.log_scale.fill_(10.0)
    assert fresh.scale.item() == MAX_SCALE
