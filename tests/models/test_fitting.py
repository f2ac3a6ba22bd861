import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import fitting, inputs
from models.artifacts import save
from models.checkpoints import OfAnotherTraining
from models.evaluation import METRICS, Metric, cross_test, neighbour_recall
from models.fitting import Fitted, Options, assess, fit, trainable
from models.fusion import fused_blocks
from models.inputs import Pairs, check_pairs, read_pairs, split, warnings_about
from models.method import Batch
from models.methods import METHODS
from models.methods.l2 import L2
from models.runtime import Transform
from models.training import Step
from models.transformations import Linear, LinearTransformation, Transformation
from models.verdict import (
    DIRECTIONS,
    ByLabel,
    ByNeighbours,
    Direction,
    Metrics,
    Sample,
    Verdict,
    bootstrap,
    choose_weight,
    gains,
    give_verdict,
    judge_of,
    loses,
    searches,
)
from tests.real_data import EMBEDDINGS, needs

SMALL = {name: {"hidden": 16} for name in ("fct", "fastfill")}
CLASSES, WIDTH = 12, 8


def views(rows: int, noises: tuple[float, ...], seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels, and for each noise a view of them that is independent of the other views."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % CLASSES)
    return labels, [
        (rng.normal(size=(CLASSES, WIDTH))[labels] + noise * rng.normal(size=(rows, WIDTH))).astype(np.float32)
        for noise in noises
    ]


def extracted(scale: float = 0.05) -> Transformation:
    """The map that reads the second half of a vector, which was stored small."""
    module = LinearTransformation(Linear(source_dimension=2 * WIDTH, target_dimension=WIDTH))
    with torch.no_grad():
        module.weight.copy_(torch.cat([torch.zeros(WIDTH, WIDTH), torch.eye(WIDTH) / scale], dim=1))
    return module


def hiding(poor: float, good: float, rows: int = 600, *, labelled: bool = True, seed: int = 0) -> Pairs:
    """An old model that sees one view, and hides in a small part of its vectors all that the new model sees."""
    labels, (first, second) = views(rows, (poor, good), seed)
    old = np.concatenate([first, 0.05 * second], axis=1)
    return Pairs(source=old, target=second, labels=labels if labelled else None)


def judged(
    pairs: Pairs, module: Transformation, metric: Metric = "cosine", direction: Direction = "forward"
) -> Verdict:
    return assess(module, pairs, Options(metric=metric, direction=direction)).verdict


def different(rows: int, *, width: int = 1, labels: np.ndarray | None = None) -> Pairs:
    """Pairs of which no two are equal, and nothing else is known."""
    vectors = np.repeat(np.arange(rows)[:, None], width, axis=1)
    return Pairs(source=vectors, target=vectors, labels=labels)


class TestSplit:
    @given(st.integers(20, 400), st.floats(0.05, 0.9), st.integers(0, 5), st.integers(1, 60) | st.none())
    def test_each_row_is_in_one_part(self, rows: int, share: float, seed: int, classes: int | None) -> None:
        labels = None if classes is None else np.random.default_rng(seed).integers(0, classes, rows)
        pairs = different(rows, labels=labels)
        try:
            parts = split(pairs, held_out=share, seed=seed)
        except ValueError as error:
            assert "hold out more" in str(error)  # noqa: PT017 - a share that leaves nothing to judge by
            return
        together = np.concatenate([parts.train, parts.validation, parts.test])
        np.testing.assert_array_equal(np.sort(together), np.arange(rows))

    def test_a_seed_decides(self) -> None:
        pairs = hiding(1, 1)
        first, again, other = (split(pairs, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first.test, again.test)
        assert set(first.test) != set(other.test)

    def test_each_label_gives_its_share_and_is_held_out_in_twos(self) -> None:
        labels = np.repeat(np.arange(100), 10)
        pairs = different(1000, labels=labels)
        parts = split(pairs)
        assert (len(parts.train), len(parts.validation), len(parts.test)) == (800, 100, 100)
        np.testing.assert_array_equal(np.bincount(labels[parts.train]), np.full(100, 8))
        for part in (parts.validation, parts.test):
            assert set(np.bincount(labels[part], minlength=100)) == {0, 2}

    def test_frequent_labels_are_in_every_part_alike(self) -> None:
        labels = np.repeat(np.arange(4), 500)
        parts = split(different(2000, labels=labels))
        for part, expected in ((parts.train, 400), (parts.validation, 50), (parts.test, 50)):
            assert np.abs(np.bincount(labels[part]) - expected).max() <= 4

    @pytest.mark.parametrize(("rows", "expected"), [(20, 5), (500, 100), (5_000, 500), (300_000, 20_000)])
    def test_few_pairs_hold_out_more_and_many_no_more_than_judging_needs(self, rows: int, expected: int) -> None:
        parts = split(different(rows))
        assert len(parts.validation) == len(parts.test) == expected
        assert len(parts.train) == rows - 2 * expected

    def test_labels_that_stand_alone_are_not_judged_by(self) -> None:
        pairs = different(900, width=2, labels=np.arange(900))
        parts = split(pairs)
        assert not parts.labelled
        assert any("stand alone" in warning for warning in warnings_about(pairs, parts))

    @pytest.mark.parametrize("others", [0, 1, 3])
    def test_one_label_for_all_rows_that_are_held_out_is_as_good_as_none(self, others: int) -> None:
        """Whatever is found has it: every search would be perfect, and none better than another."""
        pairs = hiding(2.0, 0.3)
        alike = replace(pairs, labels=np.maximum(0, np.arange(len(pairs)) - len(pairs) + others + 1))
        assert not split(alike).labelled
        assessment = assess(extracted(), alike, Options())
        assert assessment.verdict == judged(replace(pairs, labels=None), extracted())
        assert any("all the same" in warning for warning in assessment.warnings)

    @pytest.mark.parametrize("labelled", [True, False])
    @pytest.mark.parametrize("times", [2, 6])
    def test_no_pair_is_judged_by_that_is_trained_on_or_judged_by_already(self, labelled: bool, times: int) -> None:
        once = different(300, labels=np.arange(300) % 7 if labelled else None)
        several = once.take(np.tile(np.arange(300), times))
        parts, alone = split(several), split(once)
        for name in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(alone, name))
        assert any(
            f"{300 * (times - 1):,} of {300 * times:,} pairs are copies" in w for w in warnings_about(several, parts)
        )
        assert alone.copies == 0
        assert not any("copies" in warning for warning in warnings_about(once, alone))

    def test_a_pair_is_a_copy_where_both_vectors_are_equal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inputs, "CHECKED_ROWS", 16)
        source, target = np.arange(40.0)[:, None], np.arange(40.0)[:, None]
        source[30], target[31], source[32], target[32] = source[3], target[4], source[5], target[5]
        parts = split(Pairs(source=source, target=target))
        assert set(range(40)) - {*parts.train, *parts.validation, *parts.test} == {32}

    def test_too_few_different_pairs_are_counted_without_their_copies(self) -> None:
        with pytest.raises(ValueError, match=r"of 3 different pairs leaves nothing to judge by"):
            split(different(3).take(np.tile(np.arange(3), 50)))

    def test_warnings_name_the_number_that_would_do(self) -> None:
        def about(rows: int) -> list[str]:
            pairs = different(rows, width=128)
            return warnings_about(pairs, split(pairs, held_out=0.2))

        assert "320 pairs in all would do" in about(200)[0]
        assert "1,000 pairs in all would do" in about(200)[1]
        assert not about(1000)


class TestInputs:
    def write(self, folder: Path, **columns: np.ndarray) -> dict[str, Path]:
        paths = {name: folder / f"{name}.npy" for name in columns}
        for name, values in columns.items():
            np.save(paths[name], values)
        return paths

    @pytest.mark.parametrize(
        ("column", "values", "message"),
        [
            ("target", np.ones((19, 3)), "target.npy has 19 rows, .*source.npy has 20: row i must be the same item"),
            ("target", np.ones(20), r"target.npy has shape \(20,\): vectors are rows of one matrix"),
            ("target", np.ones((20, 3), complex), "target.npy holds complex128: vectors are real numbers"),
            ("side", np.ones((20, 3), "U4"), "side.npy holds <U4: vectors are real numbers"),
            ("labels", np.ones((20, 1), int), r"labels.npy holds int64 of shape \(20, 1\): labels are one integer"),
            ("labels", np.ones(20), "labels.npy holds float64"),
            ("labels", np.ones(21, int), "labels.npy has 21 rows"),
            ("source", np.ones((9, 3)), "source.npy has 9 rows: a map needs 10 pairs"),
        ],
    )
    def test_a_bad_file_is_named_with_what_is_wrong(
        self, tmp_path: Path, column: str, values: np.ndarray, message: str
    ) -> None:
        rows = len(values) if column == "source" else 20
        good = {"source": np.ones((rows, 3)), "target": np.ones((rows, 3))}
        with pytest.raises(ValueError, match=message):
            read_pairs(**self.write(tmp_path, **(good | {column: values})))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300], ids=["NaN", "infinity", "infinity as float32"])
    def test_rows_that_are_not_finite_are_counted_and_the_first_is_named(
        self, tmp_path: Path, bad: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inputs, "CHECKED_ROWS", 8)
        target = np.ones((40, 3))
        target[[17, 30], 1] = bad
        with pytest.raises(ValueError, match=r"target.npy has 2 rows with a NaN or an infinity, the first is row 17"):
            read_pairs(**self.write(tmp_path, source=np.ones((40, 3)), target=target))

    @pytest.mark.parametrize("column", ["source", "target"])
    def test_rows_whose_scores_would_overflow_are_counted_and_the_first_is_named(
        self, tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inputs, "CHECKED_ROWS", 8)
        long = np.ones((40, 3), np.float32)
        long[[17, 30], 1] = 1e19
        given = {"source": np.ones((40, 3)), "target": np.ones((40, 3)), "side": long} | {column: long}
        with pytest.raises(
            ValueError, match=rf"{column}.npy has 2 rows longer than 9e\+18, the first is row 17: .*divide"
        ):
            read_pairs(**self.write(tmp_path, **given))
        long[[17, 30], 1] = 9e18
        assert len(read_pairs(**self.write(tmp_path, **given))) == 40

    def test_pickles_are_never_loaded(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, source=np.array([{}] * 20, object), target=np.ones((20, 3)))
        with pytest.raises(ValueError, match=r"source.npy is not an array that `np.save` wrote"):
            read_pairs(**paths)

    def test_archives_and_files_that_are_cut_short_are_refused(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, source=np.ones((20, 3)), target=np.ones((20, 3)))
        paths["target"].write_bytes(paths["target"].read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"target.npy is not an array .* or is cut short"):
            read_pairs(**paths)
        np.savez(tmp_path / "target.npz", target=np.ones((20, 3)))
        with pytest.raises(ValueError, match="is an archive of arrays"):
            read_pairs(paths["source"], tmp_path / "target.npz")

    def test_files_are_mapped_and_rows_taken_as_float32(self, tmp_path: Path) -> None:
        values = np.arange(60, dtype=np.float16).reshape(20, 3)
        pairs = read_pairs(**self.write(tmp_path, source=values, target=values))
        assert isinstance(pairs.source, np.memmap)
        taken = pairs.take(np.array([3, 1]))
        assert taken.source.dtype == np.float32
        np.testing.assert_array_equal(taken.source, values[[3, 1]])


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


def quick(method: str = "fct", **given: object) -> Options:
    return Options(method=method, epochs=3, hyperparameters=SMALL, **given)  # type: ignore[arg-type]


def small_pairs(rows: int = 240, *, labelled: bool = True) -> Pairs:
    labels, (old, new, side) = views(rows, (1.0, 0.4, 0.8))
    return Pairs(source=old, target=new[:, :5], side=side[:, :3], labels=labels if labelled else None)


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    return dict(fitted.transformation.state_dict())


class TestFit:
    def test_items_that_are_held_out_leave_no_trace_in_the_map(self) -> None:
        pairs = small_pairs()
        parts = split(pairs)
        target = pairs.target.copy()
        target[parts.test] = 100.0
        target[parts.validation] = -100.0
        other = Pairs(source=pairs.source, target=target, side=pairs.side, labels=pairs.labels)
        first, second = fit(pairs, quick()), fit(other, quick())
        for name, tensor in weights(first).items():
            torch.testing.assert_close(weights(second)[name], tensor, rtol=0, atol=0)
        assert first.assessment.evaluation != second.assessment.evaluation

    def test_copies_of_pairs_change_neither_the_map_nor_the_verdict(self) -> None:
        pairs = small_pairs()
        several = fit(pairs.take(np.tile(np.arange(len(pairs)), 4)), quick("affine")).assessment
        once = fit(pairs, quick("affine")).assessment
        assert several.verdict == once.verdict
        assert "are copies of others" in several.warnings[0]

    def test_the_same_seed_finds_the_same(self) -> None:
        first, second, other = (fit(small_pairs(), quick(seed=seed)) for seed in (0, 0, 1))
        assert first.assessment == second.assessment
        assert first.assessment != other.assessment

    def test_the_report_is_plain_json(self) -> None:
        report = fit(small_pairs(), quick()).report()
        assert json.loads(json.dumps(report, allow_nan=False))["verdict"]["decision"] in ("stay", "upgrade", "fuse")
        assert report["parts"] == {"train": 120, "validation": 60, "test": 60}

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_every_method_that_pairs_are_enough_for_is_tried_or_says_why_not(self, direction: Direction) -> None:
        fitted = fit(small_pairs(), quick("auto", direction=direction, metric="euclidean"))
        assert [candidate.method for candidate in fitted.candidates] == list(trainable())
        assert all(bool(candidate.validation) != bool(candidate.skipped) for candidate in fitted.candidates)
        tried = {each.method: sum(each.validation.values()) for each in fitted.candidates if each.validation}
        assert tried[fitted.method] == max(tried.values())

    def test_methods_that_need_labels_are_skipped_without(self) -> None:
        candidates = fit(small_pairs(labelled=False), quick("auto")).candidates
        for candidate in candidates:
            if trainable()[candidate.method].needs_labels:
                assert candidate.skipped == f"{candidate.method} needs labels"

    def test_the_best_of_a_contest_on_few_pairs_is_trained_on_all(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(fitting, "CONTEST_PAIRS", 80)
        options, alone = quick("auto"), fit(small_pairs(), quick())
        monkeypatch.setattr(fitting, "trainable", lambda: {"fct": trainable()["fct"]})
        fitted = fit(small_pairs(), options, log=tmp_path / "loss.csv", checkpoint=tmp_path / "state")
        assert {path.name for path in tmp_path.glob("loss*")} == {"loss.fct-80.csv", "loss.fct-120.csv"}
        assert {path.name for path in fitted.checkpoints} == {"state.fct-80", "state.fct-120"}
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(weights(fitted)[name], tensor, rtol=0, atol=0)

    def test_a_fit_that_was_killed_goes_on_where_it_was(self, tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        def kill(name: str, step: object) -> None:
            steps.append(name)
            if len(steps) == 3:
                raise Killed

        steps: list[str] = []
        whole = fit(small_pairs(), quick())
        with pytest.raises(Killed):
            fit(small_pairs(), quick(), on_step=kill, checkpoint=tmp_path / "state")
        assert steps == ["fct"] * 3
        again = fit(small_pairs(), quick(), checkpoint=tmp_path / "state")
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(again)[name], tensor, rtol=0, atol=0)

    @pytest.mark.parametrize("what", ["rows", "width", "metric", "hyperparameter"])
    def test_the_state_of_another_fit_is_refused(self, what: str, tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        def kill(name: str, step: Step) -> None:
            if step.done > step.total // 2:
                raise Killed

        pairs, options = small_pairs(), Options(method="l2", metric="cosine", epochs=3)
        with pytest.raises(Killed):
            fit(pairs, options, on_step=kill, checkpoint=tmp_path / "state")
        others = {
            "rows": (replace(pairs, source=pairs.source[:, ::-1].copy()), options),
            "width": (replace(pairs, target=pairs.target[:, :4]), options),
            "metric": (pairs, replace(options, metric="inner_product")),
            "hyperparameter": (pairs, replace(options, hyperparameters={"l2": {"weight": 0.001}})),
        }
        with pytest.raises(ValueError, match="is the state of another training"):
            fit(*others[what], checkpoint=tmp_path / "state")

    def test_the_state_of_another_fit_takes_no_method_out_of_the_contest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fitting, "trainable", lambda: {name: METHODS[name] for name in ("affine", "l2")})
        fit(small_pairs(), Options(epochs=3), checkpoint=tmp_path / "state")
        assert (tmp_path / "state.l2-120").exists()
        with pytest.raises(OfAnotherTraining, match=r"state.l2-120 is the state of another training: remove it"):
            fit(small_pairs(), Options(epochs=3, seed=1), checkpoint=tmp_path / "state")

    @pytest.mark.parametrize("what", ["empty", "no state", "cut short", "an artifact", "damaged"])
    def test_a_file_that_is_no_state_is_refused_in_a_sentence(self, what: str, tmp_path: Path) -> None:
        options, state = Options(method="l2", epochs=3), tmp_path / "state"
        fitted = fit(small_pairs(), options, checkpoint=state)
        whole = state.read_bytes()
        contents = {
            "empty": b"",
            "no state": b"precious " * 9,
            "cut short": whole[:-1],
            "damaged": whole.replace(b"random.torch", b"random.torcx"),
        }
        if what == "an artifact":
            save(state, fitted.transformation)
        else:
            state.write_bytes(contents[what])
        before = state.read_bytes()
        with pytest.raises(OfAnotherTraining, match=r"state is not the state of .*: remove it, or name another place"):
            fit(small_pairs(), options, checkpoint=state)
        assert state.read_bytes() == before

    def test_a_method_that_diverges_leaves_no_state_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def diverging(method: L2, batch: Batch) -> dict[str, Tensor]:
            losses = real_losses(method, batch)
            return {name: loss * (torch.nan if (tmp_path / "state").exists() else 1) for name, loss in losses.items()}

        real_losses = L2.losses
        monkeypatch.setattr(L2, "losses", diverging)
        with pytest.raises(FloatingPointError):
            fit(small_pairs(), Options(method="l2", epochs=3), checkpoint=tmp_path / "state")
        assert not (tmp_path / "state").exists()

    def test_a_closed_form_does_not_name_a_file_as_its_state(self, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("precious")
        assert fit(small_pairs(), Options(method="affine"), checkpoint=tmp_path / "state").checkpoints == ()
        assert (tmp_path / "state").read_text() == "precious"

    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
    def test_vectors_of_every_number_type_are_fitted_and_judged(self, dtype: str) -> None:
        pairs = small_pairs()
        source, target = ((20 * each + 120).clip(0, 127).astype(dtype) for each in (pairs.source, pairs.target))
        typed = replace(pairs, source=source, target=target)
        fitted = fit(typed, Options(method="affine", metric="euclidean"))
        assert fitted.transformation.architecture.source_dimension == WIDTH
        assert assess(fitted.transformation, typed, Options(metric="euclidean")).verdict.gallery == 120

    def test_the_loss_follows_the_metric(self) -> None:
        by_cosine, by_distance = (fit(small_pairs(), quick(metric=metric)) for metric in ("cosine", "euclidean"))
        assert by_cosine.transformation.architecture.normalize_output
        assert not by_distance.transformation.architecture.normalize_output

    @pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
    def test_between_vectors_of_unit_length_what_is_mapped_has_it_too(self, metric: Metric) -> None:
        pairs = small_pairs()
        source, target = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (pairs.source, pairs.target))
        fitted = fit(replace(pairs, source=source.astype(np.float16), target=target), quick(metric=metric))
        assert fitted.options.metric == "cosine"
        assert fitted.transformation.architecture.normalize_output
        one_of_them = fit(replace(pairs, target=target), quick(metric=metric))
        assert one_of_them.options.metric == metric

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"metric": "manhattan"}, "the metric 'manhattan' is not one of euclidean"),
            ({"direction": "sideways"}, "the direction 'sideways' is not one of forward, backward"),
            ({"method": "bct"}, "the method 'bct' is not one of .*fct"),
            ({"epochs": 0}, "training needs an epoch, not 0"),
            ({"hyperparameters": {"fct": {"width": 3}}}, "the hyperparameter of fct 'width' is not one of hidden"),
        ],
    )
    def test_options_that_mean_nothing_are_refused(self, given: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Options(**given)  # type: ignore[arg-type]

    def test_pairs_in_memory_are_checked_too(self) -> None:
        pairs = small_pairs()
        pairs.source[5, 0] = np.nan
        with pytest.raises(ValueError, match="source has 1 rows with a NaN or an infinity, the first is row 5"):
            fit(pairs, quick())
        with pytest.raises(ValueError, match="a map needs 10 pairs"):
            check_pairs(small_pairs().take(np.arange(9)))

    def test_pairs_that_are_no_numpy_arrays_are_refused_with_what_would_do(self) -> None:
        pairs = small_pairs()
        for source in (torch.from_numpy(pairs.source), pairs.source.tolist()):
            with pytest.raises(TypeError, match=r"source is of type (Tensor|list): give a NumPy array, as np.asarray"):
                fit(replace(pairs, source=source), quick())


def real(step: int, *, swapped: bool = False) -> Pairs:
    with np.load(EMBEDDINGS) as files:
        old, side, new = (files[f"{role}_train"][::step].astype(np.float32) for role in ("old", "side", "new"))
        labels = files["labels_train"][::step]
    return Pairs(source=new if swapped else old, target=old if swapped else new, side=side, labels=labels)


@pytest.mark.slow
@needs(EMBEDDINGS)
class TestRealEmbeddings:
    options = Options(method="fct", metric="cosine", epochs=15, hyperparameters={"fct": {"hidden": 256}})

    def test_upgrading_to_the_better_model_is_advised(self) -> None:
        verdict = fit(real(20), self.options).assessment.verdict
        assert verdict.decision in ("upgrade", "fuse")
        assert verdict.searches["naive"]["map"] < verdict.searches["stay"]["map"] < verdict.searches["upgrade"]["map"]

    def test_going_back_to_the_worse_model_is_not(self) -> None:
        verdict = fit(real(20, swapped=True), self.options).assessment.verdict
        assert verdict.decision == "stay"
