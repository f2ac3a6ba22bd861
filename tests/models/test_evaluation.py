import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from models import evaluation
from models.evaluation import (
    METRICS,
    Metric,
    cmc_from_ranking,
    cross_test,
    evaluate_pairs,
    evaluate_retrieval,
    fraction_closed,
    map_from_ranking,
    neighbour_recall,
    ranked_relevance,
)
from tests.real_data import EMBEDDINGS, needs


def data(rows: int = 60, width: int = 5, classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    new, old = rng.normal(size=(2, rows, width)).astype(np.float32)
    return new, old, rng.integers(0, classes, rows)


def naive_score(query: np.ndarray, item: np.ndarray, metric: Metric) -> float:
    query, item = query.astype(np.float64), item.astype(np.float64)
    if metric == "euclidean":
        return -float(np.sqrt(((query - item) ** 2).sum()))
    product = float(query @ item)
    return product if metric == "inner_product" else product / float(np.linalg.norm(query) * np.linalg.norm(item))


def naive(queries: np.ndarray, gallery: np.ndarray, labels: np.ndarray, metric: Metric) -> tuple[float, float, float]:
    """CMC-1, CMC-5 and mAP by a full ranking of each query, and scikit-learn."""
    first, five, precisions = [], [], []
    for i, query in enumerate(queries):
        others = [j for j in range(len(gallery)) if j != i]
        scores = np.array([naive_score(query, gallery[j], metric) for j in others])
        relevant = labels[others] == labels[i]
        if relevant.any():
            ranking = relevant[np.argsort(-scores, kind="stable")]
            first.append(ranking[:1].any())
            five.append(ranking[:5].any())
            precisions.append(average_precision_score(relevant, scores))
    return float(np.mean(first)), float(np.mean(five)), float(np.mean(precisions))


@pytest.mark.parametrize("metric", METRICS)
def test_cmc_and_map_equal_a_naive_ranking(metric: Metric) -> None:
    new, old, labels = data()
    got = cross_test(new, old, labels, metric=metric)
    assert (got.cmc1, got.cmc5, got.map) == pytest.approx(naive(new, old, labels, metric), abs=1e-12)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old, labels = data()
    whole = cross_test(new, old, labels), neighbour_recall(new, old, new, leave_one_out=True)
    monkeypatch.setattr(evaluation, "BLOCK_SCORES", 7 * len(old))
    assert (cross_test(new, old, labels), neighbour_recall(new, old, new, leave_one_out=True)) == whole


def test_equal_scores_are_handled_jointly_as_in_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.integers(0, 3, (50, 2)).astype(np.float32)  # many equal vectors
    labels = rng.integers(0, 4, 50)
    got = cross_test(vectors, vectors, labels)
    assert (got.cmc1, got.cmc5, got.map) == pytest.approx(naive(vectors, vectors, labels, "euclidean"), abs=1e-12)


def test_a_gallery_of_equal_vectors_is_no_success() -> None:
    labels = np.arange(100) % 10
    got = cross_test(np.ones((100, 4)), np.ones((100, 4)), labels)
    assert got.cmc1 == pytest.approx(0.09)  # item 0 comes first: right for the nine others of its class
    assert got.map == pytest.approx(9 / 99)


def test_the_own_item_is_left_out_only_on_request() -> None:
    new, _, _ = data()
    labels = np.arange(len(new)) // 2
    assert evaluate_retrieval(new, new, labels, labels).cmc1 == 1.0
    assert cross_test(new, new, labels).cmc1 < 0.5


def test_queries_with_nothing_to_find_are_not_counted() -> None:
    vectors = np.array([[0.0], [0.1], [5.0]])
    got = cross_test(vectors, vectors, np.array([1, 1, 2]))
    assert (got.queries, got.cmc1, got.map) == (2, 1.0, 1.0)
    nothing = cross_test(vectors, vectors, np.array([1, 2, 3]))
    assert nothing.queries == 0
    assert np.isnan(nothing.cmc1)


def test_euclidean_scores_stay_exact_far_from_the_origin() -> None:
    new, old, labels = data()
    for far in (100, 1e5):
        moved = cross_test(new.astype(np.float64) + far, old.astype(np.float64) + far, labels)
        assert moved.map == pytest.approx(cross_test(new, old, labels).map, abs=1e-9)


def test_neighbour_recall_equals_a_naive_count() -> None:
    new, old, _ = data()
    shared = 0
    for i, query in enumerate(new):
        tops = []
        for gallery in (old, new):
            distances = ((gallery.astype(np.float64) - query) ** 2).sum(axis=1)
            distances[i] = np.inf
            tops.append(set(np.argsort(distances)[:10]))
        shared += len(tops[0] & tops[1])
    assert neighbour_recall(new, old, new, leave_one_out=True) == pytest.approx(shared / (10 * len(new)))


def test_neighbour_recall_of_the_reference_itself_is_one() -> None:
    new, old, _ = data()
    assert neighbour_recall(old, new, new, k=3) == 1.0


def test_perfect_pairs_score_perfectly() -> None:
    new, _, labels = data()
    values = evaluate_pairs(new, new, labels)
    assert values["mean_cosine"] == pytest.approx(1)
    assert values["mean_squared_error"] == 0
    assert values["neighbour_recall"] == 1
    same = cross_test(new, new, labels)
    assert (values["cmc1"], values["cmc5"], values["map"]) == (same.cmc1, same.cmc5, same.map)


def test_pairs_are_measured_with_native_queries_over_the_predicted_gallery() -> None:
    new, predicted, labels = data()
    values = evaluate_pairs(predicted, new, labels, metric="cosine", k=4)
    cosines = [float(p @ t / np.linalg.norm(p) / np.linalg.norm(t)) for p, t in zip(predicted, new, strict=True)]
    assert values["mean_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert values["mean_squared_error"] == pytest.approx(float(((predicted - new) ** 2).mean()), rel=1e-5)
    assert values["cmc1"] == cross_test(new, predicted, labels, metric="cosine").cmc1
    expected = neighbour_recall(new, predicted, new, metric="cosine", k=4, leave_one_out=True)
    assert values["neighbour_recall"] == expected


def test_without_labels_there_is_no_cmc() -> None:
    new, predicted, _ = data()
    assert evaluate_pairs(predicted, new).keys() == {"mean_cosine", "mean_squared_error", "neighbour_recall"}


def test_what_pairs_do_not_define_is_none() -> None:
    values = evaluate_pairs(np.ones((1, 3)), np.ones((1, 3)), np.array([4]))
    assert values["neighbour_recall"] is None
    assert values["cmc1"] is None
    assert values["map"] is None
    assert values["mean_squared_error"] == 0


def test_zero_vectors_have_cosine_zero() -> None:
    assert evaluate_pairs(np.zeros((3, 2)), np.ones((3, 2)))["mean_cosine"] == 0


def test_wrong_shapes_and_metrics_are_refused() -> None:
    new, old, labels = data()
    with pytest.raises(ValueError, match="must have one shape"):
        evaluate_pairs(new, old[:5])
    with pytest.raises(ValueError, match="must have one shape"):
        evaluate_pairs(new[:0], old[:0])
    with pytest.raises(ValueError, match="'l1' is not one of"):
        cross_test(new, old, labels, metric="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of one width"):
        cross_test(new, old[:, :3], labels)
    with pytest.raises(ValueError, match="as many queries"):
        evaluate_retrieval(new[:5], old, labels[:5], labels, leave_one_out=True)
    with pytest.raises(ValueError, match="labels"):
        cross_test(new, old, labels[:5])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_not_judged_as_if_they_were_absent(metric: Metric, value: float) -> None:
    vectors, labels = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 4
    bad = vectors.copy()
    bad[7, 2] = value
    for queries, gallery, which in ((bad, vectors, "queries"), (vectors, bad, "gallery")):
        with pytest.raises(ValueError, match=f"{which}: a NaN or an infinity, first in row 7"):
            cross_test(queries, gallery, labels, metric=metric)
    with pytest.raises(ValueError, match="a NaN or an infinity, first in row 7"):
        evaluate_pairs(vectors, bad, metric=metric)
    for given in (None, labels):
        told = evaluate_pairs(bad, vectors, given, metric=metric)
        assert told == dict.fromkeys(evaluate_pairs(vectors, vectors, given, metric=metric))


def test_ranked_lists_of_ids_give_what_the_vectors_give() -> None:
    new, old, labels = data()
    names = [f"item-{i}" for i in range(len(old))]
    distances = ((new[:, None].astype(np.float64) - old[None]) ** 2).sum(axis=2)
    ranked = [[names[j] for j in np.argsort(row)] for row in distances]
    relevance, total = ranked_relevance(
        ranked, labels.tolist(), dict(zip(names, labels.tolist(), strict=True)), own=names
    )
    expected = cross_test(new, old, labels)
    assert cmc_from_ranking(relevance, total, k=1) == pytest.approx(expected.cmc1)
    assert cmc_from_ranking(relevance, total, k=5) == pytest.approx(expected.cmc5)
    assert map_from_ranking(relevance, total) == pytest.approx(expected.map)


def test_a_list_that_was_cut_off_counts_the_rest_as_not_found() -> None:
    relevance, total = ranked_relevance([["a", "x", "b"], ["x"]], [1, 1], {"a": 1, "b": 1, "c": 1, "x": 2})
    assert relevance.tolist() == [[True, False, True], [False, False, False]]
    assert total.tolist() == [3, 3]
    assert map_from_ranking(relevance, total) == pytest.approx(((1 + 2 / 3) / 3 + 0) / 2)
    assert cmc_from_ranking(relevance, total) == 0.5


def test_rankings_without_anything_relevant_are_undefined() -> None:
    relevance, total = ranked_relevance([["a"]], [7], {"a": 1})
    assert np.isnan(cmc_from_ranking(relevance, total))
    assert np.isnan(map_from_ranking(relevance, total))


def test_fraction_closed_is_one_at_the_best_and_zero_before() -> None:
    assert fraction_closed(0.34, 0.34, 0.565) == 0
    assert fraction_closed(0.34, 0.565, 0.565) == 1
    assert fraction_closed(0.34, 0.509, 0.565) == pytest.approx(0.751, abs=1e-3)


@pytest.mark.slow
@needs(EMBEDDINGS)
def test_the_published_figures_of_the_real_embeddings_are_met() -> None:
    with np.load(EMBEDDINGS) as files:
        old, new, labels = files["old_test"], files["new_test"], files["labels_test"]
    started = time.perf_counter()
    old_old, new_new, naive = cross_test(old, old, labels), cross_test(new, new, labels), cross_test(new, old, labels)
    assert time.perf_counter() - started < 60
    assert [round(100 * x, 1) for x in (old_old.cmc1, old_old.cmc5, old_old.map)] == [34.0, 61.4, 11.5]
    assert [round(100 * x, 1) for x in (new_new.cmc1, new_new.cmc5, new_new.map)] == [56.5, 79.5, 32.6]
    assert [round(100 * x, 1) for x in (naive.cmc1, naive.cmc5, naive.map)] == [1.1, 5.1, 1.3]
