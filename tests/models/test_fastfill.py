from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifacts import save
from models.backfilling import backfilling_curve, random_order, uncertainty_order
from models.evaluation import Metric
from models.method import Batch, Setting
from models.methods.fastfill import FastFill
from models.methods.fct import Fct
from models.plan import Plan
from models.runtime import Transform, load_transform
from models.training import train, train_transformation
from tests.real_data import EMBEDDINGS, needs

METRIC = pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner_product"])


def setting(metric: Metric = "euclidean", *, head: bool = True) -> Setting:
    rows = 5 * torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    return Setting(
        old_dimension=6, new_dimension=4, side_dimension=3, classes=3, metric=metric, new_head=rows if head else None
    )


def method(metric: Metric = "euclidean", *, head: bool = True) -> FastFill:
    """In eval mode, and with an uncertainty head that says something."""
    torch.manual_seed(0)
    fresh = FastFill(setting(metric, head=head), hidden=16).eval()
    uncertainty(fresh, 0.3, torch.tensor([[1.0, -2.0, 0.5, 3.0]]))
    return fresh


def uncertainty(fastfill: FastFill, bias: float, weight: torch.Tensor | None = None) -> None:
    with torch.no_grad():
        fastfill.transformation.get_parameter("uncertainty.bias").fill_(bias)
        fastfill.transformation.get_parameter("uncertainty.weight").copy_(
            torch.zeros(1, 4) if weight is None else weight
        )


def batch(rows: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        old=torch.rand(rows, 6, generator=generator),
        side=torch.rand(rows, 3, generator=generator),
        new=torch.rand(rows, 4, generator=generator),
        labels=torch.randint(0, 3, (rows,), generator=generator),
    )


def arrays(fastfill: FastFill, rows: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """h's output, the log-variance, the target and the labels, in float64."""
    assert rows.new is not None
    assert rows.labels is not None
    with torch.no_grad():
        output = fastfill.raw(rows)
    weight = fastfill.transformation.get_parameter("uncertainty.weight").detach().double().numpy()
    bias = fastfill.transformation.get_parameter("uncertainty.bias").detach().double().numpy()
    raw = output.double().numpy()
    return raw, raw @ weight[0] + bias, rows.new.double().numpy(), rows.labels.numpy()


def similarity(output: np.ndarray, new: np.ndarray, metric: Metric) -> float:
    if metric == "cosine":
        output, new = output / np.linalg.norm(output), new / np.linalg.norm(new)
    return float(((output - new) ** 2).sum() / len(new))


def smoothed_cross_entropy(logits: np.ndarray, label: int) -> float:
    """0.9 NLL + 0.1 mean over classes of -log p."""
    minus_log = np.log(np.exp(logits - logits.max()).sum()) - (logits - logits.max())
    return float(0.9 * minus_log[label] + 0.1 * minus_log.mean())


def supervised_contrast(i: int, output: np.ndarray, new: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the row's positives, its own target among them, of -log softmax(cos / 0.1) over all targets."""
    cosines = np.array([output[i] @ n / np.linalg.norm(output[i]) / np.linalg.norm(n) for n in new]) / 0.1
    logs = cosines - np.log(np.exp(cosines).sum())
    return float(-logs[labels == labels[i]].mean())


@METRIC
def test_the_loss_is_the_papers_formula(metric: Metric) -> None:
    fastfill, rows = method(metric), batch()
    output, log_variance, new, labels = arrays(fastfill, rows)
    assert fastfill.new_head is not None
    head = fastfill.new_head.double().numpy()
    row = np.array(
        [
            similarity(o, n, metric) + smoothed_cross_entropy(head @ o, y)
            for o, n, y in zip(output, new, labels, strict=True)
        ]
    )
    losses = fastfill.losses(rows)
    assert losses["likelihood"].item() == pytest.approx((0.5 * np.exp(-log_variance) * row).mean(), rel=1e-4)
    assert losses["uncertainty"].item() == pytest.approx(0.5 * log_variance.mean(), rel=1e-4)
    assert losses.keys() == {"likelihood", "uncertainty"}


@METRIC
def test_without_a_classifier_rows_are_contrasted_with_the_new_vectors_of_their_class(metric: Metric) -> None:
    fastfill, rows = method(metric, head=False), batch()
    output, log_variance, new, labels = arrays(fastfill, rows)
    row = np.array(
        [
            similarity(output[i], new[i], metric) + 0.1 * supervised_contrast(i, output, new, labels)
            for i in range(len(output))
        ]
    )
    expected = (0.5 * np.exp(-log_variance) * row).mean()
    assert fastfill.losses(rows)["likelihood"].item() == pytest.approx(expected, rel=1e-4)


def test_without_labels_only_the_similarity_is_left() -> None:
    fastfill, rows = method(), batch()
    output, log_variance, new, _ = arrays(fastfill, rows)
    row = np.array([similarity(o, n, "euclidean") for o, n in zip(output, new, strict=True)])
    unlabelled = Batch(old=rows.old, side=rows.side, new=rows.new)
    expected = (0.5 * np.exp(-log_variance) * row).mean()
    assert fastfill.losses(unlabelled)["likelihood"].item() == pytest.approx(expected, rel=1e-4)


def test_weights_scale_their_terms() -> None:
    rows = batch()
    torch.manual_seed(0)
    weighted = FastFill(setting(), hidden=16, similarity=3.0, discrimination=0.0, uncertainty=2.0).eval()
    uncertainty(weighted, 0.7)
    torch.manual_seed(0)
    fct = Fct(setting(), hidden=16).eval()
    weighted.transformation.load_state_dict(fct.transformation.state_dict(), strict=False)
    losses = weighted.losses(rows)
    alignment = fct.losses(rows)["alignment"]
    torch.testing.assert_close(losses["likelihood"], 0.5 * torch.exp(torch.tensor(-0.7)) * 3 * alignment)
    assert losses["uncertainty"].item() == pytest.approx(2 * 0.7)


@given(error=st.floats(0.1, 30), away=st.floats(0.05, 3))
@settings(max_examples=30, deadline=None)
def test_where_the_loss_is_constant_the_best_log_variance_is_its_logarithm(error: float, away: float) -> None:
    fastfill, rows = method(), batch(4)
    assert rows.old is not None
    with torch.no_grad():
        new = fastfill.transformation.raw(rows.old, rows.side) + error
    constant = Batch(old=rows.old, side=rows.side, new=new)  # l = error^2 in each row
    best = float(np.log(error**2))

    def value(log_variance: float) -> torch.Tensor:
        uncertainty(fastfill, log_variance)
        return torch.stack(list(fastfill.losses(constant).values())).sum()

    assert value(best).item() == pytest.approx(0.5 + 0.5 * best, abs=1e-3)
    fastfill.zero_grad()
    value(best).backward()  # type: ignore[no-untyped-call]
    slope = fastfill.transformation.get_parameter("uncertainty.bias").grad
    assert slope is not None
    assert abs(slope.item()) < 1e-3
    assert value(best + away) > value(best) < value(best - away)


def test_a_fresh_head_weighs_all_rows_alike() -> None:
    fastfill, rows = FastFill(setting(), hidden=16), batch()
    losses = fastfill.losses(rows)
    assert losses["uncertainty"] == 0
    assert rows.old is not None
    assert rows.new is not None
    row = fastfill.row_losses(fastfill.transformation.raw(rows.old, rows.side), rows.new, rows.labels)
    assert row.shape == (20,)
    torch.testing.assert_close(losses["likelihood"], 0.5 * row.mean())


@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_a_head_that_strays_costs_a_finite_loss(bias: float) -> None:
    fastfill = method()
    uncertainty(fastfill, bias)
    losses = fastfill.losses(batch())
    assert torch.isfinite(losses["likelihood"])
    assert losses["uncertainty"].item() == pytest.approx(0.5 * np.clip(bias, -10, 10))


@pytest.mark.parametrize("bias", [-10.5, 200.0])
def test_a_head_that_strays_is_drawn_back(bias: float) -> None:
    fastfill = method()
    uncertainty(fastfill, bias)
    torch.stack(list(fastfill.losses(batch()).values())).sum().backward()  # type: ignore[no-untyped-call]
    slope = fastfill.transformation.get_parameter("uncertainty.bias").grad
    assert slope is not None
    assert slope.item() * bias > 0


@METRIC
def test_what_is_served_is_the_log_variance_that_was_trained(metric: Metric, tmp_path: Path) -> None:
    fastfill, rows = method(metric), batch()
    assert rows.old is not None
    assert rows.side is not None
    save(tmp_path / "artifact", fastfill.transformations().forward)  # type: ignore[arg-type]
    served = load_transform(tmp_path / "artifact").uncertainty(rows.old.numpy(), rows.side.numpy())
    assert served is not None
    assert 0.5 * served.mean() == pytest.approx(fastfill.losses(rows)["uncertainty"].item(), rel=1e-5)


@pytest.mark.parametrize("head", [True, False], ids=["through the classifier", "by contrast"])
def test_a_row_that_lands_in_another_class_costs_more(head: bool) -> None:
    fastfill = method("cosine", head=head)
    new = torch.eye(4)[:3].repeat(2, 1)
    labels = torch.arange(3).repeat(2)
    fastfill.new_head = 3 * torch.eye(4)[:3] if head else None
    right = fastfill.row_losses(new + 0.1, new, labels)
    wrong = fastfill.row_losses(new.roll(1, 0) + 0.1, new, labels)
    assert (wrong > right + 1).all()


def test_the_contrast_sees_directions_only() -> None:
    fastfill, rows = method("cosine", head=False), batch()
    assert rows.new is not None
    output = torch.rand(20, 4, generator=torch.Generator().manual_seed(5))
    lengths = torch.linspace(0.5, 9, 20)[:, None]
    torch.testing.assert_close(
        fastfill.row_losses(lengths * output, rows.new, rows.labels), fastfill.row_losses(output, rows.new, rows.labels)
    )


def test_a_batch_of_one_class_has_nothing_to_contrast() -> None:
    fastfill, rows = method(head=False), batch()
    assert rows.new is not None
    output = torch.rand(20, 4)
    labelled = fastfill.row_losses(output, rows.new, torch.ones(20, dtype=torch.int64))
    torch.testing.assert_close(labelled, fastfill.row_losses(output, rows.new, None))


def test_both_terms_train_h_and_none_trains_the_classifier() -> None:
    for term in ("likelihood", "uncertainty"):
        fastfill = method()
        fastfill.losses(batch())[term].backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in fastfill.transformation.parameters()]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients)
    assert fastfill.new_head is not None
    assert fastfill.new_head.grad is None
    assert len(list(fastfill.parameters())) == len(gradients)
    kept = {f"transformation.{name}" for name in fastfill.transformation.state_dict()}
    frames = {f"{name}_frame.{part}" for name in ("old", "new", "side") for part in ("mean", "scale", "deviation")}
    assert fastfill.state_dict().keys() == kept | frames, "the classifier is no part of what is kept"


def test_the_second_half_of_training_is_in_eval_mode_as_in_fct() -> None:
    fastfill, modes = method(), []
    for epoch in range(4):
        fastfill.start_epoch(epoch, 4)
        modes.append(fastfill.transformation.training)
    assert modes == [True, True, False, False]


@pytest.mark.parametrize(
    ("old", "new", "parameters"), [(128, 128, 5_712_129), (384, 768, 15_026_689), (512, 768, 16_272_897)]
)
def test_it_is_as_large_as_the_papers(old: int, new: int, parameters: int) -> None:
    with torch.device("meta"):
        fastfill = FastFill(Setting(old_dimension=old, new_dimension=new, side_dimension=old))
    assert sum(parameter.numel() for parameter in fastfill.transformation.parameters()) == parameters


def test_a_classifier_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"new_head has shape \(3, 5\): it must be \(classes, 4\)"):
        FastFill(Setting(old_dimension=6, new_dimension=4, new_head=torch.rand(3, 5)))
    rows = batch()
    rows.labels[2] = 3  # type: ignore[index]
    with pytest.raises(ValueError, match="labels lie between 0 and 3, new_head has 3 classes"):
        method().prepare(rows)


def test_rows_that_cannot_be_predicted_become_the_uncertain_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(600, 6, generator=generator)
    noisy = old[:, 0] > 0
    new = old[:, :4] + 2 * noisy[:, None] * torch.randn(600, 4, generator=generator)
    torch.manual_seed(0)
    fastfill = FastFill(Setting(old_dimension=6, new_dimension=4), hidden=16)
    plan = Plan(epochs=30, batch=100, learning_rate=1e-2, optimizer="adam", schedule="epoch")
    train(fastfill, Batch(old=old[:400], new=new[:400]), plan)
    with torch.no_grad():
        offered = fastfill.transformations().forward
        assert offered is not None
        offered.eval()
        predicted = offered.log_variance(offered.raw(old[400:]))
    noisy, clean = predicted[noisy[400:]], predicted[~noisy[400:]]
    better = (noisy[:, None] > clean[None]).double().mean()  # by chance: 0.5
    assert better > 0.8


@pytest.mark.slow
@needs(EMBEDDINGS)
def test_on_real_embeddings_its_order_beats_random_ones_on_the_same_map() -> None:
    """Without labels: the file has no classifier, and one fitted to so few rows says little about others."""
    with np.load(EMBEDDINGS) as files:
        given = {role: files[f"{role}_train"][::8].astype(np.float32) for role in ("old", "side", "new")}
        old, side, new = (files[f"{role}_test"][::4].astype(np.float32) for role in ("old", "side", "new"))
        labels = files["labels_test"][::4]
    torch.manual_seed(0)
    fastfill = FastFill(Setting(old_dimension=128, new_dimension=128, side_dimension=128), hidden=256)
    plan = Plan(epochs=12, batch=128, learning_rate=1e-3, optimizer="adam", schedule="epoch")
    train_transformation(fastfill, **given, plan=plan)
    forward = fastfill.transformations().forward
    assert forward is not None
    transform = Transform(forward)
    derived, log_variance = transform(old, side), transform.uncertainty(old, side)
    assert log_variance is not None
    orders = [uncertainty_order(log_variance), *(random_order(len(new), seed=seed) for seed in range(3))]
    first, *others = (backfilling_curve(new, derived, new, labels, order).area.map for order in orders)
    assert first > max(others) + 0.005
