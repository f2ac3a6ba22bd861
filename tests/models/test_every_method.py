"""What is registered is checked: a new line in METHODS is tested here without another line."""

from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from models.artifacts import save
from models.evaluation import METRICS, Metric
from models.method import Batch, Method, Setting, needed
from models.methods import METHODS
from models.methods.procrustes import Procrustes
from models.plan import Plan
from models.runtime import load_transform
from models.training import CompatibleTraining, History, train

ROWS, OLD, NEW, SIDE, CLASSES = 160, 8, 12, 5, 4
PLAN = Plan(epochs=30, batch=32, learning_rate=5e-3, optimizer="adam", schedule="epoch")
Array = npt.NDArray[np.float32]


def world() -> Batch:
    """Classes in a hidden space, and three models that see it: the old one less of it, the new one more."""
    rng = np.random.default_rng(0)
    labels = np.arange(ROWS) % CLASSES
    hidden = 2 * rng.normal(size=(CLASSES, 16))[labels] + 0.7 * rng.normal(size=(ROWS, 16))
    seen = {
        "old": np.tanh(hidden[:, :6] @ rng.normal(size=(6, OLD)) / 3),
        "new": np.tanh(hidden @ rng.normal(size=(16, NEW)) / 3),
        "side": np.tanh(hidden[:, 6:12] @ rng.normal(size=(6, SIDE)) / 3),
        "images": hidden,
    }
    tensors = {name: torch.from_numpy(values.astype(np.float32)) for name, values in seen.items()}
    return Batch(**tensors, labels=torch.from_numpy(labels))


def setting(metric: Metric = "cosine") -> Setting:
    rows, generator = world(), torch.Generator().manual_seed(1)
    assert rows.labels is not None
    return Setting(
        old_dimension=OLD,
        new_dimension=NEW,
        side_dimension=SIDE,
        classes=CLASSES,
        metric=metric,
        old_head=torch.randn(CLASSES // 2, OLD, generator=generator),  # the old model knows half of the classes
        new_head=torch.randn(CLASSES, NEW, generator=generator),
    )


def made(method: type[Method], given: Setting | None = None) -> CompatibleTraining | Method:
    """A method ready to train: with a small backbone where it trains one."""
    torch.manual_seed(0)
    # the paper's width is for tens of thousands of rows
    narrow: dict[str, int] = {"hidden": 64} if "hidden" in signature(method).parameters else {}
    fresh = method(given or setting(), **narrow)
    if not method.trains_backbone:
        return fresh
    last = [nn.ReLU()] if method.ends_in_relu else []
    return CompatibleTraining(
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, fresh.feature_dimension), *last), fresh
    )


def the_method(task: CompatibleTraining | Method) -> Method:
    return task.method if isinstance(task, CompatibleTraining) else task


def trained(method: type[Method], plan: Plan = PLAN) -> tuple[CompatibleTraining | Method, History]:
    task = made(method)
    return task, train(task, world(), plan, seed=3)


@cache
def once_trained(method: type[Method]) -> tuple[CompatibleTraining | Method, History]:
    """For tests that only look."""
    return trained(method)


def total(task: CompatibleTraining | Method) -> float:
    """The sum of the losses over all rows, with whatever the task draws drawn alike."""
    task.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return sum(value.item() for value in task.losses(replace(world(), index=torch.arange(ROWS))).values())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
class TestEveryMethod:
    def test_its_name_is_its_key(self, method: type[Method]) -> None:
        assert METHODS[method.name] is method

    def test_training_lowers_its_finite_losses(self, method: type[Method]) -> None:
        fresh = made(method)
        fresh.prepare(replace(world(), index=torch.arange(ROWS)))
        closed_form = not any(parameter.requires_grad for parameter in fresh.parameters())
        before = total(made(method) if closed_form else fresh)
        task, history = once_trained(method)
        assert all(np.isfinite(value) for epoch in history.epochs for value in epoch.values())
        assert total(task) < before

    def test_the_same_seed_gives_the_same_weights(self, method: type[Method]) -> None:
        (first, _), (second, _) = once_trained(method), trained(method)
        for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_a_training_that_was_killed_ends_as_if_it_had_not_been(self, method: type[Method], tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        def kill(step: object) -> None:
            nonlocal steps
            steps += 1
            if steps == 12:  # in the middle of the third epoch
                raise Killed

        steps, place, plan = 0, tmp_path / "state", replace(PLAN, epochs=6)
        whole, _ = trained(method, plan=plan)
        task = made(method)
        if any(parameter.requires_grad for parameter in task.parameters()):
            with pytest.raises(Killed):
                train(task, world(), plan, seed=3, checkpoint=place, on_step=kill)
        again = made(method)
        train(again, world(), plan, seed=3, checkpoint=place)
        for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_what_it_stores_has_the_width_it_says(self, method: type[Method]) -> None:
        fresh = the_method(made(method)).eval()
        assert fresh.embed(torch.rand(7, fresh.feature_dimension)).shape == (7, fresh.dimension)

    def test_its_transformations_have_the_right_widths_and_survive_a_round_trip(
        self, method: type[Method], tmp_path: Path
    ) -> None:
        task, _ = once_trained(method)
        rows, fresh = world(), the_method(task)
        assert rows.old is not None
        assert rows.new is not None
        assert rows.side is not None
        new: Array = rows.new.numpy()
        if isinstance(task, CompatibleTraining):
            assert rows.images is not None
            with torch.no_grad():
                new = task(rows.images).numpy()
        offered, side = fresh.transformations(), rows.side.numpy()
        directions = [(offered.forward, rows.old.numpy(), fresh.dimension), (offered.backward, new, OLD)]
        assert any(module is not None for module, _, _ in directions)
        for module, vectors, width in directions:
            if module is not None:
                save(tmp_path / "artifact", module)
                output = load_transform(tmp_path / "artifact")(vectors, side)
                assert output.shape == (ROWS, width)
                with torch.no_grad():
                    expected = module.eval()(torch.from_numpy(vectors), torch.from_numpy(side))
                np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-5)

    def test_its_transformation_brings_the_spaces_together(self, method: type[Method]) -> None:
        """New-model queries find their own class among old vectors, through the route that the method offers."""
        task, _ = trained(method, plan=replace(PLAN, epochs=120))
        rows, offered = world(), the_method(task).transformations()
        assert rows.old is not None
        assert rows.new is not None
        assert rows.images is not None
        assert rows.labels is not None
        with torch.no_grad():
            new = task(rows.images) if isinstance(task, CompatibleTraining) else rows.new
            if offered.backward is not None:
                queries, gallery = offered.backward.eval()(new), rows.old
            else:
                assert offered.forward is not None
                queries, gallery = new, offered.forward.eval()(rows.old, rows.side)
        scores = nn.functional.normalize(queries, dim=1) @ nn.functional.normalize(gallery, dim=1).T
        found = scores.fill_diagonal_(-torch.inf).argmax(dim=1)
        assert (rows.labels[found] == rows.labels).double().mean() > 0.6  # by chance: 0.25

    def test_orthogonal_weights_are_orthogonal_after_training(self, method: type[Method]) -> None:
        task, _ = once_trained(method)
        for module in task.modules():
            if parametrize.is_parametrized(module, "weight"):
                weight = module.weight.detach().double()
                gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
                torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)

    def test_nan_rows_are_refused_by_name(self, method: type[Method]) -> None:
        rows = world()
        assert rows.old is not None
        rows.old[3, 1] = torch.nan
        with pytest.raises(ValueError, match=r"`old` holds a NaN or an infinity, first in row 3"):
            train(made(method), rows, PLAN)

    def test_columns_of_other_lengths_are_refused_by_name(self, method: type[Method]) -> None:
        rows = world()
        assert rows.old is not None
        with pytest.raises(ValueError, match="`old` has 159 rows"):
            train(made(method), replace(rows, old=rows.old[1:]), PLAN)

    def test_labels_it_needs_and_does_not_get_are_asked_for(self, method: type[Method]) -> None:
        if method.needs_labels:
            with pytest.raises(ValueError, match="label"):
                train(made(method), replace(world(), labels=None), PLAN)
        else:
            task = made(method, replace(setting(), classes=None))
            train(task, replace(world(), labels=None), replace(PLAN, epochs=1))

    def test_a_batch_of_one_is_computed(self, method: type[Method]) -> None:
        offered = the_method(trained(method, plan=replace(PLAN, epochs=2))[0]).transformations()
        for module, width in ((offered.forward, OLD), (offered.backward, the_method(made(method)).dimension)):
            if module is not None:
                with torch.no_grad():
                    assert module.eval()(torch.rand(1, width), torch.rand(1, SIDE)).shape[0] == 1


ON_PAIRS = [
    pytest.param(method, metric, id=f"{name}-{metric}")
    for name, method in METHODS.items()
    for metric in METRICS
    if not method.trains_backbone and method.metric in (None, metric)
]


def on_pairs(method: type[Method], rows: Batch, metric: Metric, plan: Plan) -> list[tuple[Tensor, Tensor]]:
    """What a method's maps make of the rows that it is trained on, and what they should be."""
    given = replace(setting(metric), new_head=None)  # which reads vectors as they were
    task = made(method, given)
    train(task, rows, plan, seed=3)
    offered, old, new = the_method(task).transformations(), needed(rows.old, "old"), needed(rows.new, "new")
    with torch.no_grad():
        forward = None if offered.forward is None else offered.forward.eval()(old, rows.side)
        backward = None if offered.backward is None else offered.backward.eval()(new)
    return [(mapped, target) for mapped, target in ((forward, new), (backward, old)) if mapped is not None]


@pytest.mark.parametrize(("method", "metric"), ON_PAIRS)
def test_what_it_reaches_does_not_depend_on_the_unit_of_a_model(method: type[Method], metric: Metric) -> None:
    """Powers of two change no digit, so that what frames let through shows."""
    units = {"old": 2.0**-8, "new": 2.0**5, "side": 2.0**-4}
    rows, plan = world(), replace(PLAN, epochs=5)
    scaled = replace(rows, **{name: getattr(rows, name) * unit for name, unit in units.items()})
    once, again = (on_pairs(method, each, metric, plan) for each in (rows, scaled))
    for (mapped, target), (mapped_again, target_again) in zip(once, again, strict=True):
        unit = 1.0 if metric == "cosine" else target_again.norm() / target.norm()
        torch.testing.assert_close(mapped_again / unit, mapped, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "metric"), ON_PAIRS)
def test_what_it_reaches_does_not_depend_on_what_all_vectors_have_in_common(
    method: type[Method], metric: Metric
) -> None:
    """Text models give any two texts a cosine of 0.9 and more; here it is 0.98."""
    if method is Procrustes and metric == "cosine":
        pytest.skip("it has one scale for all directions, and what is moved has other variances in each")
    rows, generator = world(), torch.Generator().manual_seed(0)
    moved = {
        name: getattr(rows, name) + 15 * F.normalize(torch.randn(width, generator=generator), dim=0)
        for name, width in (("old", OLD), ("new", NEW))
    }
    once, again = (on_pairs(method, each, metric, PLAN) for each in (rows, replace(rows, **moved)))
    for (mapped, target), (mapped_again, target_again) in zip(once, again, strict=True):
        assert missed(mapped_again, target_again, metric) < missed(mapped, target, metric) + 0.1


def missed(mapped: Tensor, target: Tensor, metric: Metric) -> float:
    """The share of the targets' variance that a map does not explain."""
    if metric == "cosine":
        mapped, target = F.normalize(mapped, dim=1), F.normalize(target, dim=1)
    return ((mapped - target).square().sum() / (target - target.mean(dim=0)).square().sum()).item()
