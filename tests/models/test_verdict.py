from dataclasses import replace

import numpy as np
import pytest
import torch

from models.evaluation import METRICS, Metric, cross_test, neighbour_recall
from models.fitting import Options, assess
from models.fusion import fused_blocks
from models.inputs import Pairs
from models.runtime import Transform
from models.transformations import Linear, LinearTransformation
from models.verdict import (
    DIRECTIONS,
    ByLabel,
    ByNeighbours,
    Direction,
    Metrics,
    Sample,
    bootstrap,
    choose_weight,
    gains,
    give_verdict,
    judge_of,
    loses,
    searches,
)
from tests.models.known_pairs import WIDTH, extracted, hiding, judged, views


class TestFusion:
    def test_the_score_is_the_formula(self) -> None:
        """A share of the cosine in the upgraded space, and the rest of that in the old one."""
        rng = np.random.default_rng(0)
        upgraded_q, upgraded_g = rng.normal(size=(4, 5)), rng.normal(size=(9, 5))
        old_q, old_g = rng.normal(size=(4, 3)), rng.normal(size=(9, 3))

        def cosine(a: np.ndarray, b: np.ndarray) -> float:
            return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))

        ((start, scores),) = fused_blocks((upgraded_q, upgraded_g), (old_q, old_g), (0.0, 0.3, 1.0))
        assert start == 0
        for weight, got in scores.items():
            for i in range(4):
                for j in range(9):
                    expected = weight * cosine(upgraded_q[i], upgraded_g[j]) + (1 - weight) * cosine(old_q[i], old_g[j])
                    assert got[i, j] == (-np.inf if i == j else pytest.approx(expected, abs=1e-6))

    def test_the_ends_are_staying_and_upgrading_by_cosine(self) -> None:
        pairs = hiding(0.8, 0.4)
        sample, transform = Sample(pairs=pairs, queries=100), Transform(extracted())
        judge, ways = judge_of(sample, metric="cosine"), searches(sample, transform, direction="forward")
        ends = judge.fused(ways["upgrade"], ways["stay"], (0.0, 1.0))
        np.testing.assert_array_equal(ends[0.0], judge.search(ways["stay"], "cosine"))
        np.testing.assert_array_equal(ends[1.0], judge.search(ways["upgrade"], "cosine"))

    def test_the_weight_that_is_chosen_is_no_worse_than_either_end(self) -> None:
        for seed in range(4):
            sample = Sample(pairs=hiding(0.7, 0.7, seed=seed), queries=300)
            transform, judge = Transform(extracted()), judge_of(sample, metric="cosine")
            weight = choose_weight(sample, transform, judge, direction="forward")
            ways = searches(sample, transform, direction="forward")
            means = {
                each: sum(judge.means(values).values())
                for each, values in judge.fused(ways["upgrade"], ways["stay"], (0.0, weight, 1.0)).items()
            }
            assert means[weight] == max(means.values())


class TestVerdict:
    @pytest.mark.parametrize("metric", METRICS)
    def test_its_measures_are_those_of_the_one_evaluation(self, metric: Metric) -> None:
        pairs = hiding(0.8, 0.5)
        assert pairs.labels is not None
        sample = Sample(pairs=pairs, queries=len(pairs))
        queries, gallery = searches(sample, Transform(extracted()), direction="forward")["naive"]
        found = cross_test(queries, gallery, pairs.labels, metric=metric)
        by_label, by_neighbours = ByLabel(pairs.labels), ByNeighbours(sample, metric)
        means = by_label.means(by_label.search((queries, gallery), metric))
        assert means == pytest.approx({"cmc1": found.cmc1, "map": found.map})
        recall = neighbour_recall(pairs.target, gallery, pairs.target, metric=metric, leave_one_out=True)
        means = by_neighbours.means(by_neighbours.search((queries, gallery), metric))
        assert means == pytest.approx({"recall": recall})

    def test_the_ways_to_search_are_those_of_the_direction(self) -> None:
        pairs, transform = hiding(1, 1), Transform(extracted())
        forward = searches(Sample(pairs=pairs, queries=50), transform, direction="forward")
        np.testing.assert_array_equal(forward["naive"][1], pairs.source[:, :WIDTH])
        np.testing.assert_array_equal(forward["upgrade"][1], transform(pairs.source))
        assert all(len(queries) == 50 and len(gallery) == 600 for queries, gallery in forward.values())
        swapped = Pairs(source=pairs.target, target=pairs.source)  # the wide model is the new one now
        backward = searches(Sample(pairs=swapped, queries=50), transform, direction="backward")
        np.testing.assert_array_equal(backward["naive"][0], swapped.target[:50, :WIDTH])
        np.testing.assert_array_equal(backward["upgrade"][0], transform(swapped.target)[:50])
        np.testing.assert_array_equal(backward["upgrade"][1], swapped.source)

    @pytest.mark.parametrize("metric", METRICS)
    def test_a_map_to_a_better_model_is_an_upgrade(self, metric: Metric) -> None:
        verdict = judged(hiding(2.0, 0.3), extracted(), metric)
        assert verdict.decision in ("upgrade", "fuse")
        assert verdict.searches["upgrade"] == pytest.approx(verdict.searches["ceiling"], abs=1e-3)
        assert verdict.closed == pytest.approx({"cmc1": 1.0, "map": 1.0}, abs=1e-2)

    @pytest.mark.parametrize("metric", METRICS)
    def test_a_map_to_a_worse_model_is_none(self, metric: Metric) -> None:
        verdict = judged(hiding(0.3, 2.0), extracted(), metric)
        assert verdict.decision == "stay"
        assert loses(verdict.differences["upgrade - stay"])
        assert "upgrading loses" in verdict.reason

    def test_two_models_that_see_different_things_are_fused(self) -> None:
        verdict = judged(hiding(0.8, 0.8, rows=1500), extracted())
        assert verdict.decision == "fuse"
        assert 0 < verdict.weight < 1
        assert verdict.searches["fuse"]["map"] > max(verdict.searches[name]["map"] for name in ("stay", "upgrade"))

    @pytest.mark.parametrize(("old", "new", "alone"), [(0.8, 1.2, False), (1.2, 0.8, True)])
    def test_where_fusing_is_best_it_is_told_whether_upgrading_alone_gains(
        self, old: float, new: float, alone: bool
    ) -> None:
        verdict = judged(hiding(old, new, rows=1500), extracted())
        assert verdict.decision == "fuse"
        assert verdict.upgrade_gains == gains(verdict.differences["upgrade - stay"]) == alone

    def test_a_map_that_changes_nothing_is_no_measurable_gain(self) -> None:
        _, (old,) = views(600, (0.8,))
        pairs = Pairs(source=old, target=old, labels=views(600, (0.8,))[0])
        module = LinearTransformation(Linear(source_dimension=WIDTH, target_dimension=WIDTH))
        with torch.no_grad():
            module.weight.copy_(torch.eye(WIDTH))
        verdict = judged(pairs, module)
        assert verdict.decision == "stay"
        assert verdict.reason.startswith("no measurable gain")
        assert verdict.reason.endswith(f"; among {verdict.gallery:,} items")
        assert verdict.searches["naive"] == verdict.searches["stay"] == verdict.searches["ceiling"]
        assert verdict.closed == {"cmc1": None, "map": None}

    def test_what_cosine_alone_gains_is_no_merit_of_fusing(self) -> None:
        """Lengths are noise: by cosine staying is far better than by distance, and the new model adds nothing."""
        labels, (old, new) = views(900, (0.5, 3.0))
        old *= np.exp(np.random.default_rng(1).normal(size=(900, 1))).astype(np.float32)
        pairs = Pairs(source=np.concatenate([old, 0.05 * new], axis=1), target=new, labels=labels)
        sample, both = Sample(pairs=pairs, queries=900), Metrics("euclidean", "euclidean")
        judge = judge_of(sample, metric="euclidean")
        verdict = give_verdict(sample, Transform(extracted()), judge, direction="forward", metrics=both, weight=0.1)
        assert gains(verdict.differences["fuse - stay"])
        assert not gains(verdict.differences["fuse - stay by cosine"])
        assert verdict.decision == "stay"

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_each_search_is_judged_by_the_metric_of_the_space_it_is_in(self, direction: Direction) -> None:
        pairs, module = hiding(1.0, 0.5), extracted()
        if direction == "backward":  # the wide model is the new one now
            pairs = Pairs(source=pairs.target, target=pairs.source, labels=pairs.labels)
        sample, transform = Sample(pairs=pairs, queries=600), Transform(module)
        judge = judge_of(sample, metric="cosine")
        verdict = give_verdict(
            sample, transform, judge, direction=direction, metrics=Metrics("euclidean", "cosine"), weight=1.0
        )
        mapped: Metric = "cosine" if direction == "forward" else "euclidean"
        by: dict[str, Metric] = {"stay": "euclidean", "naive": mapped, "upgrade": mapped, "ceiling": "cosine"}
        ways = searches(sample, transform, direction=direction)
        assert verdict.searches == {name: judge.means(judge.search(ways[name], by[name])) for name in by}

    def test_an_old_model_that_tells_classes_by_length_is_not_belittled_by_a_new_one_that_has_none(self) -> None:
        pairs, module = hiding(2.0, 0.5), extracted()
        assert pairs.labels is not None
        pairs.source[:, 0] = 100.0  # one direction, more or less
        pairs = replace(pairs, source=pairs.source * (1 + pairs.labels[:, None]).astype(np.float32))
        by_one = assess(module, pairs, Options(metric="cosine")).verdict
        verdict = assess(module, pairs, Options(metric="cosine", other_metric="euclidean")).verdict
        assert by_one.upgrade_gains
        assert verdict.decision == "stay"
        assert verdict.searches["upgrade"] == by_one.searches["upgrade"]

    def test_spaces_that_agree_already_are_noticed(self) -> None:
        labels, (poor, good) = views(600, (1.5, 0.3))
        pairs = Pairs(source=good + poor, target=good, labels=labels)
        module = LinearTransformation(Linear(source_dimension=WIDTH, target_dimension=WIDTH))
        assert "new queries gain on the old vectors as they are: CMC-1" in judged(pairs, module).reason

    def test_without_labels_it_says_what_it_assumes(self) -> None:
        verdict = judged(hiding(2.0, 0.3, labelled=False), extracted())
        assert verdict.assumption is not None
        assert "assumes" in verdict.assumption
        assert verdict.searches["ceiling"] == {"recall": 1.0}
        assert verdict.decision == "upgrade"
        assert judged(hiding(2.0, 0.3), extracted()).assumption is None

    def test_too_few_queries_measure_nothing(self) -> None:
        verdict = judged(hiding(2.0, 0.3, rows=30), extracted())
        assert verdict.decision == "stay"
        assert "too few" in verdict.reason

    def test_too_few_queries_do_not_tell_that_spaces_agree_either(self) -> None:
        _, (poor, good) = views(30, (1.5, 0.1))
        module = LinearTransformation(Linear(source_dimension=WIDTH, target_dimension=WIDTH))
        verdict = judged(Pairs(source=good + poor, target=good), module)
        assert "too few to measure a gain" in verdict.reason
        assert "new queries gain" not in verdict.reason

    def test_a_map_that_does_not_fit_the_pairs_is_refused(self) -> None:
        pairs = hiding(1, 1)
        with pytest.raises(ValueError, match="the map goes from 16 to 8 dimensions, a backward map"):
            judged(pairs, extracted(), direction="backward")


class TestBootstrap:
    def test_it_brackets_the_difference_of_the_queries_that_count(self) -> None:
        rng = np.random.default_rng(0)
        first, second = rng.random((2, 300, 2))
        first[::7] = second[::7] = np.nan
        counted = ~np.isnan(first[:, 0])
        for place, interval in enumerate(bootstrap(first, second)):
            differences = (first - second)[counted, place]
            assert interval.difference == pytest.approx(differences.mean())
            error = differences.std() / np.sqrt(counted.sum())  # what theory says of a mean
            assert interval.low == pytest.approx(interval.difference - 1.96 * error, abs=0.15 * error)
            assert interval.high == pytest.approx(interval.difference + 1.96 * error, abs=0.15 * error)

    def test_the_other_way_round_it_is_mirrored(self) -> None:
        first, second = np.random.default_rng(1).random((2, 100, 1))
        (one,), (other,) = bootstrap(first, second), bootstrap(second, first)
        assert (other.low, other.high) == pytest.approx((-one.high, -one.low))

    def test_of_equally_good_searches_few_are_told_apart(self) -> None:
        rng = np.random.default_rng(2)
        alarms = 0
        for trial in range(300):
            first, second = (rng.random((2, 150, 1)) < 0.4).astype(float)
            (interval,) = bootstrap(first, second, seed=trial, resamples=400)
            alarms += interval.low > 0
        assert alarms / 300 < 0.06  # 0.025 in theory

    def test_of_equally_good_searches_for_twins_few_are_told_apart(self) -> None:
        """A label has two items, which find each other: with both of them, a chance counts twice."""
        rng, labels, alarms = np.random.default_rng(3), np.repeat(np.arange(50), 2), 0
        for trial in range(300):
            items = np.repeat(rng.normal(size=(50, 16)), 2, axis=0) + rng.normal(size=(100, 16)) / 2
            old, new = (items + 1.5 * rng.normal(size=(2, 100, 16))).astype(np.float32)
            judge = ByLabel(labels)
            found, before = (judge.search((each, each), "cosine") for each in (new, old))
            intervals = bootstrap(found, before, labels=judge.labels, seed=trial, resamples=400)
            alarms += gains(dict(zip(judge.measures, intervals, strict=True)))
        assert alarms / 300 < 0.075  # 0.025 for each of two measures in theory; 0.1 from queries alone

    def test_of_few_labels_only_queries_are_resampled(self) -> None:
        first, second = np.random.default_rng(4).random((2, 100, 1))
        labels = np.arange(100) % 3
        assert bootstrap(first, second, labels=labels) == bootstrap(first, second)
