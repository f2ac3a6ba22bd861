import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import evaluation
from models.backfilling import (
    BackfillingCurve,
    backfilling_curve,
    class_mean_order,
    distance_order,
    random_order,
    uncertainty_order,
)
from models.evaluation import METRICS, Metric, Retrieval, cross_test, judge_queries, mean_retrieval

N = 50


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Derived and native vectors of the same items, and labels."""
    rng = np.random.default_rng(seed)
    native = rng.normal(size=(N, 5)).astype(np.float32)
    return native + 0.7 * rng.normal(size=(N, 5)).astype(np.float32), native, rng.integers(0, 6, N)


def figures(retrieval: Retrieval) -> tuple[float, float, float, int]:
    return retrieval.cmc1, retrieval.cmc5, retrieval.map, retrieval.queries


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sample", [None, 13])
def test_each_point_is_the_evaluation_of_a_mixed_gallery(metric: Metric, sample: int | None) -> None:
    derived, native, labels = data()
    order = random_order(N, seed=4)
    curve = backfilling_curve(native, derived, native, labels, order, metric=metric, sample=sample)
    asked = slice(None) if sample is None else [i * N // sample for i in range(sample)]
    assert len(curve.retrievals) == 22
    for i, (fraction, got) in enumerate(zip(curve.fractions, curve.retrievals, strict=True)):
        mixed = derived.copy()
        mixed[order[: i * N // 21]] = native[order[: i * N // 21]]
        judged = judge_queries(native, mixed, labels, labels, metric=metric, leave_one_out=True)
        assert fraction == (i * N // 21) / N
        assert figures(got) == pytest.approx(figures(mean_retrieval(judged[asked])), abs=1e-12)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    derived, native, labels = data()
    whole = backfilling_curve(native, derived, native, labels, random_order(N))
    monkeypatch.setattr(evaluation, "BLOCK_SCORES", 7 * N)
    assert backfilling_curve(native, derived, native, labels, random_order(N)).retrievals == whole.retrievals


@given(order=st.permutations(range(N)), points=st.integers(2, 30))
@settings(max_examples=20, deadline=None)
def test_every_order_starts_at_the_derived_gallery_and_ends_at_the_native_one(order: list[int], points: int) -> None:
    derived, native, labels = data()
    curve = backfilling_curve(native, derived, native, labels, np.array(order), points=points)
    assert curve.retrievals[0] == cross_test(native, derived, labels)
    assert curve.retrievals[-1] == cross_test(native, native, labels)
    assert (curve.fractions[0], curve.fractions[-1], len(curve.fractions)) == (0, 1, points)
    assert (np.diff(curve.fractions) >= 0).all()


def test_the_area_of_a_constant_curve_is_that_constant() -> None:
    _, native, labels = data()
    curve = backfilling_curve(native, native, native, labels, random_order(N))
    assert figures(curve.area) == pytest.approx(figures(cross_test(native, native, labels)))


def test_the_area_is_the_plain_mean_of_the_points() -> None:
    points = (Retrieval(0.0, 0.3, 0.1, 7), Retrieval(0.0, 0.3, 0.1, 7), Retrieval(0.9, 0.6, 0.4, 7))
    assert figures(BackfillingCurve(np.array([0, 0.5, 1]), points).area) == pytest.approx((0.3, 0.4, 0.2, 7))


def test_queries_need_not_be_what_is_stored() -> None:
    derived, native, labels = data()
    curve = backfilling_curve(2 * native + 1, derived, native, labels, random_order(N))
    assert curve.retrievals[-1] == cross_test(2 * native + 1, native, labels)


def test_with_few_wrong_items_the_oracle_repairs_the_gallery_at_once() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(N) % 5
    native = 10 * np.eye(5)[labels] + 0.1 * rng.normal(size=(N, 5))
    derived = native + 0.01 * rng.normal(size=(N, 5))
    wrong = rng.choice(N, 6, replace=False)
    derived[wrong] = 10 * np.eye(5)[(labels[wrong] + 1) % 5]
    oracle = backfilling_curve(native, derived, native, labels, distance_order(derived, native))
    others = [backfilling_curve(native, derived, native, labels, random_order(N, seed=seed)) for seed in range(5)]
    assert set(distance_order(derived, native)[:6]) == set(wrong)
    assert oracle.retrievals[3].map == 1  # 7 of the 50 items are native
    assert all(oracle.area.map > other.area.map for other in others)


def test_the_most_uncertain_come_first_and_equal_ones_in_the_gallerys_order() -> None:
    assert uncertainty_order(np.array([0.5, 2.0, 0.5, -1.0, 2.0], np.float32)).tolist() == [1, 4, 0, 2, 3]


@given(st.lists(st.floats(-20, 20, width=16), min_size=1, max_size=30))
def test_any_rising_function_of_the_uncertainty_gives_the_same_order(values: list[float]) -> None:
    log_variance = np.array(values)
    np.testing.assert_array_equal(uncertainty_order(log_variance), uncertainty_order(3 * log_variance + 5))


def test_the_furthest_from_their_native_vectors_come_first() -> None:
    native = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    derived = np.array([[0.9, 0.1], [5.0, 0.0], [0.0, 1.0]])
    assert distance_order(derived, native).tolist() == [1, 2, 0]
    assert distance_order(derived, native, metric="cosine").tolist() == [2, 0, 1]  # length does not count


def test_the_furthest_from_their_class_mean_come_first() -> None:
    derived = np.array([[0.0, 1.0], [10.0, 0.0], [4.0, 1.0], [11.0, 0.0], [0.0, 1.0]])
    labels = np.array([7, 3, 7, 3, 7])
    assert class_mean_order(derived, labels).tolist() == [2, 0, 4, 1, 3]  # means (4/3, 1) and (10.5, 0)


def test_a_random_order_is_a_permutation_that_its_seed_decides() -> None:
    assert sorted(random_order(N, seed=1)) == list(range(N))
    np.testing.assert_array_equal(random_order(N, seed=1), random_order(N, seed=1))
    assert (random_order(N, seed=1) != random_order(N, seed=2)).any()


def test_what_does_not_fit_is_refused() -> None:
    derived, native, labels = data()
    order = random_order(N)
    with pytest.raises(ValueError, match="row i must be the same item"):
        backfilling_curve(native, derived[1:], native, labels, order)
    with pytest.raises(ValueError, match="each of the 50 items once"):
        backfilling_curve(native, derived, native, labels, np.zeros(N, np.int64))
    with pytest.raises(ValueError, match="each of the 50 items once"):
        backfilling_curve(native, derived, native, labels, order[1:])
    with pytest.raises(ValueError, match="a curve needs 2 points"):
        backfilling_curve(native, derived, native, labels, order, points=1)
    with pytest.raises(ValueError, match="1 to 50 queries, not 22 and 51"):
        backfilling_curve(native, derived, native, labels, order, sample=51)
    with pytest.raises(ValueError, match="no NaN"):
        uncertainty_order(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="one number per item"):
        uncertainty_order(np.ones((3, 1)))
    with pytest.raises(ValueError, match="the same space"):
        distance_order(derived, native[:, :3])
