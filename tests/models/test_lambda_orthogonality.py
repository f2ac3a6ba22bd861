from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.evaluation import METRICS, Metric
from models.method import Batch, Setting
from models.methods.lambda_orthogonality import LambdaOrthogonality, deviation, gate
from models.methods.procrustes import Procrustes
from models.moments import unit
from models.plan import Plan
from models.training import Step, train
from models.transformations import Transformation

Array = npt.NDArray[np.float64]
WIDTHS = pytest.mark.parametrize("widths", [(5, 5), (4, 7), (7, 4)], ids=str)  # (old, new)


def pairs(widths: tuple[int, int] = (5, 5), rows: int = 40) -> Batch:
    """Four classes in a hidden space, seen by two models."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 4
    hidden = rng.normal(size=(4, 5))[labels] + rng.normal(size=(rows, 5))
    views = (hidden @ rng.normal(size=(5, d)) + 0.3 * rng.normal(size=(rows, d)) + 1 for d in widths)
    old, new = (torch.from_numpy(view.astype(np.float32)) for view in views)
    return Batch(old=old, new=new, labels=torch.from_numpy(labels))


def vectors(rows: Batch) -> tuple[Tensor, Tensor]:
    assert rows.old is not None
    assert rows.new is not None
    return rows.old, rows.new


def fitted(rows: Batch, metric: Metric = "euclidean", *, strict: bool = False, epochs: int = 20) -> LambdaOrthogonality:
    """Trained, so that neither B nor F is what it started as."""
    old, new = vectors(rows)
    torch.manual_seed(0)
    setting = Setting(old_dimension=old.shape[1], new_dimension=new.shape[1], metric=metric)
    method = LambdaOrthogonality(setting, strict=strict, hidden=16)
    train(method, rows, Plan(epochs=epochs, batch=16, learning_rate=1e-2, optimizer="adam"))
    return method


def maps(method: LambdaOrthogonality) -> tuple[Transformation, Transformation]:
    """(backward, forward), as they are exported."""
    offered = method.transformations()
    assert offered.backward is not None
    assert offered.forward is not None
    return offered.backward, offered.forward


def of(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def units(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def supcon(anchors: Array, others: Array, labels: Array, temperature: float) -> float:
    """Khosla et al. 2020, anchors on one side and what they are compared with on the other."""
    scores = units(anchors) @ units(others).T / temperature
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return float(np.mean([-row[labels == label].mean() for row, label in zip(logs, labels, strict=True)]))


def formula(method: LambdaOrthogonality, rows: Batch) -> dict[str, float]:
    """The paper's four terms in NumPy."""
    old, new = of(method.old_frame(vectors(rows)[0])), of(method.new_frame(vectors(rows)[1]))
    state = {name: of(tensor) for name, tensor in method.towards.state_dict().items()}
    weight = of(method.to_old.weight)
    back = new @ weight.T + (0 if method.strict else of(method.to_old.bias))
    hidden = old @ state["layers.0.weight"].T + state["layers.0.bias"]
    hidden = hidden * (1 + torch.erf(torch.from_numpy(hidden / np.sqrt(2))).numpy()) / 2
    skip = old @ state["skip.weight"].T if "skip.weight" in state else old
    towards = skip + hidden @ state["layers.1.weight"].T + state["layers.1.bias"]
    labels = np.arange(len(old)) if rows.labels is None else rows.labels.numpy()
    variance = float(np.square(old - old.mean(axis=0)).sum(axis=1).mean())
    old = np.pad(old, ((0, 0), (0, back.shape[1] - old.shape[1])))
    gram = weight.T @ weight
    x = float(np.linalg.norm(gram - np.eye(len(gram))))
    return {
        "backward": float(np.square(back - old).sum(axis=1).mean()) / variance,
        "forward": float(np.square(towards - back).sum(axis=1).mean()) / variance,
        "contrastive": 0.1 * (supcon(towards, back, labels, 0.1) + supcon(towards, old, labels, 0.1)),
        "orthogonality": x / (1 + np.exp(-(x - 0.1 * np.sqrt(len(gram))))),
    }


@WIDTHS
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_the_losses_are_the_papers(widths: tuple[int, int], metric: Metric, labelled: bool) -> None:
    rows = pairs(widths) if labelled else replace(pairs(widths), labels=None)
    for strict in (False, True):
        method = fitted(rows, metric, strict=strict, epochs=4)
        expected = formula(method, rows)
        if strict:
            del expected["orthogonality"]
        found = {name: value.item() for name, value in method.losses(rows).items()}
        assert found == pytest.approx(expected, rel=1e-4)


@given(threshold=st.floats(0.1, 50), sharpness=st.floats(0.1, 20))
def test_the_gate_is_a_half_at_the_threshold_and_opens_around_it(threshold: float, sharpness: float) -> None:
    size = 4
    weight = torch.eye(size, dtype=torch.float64) * np.sqrt(1 + threshold / np.sqrt(size))
    apart = deviation(weight)
    assert apart.item() == pytest.approx(threshold)
    assert gate(apart, threshold=threshold, sharpness=sharpness).item() == pytest.approx(0.5)
    far = 40 / sharpness
    assert gate(apart - far, threshold=threshold, sharpness=sharpness).item() == pytest.approx(0, abs=1e-12)
    assert gate(apart + far, threshold=threshold, sharpness=sharpness).item() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(5, 5), (7, 4)], ids=str)
def test_orthonormal_columns_deviate_by_nothing(shape: tuple[int, int]) -> None:
    weight = torch.nn.init.orthogonal_(torch.empty(shape))
    assert deviation(weight).item() < 1e-5
    assert deviation(2 * weight).item() == pytest.approx(3 * np.sqrt(shape[1]), rel=1e-5)


def test_a_small_threshold_keeps_the_relaxed_map_closer_to_orthogonal() -> None:
    rows = pairs((5, 8), rows=80)
    apart = []
    for threshold in (0.1, 100.0):
        torch.manual_seed(0)
        setting = Setting(old_dimension=5, new_dimension=8)
        method = LambdaOrthogonality(setting, threshold=threshold, sharpness=10)
        train(method, rows, Plan(epochs=30, batch=40, learning_rate=2e-2, optimizer="adam"))
        apart.append(deviation(method.to_old.weight).item())
    assert apart[0] < 0.5 * apart[1]


@WIDTHS
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "relaxed"])
def test_it_starts_as_procrustes(widths: tuple[int, int], metric: Metric, strict: bool) -> None:
    rows = pairs(widths)
    if metric == "cosine":
        old, new = vectors(rows)
        rows = Batch(old=unit(old), new=unit(new))
    setting = Setting(old_dimension=widths[0], new_dimension=widths[1], metric=metric)
    method = LambdaOrthogonality(setting, strict=strict)
    closed = Procrustes(replace(setting, metric="euclidean"), centred=not strict)
    method.prepare(rows)
    closed.prepare(rows)
    expected = closed.transformations().backward
    assert expected is not None
    new = vectors(rows)[1]
    wanted = expected(new)
    if strict:  # a rotation under every metric, where relaxed B has a scale as Procrustes has
        wanted = wanted / torch.linalg.matrix_norm(expected.state_dict()["weight"], ord=2)
    wanted = unit(wanted) if metric == "cosine" else wanted
    torch.testing.assert_close(maps(method)[0](new), wanted, atol=1e-4, rtol=1e-4)


def test_the_relaxed_map_does_not_depend_on_the_unit_of_the_new_vectors() -> None:
    rows = pairs((4, 7))
    old, new = vectors(rows)
    outputs = []
    for scale in (1.0, 8.0):
        backward, forward = maps(fitted(replace(rows, new=scale * new)))
        outputs.append((backward(scale * new), forward(old) / scale))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)


def test_the_strict_map_keeps_every_distance_through_training() -> None:
    rows = pairs((7, 5))
    new = vectors(rows)[1]
    backward, _ = maps(fitted(rows, strict=True))
    assert not torch.allclose(backward(new)[:, :5], new, atol=0.1)
    torch.testing.assert_close(torch.pdist(backward(new)), torch.pdist(new), atol=1e-4, rtol=1e-4)


class TestForward:
    """The authors store F(o) and search with B(n); here what is stored is in the new space, and searched with n."""

    @pytest.mark.parametrize("widths", [(5, 5), (4, 7)], ids=str)
    @pytest.mark.parametrize("metric", METRICS)
    def test_with_a_strict_map_scores_are_the_authors(self, widths: tuple[int, int], metric: Metric) -> None:
        rows = pairs(widths)
        old, new = vectors(rows)
        method = fitted(rows, metric, strict=True)
        if metric == "cosine":
            old, new = (torch.nn.functional.normalize(each, dim=1) for each in (old, new))
        stored, one = maps(method)[1](old), method.old_frame.scale
        assert not method.old_frame.mean.any()
        assert not method.new_frame.mean.any()
        towards, back = one * method.towards(old / one), one * method.to_old(new / one)
        if metric == "cosine":
            towards = torch.nn.functional.normalize(towards, dim=1)
        if metric == "euclidean":
            torch.testing.assert_close(torch.cdist(new, stored), torch.cdist(back, towards), atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(new @ stored.T, back @ towards.T, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "relaxed"])
    @pytest.mark.parametrize("widths", [(5, 5), (4, 7)], ids=str)
    def test_what_is_stored_is_taken_back_to_what_the_authors_store(
        self, widths: tuple[int, int], strict: bool
    ) -> None:
        rows = pairs(widths)
        old, _ = vectors(rows)
        method = fitted(rows, strict=strict)
        stored = maps(method)[1](old)
        back, towards = method.to_old(method.new_frame(stored)), method.towards(method.old_frame(old))
        torch.testing.assert_close(back, towards, atol=1e-3, rtol=1e-3)

    def test_into_a_narrower_space_it_is_the_nearest_point_that_a_query_can_reach(self) -> None:
        rows = pairs((7, 4))
        old, _ = vectors(rows)
        method = fitted(rows, strict=True)
        backward, forward = maps(method)
        towards, reached = method.old_frame.back(method.towards(method.old_frame(old))), backward(forward(old))
        weight = method.to_old.weight
        torch.testing.assert_close((towards - reached) @ weight, torch.zeros(len(old), 4), atol=1e-3, rtol=0)

    def test_under_cosine_the_length_of_a_row_does_not_matter(self) -> None:
        rows = pairs()
        old, new = vectors(rows)
        backward, forward = maps(fitted(rows, "cosine"))
        torch.testing.assert_close(backward(3 * new), backward(new), atol=1e-5, rtol=0)
        torch.testing.assert_close(forward(3 * old), forward(old), atol=1e-5, rtol=0)
        torch.testing.assert_close(forward(old).norm(dim=1), torch.ones(len(old)))


def test_labels_pull_the_classes_together_in_what_is_stored() -> None:
    rows = pairs(rows=80)
    assert rows.labels is not None
    same = rows.labels[:, None] == rows.labels[None]
    nearness = []
    for labels in (rows.labels, None):
        method = fitted(replace(rows, labels=labels), "cosine")
        stored = maps(method)[1](vectors(rows)[0])
        cosines = stored @ stored.T
        nearness.append(cosines[same].mean() - cosines[~same].mean())
    assert nearness[0] > nearness[1] + 0.03


def test_pairs_of_another_width_are_refused_by_name() -> None:
    method = LambdaOrthogonality(Setting(old_dimension=5, new_dimension=6))
    with pytest.raises(ValueError, match=r"`new` has shape \(40, 5\), the setting says \(n, 6\)"):
        method.prepare(pairs((5, 5)))


@WIDTHS
def test_a_strict_training_that_was_killed_ends_as_if_it_had_not_been(widths: tuple[int, int], tmp_path: Path) -> None:
    """Its orthogonal weight lies column by column, and Adam's moments must lie beside it alike."""

    class Killed(BaseException):
        pass

    def kill(step: Step) -> None:
        if step.done == 14:
            raise Killed

    def made() -> LambdaOrthogonality:
        torch.manual_seed(0)
        return LambdaOrthogonality(Setting(old_dimension=widths[0], new_dimension=widths[1]), strict=True, hidden=16)

    whole, killed, again = made(), made(), made()
    plan = Plan(epochs=12, batch=16, learning_rate=1e-2, optimizer="adam")
    train(whole, pairs(widths), plan)
    with pytest.raises(Killed):
        train(killed, pairs(widths), plan, checkpoint=tmp_path / "state", on_step=kill)
    train(again, pairs(widths), plan, checkpoint=tmp_path / "state")
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
