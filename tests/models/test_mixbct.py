import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import ArcFaceLoss
from torch.nn import functional as F

from models.method import Batch, Setting
from models.methods.mixbct import MixBct, arcface_logits, credible_rows
from tests.models.formulas import Array, numbers, units

ROWS, WIDTH, CLASSES = 30, 6, 3


def rows() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        features=torch.randn(ROWS, WIDTH, generator=generator),
        old=torch.rand(ROWS, WIDTH, generator=generator),
        labels=torch.arange(ROWS) % CLASSES,
        index=torch.arange(ROWS),
    )


def method(**given: float) -> MixBct:
    torch.manual_seed(0)
    fresh = MixBct(Setting(old_dimension=WIDTH, new_dimension=9, classes=CLASSES), **given)
    fresh.prepare(rows())
    return fresh


def arcface(vectors: Array, centres: Array, labels: Array, scale: float, margin: float) -> float:
    """The paper's mean cross-entropy, row by row."""
    total = 0.0
    for cosines, label in zip(units(vectors) @ units(centres).T, labels.astype(int), strict=True):
        theta = math.acos(cosines[label])
        logits = scale * cosines
        grown = math.cos(theta + margin) if theta + margin < math.pi else math.cos(theta) - math.sin(margin) * margin
        logits[label] = scale * grown
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    return total / len(vectors)


def test_the_loss_is_arcface_of_new_rows_where_nothing_is_mixed_in() -> None:
    mix, batch = method(alpha=0.0), rows()
    features = numbers(batch.features)
    new = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0) + 1e-5)
    expected = arcface(new, numbers(mix.centres), numbers(batch.labels), 64, 0.5)
    assert mix.losses(batch)["arcface"].item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_arcface_of_old_rows_where_they_are_chosen() -> None:
    mix, batch = method(alpha=0.5, keep=0.6), rows()
    torch.manual_seed(7)
    chosen = numbers(mix._choose(torch.arange(ROWS))) > 0
    features = numbers(batch.features)
    new = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0) + 1e-5)
    mixed = np.where(chosen[:, None], numbers(batch.old), new)
    torch.manual_seed(7)
    assert chosen.sum() == 15
    expected = arcface(mixed, numbers(mix.centres), numbers(batch.labels), 64, 0.5)
    assert mix.losses(batch)["arcface"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 1.5])
def test_arcface_is_pytorch_metric_learnings(margin: float) -> None:
    generator = torch.Generator().manual_seed(2)
    vectors, centres = (torch.randn(50, WIDTH, generator=generator) for _ in range(2))
    labels = torch.arange(50)
    theirs = ArcFaceLoss(50, WIDTH, margin=math.degrees(margin), scale=64)
    theirs.W.data = centres.T.contiguous()
    ours = F.cross_entropy(arcface_logits(vectors, centres, labels, 64.0, margin), labels)
    torch.testing.assert_close(ours, theirs(vectors, labels), rtol=1e-4, atol=1e-4)


def test_a_vector_on_its_centre_or_opposite_has_a_finite_gradient() -> None:
    vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    centres = torch.eye(2, requires_grad=True)
    F.cross_entropy(arcface_logits(vectors, centres, torch.tensor([0, 0]), 64.0, 0.5), torch.tensor([0, 0])).backward()
    assert vectors.grad is not None
    assert centres.grad is not None
    assert vectors.grad.isfinite().all()
    assert centres.grad.isfinite().all()


def test_arcface_sees_no_length() -> None:
    generator = torch.Generator().manual_seed(2)
    vectors, centres, labels = torch.randn(9, 4, generator=generator), torch.randn(3, 4), torch.arange(9) % 3
    once = arcface_logits(vectors, centres, labels, 64.0, 0.5)
    torch.testing.assert_close(arcface_logits(5 * vectors, 3 * centres, labels, 64.0, 0.5), once, rtol=1e-4, atol=1e-3)


def test_credible_rows_are_those_closest_to_their_class_after_rows_and_columns_are_normalised() -> None:
    old, labels = rows().old, rows().labels
    assert old is not None
    assert labels is not None
    even = units(units(numbers(old)), axis=0)
    expected = np.zeros(ROWS, dtype=bool)
    for label in range(CLASSES):
        places = np.flatnonzero(labels.numpy() == label)
        distances = np.linalg.norm(even[places] - even[places].mean(axis=0), axis=1)
        expected[places[np.argsort(distances)[: math.ceil(0.55 * len(places))]]] = True
    np.testing.assert_array_equal(credible_rows(old, labels, 0.55).numpy(), expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_each_class_keeps_its_share_whatever_the_order_of_labels(drawn: list[int], keep: float) -> None:
    labels = torch.tensor(drawn)
    old = torch.rand(len(drawn), 4, generator=torch.Generator().manual_seed(1)) + 0.1
    credible = credible_rows(old, labels, keep)
    for label in set(drawn):
        assert int(credible[labels == label].sum()) == math.ceil(keep * drawn.count(label))


def test_no_gradient_flows_to_the_features_of_replaced_rows_but_all_reach_the_centres() -> None:
    mix, batch = method(alpha=0.5, keep=1.0), rows()
    mix.eval()  # the batch's statistics would pass gradients between rows
    assert batch.features is not None
    features = batch.features.requires_grad_()
    torch.manual_seed(7)
    chosen = mix._choose(torch.arange(ROWS))
    torch.manual_seed(7)
    mix.losses(batch)["arcface"].backward()
    assert features.grad is not None
    torch.testing.assert_close((features.grad == 0).all(dim=1), chosen)
    assert mix.centres.grad is not None
    assert (mix.centres.grad != 0).any(dim=1).all()


def test_only_credible_rows_are_mixed_in_and_all_where_there_are_too_few() -> None:
    mix = method(alpha=0.5, keep=0.5)
    places = torch.cat((mix.credible.nonzero()[:2, 0], (~mix.credible).nonzero()[:10, 0]))
    chosen = mix._choose(places)  # alpha asks for 6 of these 12
    torch.testing.assert_close(chosen, mix.credible[places])


def test_draws_differ_from_batch_to_batch() -> None:
    mix = method()
    drawn = torch.stack([mix._choose(torch.arange(ROWS)) for _ in range(20)])
    assert (drawn.sum(dim=1) == 9).all()
    assert len(drawn.unique(dim=0)) > 10


def test_the_last_batch_norm_sees_new_rows_only_and_keeps_its_scale() -> None:
    mix, batch = method(alpha=0.5), rows()
    assert batch.features is not None
    mix.losses(batch)["arcface"].backward()
    assert mix.norm.running_mean is not None
    torch.testing.assert_close(mix.norm.running_mean, 0.1 * batch.features.mean(dim=0))
    assert mix.norm.weight.grad is None
    assert mix.norm.bias.grad is not None


def test_the_new_model_is_as_wide_as_the_old() -> None:
    mix = method()
    assert (mix.feature_dimension, mix.dimension) == (WIDTH, WIDTH)
    backward = mix.transformations().backward
    assert backward is not None
    vectors = torch.randn(4, WIDTH)
    torch.testing.assert_close(backward(vectors), F.normalize(vectors, dim=1))


def test_which_rows_are_credible_is_not_part_of_the_weights() -> None:
    assert set(method().state_dict()) == {
        "centres",
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }


def test_what_it_cannot_do_is_named() -> None:
    setting = Setting(old_dimension=WIDTH, new_dimension=WIDTH, classes=CLASSES)
    with pytest.raises(ValueError, match="alpha must be"):
        MixBct(setting, alpha=1.0)
    with pytest.raises(ValueError, match="keep above 0"):
        MixBct(setting, keep=0.0)
    with pytest.raises(ValueError, match="call `prepare`"):
        MixBct(setting).losses(rows())
    with pytest.raises(ValueError, match="0% of the old vectors are credible, alpha asks for 30%"):
        MixBct(setting).prepare(replace(rows(), old=torch.zeros(ROWS, WIDTH)))
    with pytest.raises(ValueError, match="every row has the label 1"):
        MixBct(setting).prepare(replace(rows(), labels=torch.ones(ROWS, dtype=torch.int64)))
