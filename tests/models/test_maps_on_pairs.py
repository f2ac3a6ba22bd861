"""Procrustes, affine, low rank, residual MLP and L2: each against its formula in NumPy, then against what it must obey."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.evaluation import METRICS, Metric, cross_test
from models.method import Batch, Setting
from models.methods.affine import RIDGES, Affine
from models.methods.l2 import L2
from models.methods.low_rank import LowRank
from models.methods.procrustes import Procrustes
from models.methods.residual_mlp import ResidualMlp
from models.moments import CHUNK, cross_moment, mean_row, unit
from models.pairs import PairMaps
from models.plan import Plan
from models.runtime import Transform
from models.training import train, train_transformation
from models.transformations import Transformation
from tests.real_data import EMBEDDINGS, needs

METHODS: list[type[PairMaps]] = [Procrustes, Affine, LowRank, ResidualMlp, L2]
Array = npt.NDArray[np.float64]


def pairs(old: int = 6, new: int = 4, rows: int = 40, seed: int = 0) -> Batch:
    """Two views of one hidden space, each with a noise and a mean of its own."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, 5))
    views = (
        hidden @ rng.normal(size=(5, d)) + 0.3 * rng.normal(size=(rows, d)) + rng.normal(size=d) for d in (old, new)
    )
    o, n = (torch.from_numpy(view.astype(np.float32)) for view in views)
    return Batch(old=o, new=n)


def both(rows: Batch) -> tuple[Tensor, Tensor]:
    assert rows.old is not None
    assert rows.new is not None
    return rows.old, rows.new


def fitted(method: PairMaps, rows: Batch) -> PairMaps:
    train(method, rows, Plan(epochs=3, batch=16, learning_rate=1e-2, optimizer="adam"))
    return method


def maps(method: PairMaps) -> tuple[Transformation, Transformation]:
    """(backward, forward), as they are exported."""
    offered = method.eval().transformations()
    assert offered.backward is not None
    assert offered.forward is not None
    return offered.backward, offered.forward


def setting(rows: Batch, metric: Metric = "euclidean") -> Setting:
    old, new = both(rows)
    return Setting(old_dimension=old.shape[1], new_dimension=new.shape[1], metric=metric)


def units(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def of(vectors: Tensor) -> Array:
    return vectors.detach().double().numpy()


class TestProcrustes:
    @pytest.mark.parametrize("widths", [(6, 4), (4, 6), (5, 5)], ids=str)
    @pytest.mark.parametrize("centred", [True, False])
    def test_it_is_the_authors_closed_form_and_a_scale_on_unit_rows(
        self, widths: tuple[int, int], centred: bool
    ) -> None:
        rows = pairs(*widths)
        backward, forward = maps(fitted(Procrustes(setting(rows, "cosine"), centred=centred), rows))
        old, new = (units(of(each)) for each in both(rows))
        o, n = (each.mean(axis=0) * centred for each in (old, new))
        p, _, qt = np.linalg.svd((new - n).T @ (old - o), full_matrices=False)
        there = (old - o) @ (p @ qt).T
        scale = np.square(there).sum() / (there * (new - n)).sum()  # new is there / scale by least squares
        expected = units((new - n) @ (p @ qt) * scale + o), units(there / scale + n)
        np.testing.assert_allclose(of(backward(both(rows)[1])), expected[0], atol=1e-5)
        np.testing.assert_allclose(of(forward(both(rows)[0])), expected[1], atol=1e-5)

    @given(
        seed=st.integers(0, 10_000), width=st.integers(1, 12), metric=st.sampled_from(METRICS), centred=st.booleans()
    )
    def test_it_recovers_a_planted_rotation_exactly(self, seed: int, width: int, metric: Metric, centred: bool) -> None:
        rng = np.random.default_rng(seed)
        new = rng.normal(size=(width + 20, width))
        rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
        rows = Batch(old=torch.from_numpy(new @ rotation).float(), new=torch.from_numpy(new).float())
        backward, forward = maps(fitted(Procrustes(setting(rows, metric), centred=centred), rows))
        unseen = rng.normal(size=(7, width))
        there = torch.from_numpy(unseen @ rotation).float()
        here = torch.from_numpy(unseen).float()
        wanted = (unit(there), unit(here)) if metric == "cosine" else (there, here)
        torch.testing.assert_close(backward(here), wanted[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(forward(there), wanted[1], atol=1e-5, rtol=0)

    def test_a_planted_rigid_motion_is_recovered_with_its_shift(self) -> None:
        rng = np.random.default_rng(2)
        new = rng.normal(size=(30, 5)) + 50
        rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
        rows = Batch(old=torch.from_numpy(new @ rotation - 20).float(), new=torch.from_numpy(new).float())
        backward, forward = maps(fitted(Procrustes(setting(rows)), rows))
        torch.testing.assert_close(backward(both(rows)[1]), both(rows)[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(forward(both(rows)[0]), both(rows)[1], atol=1e-4, rtol=0)

    @given(
        seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 3.0]), widths=st.sampled_from([(5, 5), (4, 7), (7, 4)])
    )
    def test_under_the_euclidean_distance_it_recovers_a_planted_similarity(
        self, seed: int, scale: float, widths: tuple[int, int]
    ) -> None:
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=(30, min(widths)))
        turned = (np.linalg.qr(rng.normal(size=(width, min(widths))))[0].T for width in widths)
        old, new = (torch.from_numpy(shared @ turn + rng.normal(size=turn.shape[1])).float() for turn in turned)
        rows = Batch(old=old, new=scale * new)
        backward, forward = maps(fitted(Procrustes(setting(rows)), rows))
        torch.testing.assert_close(backward(scale * new), old, atol=1e-4, rtol=0)
        torch.testing.assert_close(forward(old), scale * new, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("widths", [(5, 5), (6, 4), (4, 7)], ids=str)
    def test_a_poor_fit_shrinks_what_is_stored_and_no_query(self, widths: tuple[int, int]) -> None:
        rng = np.random.default_rng(0)
        old, new = (torch.from_numpy(rng.normal(size=(4000, width))).float() for width in widths)  # nothing in common
        lengths = []
        for fit in (0.0, 1.0):
            new[:, :4] = fit * old[:, :4] + (1 - fit) * new[:, :4]
            maps_of = maps(fitted(Procrustes(setting(Batch(old=old, new=new))), Batch(old=old, new=5 * new)))
            lengths.append([torch.linalg.matrix_norm(each.state_dict()["weight"], ord=2).item() for each in maps_of])
        (poor_query, poor_stored), (query, stored) = lengths
        assert poor_query > query
        assert poor_stored < stored
        assert poor_query * poor_stored == pytest.approx(1)

    @pytest.mark.parametrize("centred", [True, False])
    def test_from_more_dimensions_scores_are_those_of_the_padded_square_solution(self, centred: bool) -> None:
        rows = pairs(old=4, new=7)
        old, new = both(rows)
        padded = replace(rows, old=torch.nn.functional.pad(old, (0, 3)))
        narrow, _ = maps(fitted(Procrustes(setting(rows, "inner_product"), centred=centred), rows))
        square, _ = maps(fitted(Procrustes(setting(padded, "inner_product"), centred=centred), padded))
        assert padded.old is not None
        torch.testing.assert_close(narrow(new) @ old.T, square(new) @ padded.old.T, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("widths", [(6, 4), (4, 6), (5, 5), (30, 50)], ids=str)
    def test_it_is_an_isometry_with_one_scale_as_far_as_the_widths_allow(self, widths: tuple[int, int]) -> None:
        rows = pairs(*widths, rows=20)  # fewer than dimensions, in the last
        for each in maps(fitted(Procrustes(setting(rows, "inner_product")), rows)):
            weight = each.state_dict()["weight"].double()
            gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram / gram[0, 0], torch.eye(min(widths)).double(), atol=1e-6, rtol=0)

    def test_into_more_dimensions_distances_are_kept_but_for_the_scale(self) -> None:
        rows = pairs(old=6, new=4)
        backward, _ = maps(fitted(Procrustes(setting(rows, "inner_product")), rows))
        new = both(rows)[1]
        longer = torch.pdist(backward(new)) / torch.pdist(new)
        torch.testing.assert_close(longer, torch.full_like(longer, longer[0].item()), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("away", [(2.0, 40.0), (40.0, 2.0), (10.0, 40.0)], ids=str)
    def test_by_cosine_each_vector_is_found_across_cones_of_other_widths(self, away: tuple[float, float]) -> None:
        """A text model's vectors may all lie near one direction, and the other model's not so near."""
        rng = np.random.default_rng(3)
        hidden = rng.normal(size=(300, 6))
        old, new = (
            hidden @ np.linalg.qr(rng.normal(size=(8, 6)))[0].T + far * units(rng.normal(size=(1, 8))) for far in away
        )
        rows = Batch(old=torch.from_numpy(old).float(), new=torch.from_numpy(new).float())
        backward, forward = maps(fitted(Procrustes(setting(rows, "cosine")), rows))
        for queries, stored in ((new, forward(both(rows)[0])), (of(backward(both(rows)[1])), both(rows)[0])):
            nearest = (units(queries) @ units(of(stored)).T).argmax(axis=1)
            assert (nearest == np.arange(300)).mean() > 0.9

    @pytest.mark.parametrize("unit_of_new", [0.01, 100.0])
    def test_by_inner_product_what_is_mapped_is_as_long_as_what_is_native(self, unit_of_new: float) -> None:
        """Beside items that the new model embedded itself, or an old mean, a vector in another unit is always or never found."""
        rows = pairs(5, 5, rows=400)
        rows = replace(rows, new=unit_of_new * both(rows)[1])
        backward, forward = maps(fitted(Procrustes(setting(rows, "inner_product")), rows))
        old, new = both(rows)
        for mapped, native in ((backward(new), old), (forward(old), new)):
            lengths = [each.detach().norm(dim=1).mean().item() for each in (mapped, native)]
            assert lengths[0] == pytest.approx(lengths[1], rel=0.3)

    def test_no_isometry_nearby_is_closer(self) -> None:
        rows, generator = pairs(old=5, new=5), torch.Generator().manual_seed(0)
        old, new = (each - each.mean(dim=0) for each in both(rows))
        weight = maps(fitted(Procrustes(setting(rows)), rows))[0].state_dict()["weight"]
        best = (new @ weight.T - old).square().sum()
        for _ in range(20):
            skew = 0.1 * torch.randn(5, 5, generator=generator)
            turned = weight @ torch.matrix_exp(skew - skew.T)
            assert (new @ turned.T - old).square().sum() > best


class TestAffine:
    def test_with_a_ridge_it_is_the_normal_equations_with_a_bias(self) -> None:
        rows = pairs()
        backward, forward = maps(fitted(Affine(setting(rows), ridge=0.1), rows))
        for module, source, target in ((backward, *both(rows)[::-1]), (forward, *both(rows))):
            x, y = of(source), of(target)
            centred = x - x.mean(axis=0)
            ridge = 0.1 * np.trace(centred.T @ centred) / x.shape[1]
            weight = np.linalg.solve(centred.T @ centred + ridge * np.eye(x.shape[1]), centred.T @ (y - y.mean(axis=0)))
            np.testing.assert_allclose(of(module(source)), centred @ weight + y.mean(axis=0), atol=1e-4)

    def test_the_ridge_is_the_one_that_cross_validates_best(self) -> None:
        rows = pairs(rows=14)
        backward, _ = maps(fitted(Affine(setting(rows)), rows))
        x, y = (of(each) - of(each).mean(axis=0) for each in both(rows)[::-1])
        scores, weights = [], []
        for ridge in (of(RIDGES) * np.trace(x.T @ x) / x.shape[1]).tolist():
            weight = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
            hat = x @ np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T)
            scores.append(np.square(y - x @ weight).sum() / (len(x) - 1 - np.trace(hat)) ** 2)
            weights.append(weight)
        best = int(np.argmin(scores))
        assert 0 < best < len(RIDGES) - 1  # there is something to choose
        np.testing.assert_allclose(of(backward.state_dict()["weight"]), weights[best].T, atol=1e-5)

    @given(seed=st.integers(0, 10_000), old=st.integers(1, 9), new=st.integers(1, 9))
    def test_it_recovers_a_planted_affine_map(self, seed: int, old: int, new: int) -> None:
        rng = np.random.default_rng(seed)
        source = rng.normal(size=(200, new)) + 3
        weight, bias = rng.normal(size=(new, old)), rng.normal(size=old)
        rows = Batch(old=torch.from_numpy(source @ weight + bias).float(), new=torch.from_numpy(source).float())
        backward, _ = maps(fitted(Affine(setting(rows)), rows))
        torch.testing.assert_close(backward(both(rows)[1]), both(rows)[0], atol=1e-3, rtol=1e-3)

    def test_fewer_pairs_than_dimensions_do_not_magnify_noise(self) -> None:
        rows = pairs(old=60, new=80, rows=430)
        few, unseen = rows.take(torch.arange(30)), rows.take(torch.arange(30, 430))
        chosen, bare = (maps(fitted(Affine(setting(rows), ridge=ridge), few))[0] for ridge in (None, 1e-9))
        old, new = both(unseen)
        errors = [(module(new) - old).square().mean() for module in (chosen, bare)]
        mean = (both(few)[0].mean(dim=0) - old).square().mean()
        assert errors[0] < 0.9 * errors[1]
        assert errors[0] < 0.5 * mean

    def test_a_ridge_of_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="ridge must be positive, not 0"):
            Affine(setting(pairs()), ridge=0)


class TestMoments:
    def test_they_do_not_depend_on_where_the_rows_are_cut(self) -> None:
        rng = np.random.default_rng(0)
        first, second = rng.normal(size=(2 * CHUNK + 5, 3)) + 100, rng.normal(size=(2 * CHUNK + 5, 2))
        tensors = torch.from_numpy(first), torch.from_numpy(second)
        means = tuple(mean_row(each, normalize=False) for each in tensors)
        np.testing.assert_allclose(of(means[0]), first.mean(axis=0), rtol=1e-12)
        expected = (first - first.mean(axis=0)).T @ (second - second.mean(axis=0))
        found = cross_moment(*tensors, (means[0], means[1]), normalize=False)
        np.testing.assert_allclose(of(found), expected, rtol=1e-9, atol=1e-9)


def network(x: Array, state: dict[str, Array], prefix: str) -> Array:
    """s * (skip(q) + W2 act(W1 q + b1) + b2), with what of it there is: both of Drift-Adapter's trained maps."""
    inner = f"{prefix}.inner."
    hidden = x @ state[f"{inner}layers.0.weight"].T + state.get(f"{inner}layers.0.bias", 0)
    skip: Array | float = 0.0
    if f"{inner}layers.0.bias" in state:  # the MLP: GELU by the error function, and a skip
        hidden = hidden * (1 + torch.erf(torch.from_numpy(hidden / np.sqrt(2))).numpy()) / 2
        skip = x @ state[f"{inner}skip.weight"].T + state[f"{inner}skip.bias"] if f"{inner}skip.bias" in state else x
    output = hidden @ state[f"{inner}layers.1.weight"].T + state[f"{inner}layers.1.bias"] + skip
    scaled: Array = output * state[f"{prefix}.scale"]
    return scaled


@pytest.mark.parametrize("method", [LowRank, ResidualMlp])
@pytest.mark.parametrize("widths", [(6, 4), (5, 5)], ids=str)
class TestDriftAdapter:
    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    def test_its_losses_are_the_distances_of_the_papers_maps(
        self, method: type[PairMaps], widths: tuple[int, int], metric: Metric
    ) -> None:
        torch.manual_seed(0)
        rows = pairs(*widths)
        made = fitted(method(setting(rows, metric)), rows)  # a scale that is no longer 1
        state = {name: of(tensor) for name, tensor in made.state_dict().items()}
        old, new = (units(of(each)) if metric == "cosine" else of(each) for each in both(rows))
        losses = made.losses(rows)
        for name, prefix, source, target in (("backward", "to_old", new, old), ("forward", "to_new", old, new)):
            inside = (source - source.mean(axis=0)) / (source - source.mean(axis=0)).std()  # in its model's frame
            unit_of_target = (target - target.mean(axis=0)).std()
            predicted = network(inside, state, prefix) * unit_of_target + target.mean(axis=0)
            if metric == "cosine":
                expected = 2 * (1 - (units(predicted) * target).sum(axis=1)) / target.shape[1]
            else:
                expected = np.square(predicted - target).mean(axis=1)
            assert losses[name].item() == pytest.approx(expected.mean() / unit_of_target**2, rel=1e-4)

    def test_the_scale_is_folded_into_what_is_exported(self, method: type[PairMaps], widths: tuple[int, int]) -> None:
        torch.manual_seed(0)
        rows = pairs(*widths)
        made = method(setting(rows))
        with torch.no_grad():
            for each in (made.to_old, made.to_new):
                each.scale.uniform_(-2, 2)
        backward, forward = maps(made)
        torch.testing.assert_close(backward(both(rows)[1]), made.to_old.raw(both(rows)[1]))
        torch.testing.assert_close(forward(both(rows)[0]), made.to_new.raw(both(rows)[0]))


class TestSizes:
    """Parameters from 768 to 384, counted by hand: weights and biases of each layer."""

    @pytest.mark.parametrize(
        ("made", "expected"),
        [
            (Affine, 295_296),
            (L2, 295_296),
            (LowRank, 74_112),
            (lambda wide: LowRank(wide, rank=192), 221_568),
            (ResidualMlp, 590_848),
        ],
        ids=["affine", "l2", "low rank 64", "low rank 192", "residual mlp"],
    )
    def test_an_exported_map_has_as_many_numbers_as_the_papers(self, made: object, expected: int) -> None:
        assert callable(made)
        backward, _ = maps(made(Setting(old_dimension=384, new_dimension=768)))
        assert sum(tensor.numel() for tensor in backward.state_dict().values()) == expected

    def test_a_rank_is_cut_to_the_smaller_width(self) -> None:
        backward, forward = maps(LowRank(setting(pairs(old=6, new=4)), rank=64))
        assert backward.state_dict()["layers.0.weight"].shape == (4, 4)
        assert forward.state_dict()["layers.0.weight"].shape == (4, 6)

    def test_a_map_of_low_rank_has_that_rank(self) -> None:
        rows = pairs(old=6, new=5)
        backward, _ = maps(fitted(LowRank(setting(rows), rank=2), rows))
        assert torch.linalg.matrix_rank(torch.cov(backward(both(rows)[1]).T), rtol=1e-4) == 2


class TestL2:
    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    def test_its_loss_is_ten_times_the_mean_distance_in_the_unit_of_the_old_model(self, metric: Metric) -> None:
        rows = pairs()
        made = fitted(L2(setting(rows, metric)), rows)
        old, new = both(rows)
        predicted, target = of(maps(made)[0](new)), units(of(old)) if metric == "cosine" else of(old)
        unit_of_old = np.sqrt(np.square(target - target.mean(axis=0)).mean())
        expected = 10 * np.linalg.norm(predicted - target, axis=1).mean() / unit_of_old
        assert made.losses(rows)["backward"].item() == pytest.approx(expected, rel=1e-4)

    def test_an_error_twice_as_large_costs_twice_as_much(self) -> None:
        made, (old, _) = L2(setting(pairs())), both(pairs())
        once, twice = made.distance(old + 0.5, old), made.distance(old + 1.0, old)
        torch.testing.assert_close(twice, 2 * once)

    @pytest.mark.parametrize("metric", METRICS)
    def test_gradients_are_finite_and_small_where_a_difference_or_a_vector_is_zero(self, metric: Metric) -> None:
        made, (target, _) = L2(setting(pairs(), metric)), both(pairs())
        predicted = target.clone()
        predicted[1] = 0
        target[2] = 0
        predicted.requires_grad_()
        frame = made.old_frame
        made.distance(frame.landed(predicted), frame(target)).sum().backward()
        assert predicted.grad is not None
        assert predicted.grad.isfinite().all()
        assert predicted.grad[0].abs().max() < 1e-3  # where nothing is wrong
        assert predicted.grad.norm(dim=1).max() <= 10.1  # the weight: a norm's gradient is a unit vector


@pytest.mark.parametrize("method", METHODS)
class TestEveryMap:
    def test_under_cosine_the_length_of_a_row_does_not_matter(self, method: type[PairMaps]) -> None:
        rows = pairs()
        old, new = both(rows)
        lengths = torch.rand(len(old), 1, generator=torch.Generator().manual_seed(3)) + 0.5
        outputs = []
        for shown in (rows, Batch(old=old * lengths, new=new / lengths)):
            torch.manual_seed(0)
            backward, forward = maps(fitted(method(setting(rows, "cosine")), shown))
            outputs.append((backward(new), forward(old)))
            torch.testing.assert_close(backward(new * lengths), backward(new), atol=1e-5, rtol=0)
            torch.testing.assert_close(backward(new).norm(dim=1), torch.ones(len(new)))
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=0)

    def test_it_learns_a_rigid_motion_from_a_few_noisy_pairs(self, method: type[PairMaps]) -> None:
        rng = np.random.default_rng(0)
        rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
        new = rng.normal(size=(60, 6))
        old = new @ rotation + 1 + 0.1 * rng.normal(size=(60, 6))
        torch.manual_seed(0)
        made = method(Setting(old_dimension=6, new_dimension=6))
        train_transformation(made, old=old[:40], new=new[:40])  # as its own plan says
        unseen = torch.from_numpy(new[40:]).float(), torch.from_numpy(old[40:]).float()
        for each, source, target in zip(maps(made), unseen, unseen[::-1], strict=True):
            assert (each(source) - target).square().mean() < 0.25 * target.var(dim=0).mean()

    def test_pairs_of_other_widths_are_refused_by_name(self, method: type[PairMaps]) -> None:
        rows = pairs(old=6, new=4)
        with pytest.raises(ValueError, match=r"`new` has shape \(40, 5\), the setting says \(n, 4\)"):
            method(setting(rows)).prepare(replace(rows, new=torch.rand(40, 5)))

    def test_a_model_that_always_says_the_same_is_refused(self, method: type[PairMaps]) -> None:
        rows = pairs()
        with pytest.raises(ValueError, match="all rows of `old` are the same"):
            method(setting(rows)).prepare(replace(rows, old=torch.ones(40, 6)))


@needs(EMBEDDINGS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_on_real_embeddings_new_queries_find_more_than_old_ones_through_a_rotation(metric: Metric) -> None:
    with np.load(EMBEDDINGS, allow_pickle=False) as files:
        shown = {role: files[f"{role}_train"][::8].astype(np.float32) for role in ("old", "new")}
        old, new = (files[f"{role}_test"][::8].astype(np.float32) for role in ("old", "new"))
        labels = files["labels_test"][::8]
    method = Procrustes(Setting(old_dimension=128, new_dimension=128, metric=metric))
    train_transformation(method, **shown)
    backward, forward = maps(method)
    before = cross_test(old, old, labels, metric=metric)
    through = cross_test(Transform(backward)(new), old, labels, metric=metric)
    upgraded = cross_test(new, Transform(forward)(old), labels, metric=metric)
    assert through.cmc1 > before.cmc1 + 0.05
    assert upgraded.cmc1 > before.cmc1 + 0.05
