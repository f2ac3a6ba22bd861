import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.method import Batch, Setting
from models.methods.bct import Bct, Unseen, completed_head
from tests.models.formulas import Array, numbers, units

OLD, CLASSES, KNOWN = 6, 5, 3


def rows(count: int = 40, new: int = 8) -> Batch:
    """Old vectors that are not negative, around a mean for each class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % CLASSES
    means = 3 * torch.rand(CLASSES, OLD, generator=generator)
    return Batch(
        features=torch.rand(count, new, generator=generator),
        old=means[labels] + 0.1 * torch.rand(count, OLD, generator=generator),
        labels=labels,
    )


def method(unseen: Unseen = "prototypes", new: int = 8, **given: float) -> Bct:
    torch.manual_seed(0)
    head = 3 * torch.randn(KNOWN, OLD)
    fresh = Bct(Setting(old_dimension=OLD, new_dimension=new, classes=CLASSES, old_head=head), unseen=unseen, **given)
    fresh.prepare(rows(new=new))
    return fresh


def log_softmax(logits: Array) -> Array:
    shares: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return shares


def compatible(features: Array) -> Array:
    width = features.shape[1]
    return features[:, :OLD] if width >= OLD else np.pad(features, ((0, 0), (0, OLD - width)))


@pytest.mark.parametrize("new", [8, 6, 4], ids=["wider than the old", "as wide", "narrower"])
def test_the_loss_is_the_new_heads_and_that_of_cosines_with_class_means(new: int) -> None:
    bct, batch = method(new=new, weight=10.0, scale=20.0), rows(new=new)
    features, old, labels = numbers(batch.features), numbers(batch.old), numbers(batch.labels).astype(int)
    means = np.stack([units(old)[labels == k].mean(axis=0) for k in range(CLASSES)])
    seen = log_softmax(20 * units(compatible(features)) @ units(means).T)
    own = log_softmax(features @ numbers(bct.head.weight).T)
    losses = bct.losses(batch)
    assert losses["influence"].item() == pytest.approx(-10 * np.mean(seen[np.arange(40), labels]), rel=1e-5)
    smoothed = -0.9 * own[np.arange(40), labels] - 0.1 * own.mean(axis=1)
    assert losses["classes"].item() == pytest.approx(smoothed.mean(), rel=1e-5)


def test_skipped_samples_are_those_of_classes_below_the_heads_last_row() -> None:
    bct, batch = method("skip"), rows()
    features, old, labels = numbers(batch.features), numbers(batch.old), numbers(batch.labels).astype(int)
    length = np.linalg.norm(old, axis=1).mean()
    logits = length * units(compatible(features)) @ numbers(bct.setting.old_head).T
    expected = [-log_softmax(logits)[i, label] for i, label in enumerate(labels) if label < KNOWN]
    assert bct.losses(batch)["influence"].item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_distillation_asks_for_what_the_old_head_says_of_the_old_vectors() -> None:
    bct, batch = method("distillation"), rows()
    features, old, head = numbers(batch.features), numbers(batch.old), numbers(bct.setting.old_head)
    length = np.linalg.norm(old, axis=1).mean()
    said = log_softmax(length * units(compatible(features)) @ head.T)
    expected = -(np.exp(log_softmax(old @ head.T)) * said).sum(axis=1).mean()
    assert bct.losses(batch)["influence"].item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_unseen_classes_alone_can_still_be_stepped_on_though_it_has_no_influence() -> None:
    bct, batch = method("skip"), rows()
    assert batch.labels is not None
    assert batch.features is not None
    batch.features.requires_grad_()
    losses = bct.losses(batch.take((batch.labels >= KNOWN).nonzero()[:, 0]))
    assert losses["influence"].item() == 0
    losses["influence"].backward()
    torch.testing.assert_close(batch.features.grad, torch.zeros_like(batch.features))


@pytest.mark.parametrize(("scale", "low", "high"), [(30.0, 0.0, 0.01), (1.0, 0.5 * math.log(50), math.log(50))])
def test_a_perfect_embedding_costs_nothing_once_cosines_are_scaled(scale: float, low: float, high: float) -> None:
    classes, many = 50, torch.arange(100) % 50
    perfect = Batch(features=torch.eye(classes)[many], old=torch.eye(classes)[many], labels=many)
    bct = Bct(Setting(old_dimension=classes, new_dimension=classes, classes=classes), scale=scale)
    bct.prepare(perfect)
    assert low <= bct.losses(perfect)["influence"].item() <= high


@pytest.mark.parametrize("unseen", ["prototypes", "completed", "skip", "distillation"])
def test_the_influence_sees_only_directions_as_a_search_by_cosine_does(unseen: Unseen) -> None:
    bct, batch = method(unseen), rows()
    assert batch.features is not None
    longer = replace(batch, features=7 * batch.features)
    torch.testing.assert_close(bct.losses(longer)["influence"], bct.losses(batch)["influence"])


@pytest.mark.parametrize("unseen", ["prototypes", "completed", "skip", "distillation"])
def test_the_old_classifier_stays_frozen(unseen: Unseen) -> None:
    bct = method(unseen)
    assert [name for name, _ in bct.named_parameters()] == ["head.weight"]
    assert not bct.classifier.requires_grad


@pytest.mark.parametrize("unseen", ["completed", "skip", "distillation"])
def test_a_head_keeps_its_rows(unseen: Unseen) -> None:
    bct = method(unseen)
    assert bct.setting.old_head is not None
    torch.testing.assert_close(bct.classifier[:KNOWN], bct.setting.old_head, rtol=0, atol=0)
    assert len(bct.classifier) == (CLASSES if unseen == "completed" else KNOWN)


def test_a_completed_heads_new_rows_share_one_factor_and_one_offset() -> None:
    batch = rows()
    assert batch.old is not None
    assert batch.labels is not None
    head = 3 * torch.randn(2, OLD, generator=torch.Generator().manual_seed(2))
    completed = completed_head(head, batch.old, batch.labels, CLASSES)
    means = torch.stack([batch.old[batch.labels == k].mean(dim=0) for k in range(2, CLASSES)])
    one, other = (completed[3:] - completed[2]), (means[1:] - means[0])  # the offset cancels
    torch.testing.assert_close(one, (one.norm() / other.norm()) * one.mul(other).sum().sign() * other)


def test_a_completed_head_tells_old_vectors_apart_better_than_one_with_means_put_below_it() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(400) % 8
    old = (torch.rand(8, 16, generator=generator)[labels] + 0.2 * torch.randn(400, 16, generator=generator)).relu()
    seen = labels < 4
    targets = F.one_hot(labels[seen], 4).float()
    head = 2 * torch.linalg.lstsq(old[seen], targets).solution.T
    means = torch.stack([old[labels == k].mean(dim=0) for k in range(4, 8)])
    completed = completed_head(head, old, labels, 8)

    def known_found(weight: torch.Tensor) -> float:
        return ((old[seen] @ weight.T).argmax(dim=1) == labels[seen]).double().mean().item()

    assert known_found(torch.cat((head, means))) < 0.6 < known_found(completed)


@pytest.mark.parametrize("unit", [2.0**-14, 2.0**-7, 2.0**14])
def test_a_completed_head_says_the_same_of_old_vectors_in_any_unit(unit: float) -> None:
    batch = rows(400)
    assert batch.old is not None
    assert batch.labels is not None
    head = 3 * torch.randn(KNOWN, OLD, generator=torch.Generator().manual_seed(2))
    said = batch.old @ completed_head(head, batch.old, batch.labels, CLASSES).T
    scaled = unit * batch.old
    again = scaled @ completed_head(head / unit, scaled, batch.labels, CLASSES).T
    torch.testing.assert_close(again, said, rtol=1e-4, atol=1e-4)


def test_the_backward_map_takes_the_first_dimensions_as_the_influence_does() -> None:
    backward = method().transformations().backward
    assert backward is not None
    vectors = torch.rand(4, 8)
    torch.testing.assert_close(backward(vectors), F.normalize(vectors[:, :OLD], dim=1))


def test_state_goes_where_no_training_set_is() -> None:
    bct = method("completed")
    fresh = Bct(bct.setting, unseen="completed")
    fresh.load_state_dict(bct.state_dict())
    torch.testing.assert_close(fresh.losses(rows()), bct.losses(rows()))


def test_what_it_cannot_do_without_is_named() -> None:
    setting = Setting(old_dimension=OLD, new_dimension=8, classes=CLASSES)
    with pytest.raises(ValueError, match="set `old_head`"):
        Bct(setting, unseen="skip")
    with pytest.raises(ValueError, match="head is 4 wide, the old vectors are 6"):
        Bct(replace(setting, old_head=torch.rand(3, 4)), unseen="distillation")
    with pytest.raises(ValueError, match="set `classes`"):
        Bct(replace(setting, classes=None))
    with pytest.raises(ValueError, match="every row has the label 2"):
        Bct(setting).prepare(replace(rows(), labels=torch.full((40,), 2)))
    with pytest.raises(ValueError, match="number the classes from 0"):
        Bct(setting).prepare(replace(rows(), labels=torch.arange(40) % CLASSES + 1))
